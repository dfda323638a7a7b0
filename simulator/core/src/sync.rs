//! Small tools for waiting: a one-shot signal, locks that survive a panic, the monotonic clock.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// Locks `mutex`; a panic elsewhere is reported at its export and must not spread here.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As [`lock`], for shared reading.
pub fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// As [`lock`], for exclusive writing.
pub fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// CLOCK_MONOTONIC in nanoseconds: the same for all processes of the machine.
#[must_use]
pub fn now_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec for the call to fill.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Sleeps until the monotonic clock shows `deadline_ns`.
pub fn sleep_until(deadline_ns: u64) {
    loop {
        let now = now_ns();
        if now >= deadline_ns {
            return;
        }
        let left = deadline_ns - now;
        if left < 60_000 {
            // A timer would overshoot by about as much.
            while now_ns() < deadline_ns {
                std::hint::spin_loop();
            }
            return;
        }
        std::thread::sleep(Duration::from_nanos(left - 50_000));
    }
}

const UNSET: u32 = 0;
const AWAITED: u32 = 1;
const SET: u32 = 2;

/// Set once, waited for by any number of threads.
#[derive(Debug, Default)]
pub struct Signal(AtomicU32);

impl Signal {
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire) == SET
    }

    pub fn set(&self) {
        if self.0.swap(SET, Ordering::AcqRel) == AWAITED {
            futex(&self.0, libc::FUTEX_WAKE, i32::MAX as u32);
        }
    }

    pub fn wait(&self) {
        loop {
            match self
                .0
                .compare_exchange(UNSET, AWAITED, Ordering::AcqRel, Ordering::Acquire)
            {
                Err(SET) => return,
                _ => futex(&self.0, libc::FUTEX_WAIT, AWAITED),
            }
        }
    }
}

fn futex(word: &AtomicU32, operation: i32, value: u32) {
    // SAFETY: the word outlives the call; spurious and failed waits are handled by the caller's loop.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            operation | libc::FUTEX_PRIVATE_FLAG,
            value,
            std::ptr::null::<libc::timespec>(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_signal_wakes_all_who_wait() {
        let signal = Arc::new(Signal::default());
        let waiters: Vec<_> = (0..4)
            .map(|_| {
                let signal = Arc::clone(&signal);
                std::thread::spawn(move || signal.wait())
            })
            .collect();
        std::thread::sleep(Duration::from_millis(10));
        assert!(!signal.is_set());
        signal.set();
        for waiter in waiters {
            waiter.join().unwrap();
        }
        signal.wait();
    }
}
