//! The closer's side.

use super::lock::futex_wake;
use super::registry::{self, LATE_INSIDE};
use super::{CLOSED, FENCED, LINE, barrier, start};
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering, fence};
use core::time::Duration;
use std::time::Instant;

/// Somebody has closed the gate or is doing so.
static CLOSER: AtomicBool = AtomicBool::new(false);

/// A thread that did not leave in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// The kernel's id of the thread.
    pub tid: i32,
    /// Its name, empty if it could not be read.
    pub name: String,
}

/// Why the gate is not closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseError {
    /// These threads (and so many late ones, which have no record) were still inside at the deadline; the
    /// gate is open again.
    Busy {
        /// Who is inside.
        stuck: Vec<Stuck>,
        /// How many threads beyond their end are inside.
        late: u64,
    },
    /// Another closer has not opened it yet.
    AlreadyClosed,
    /// The kernel granted `membarrier` at start and refuses it now: without it, whether anybody is inside
    /// cannot be known. The gate is open, and stays so.
    NoBarrier,
}

impl fmt::Display for CloseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy { stuck, late } => {
                write!(
                    f,
                    "{} threads are still inside a CUDA call",
                    stuck.len() as u64 + late
                )?;
                for thread in stuck.iter().take(8) {
                    write!(f, ", {} ({})", thread.tid, thread.name)?;
                }
                Ok(())
            }
            Self::AlreadyClosed => f.write_str("the gate is closed already"),
            Self::NoBarrier => {
                f.write_str("the kernel refuses membarrier since this process started using it")
            }
        }
    }
}

impl std::error::Error for CloseError {}

/// Closes the gate and waits until nobody is inside, at most for `deadline`.
///
/// One closer at a time; call it from a thread that is outside, or exempt.
///
/// # Errors
/// See [`CloseError`]; the gate is open then, except for `AlreadyClosed`, where it is another closer's.
pub fn close(deadline: Duration) -> Result<(), CloseError> {
    close_with(deadline, barrier::everywhere)
}

/// [`close`] with its barrier left out: wrong on purpose, to see that the test of the barrier can fail.
///
/// # Errors
/// As [`close`].
#[cfg(feature = "testing")]
pub fn close_without_barrier(deadline: Duration) -> Result<(), CloseError> {
    close_with(deadline, || true)
}

/// As if the kernel had no `membarrier`.
#[cfg(feature = "testing")]
pub fn pretend_no_membarrier() {
    start();
    LINE.state.fetch_or(FENCED, Ordering::SeqCst);
}

fn close_with(deadline: Duration, barrier: impl FnOnce() -> bool) -> Result<(), CloseError> {
    start();
    if CLOSER.swap(true, Ordering::Acquire) {
        return Err(CloseError::AlreadyClosed);
    }
    let began = Instant::now();
    let before = LINE.state.fetch_or(CLOSED, Ordering::SeqCst);
    if before & FENCED != 0 {
        fence(Ordering::SeqCst);
    } else if !barrier() {
        open();
        return Err(CloseError::NoBarrier);
    }
    let mut tries = 0_u32;
    loop {
        if nobody_inside() {
            return Ok(());
        }
        if began.elapsed() >= deadline {
            let error = busy();
            open();
            return Err(error);
        }
        tries += 1;
        match tries {
            0..50 => core::hint::spin_loop(),
            // The caller that is awaited may need this very core.
            50..150 => std::thread::yield_now(),
            150..250 => std::thread::sleep(Duration::from_micros(20)),
            _ => std::thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// A thread that this has once seen outside stays outside: entering again, it finds the gate closed.
fn nobody_inside() -> bool {
    registry::all(|thread| thread.depth() == 0) && LATE_INSIDE.load(Ordering::SeqCst) == 0
}

fn busy() -> CloseError {
    // Ids first, names after the lock is free: reading them allocates.
    let mut tids = [0_i32; 64];
    let mut count = 0;
    registry::all(|thread| {
        if thread.depth() != 0 && count < tids.len() {
            tids[count] = thread.tid.load(Ordering::Relaxed);
            count += 1;
        }
        true
    });
    let stuck = tids[..count]
        .iter()
        .map(|&tid| {
            let name =
                std::fs::read_to_string(format!("/proc/self/task/{tid}/comm")).unwrap_or_default();
            Stuck {
                tid,
                name: name.trim_end().to_owned(),
            }
        })
        .collect();
    CloseError::Busy {
        stuck,
        late: LATE_INSIDE.load(Ordering::SeqCst),
    }
}

/// Opens the gate and wakes all who wait: the last thing to do after a swap. Does nothing if it is open.
pub fn open() {
    LINE.state.fetch_and(!CLOSED, Ordering::SeqCst);
    CLOSER.store(false, Ordering::Release);
    futex_wake(&LINE.state, i32::MAX);
}

/// Whether the gate is closed, or closing.
#[must_use]
pub fn is_closed() -> bool {
    LINE.state.load(Ordering::SeqCst) & CLOSED != 0
}

/// In a forked child: the closer is gone.
pub(super) fn reset() {
    CLOSER.store(false, Ordering::Release);
}
