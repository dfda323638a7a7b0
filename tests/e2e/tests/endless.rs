//! A kernel that does not end holds up who waits for it, and nobody else: no allocation waits for it for ever, and
//! no eviction waits for an allocation.

use std::time::{Duration, Instant};

use spillway_tests::{Client, MIB, Place};

/// Longer than any test waits, in milliseconds.
const ENDLESS: &str = "late 60000 1";
/// What is answered without waiting is answered within this, also on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);
/// What waits, and gives up.
const IN_TIME: Duration = Duration::from_secs(25);

fn probe(place: &Place, swap: &str, limit: &str) -> Client {
    let launch = place.client("driver-probe").workload("w").limit(limit);
    let launch = match swap {
        "never" => launch.var("SPILLWAY_SWAP", "never"),
        _ => launch.request("64MiB"),
    };
    let mut client = launch.start();
    assert_eq!(client.line(), "ready");
    client
}

fn free(client: &mut Client) -> u64 {
    let line = client.ask("info");
    let free = line.split_once(' ').and_then(|(free, _)| free.parse().ok());
    free.unwrap_or_else(|| panic!("info: {line}"))
}

/// Asks, and says how long the answer took.
fn timed(client: &mut Client, line: &str) -> (String, Duration) {
    let start = Instant::now();
    (client.ask(line), start.elapsed())
}

fn fine(client: &mut Client, line: &str) {
    let (answer, took) = timed(client, line);
    assert!(answer.starts_with("ok"), "{line}: {answer}");
    assert!(took < AT_ONCE, "{line}: {took:?}");
}

/// Out of memory, if not at once.
fn refused(client: &mut Client, bytes: u64) {
    let (answer, took) = timed(client, &format!("alloc {bytes}"));
    assert_eq!(answer, "error 2", "{bytes} bytes");
    assert!(took < IN_TIME, "{took:?}");
}

fn what_is_freed_behind_it(name: &str, swap: &str) {
    let place = Place::new(name).build();
    let _daemon = place.daemon(&[]);
    let mut client = probe(&place, swap, "256MiB");
    fine(&mut client, "ordered 67108864");
    fine(&mut client, ENDLESS);
    fine(&mut client, "let-go");
    // What does not need it is had at once; what does is refused in time.
    fine(&mut client, "alloc 16777216");
    let left = free(&mut client);
    refused(&mut client, left + 2 * MIB);
    client.kill();
}

#[test]
fn memory_that_is_freed_behind_it_is_not_waited_for_for_ever() {
    what_is_freed_behind_it("endless-own", "auto");
}

#[test]
fn nor_what_is_freed_to_a_pool_of_the_drivers() {
    what_is_freed_behind_it("endless-pool", "never");
}

/// The driver has it until the work before is done, so it stays charged; memory of work that ends is had again.
#[test]
fn plain_memory_that_is_freed_behind_it_stays_charged() {
    let place = Place::new("endless-plain").build();
    let daemon = place.daemon(&[]);
    let mut client = probe(&place, "never", "256MiB");
    for (work, again) in [("late 700 1", "ok"), (ENDLESS, "error 2")] {
        fine(&mut client, "alloc 134217728");
        fine(&mut client, work);
        fine(&mut client, "let-go");
        let (answer, took) = timed(&mut client, "alloc 134217728");
        assert!(answer.starts_with(again), "{work}: {answer}");
        assert!(took < IN_TIME, "{took:?}");
        if again == "ok" {
            fine(&mut client, "free all");
            let used = daemon.workload("w")["used_bytes"].as_u64();
            assert!(used.is_some_and(|used| used < 128 * MIB), "{used:?}");
        }
    }
    // Nobody is in its way meanwhile.
    fine(&mut client, "alloc 16777216");
    client.kill();
}

/// Stacks grow only when the context is idle. Until then they are left room for.
#[test]
fn stacks_that_cannot_grow_now_hold_up_nobody() {
    let place = Place::new("endless-stack").memory("2GiB").build();
    let daemon = place.daemon(&["--drain-deadline", "1s"]);
    // The stacks alone will take 3 KiB for each of 270,336 threads.
    let mut client = probe(&place, "auto", "1GiB");
    fine(&mut client, "stack");
    fine(&mut client, ENDLESS);
    let left = free(&mut client);
    fine(
        &mut client,
        &format!("alloc {}", left / 2 / (2 * MIB) * 2 * MIB),
    );
    let left = free(&mut client);
    client.send(&format!("alloc {}", left + 2 * MIB));
    std::thread::sleep(Duration::from_millis(300));
    // It waits for the kernel, and not inside the gate.
    let start = Instant::now();
    let answer = daemon.operate("w", "evict");
    assert_eq!(answer.status, 409, "{}", answer.body);
    assert!(start.elapsed() < IN_TIME, "{:?}", start.elapsed());
    let busy = daemon.events_of("w", "note");
    assert!(
        busy.iter()
            .any(|event| event.to_string().contains("work on the GPU")),
        "{busy:?}"
    );
    assert_eq!(client.line(), "error 2");
    let left = free(&mut client);
    fine(&mut client, &format!("alloc {left}"));
    client.kill();
}

/// What was freed in stream order, and has left, is had again: also while another thread gives it back.
#[test]
fn what_has_left_is_had_again() {
    let place = Place::new("endless-left").build();
    let _daemon = place.daemon(&[]);
    let mut client = probe(&place, "never", "256MiB");
    for round in 0..200 {
        let answer = client.ask("alloc 134217728");
        assert!(answer.starts_with("ok"), "round {round}: {answer}");
        fine(&mut client, "let-go");
        // The library looks by itself now and then.
        std::thread::sleep(Duration::from_millis(round % 60));
    }
}

/// Work that never stops, and ends piece by piece: what was submitted before is what counts.
#[test]
fn who_is_always_busy_is_waited_for_as_far_as_its_work_was() {
    let place = Place::new("endless-busy").build();
    let _daemon = place.daemon(&[]);
    let mut client = probe(&place, "never", "256MiB");
    fine(&mut client, "busy 2");
    for round in 0..5 {
        fine(&mut client, "ordered 134217728");
        fine(&mut client, "late 50 1");
        fine(&mut client, "let-go");
        let (answer, took) = timed(&mut client, "alloc 134217728");
        assert!(
            answer.starts_with("ok"),
            "round {round}: {answer}, {took:?}"
        );
        assert!(took < AT_ONCE, "{took:?}");
        fine(&mut client, "let-go");
    }
    client.kill();
}
