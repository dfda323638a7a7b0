//! A program that allocates as PyTorch does keeps within its limit and keeps its bytes: caching allocator,
//! expandable segments, stream-ordered pools that keep everything, graphs with pools of their own; while it is
//! evicted again and again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use serde_json::Value;
use spillway_tests::{Client, MIB, Place};

/// A command, on a machine that others use, too.
const ANSWER: Duration = Duration::from_secs(60);
const LIMIT: u64 = 320 * MIB;

fn ask(client: &mut Client, line: &str) -> Value {
    let answer = client.ask_within(line, ANSWER);
    let figures = answer.strip_prefix("ok ").unwrap_or_else(|| {
        panic!("{line}: {answer}; {}", client.stderr());
    });
    serde_json::from_str(figures).expect("figures are JSON")
}

fn number(figures: &Value, name: &str) -> u64 {
    figures[name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name}: {figures}"))
}

/// Physical bytes in use on the device, by NVML, asked by a program without Spillway.
fn physical(bare: &mut Client) -> u64 {
    let line = bare.ask("nvml");
    let first = line.split_whitespace().next().unwrap_or_default();
    first.parse().unwrap_or_else(|_| panic!("nvml: {line}"))
}

/// What the program does, whatever comes between: more than fits, graphs, everything checked.
fn work(client: &mut Client) -> Value {
    ask(client, "train 150");
    for _ in 0..2 {
        ask(client, "capture");
        ask(client, "train 60");
    }
    ask(client, "verify");
    let full = ask(client, "full");
    ask(client, "verify");
    ask(client, "empty");
    ask(client, "drop");
    ask(client, "capture");
    ask(client, "train 60");
    ask(client, "verify");
    ask(client, "drop");
    ask(client, "verify");
    full
}

fn habits(backend: &str) {
    let place = Place::new(&format!("torch-{backend}"))
        .time(Duration::from_secs(240))
        .build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut bare = place.client("driver-probe").bare().start();
    assert_eq!(bare.line(), "ready");
    let before = physical(&mut bare);
    let mut client = place
        .client("torch-habits")
        .args(&format!("--backend {backend}"))
        .workload("torch")
        .request("64MiB")
        .limit("320MiB")
        .start();
    assert_eq!(client.line_within(ANSWER), "ready");

    let (stop, most, evicted) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        // Undisturbed at first, then evicted all the time.
        let full = work(&mut client);
        let took = number(&full, "took");
        assert!(took <= LIMIT, "{took} bytes under a limit of {LIMIT}");
        assert!(
            took >= LIMIT / 2,
            "{took} bytes of {LIMIT}: what was cached came back: {full}"
        );
        assert!(
            number(&full, "refusals") > 0,
            "it asked for too much: {full}"
        );
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                most.fetch_max(physical(&mut bare) - before, SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                // Refused while it captures or works; then it is asked again.
                if daemon.operate("torch", "evict").status == 200 {
                    evicted.fetch_add(1, SeqCst);
                }
                std::thread::sleep(Duration::from_millis(15));
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let full = work(&mut client);
            let took = number(&full, "took");
            assert!(took <= LIMIT, "{took} bytes under a limit of {LIMIT}");
        }));
        stop.store(true, SeqCst);
        if let Err(why) = result {
            std::panic::resume_unwind(why);
        }
    });
    let (most, evicted) = (most.into_inner(), evicted.into_inner());
    assert!(
        most <= LIMIT,
        "{most} physical bytes under a limit of {LIMIT}"
    );
    assert!(most >= LIMIT / 2, "{most}: the limit was reached");
    assert!(evicted >= 3, "evicted {evicted} times");
    let last = ask(&mut client, "verify");
    assert!(number(&last, "checked") > 300, "{last}");
    // A pool of the driver's gives what is free in it to any size; segments have to go first.
    assert!(
        backend == "async" || number(&last, "retries") > 0,
        "gave back and asked again: {last}"
    );
    client.send("quit");
    assert_eq!(client.wait(ANSWER), Some(0), "{}", client.stderr());
}

#[test]
fn a_caching_allocator_keeps_its_limit_and_its_bytes() {
    habits("native");
}

#[test]
fn expandable_segments_keep_their_limit_and_their_bytes() {
    habits("expandable");
}

#[test]
fn pools_that_keep_everything_keep_the_limit_and_their_bytes() {
    habits("async");
}
