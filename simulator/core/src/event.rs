//! Events: a marker per record, so that recording again does not disturb who waits for the last.

use crate::code::{INVALID_HANDLE, NOT_READY, R};
use crate::sync::{Signal, lock};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// One record of an event.
#[derive(Default)]
pub struct Marker {
    signal: Signal,
    time_ns: AtomicU64,
}

impl Marker {
    pub fn set(&self, time_ns: u64) {
        self.time_ns.store(time_ns, Ordering::Release);
        self.signal.set();
    }

    #[must_use]
    pub fn is_set(&self) -> bool {
        self.signal.is_set()
    }

    pub fn wait(&self) {
        self.signal.wait();
    }
}

/// `CU_EVENT_DISABLE_TIMING`.
pub const DISABLE_TIMING: u32 = 2;

/// An event.
pub struct Event {
    pub id: u64,
    pub context: u64,
    pub flags: u32,
    state: Mutex<State>,
}

/// The last record, if any.
#[derive(Clone, Default)]
pub enum State {
    #[default]
    Never,
    Recorded(Arc<Marker>),
    /// Recorded in a capturing stream: capture id and the nodes that precede it.
    Captured(u64, Vec<usize>),
}

impl Event {
    #[must_use]
    pub fn new(id: u64, context: u64, flags: u32) -> Self {
        Self {
            id,
            context,
            flags,
            state: Mutex::default(),
        }
    }

    pub fn set_state(&self, state: State) {
        *lock(&self.state) = state;
    }

    #[must_use]
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// Milliseconds between two recorded events.
    ///
    /// # Errors
    /// `INVALID_HANDLE` if either was never recorded or keeps no time, `NOT_READY` if either is
    /// still to come.
    pub fn elapsed_ms(&self, end: &Self) -> R<f32> {
        if (self.flags | end.flags) & DISABLE_TIMING != 0 {
            return Err(INVALID_HANDLE);
        }
        let (State::Recorded(from), State::Recorded(to)) = (self.state(), end.state()) else {
            return Err(INVALID_HANDLE);
        };
        if !from.is_set() || !to.is_set() {
            return Err(NOT_READY);
        }
        let (from, to) = (
            from.time_ns.load(Ordering::Acquire),
            to.time_ns.load(Ordering::Acquire),
        );
        Ok((to as f64 - from as f64) as f32 / 1e6)
    }
}
