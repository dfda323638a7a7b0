//! The gate's protocol under loom: every interleaving of one or two callers, a closer, and the weak memory
//! orders of the language.
//!
//! loom has no `membarrier`; the model has the fence on both sides, as the gate itself has where the kernel
//! offers none. That `membarrier` stands in for the caller's fence is what `gate_stress` checks.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;

const CLOSED: u32 = 1;

struct Gate {
    state: AtomicU32,
    words: [AtomicU64; 2],
    /// Touched by callers inside, changed by the closer while closed: loom reports any overlap.
    memory: UnsafeCell<u32>,
}

impl Gate {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: AtomicU32::new(0),
            words: [AtomicU64::new(0), AtomicU64::new(0)],
            memory: UnsafeCell::new(0),
        })
    }

    /// One call of caller `own`; gives up after `tries` rounds, as loom has no futex.
    fn call(&self, own: usize, tries: usize, fenced: bool) {
        let word = &self.words[own];
        for _ in 0..tries {
            word.store(1, Ordering::Relaxed);
            if fenced {
                fence(Ordering::SeqCst);
            }
            if self.state.load(Ordering::Acquire) & CLOSED == 0 {
                // SAFETY: the protocol under test is what makes this sound; loom checks it.
                self.memory.with(|memory| unsafe { std::ptr::read(memory) });
                word.store(0, Ordering::Release);
                return;
            }
            word.store(0, Ordering::Release);
            thread::yield_now();
        }
    }

    fn close_change_open(&self, callers: usize) {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let quiet = self.words[..callers]
            .iter()
            .all(|word| word.load(Ordering::Acquire) == 0);
        if quiet {
            // SAFETY: as above.
            self.memory.with_mut(|memory| unsafe { *memory += 1 });
        }
        self.state.fetch_and(!CLOSED, Ordering::Release);
    }
}

fn explore(callers: usize, tries: usize, fenced: bool) {
    loom::model(move || {
        let gate = Gate::new();
        let threads: Vec<_> = (0..callers)
            .map(|own| {
                let gate = gate.clone();
                thread::spawn(move || gate.call(own, tries, fenced))
            })
            .collect();
        gate.close_change_open(callers);
        for thread in threads {
            thread.join().expect("no panic");
        }
    });
}

#[test]
fn one_caller_never_overlaps_the_closer() {
    explore(1, 2, true);
}

#[test]
fn two_callers_never_overlap_the_closer() {
    explore(2, 1, true);
}

/// The model can fail: without the barrier loom finds the overlap.
#[test]
#[should_panic(expected = "Causality violation")]
fn without_the_barrier_they_do() {
    explore(1, 2, false);
}
