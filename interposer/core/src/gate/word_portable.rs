//! The thread's word as a plain thread local: architectures without a hand-written sequence, and the
//! feature `portable-gate`, with which the tests run it on `x86_64` too.
//!
//! Slower (the compiler's own thread-local access, and the word is loaded and stored), with the same
//! protocol. A signal handler that calls the driver between load and store leaves the depth as it was,
//! because its own calls are balanced; only its count of calls is lost.

use super::registry::Thread;
use core::sync::atomic::{Ordering, compiler_fence};

std::thread_local! {
    static THREAD: Thread = const { Thread::new() };
}

/// Says that the gate has started; the word itself is found by its thread local.
pub(super) fn offset() -> isize {
    1
}

/// The calling thread's record.
pub(super) fn current() -> *const Thread {
    THREAD.with(core::ptr::from_ref)
}

/// Enters without looking: the caller must look at the word and the state next.
///
/// # Safety
/// The gate has started.
#[inline(always)]
pub unsafe fn arrive(_offset: isize) {
    THREAD.with(|thread| {
        let word = thread.word.load(Ordering::Relaxed);
        thread
            .word
            .store(word.wrapping_add_signed(super::ENTER), Ordering::Relaxed);
    });
    compiler_fence(Ordering::SeqCst);
}

/// Enters, and tells whether the word says *slow*.
///
/// # Safety
/// The gate has started.
#[doc(hidden)]
#[inline(always)]
pub unsafe fn arrive_slow() -> bool {
    // SAFETY: the caller's promise.
    unsafe { arrive(1) };
    THREAD.with(|thread| thread.word.load(Ordering::Relaxed) & super::SLOW != 0)
}

/// Leaves.
///
/// # Safety
/// This thread has entered and not left.
#[inline(always)]
pub unsafe fn depart(_offset: isize) {
    THREAD.with(|thread| {
        let word = thread.word.load(Ordering::Relaxed);
        thread.word.store(word.wrapping_sub(1), Ordering::Release);
    });
}

/// The body of an exported function that forwards to its slot through the gate.
#[doc(hidden)]
#[macro_export]
macro_rules! gated_body {
    ($how:ident $name:ident ($($argument:ident),*)) => {{
        let offset = $crate::gate::LINE.offset.load(core::sync::atomic::Ordering::Relaxed);
        if offset == 0 {
            // SAFETY: the same arguments.
            return unsafe { $crate::wrappers::unstarted::$name($($argument),*) };
        }
        // SAFETY: started.
        if unsafe { $crate::gate::word::arrive_slow() }
            || $crate::gate::LINE.state.load(core::sync::atomic::Ordering::Acquire) != 0
        {
            // SAFETY: the same arguments; `settle` in the slow function completes the entry.
            return unsafe { $crate::wrappers::slow::$name($($argument),*) };
        }
        // SAFETY: the slot has the function's own signature; the caller keeps the driver's rules.
        let status = unsafe { $crate::slot_of!($how $name).get()($($argument),*) };
        // SAFETY: entered above.
        unsafe { $crate::gate::word::depart(offset) };
        status
    }};
}
