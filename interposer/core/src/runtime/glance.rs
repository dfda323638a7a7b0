//! What allocating and freeing ask of the contexts each time, to be read without their lock.
//!
//! Written under the lock of [`super::Contexts`] only, and read at any time: an answer is one that the lock
//! would have given a moment ago.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// Contexts that are remembered with their devices: a process has few.
const SLOTS: usize = 8;

/// See the module.
#[derive(Debug, Default)]
pub struct Glance {
    capturing: AtomicBool,
    /// A context's handle and its device plus 1, in the low byte; 0: nothing.
    devices: [AtomicU64; SLOTS],
}

fn slot(context: u64) -> usize {
    // The upper bits of a product hold a mix of all below.
    usize::try_from(context.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61).unwrap_or(0)
}

impl Glance {
    /// Some capture is open.
    #[inline]
    #[must_use]
    pub fn capturing(&self) -> bool {
        self.capturing.load(SeqCst)
    }

    /// A context's device, if it was asked for lately.
    #[inline]
    #[must_use]
    pub fn device_of(&self, context: usize) -> Option<usize> {
        let context = context as u64;
        let word = self.devices[slot(context)].load(SeqCst);
        let device = usize::try_from(word & 0xff).unwrap_or(0);
        (word >> 8 == context && device > 0).then(|| device - 1)
    }

    pub(super) fn set_capturing(&self, capturing: bool) {
        self.capturing.store(capturing, SeqCst);
    }

    pub(super) fn note(&self, context: usize, device: usize) {
        let context = context as u64;
        // What does not fit into a word is asked for each time.
        if context >> 56 == 0 && device < 0xff {
            self.devices[slot(context)].store(context << 8 | (device as u64 + 1), SeqCst);
        }
    }

    pub(super) fn forget(&self, context: usize) {
        let context = context as u64;
        let word = &self.devices[slot(context)];
        if word.load(SeqCst) >> 8 == context {
            word.store(0, SeqCst);
        }
    }
}
