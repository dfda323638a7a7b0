//! Is the program using the GPU? Seen from the gate's count of calls and the state of its streams.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use crate::gate;
use crate::idle::any_busy;
use crate::lock;
use crate::runtime::{Runtime, monotonic_ns};
use crate::vmm;

/// Streams asked per look: bounds what a program with thousands of streams costs.
const STREAMS: usize = 256;

/// What was seen last.
pub struct Activity {
    calls: u64,
    active: Instant,
    in_flight: bool,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            calls: 0,
            active: Instant::now(),
            in_flight: false,
        }
    }
}

impl Activity {
    /// How long ago the program was last seen active.
    pub fn idle_for(&self) -> Duration {
        self.active.elapsed()
    }

    /// Counts as activity.
    pub fn touch(&mut self) {
        self.active = Instant::now();
    }

    /// Looks, and publishes. An evicted process is not asked about its streams: they are idle.
    pub fn sample(&mut self, runtime: &Runtime, resident: bool, capture: bool) {
        let calls = gate::calls();
        // Held-up callers count each try; only what passes while resident is activity.
        let moved = calls != self.calls && resident;
        self.calls = calls;
        if moved {
            self.in_flight = true;
        }
        // A capture is work in preparation. Asking streams could spoil it. A call that lasts
        // (allocating, loading a module, a copy that waits) is work, too, though no stream has any.
        if resident && self.in_flight && !moved && !capture {
            self.in_flight = gate::inside_threads() > 0 || !streams_idle(runtime);
        }
        let busy = resident && (self.in_flight || capture);
        if busy {
            self.active = Instant::now();
            runtime
                .observed
                .last_active_ns
                .store(monotonic_ns(), SeqCst);
        }
        runtime.observed.in_flight.store(u64::from(busy), SeqCst);
        runtime.observed.calls.store(calls, SeqCst);
    }
}

/// Every stream that can be asked without side effects has finished. The per-thread default streams
/// cannot be asked from here: what runs there alone may look idle between calls, which costs a drain
/// that waits, never a byte.
fn streams_idle(runtime: &Runtime) -> bool {
    let contexts: Vec<(usize, Vec<usize>)> = {
        let contexts = lock(&runtime.contexts);
        contexts
            .all()
            .into_iter()
            .map(|c| (c, contexts.streams_of(c)))
            .collect()
    };
    let busy = contexts.into_iter().any(|(context, streams)| {
        let asked = runtime.using(context, || {
            vmm::in_context(context, || Ok(any_busy(runtime, &streams, STREAMS)))
        });
        asked == Some(Ok(true))
    });
    !busy
}
