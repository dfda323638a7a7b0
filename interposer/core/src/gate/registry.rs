//! Which threads use the gate: a list through their own thread-local records, under one lock.
//!
//! Nothing is allocated under the lock, so a fork handler that waits for it never waits for an
//! allocator.

use super::lock::Lock;
use super::{CALLS, CALLS_SHIFT, DEPTH, ENTER, LATE, SLOW, stats, word};
use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicI32, AtomicI64, AtomicPtr, AtomicU64, Ordering};

/// A thread's record, 64 bytes of its thread-local storage.
#[repr(C, align(64))]
pub(super) struct Thread {
    /// Depth, count of calls, *late*, *slow*. Written by the thread alone.
    pub(super) word: AtomicU64,
    next: AtomicPtr<Thread>,
    previous: AtomicPtr<Thread>,
    pub(super) tid: AtomicI32,
}

impl Thread {
    #[cfg(not(all(target_arch = "x86_64", not(feature = "portable-gate"))))]
    pub(super) const fn new() -> Self {
        Self {
            word: AtomicU64::new(SLOW),
            next: AtomicPtr::new(null_mut()),
            previous: AtomicPtr::new(null_mut()),
            tid: AtomicI32::new(0),
        }
    }

    pub(super) fn depth(&self) -> u64 {
        self.word.load(Ordering::Acquire) & DEPTH
    }

    pub(super) fn calls(&self) -> u64 {
        (self.word.load(Ordering::Relaxed) >> CALLS_SHIFT) & CALLS
    }
}

const _: () = assert!(
    size_of::<Thread>() == 64,
    "a cache line of its own, as large as the symbol"
);

pub(super) static LOCK: Lock = Lock::new();
/// The first registered thread. Links are only touched under the lock.
static HEAD: AtomicPtr<Thread> = AtomicPtr::new(null_mut());
/// How many late threads are inside.
pub(super) static LATE_INSIDE: AtomicU64 = AtomicU64::new(0);
/// The key whose destructor is [`forget`]; -1 if there is none.
static KEY: AtomicI64 = AtomicI64::new(-1);

/// The calling thread's record.
pub(super) fn current<'a>() -> &'a Thread {
    // SAFETY: the thread's own record, which lives as long as the thread; all its fields are atomics.
    unsafe { &*word::current() }
}

pub(super) fn make_key() {
    let mut key = 0;
    // SAFETY: `forget` stays mapped: the library is linked with -z nodelete.
    if unsafe { libc::pthread_key_create(&raw mut key, Some(forget)) } == 0 {
        KEY.store(i64::from(key), Ordering::Release);
    }
}

/// Puts the calling thread into the registry and takes *slow* off its word. Where that cannot be undone
/// when the thread ends (no key left, no memory) it becomes late instead.
pub(super) fn register(thread: &'static Thread) {
    let pointer = core::ptr::from_ref(thread).cast_mut();
    // May allocate, so before the lock.
    let undone = match libc::pthread_key_t::try_from(KEY.load(Ordering::Acquire)) {
        // SAFETY: our own key.
        Ok(key) => unsafe { libc::pthread_setspecific(key, pointer.cast()) == 0 },
        Err(_) => false,
    };
    if !undone {
        thread.word.fetch_or(LATE, Ordering::SeqCst);
        return;
    }
    // SAFETY: no arguments.
    thread
        .tid
        .store(unsafe { libc::gettid() }, Ordering::Relaxed);
    let _held = LOCK.lock();
    let head = HEAD.load(Ordering::Relaxed);
    thread.previous.store(null_mut(), Ordering::Relaxed);
    thread.next.store(head, Ordering::Relaxed);
    // SAFETY: registered records are alive: each leaves the list before its thread ends.
    if let Some(head) = unsafe { head.as_ref() } {
        head.previous.store(pointer, Ordering::Relaxed);
    }
    HEAD.store(pointer, Ordering::Relaxed);
    thread.word.fetch_and(!SLOW, Ordering::Relaxed);
}

fn unlink(thread: &Thread) {
    let next = thread.next.load(Ordering::Relaxed);
    let previous = thread.previous.load(Ordering::Relaxed);
    // SAFETY: registered records are alive.
    if let Some(next) = unsafe { next.as_ref() } {
        next.previous.store(previous, Ordering::Relaxed);
    }
    // SAFETY: as above.
    match unsafe { previous.as_ref() } {
        Some(previous) => previous.next.store(next, Ordering::Relaxed),
        None => HEAD.store(next, Ordering::Relaxed),
    }
}

/// The key's destructor: the calling thread ends. Frames that it left inside (`pthread_exit` in a call)
/// are gone, and so is their depth. Calls that still come, from later destructors, are late.
unsafe extern "C" fn forget(thread: *mut c_void) {
    // SAFETY: what `register` stored: this thread's own record.
    let thread = unsafe { &*thread.cast::<Thread>() };
    let _held = LOCK.lock();
    unlink(thread);
    stats::DEPARTED_CALLS.fetch_add(thread.calls(), Ordering::Relaxed);
    thread.word.store(SLOW | LATE, Ordering::Release);
}

/// Calls `visit` with every registered thread, under the lock, until it returns false. Whether it never did.
pub(super) fn all(mut visit: impl FnMut(&Thread) -> bool) -> bool {
    let _held = LOCK.lock();
    let mut next = HEAD.load(Ordering::Relaxed);
    // SAFETY: registered records are alive while the lock is held.
    while let Some(thread) = unsafe { next.as_ref() } {
        if !visit(thread) {
            return false;
        }
        next = thread.next.load(Ordering::Relaxed);
    }
    true
}

/// How many threads are inside the gate now, late ones included; exempt ones are not.
#[must_use]
pub fn inside_threads() -> u64 {
    let mut inside = LATE_INSIDE.load(Ordering::SeqCst);
    all(|thread| {
        inside += u64::from(thread.depth() != 0);
        true
    });
    inside
}

/// Lets the calling thread pass always, closed or not, uncounted: for the pager's own thread. For the
/// rest of the thread's life.
pub fn exempt_current_thread() {
    super::start();
    let thread = current();
    let word = thread.word.load(Ordering::Relaxed);
    if word & SLOW == 0 {
        let _held = LOCK.lock();
        unlink(thread);
        stats::DEPARTED_CALLS.fetch_add(thread.calls(), Ordering::Relaxed);
        // No thread to forget when it ends.
        if let Ok(key) = libc::pthread_key_t::try_from(KEY.load(Ordering::Acquire)) {
            // SAFETY: our own key; clearing it allocates nothing.
            unsafe { libc::pthread_setspecific(key, core::ptr::null()) };
        }
    }
    // A depth that never ends: every call of this thread is nested. Not registered, so nobody waits.
    thread
        .word
        .store(ENTER.cast_unsigned() & DEPTH, Ordering::Relaxed);
}

/// In a forked child: only the calling thread is left. Call with the lock held.
pub(super) fn keep_only_current() {
    let thread = current();
    let word = thread.word.load(Ordering::Relaxed);
    let late_inside = u64::from(word & LATE != 0 && word & DEPTH != 0);
    LATE_INSIDE.store(late_inside, Ordering::SeqCst);
    let mut listed = false;
    let mut next = HEAD.load(Ordering::Relaxed);
    // SAFETY: the records are still mapped: the child has the parent's memory.
    while let Some(other) = unsafe { next.as_ref() } {
        listed |= core::ptr::eq(other, thread);
        next = other.next.load(Ordering::Relaxed);
    }
    HEAD.store(
        if listed {
            core::ptr::from_ref(thread).cast_mut()
        } else {
            null_mut()
        },
        Ordering::Relaxed,
    );
    if listed {
        thread.next.store(null_mut(), Ordering::Relaxed);
        thread.previous.store(null_mut(), Ordering::Relaxed);
        // SAFETY: no arguments.
        thread
            .tid
            .store(unsafe { libc::gettid() }, Ordering::Relaxed);
    }
}
