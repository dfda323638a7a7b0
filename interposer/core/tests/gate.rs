//! The gate's promises, on the real one: one process, one gate, so one test after another.

use spillway_interposer_core::gate::{self, CloseError};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
const SOON: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(20);

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits until `condition`, or fails.
fn until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < LONG, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_caller_inside_holds_up_the_close_and_is_named() {
    let _alone = alone();
    let (entered, wait) = mpsc::channel();
    let (leave, told) = mpsc::channel::<()>();
    let inside = thread::Builder::new()
        .name("stuck-in-launch".into())
        .spawn(move || {
            let _inside = gate::enter();
            entered.send(()).expect("the test waits");
            told.recv().expect("the test tells");
        })
        .expect("a thread");
    wait.recv().expect("entered");
    assert_eq!(gate::inside_threads(), 1);
    let CloseError::Busy { stuck, late } = gate::close(SOON).expect_err("somebody is inside")
    else {
        panic!()
    };
    assert_eq!((stuck.len(), late), (1, 0));
    assert_eq!(stuck[0].name, "stuck-in-launch");
    assert!(stuck[0].tid > 0);
    assert!(!gate::is_closed(), "open again after the deadline");
    leave.send(()).expect("it listens");
    inside.join().expect("no panic");
    gate::close(LONG).expect("nobody inside");
    assert_eq!(gate::close(SOON), Err(CloseError::AlreadyClosed));
    gate::open();
    assert!(!gate::is_closed());
}

#[test]
fn callers_wait_outside_until_it_opens() {
    static WOKEN: AtomicU32 = AtomicU32::new(0);
    let _alone = alone();
    gate::set_on_wait(|| {
        WOKEN.fetch_add(1, Ordering::SeqCst);
    });
    let before = gate::blocked();
    gate::close(LONG).expect("nobody inside");
    let passed = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let _inside = gate::enter();
                passed.fetch_add(1, Ordering::SeqCst);
            });
        }
        until("three wait", || {
            gate::blocked().waiting == before.waiting + 3
        });
        thread::sleep(SOON);
        assert_eq!(passed.load(Ordering::SeqCst), 0);
        assert_eq!(gate::inside_threads(), 0);
        assert_eq!(WOKEN.load(Ordering::SeqCst), 3, "once per caller");
        gate::open();
    });
    assert_eq!(passed.load(Ordering::SeqCst), 3);
    let after = gate::blocked();
    assert_eq!(
        (after.waiting, after.waits - before.waits),
        (before.waiting, 3)
    );
    assert!(after.waited - before.waited >= 3 * SOON);
}

#[test]
fn nested_and_exempt_callers_never_wait() {
    let _alone = alone();
    let (entered, wait) = mpsc::channel();
    let (leave, told) = mpsc::channel::<()>();
    let outer = thread::spawn(move || {
        let _outer = gate::enter();
        entered.send(()).expect("the test waits");
        told.recv().expect("the test tells");
        let inner = gate::enter();
        assert!(inner.is_nested());
    });
    wait.recv().expect("entered");
    let closer = thread::spawn(|| gate::close(LONG));
    until("closing", gate::is_closed);
    leave.send(()).expect("it listens");
    outer.join().expect("the nested call passed a closed gate");
    closer
        .join()
        .expect("no panic")
        .expect("closed once the outer call left");
    thread::spawn(|| {
        gate::exempt_current_thread();
        for _ in 0..3 {
            let inside = gate::enter();
            assert!(inside.is_nested());
        }
        assert_eq!(
            gate::inside_threads(),
            0,
            "nobody waits for an exempt thread"
        );
    })
    .join()
    .expect("no panic");
    gate::open();
    // A thread that is registered already may become exempt too.
    let (exempt, wait) = mpsc::channel();
    let (leave, told) = mpsc::channel::<()>();
    let late = thread::spawn(move || {
        drop(gate::enter());
        gate::exempt_current_thread();
        exempt.send(()).expect("the test waits");
        told.recv().expect("the test tells");
        drop(gate::enter());
    });
    wait.recv().expect("exempt");
    gate::close(LONG).expect("nobody inside");
    leave.send(()).expect("it listens");
    late.join().expect("passed");
    gate::open();
}

#[test]
fn a_hook_can_step_out_and_come_back() {
    let _alone = alone();
    let mut inside = gate::enter();
    let closed = inside.step_out(|| {
        assert_eq!(gate::inside_threads(), 0);
        let closed = gate::close(LONG);
        gate::open();
        closed
    });
    assert_eq!(closed, Ok(()));
    assert_eq!(gate::inside_threads(), 1);
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        inside.step_out(|| panic!("expected by this test"));
    }));
    assert!(unwound.is_err());
    assert_eq!(gate::inside_threads(), 1, "back inside after unwinding too");
    drop(inside);
    assert_eq!(gate::inside_threads(), 0);
}

#[test]
fn calls_are_counted_over_ended_threads() {
    let _alone = alone();
    let before = gate::calls();
    for _ in 0..4 {
        thread::spawn(|| (0..100).for_each(|_| drop(gate::enter())))
            .join()
            .expect("no panic");
    }
    assert_eq!(gate::calls() - before, 400);
}

#[test]
fn threads_come_and_go_while_it_closes_and_opens() {
    static RUNNING: AtomicBool = AtomicBool::new(true);
    static EVICTED: AtomicBool = AtomicBool::new(false);
    static WRONG: AtomicU64 = AtomicU64::new(0);
    let _alone = alone();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while RUNNING.load(Ordering::Relaxed) {
                    thread::scope(|short| {
                        for _ in 0..3 {
                            short.spawn(|| {
                                for _ in 0..50 {
                                    let _inside = gate::enter();
                                    WRONG.fetch_add(
                                        u64::from(EVICTED.load(Ordering::Relaxed)),
                                        Ordering::Relaxed,
                                    );
                                }
                            });
                        }
                    });
                }
            });
        }
        let began = Instant::now();
        let mut closes = 0;
        while began.elapsed() < Duration::from_secs(1) {
            if gate::close(LONG).is_ok() {
                EVICTED.store(true, Ordering::Relaxed);
                thread::yield_now();
                EVICTED.store(false, Ordering::Relaxed);
                gate::open();
                closes += 1;
            }
        }
        RUNNING.store(false, Ordering::Relaxed);
        assert!(closes > 10, "{closes}");
    });
    assert_eq!(WRONG.load(Ordering::Relaxed), 0);
}

#[test]
fn a_forked_child_starts_with_an_open_gate_and_one_thread() {
    static RESET: AtomicU32 = AtomicU32::new(0);
    let _alone = alone();
    gate::set_on_fork_child(|| {
        RESET.fetch_add(1, Ordering::SeqCst);
    });
    drop(gate::enter());
    let (entered, wait) = mpsc::channel();
    let (leave, told) = mpsc::channel::<()>();
    let other = thread::spawn(move || {
        let _inside = gate::enter();
        entered.send(()).expect("the test waits");
        told.recv().expect("the test tells");
    });
    wait.recv().expect("entered");
    let closer = thread::spawn(|| gate::close(LONG));
    until("closing", gate::is_closed);
    // SAFETY: the child calls nothing but the gate (which allocates nothing here) and _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut wrong = i32::from(gate::is_closed());
        wrong |= i32::from(gate::inside_threads() != 0) << 1;
        drop(gate::enter());
        wrong |= i32::from(RESET.load(Ordering::SeqCst) != 1) << 2;
        wrong |= i32::from(gate::close(SOON).is_err()) << 3;
        gate::open();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(wrong) };
    }
    let mut status = -1;
    // SAFETY: our own child, and a valid result.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(
        status, 0,
        "wait status; the exit code's bits say what was wrong"
    );
    assert_eq!(RESET.load(Ordering::SeqCst), 0, "only in the child");
    assert!(gate::is_closed(), "the parent's gate is as it was");
    leave.send(()).expect("it listens");
    other.join().expect("no panic");
    closer.join().expect("no panic").expect("closed");
    gate::open();
}
