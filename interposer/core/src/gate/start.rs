//! One-time start of the gate, at the first call that needs it; never from a constructor.

use super::lock::{futex_wait, futex_wake};
use super::{FENCED, LINE, barrier, fork, registry, word};
use core::sync::atomic::{AtomicU32, Ordering};

/// The process id of who is starting the gate, 0 if nobody is. A child that was forked while another
/// thread of its parent was starting finds a foreign id here, and starts anew.
static STARTING: AtomicU32 = AtomicU32::new(0);

/// Starts the gate if that has not happened: registers for `membarrier`, makes the key whose destructor
/// takes ending threads out of the registry, installs the fork handlers. Cheap afterwards.
#[cold]
pub fn start() {
    let own = std::process::id();
    while LINE.offset.load(Ordering::Acquire) == 0 {
        let holder = STARTING.load(Ordering::Relaxed);
        if holder == own {
            futex_wait(&STARTING, holder);
        } else if STARTING
            .compare_exchange(holder, own, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
        {
            if LINE.offset.load(Ordering::Acquire) == 0 {
                registry::make_key();
                fork::install();
                if !barrier::register() {
                    LINE.state.fetch_or(FENCED, Ordering::SeqCst);
                }
                LINE.offset.store(word::offset(), Ordering::Release);
            }
            STARTING.store(0, Ordering::Release);
            futex_wake(&STARTING, i32::MAX);
            return;
        }
    }
}
