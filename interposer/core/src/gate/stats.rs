//! What the gate counts.

use super::registry;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

pub(super) static DEPARTED_CALLS: AtomicU64 = AtomicU64::new(0);
static WAITING: AtomicU64 = AtomicU64::new(0);
static WAITS: AtomicU64 = AtomicU64::new(0);
static WAITED_NS: AtomicU64 = AtomicU64::new(0);

/// Callers that found the gate closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// How many wait now.
    pub waiting: u64,
    /// How many have waited and gone on.
    pub waits: u64,
    /// How long those waited, summed over them.
    pub waited: Duration,
}

/// How many callers the gate has held up, and for how long.
#[must_use]
pub fn blocked() -> Blocked {
    Blocked {
        waiting: WAITING.load(Ordering::Relaxed),
        waits: WAITS.load(Ordering::Relaxed),
        waited: Duration::from_nanos(WAITED_NS.load(Ordering::Relaxed)),
    }
}

/// How many calls have passed the gate, over all threads, ended ones too: a figure that stands still
/// means that nothing is submitted. A call that is held up counts again each time it tries.
#[must_use]
pub fn calls() -> u64 {
    let mut calls = 0;
    registry::all(|thread| {
        calls += thread.calls();
        true
    });
    calls + DEPARTED_CALLS.load(Ordering::Relaxed)
}

pub(super) fn wait_begins() {
    WAITING.fetch_add(1, Ordering::SeqCst);
}

pub(super) fn wait_ends(waited: Duration) {
    WAITING.fetch_sub(1, Ordering::SeqCst);
    WAITS.fetch_add(1, Ordering::Relaxed);
    WAITED_NS.fetch_add(
        u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX),
        Ordering::Relaxed,
    );
}

/// In a forked child: those who waited are gone.
pub(super) fn reset_waiting() {
    WAITING.store(0, Ordering::SeqCst);
}
