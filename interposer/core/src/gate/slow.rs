//! What a call does that finds anything unusual: a thread not registered, a closed gate, no membarrier.

use super::lock::futex_wait;
use super::registry::{LATE_INSIDE, Thread};
use super::{CLOSED, DEPTH, LATE, LINE, SLOW, registry, start, stats, word};
use core::marker::PhantomData;
use core::sync::atomic::{AtomicPtr, Ordering, fence};
use std::time::Instant;

/// How a settled entry has to be left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[must_use]
pub struct Pass {
    /// The shared counter of late threads counts this one too.
    late: bool,
}

/// What a caller does once before it sleeps, a `fn()` or null.
static ON_WAIT: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Calls `wake` in every caller that finds the gate closed, once, outside the gate, before it sleeps: to
/// tell the coordinator that this process wants to run. It must not call hooked functions.
pub fn set_on_wait(wake: fn()) {
    ON_WAIT.store(wake as *mut (), Ordering::Release);
}

/// Completes an entry whose `arrive` has been done: on return the thread is inside. Waits while the gate
/// is closed. To be undone by [`leave_settled`].
///
/// "C" so that it cannot unwind: the exports' slow parts, which stay on the stack while the driver runs,
/// then need no landing pads, and a `pthread_exit` or a cancellation inside the driver passes them
/// whatever unwinder this library was linked with.
#[cold]
#[inline(never)]
pub extern "C" fn settle() -> Pass {
    let thread = registry::current();
    loop {
        if thread.word.load(Ordering::Relaxed) & (SLOW | LATE) == SLOW {
            registry::register(thread);
        }
        let word = thread.word.load(Ordering::Relaxed);
        // Inside already, one frame up: waiting here would hold up the one who waits for that frame.
        if word & DEPTH > 1 {
            return Pass { late: false };
        }
        let late = word & LATE != 0;
        if late {
            LATE_INSIDE.fetch_add(1, Ordering::SeqCst);
        }
        // With membarrier the closer's barrier is enough; this one is for when there is none.
        fence(Ordering::SeqCst);
        if LINE.state.load(Ordering::SeqCst) & CLOSED == 0 {
            return Pass { late };
        }
        leave(Pass { late });
        wait_open();
        // SAFETY: started, or nobody would be here.
        unsafe { word::arrive(LINE.offset.load(Ordering::Relaxed)) };
    }
}

/// The first call of all: starts the gate and begins an entry, to be completed by [`settle`].
#[cold]
#[inline(never)]
pub extern "C" fn start_and_arrive() {
    start();
    // SAFETY: started.
    unsafe { word::arrive(LINE.offset.load(Ordering::Relaxed)) };
}

/// Leaves what [`settle`] entered.
#[inline]
pub extern "C" fn leave_settled(pass: Pass) {
    leave(pass);
}

fn leave(pass: Pass) {
    // SAFETY: this thread has entered; the offset is set since.
    unsafe { word::depart(LINE.offset.load(Ordering::Relaxed)) };
    if pass.late {
        LATE_INSIDE.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Sleeps until the gate is open. The thread is outside.
fn wait_open() {
    let began = Instant::now();
    stats::wait_begins();
    let wake = ON_WAIT.load(Ordering::Acquire);
    if !wake.is_null() {
        // SAFETY: stored from a fn() above.
        let wake = unsafe { core::mem::transmute::<*mut (), fn()>(wake) };
        if std::panic::catch_unwind(wake).is_err() {
            crate::entry::detach();
        }
    }
    loop {
        let state = LINE.state.load(Ordering::SeqCst);
        if state & CLOSED == 0 {
            break;
        }
        futex_wait(&LINE.state, state);
    }
    stats::wait_ends(began.elapsed());
}

/// The calling thread is inside the gate as long as this lives.
#[must_use]
pub struct Inside {
    pass: Pass,
    /// Belongs to the thread that entered.
    here: PhantomData<*mut ()>,
}

/// Enters the gate, waiting while it is closed (unless the thread is inside already). For hand-written
/// hooks: hold it over the part that takes or touches device memory, and never while waiting for the
/// coordinator.
#[inline]
pub fn enter() -> Inside {
    let mut offset = LINE.offset.load(Ordering::Relaxed);
    if offset == 0 {
        start();
        offset = LINE.offset.load(Ordering::Relaxed);
    }
    // SAFETY: started.
    unsafe { word::arrive(offset) };
    let thread: &Thread = registry::current();
    let slow = thread.word.load(Ordering::Relaxed) & SLOW != 0;
    let pass = if slow || LINE.state.load(Ordering::Acquire) != 0 {
        settle()
    } else {
        Pass { late: false }
    };
    Inside {
        pass,
        here: PhantomData,
    }
}

impl Inside {
    /// Steps out, runs `wait` outside the gate, and enters again: for a hook that has to wait for
    /// somebody whose progress may need the gate closed. What was true inside may no longer be.
    ///
    /// Nested (see [`Inside::is_nested`]) this does not really step out: the outer frame is still inside.
    pub fn step_out<T>(&mut self, wait: impl FnOnce() -> T) -> T {
        /// Enters again even if `wait` unwinds, so that the guard's drop stays balanced.
        struct Reenter<'a>(&'a mut Inside);
        impl Drop for Reenter<'_> {
            fn drop(&mut self) {
                let again = enter();
                self.0.pass = again.pass;
                core::mem::forget(again);
            }
        }
        leave(self.pass);
        let _reenter = Reenter(self);
        wait()
    }

    /// Whether an outer frame of this thread is inside too (or the thread is exempt).
    #[must_use]
    pub fn is_nested(&self) -> bool {
        registry::current().depth() > 1
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        leave(self.pass);
    }
}
