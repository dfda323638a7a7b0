//! fork: the child has one thread, an open gate, and starts anew.

use super::{CLOSED, LINE, close, registry, stats};
use core::sync::atomic::{AtomicPtr, Ordering};

/// What else to reset in a child, a `fn()` or null.
static ON_CHILD: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Calls `reset` in every forked child, after the gate's own reset, in the one thread that the child has.
/// It must neither allocate nor take a lock that another thread of the parent may have held.
pub fn set_on_fork_child(reset: fn()) {
    ON_CHILD.store(reset as *mut (), Ordering::Release);
}

unsafe extern "C" fn prepare() {
    registry::LOCK.acquire();
}

unsafe extern "C" fn parent() {
    registry::LOCK.release();
}

unsafe extern "C" fn child() {
    registry::keep_only_current();
    LINE.state.fetch_and(!CLOSED, Ordering::SeqCst);
    close::reset();
    stats::reset_waiting();
    registry::LOCK.reset();
    let reset = ON_CHILD.load(Ordering::Acquire);
    if !reset.is_null() {
        // SAFETY: stored from a fn() above.
        unsafe { core::mem::transmute::<*mut (), fn()>(reset)() };
    }
}

pub(super) fn install() {
    // SAFETY: three functions of this library, which is never unloaded.
    unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
}
