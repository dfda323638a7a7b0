//! Everything that `libspillway.so` does; the cdylib beside this crate only emits the exports.
//!
//! Layers, lower never includes higher: [`table`] (what exists), [`driver`] (the real functions),
//! [`gate`] (who may submit), [`trace`] (the record of calls, where one is wanted), [`entry`] (the way in); above them heap, pager, session, runtime, and
//! [`hooks`], which the exports call.

#[macro_use]
pub mod table;
mod deferred;
mod descriptor;
pub mod driver;
pub mod entry;
pub mod gate;
mod graphs;
mod handles;
mod heap;
pub mod hooks;
mod idle;
mod memory;
mod meter;
mod overhead;
mod pager;
mod pools;
mod quota;
mod runtime;
mod say;
mod session;
mod shares;
mod standing;
mod stores;
pub mod trace;
mod vmm;
pub mod wrappers;

/// Subtracts from a figure that is reported; a slip in the books must not wrap around.
fn take_off(figure: &std::sync::atomic::AtomicU64, bytes: u64) {
    use std::sync::atomic::Ordering::SeqCst;
    let _ = figure.fetch_update(SeqCst, SeqCst, |now| Some(now.saturating_sub(bytes)));
}

/// Locks one of our own mutexes. A panic while it was held has been caught and has detached the
/// library; what it guards is plain bookkeeping, so going on is better than a second panic.
#[inline]
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    use std::sync::TryLockError;
    match mutex.try_lock() {
        Ok(guard) => guard,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => lock_held(mutex),
    }
}

/// All of ours are held for some dozens of nanoseconds, and never over a call of the driver: to sleep takes
/// longer than to wait, and who sleeps makes the others sleep, too.
#[cold]
fn lock_held<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    use std::sync::TryLockError;
    for _ in 0..100 {
        for _ in 0..10 {
            std::hint::spin_loop();
        }
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {}
        }
    }
    // Its holder does not run.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
