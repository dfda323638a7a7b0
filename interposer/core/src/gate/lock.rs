//! A futex lock that a forked child can unlock: std's belongs to the thread that took it.

use core::sync::atomic::{AtomicU32, Ordering};

/// 0 free, 1 taken, 2 taken with waiters.
pub(crate) struct Lock(AtomicU32);

/// The lock is held as long as this lives.
pub(crate) struct Held<'a>(&'a Lock);

impl Lock {
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Takes the lock, sleeping while another thread has it.
    pub(crate) fn lock(&self) -> Held<'_> {
        self.acquire();
        Held(self)
    }

    /// As [`Lock::lock`], without a guard: the fork handlers lock and unlock in different functions.
    pub(super) fn acquire(&self) {
        if self
            .0
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
        {
            return;
        }
        while self.0.swap(2, Ordering::Acquire) != 0 {
            futex_wait(&self.0, 2);
        }
    }

    /// Gives the lock back. Only who holds it may; the child of a fork holds what its parent's thread held.
    pub(super) fn release(&self) {
        if self.0.swap(0, Ordering::Release) == 2 {
            futex_wake(&self.0, 1);
        }
    }

    /// Forgets holder and waiters: in a child, where they do not exist.
    pub(super) fn reset(&self) {
        self.0.store(0, Ordering::Release);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// Sleeps while `word` is `value`; returns early at will. Leaves `errno` alone.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32) {
    let errno = Errno::save();
    // SAFETY: a live aligned word; no timeout.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            value,
            core::ptr::null::<libc::timespec>(),
        )
    };
    errno.restore();
}

/// Wakes up to `count` sleepers of `word`. Leaves `errno` alone.
pub(crate) fn futex_wake(word: &AtomicU32, count: i32) {
    let errno = Errno::save();
    // SAFETY: a live aligned word.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            count,
        )
    };
    errno.restore();
}

/// The caller's `errno`, kept across our own system calls.
pub(crate) struct Errno(i32);

impl Errno {
    pub(crate) fn save() -> Self {
        // SAFETY: the calling thread's own errno.
        Self(unsafe { *libc::__errno_location() })
    }

    pub(crate) fn restore(self) {
        // SAFETY: the calling thread's own errno.
        unsafe { *libc::__errno_location() = self.0 };
    }
}
