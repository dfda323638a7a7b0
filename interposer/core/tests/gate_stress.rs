//! The barrier under stress: threads call through the very code that the exports consist of, one closes
//! and opens, and no call may run while it is closed. Run again without the barrier, the same test must
//! find calls that did: otherwise it would prove nothing.

use core::ffi::c_void;
use spillway_interposer_core::driver::{Status, slots};
use spillway_interposer_core::{gate, gated_body};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static RUNNING: AtomicBool = AtomicBool::new(false);
static EVICTED: AtomicBool = AtomicBool::new(false);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Lines that all threads write: a store to one of them waits for the others' caches, and the stores
/// behind it (on x86 among them the entry into the gate) wait with it. This is what a missing barrier
/// needs to show.
#[repr(align(64))]
struct Contended(AtomicU64);
static CONTENDED: [Contended; 16] = [const { Contended(AtomicU64::new(0)) }; 16];

fn fill_the_store_buffer(value: u64) {
    for line in &CONTENDED {
        line.0.store(value, Ordering::Relaxed);
    }
}

/// Stands in for the driver: looks, for a while, whether the memory is there.
unsafe extern "C" fn real(_to: u64, _from: *const c_void, _size: usize) -> Status {
    for _ in 0..100 {
        // Relaxed: a plain load, as a driver would do; the gate alone must order it.
        if EVICTED.load(Ordering::Relaxed) {
            WRONG.fetch_add(1, Ordering::Relaxed);
            break;
        }
    }
    Status::SUCCESS
}

/// The export, as the cdylib expands it.
#[inline(never)]
unsafe extern "C" fn export(to: u64, from: *const c_void, size: usize) -> Status {
    gated_body!(gated cuMemcpyHtoD_v2 (to, from, size))
}

struct Run {
    calls: u64,
    closes: u64,
    wrong: u64,
}

fn run(
    time: Duration,
    stop_at_first: bool,
    close: fn(Duration) -> Result<(), gate::CloseError>,
) -> Run {
    slots::cuMemcpyHtoD_v2.stand_in(real);
    WRONG.store(0, Ordering::SeqCst);
    RUNNING.store(true, Ordering::SeqCst);
    let before = gate::calls();
    let mut closes = 0;
    let callers = thread::available_parallelism()
        .map_or(2, usize::from)
        .clamp(2, 4);
    thread::scope(|scope| {
        for _ in 0..callers {
            scope.spawn(|| {
                while RUNNING.load(Ordering::Relaxed) {
                    for round in 0..64 {
                        fill_the_store_buffer(round);
                        // SAFETY: the stand-in takes anything.
                        let status = unsafe { export(1, core::ptr::null(), 1) };
                        assert!(status.is_success());
                    }
                }
            });
        }
        let began = Instant::now();
        while began.elapsed() < time && !(stop_at_first && WRONG.load(Ordering::Relaxed) > 0) {
            if close(Duration::from_secs(5)).is_ok() {
                EVICTED.store(true, Ordering::Relaxed);
                for round in 0..20 {
                    fill_the_store_buffer(round);
                    core::hint::spin_loop();
                }
                EVICTED.store(false, Ordering::Relaxed);
                closes += 1;
                gate::open();
            }
        }
        RUNNING.store(false, Ordering::SeqCst);
    });
    Run {
        calls: gate::calls() - before,
        closes,
        wrong: WRONG.load(Ordering::SeqCst),
    }
}

#[test]
fn no_call_runs_while_closed() {
    let _alone = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let with = run(Duration::from_secs(2), false, gate::close);
    println!(
        "with the barrier: {} calls, {} closes, {} wrong",
        with.calls, with.closes, with.wrong
    );
    assert_eq!(with.wrong, 0);
    assert!(with.closes > 1000 && with.calls > 100_000);

    if thread::available_parallelism().map_or(1, usize::from) < 2 {
        println!("skipped: without the barrier: one processor orders everything by itself");
    } else {
        let without = run(Duration::from_secs(60), true, gate::close_without_barrier);
        println!(
            "without: {} calls, {} closes, {} wrong",
            without.calls, without.closes, without.wrong
        );
        // Seen within seconds where two processors are free; on a machine that is busy with other
        // things the two threads may hardly ever run at the same time.
        if without.wrong == 0 {
            println!(
                "skipped: without the barrier: no overlap seen in a minute; is the machine busy?"
            );
        }
    }

    // Last, as it lasts: every call fences, and no barrier is needed.
    gate::pretend_no_membarrier();
    let fenced = run(Duration::from_secs(2), false, gate::close_without_barrier);
    println!(
        "fenced: {} calls, {} closes, {} wrong",
        fenced.calls, fenced.closes, fenced.wrong
    );
    assert_eq!(fenced.wrong, 0);
    assert!(fenced.closes > 500 && fenced.calls > 50_000);
}
