//! Limits are exact: what is free can be had, one granule more cannot, whoever asks at the same time.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use spillway_tests::{Client, Daemon, MIB, Place, until};

const GRANULE: u64 = 2 * MIB;

/// The program that makes driver calls by hand, under Spillway, ready.
fn probe(place: &Place, name: &str, request: &str, limit: &str) -> Client {
    let launch = place
        .client("driver-probe")
        .workload(name)
        .request(request)
        .limit(limit);
    ready(launch.start())
}

fn ready(mut client: Client) -> Client {
    assert_eq!(client.line(), "ready");
    client
}

/// A program without Spillway.
fn bare(place: &Place) -> Client {
    ready(place.client("driver-probe").bare().start())
}

/// `cuMemGetInfo`: free and total.
fn info(client: &mut Client) -> (u64, u64) {
    let line = client.ask("info");
    let (free, total) = line
        .split_once(' ')
        .unwrap_or_else(|| panic!("info: {line}"));
    (free.parse().expect("free"), total.parse().expect("total"))
}

fn alloc(client: &mut Client, bytes: u64) {
    let line = client.ask(&format!("alloc {bytes}"));
    assert!(
        line.starts_with("ok "),
        "{bytes} bytes with {:?} free: {line}",
        info(client)
    );
}

fn refused(client: &mut Client, bytes: u64) {
    let line = client.ask(&format!("alloc {bytes}"));
    assert_eq!(
        line,
        "error 2",
        "{bytes} bytes with {:?} free",
        info(client)
    );
}

/// All that is said to be free can be had, in one piece; one granule more cannot, and nothing can be
/// had after it, but what still fits into a slab.
fn takes_all_but_no_more(client: &mut Client) {
    let (free, total) = info(client);
    assert!(
        free <= total && free.is_multiple_of(GRANULE),
        "{free} of {total}"
    );
    refused(client, free + GRANULE);
    refused(client, free + 1);
    alloc(client, free);
    assert_eq!(info(client), (0, total));
    refused(client, GRANULE);
    refused(client, MIB);
    assert_eq!(client.ask("free last"), "ok 1");
    assert_eq!(info(client), (free, total));
}

/// What the workload uses on a device, with overhead, as the coordinator says.
fn used(daemon: &Daemon<'_>, name: &str, device: usize) -> u64 {
    daemon.workload(name)["devices"][device]["used_bytes"]
        .as_u64()
        .expect("used_bytes")
}

/// Physical bytes in use on the device, by NVML, asked by a program that has no limit.
fn physical(bare: &mut Client) -> u64 {
    let line = bare.ask("nvml");
    line.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("nvml: {line}"))
}

#[test]
fn exactly_what_is_free_can_be_had() {
    let place = Place::new("quota-exact").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut neighbour = probe(&place, "neighbour", "256MiB", "256MiB");
    alloc(&mut neighbour, 100 * MIB);
    assert_eq!(neighbour.ask("fill 7"), "ok");
    let before = (
        info(&mut neighbour),
        daemon.workload("neighbour")["swaps_out"].clone(),
    );

    let mut one = probe(&place, "one", "400MiB", "400MiB");
    let (free, total) = info(&mut one);
    assert_eq!(total, 400 * MIB);
    assert_eq!(
        one.ask("total"),
        total.to_string(),
        "cuDeviceTotalMem agrees"
    );
    assert_eq!(
        one.ask("nvml"),
        format!("{} {free} {total}", total - free),
        "NVML agrees"
    );
    assert!(free < total, "the context is charged");
    takes_all_but_no_more(&mut one);

    // A hundred allocations, every second one freed again.
    for number in 0..100 {
        alloc(&mut one, MIB + number * 8192);
    }
    assert_eq!(one.ask("every 2"), "ok 50");
    takes_all_but_no_more(&mut one);
    assert_eq!(one.ask("free all"), "ok 50");
    assert_eq!(info(&mut one), (free, total), "all is given back");

    // Small ones come out of slabs; what empty slabs hold counts as free and can be had.
    for number in 0..300 {
        alloc(&mut one, 4096 + number * 512);
    }
    assert!(info(&mut one).0 < free);
    takes_all_but_no_more(&mut one);
    assert_eq!(one.ask("free all"), "ok 300");
    assert_eq!(info(&mut one), (free, total), "empty slabs count as free");
    takes_all_but_no_more(&mut one);

    // In stream order, and as physical memory that is not ours to move.
    let line = one.ask(&format!("ordered {free}"));
    assert!(line.starts_with("ok "), "{line}");
    refused(&mut one, 1);
    assert_eq!(one.ask("free all"), "ok 1");
    let line = one.ask(&format!("physical {}", free / 2 / GRANULE * GRANULE));
    assert!(line.starts_with("ok "), "{line}");
    takes_all_but_no_more(&mut one);
    assert_eq!(one.ask(&format!("physical {}", free)), "error 2");
    assert_eq!(one.ask("free all"), "ok 0");
    takes_all_but_no_more(&mut one);

    assert_eq!(neighbour.ask("check 7"), "ok");
    let after = (
        info(&mut neighbour),
        daemon.workload("neighbour")["swaps_out"].clone(),
    );
    assert_eq!(before, after, "the neighbour notices nothing");
}

#[test]
fn racing_processes_of_one_workload_never_pass_its_limit() {
    const PROCESSES: u64 = 4;
    const THREADS: u64 = 8;
    let place = Place::new("quota-race").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let limit = 600 * MIB;
    let mut racers: Vec<Client> = (0..PROCESSES)
        .map(|_| probe(&place, "racers", "600MiB", "600MiB"))
        .collect();
    let mut neighbour = probe(&place, "neighbour", "64MiB", "64MiB");
    alloc(&mut neighbour, MIB);
    let mut outsider = bare(&place);
    // What the others hold on the device, so that the rest is the racers'.
    let others = used(&daemon, "neighbour", 0) + 32 * MIB;
    let free = info(&mut racers[0]).0;
    for racer in &mut racers {
        assert_eq!(
            info(racer),
            (free, limit),
            "one figure for the whole workload"
        );
    }
    let over = AtomicBool::new(false);
    let round = |racers: &mut Vec<Client>, outsider: &mut Client, count: u64, bytes: u64| {
        for racer in racers.iter_mut() {
            racer.send(&format!("race {THREADS} {count} {bytes}"));
        }
        // While they race.
        for _ in 0..5 {
            let (counted, held) = (
                used(&daemon, "racers", 0),
                physical(outsider).saturating_sub(others),
            );
            if counted > limit || held > limit {
                over.store(true, SeqCst);
                eprintln!("{counted} counted, {held} held, limit {limit}");
            }
        }
        let mut total = [0; 3];
        for racer in racers.iter_mut() {
            let line = racer.line();
            let words: Vec<u64> = line
                .split(' ')
                .filter_map(|word| word.parse().ok())
                .collect();
            for (sum, word) in total.iter_mut().zip(words) {
                *sum += word;
            }
        }
        let held = physical(outsider).saturating_sub(others);
        assert!(held <= limit, "{held} held, limit {limit}");
        for racer in racers.iter_mut() {
            assert_ne!(racer.ask("free all"), "");
        }
        until("all is given back", || {
            (info(&mut racers[0]).0 == free).then_some(())
        });
        total
    };
    // As many granules as there are, each by one request.
    let granules = free / GRANULE;
    let asked = granules / (PROCESSES * THREADS);
    let fitting = asked * PROCESSES * THREADS;
    for _ in 0..5 {
        let [won, refused, other] = round(&mut racers, &mut outsider, asked, GRANULE);
        assert_eq!(
            (won, refused, other),
            (fitting, 0, 0),
            "{granules} granules: all of it fits"
        );
    }
    // Twice as many: exactly as many as fit are granted.
    for bytes in [GRANULE, 3 * GRANULE, 8 * GRANULE] {
        let each = (free / bytes * 2).div_ceil(PROCESSES * THREADS);
        let [won, refused, other] = round(&mut racers, &mut outsider, each, bytes);
        assert_eq!(
            (won, refused, other),
            (free / bytes, each * PROCESSES * THREADS - free / bytes, 0),
            "{free} bytes in pieces of {bytes}"
        );
    }
    assert!(!over.load(SeqCst), "never above the limit");
    alloc(&mut neighbour, MIB);
    assert_eq!(info(&mut neighbour).1, 64 * MIB);
}

/// More threads than a session may have questions open at once, near the limit, where each has to ask.
#[test]
fn a_crowd_of_threads_keeps_its_session() {
    const THREADS: u64 = 600;
    let place = Place::new("quota-crowd").build();
    let daemon = place.daemon(&[]);
    let mut client = probe(&place, "w", "64MiB", "256MiB");
    let (free, _) = info(&mut client);
    alloc(&mut client, free - 32 * MIB);
    for line in [
        format!("modules {THREADS}"),
        format!("race {THREADS} 1 {GRANULE}"),
    ] {
        let answer = client.ask(&line);
        assert!(answer.ends_with("other 0"), "{line}: {answer}");
    }
    assert_eq!(info(&mut client).0, 0, "all of it is had by somebody");
    assert!(daemon.find("w").is_some());
    for kind in ["refused", "left"] {
        assert_eq!(daemon.events_of("w", kind), [] as [serde_json::Value; 0]);
    }
}

#[test]
fn one_process_gets_what_its_siblings_do_not_use() {
    let place = Place::new("quota-siblings").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut one = probe(&place, "pair", "300MiB", "300MiB");
    let mut other = probe(&place, "pair", "300MiB", "300MiB");
    takes_all_but_no_more(&mut one);
    takes_all_but_no_more(&mut other);
    let (free, _) = info(&mut one);
    alloc(&mut one, free / 2 / GRANULE * GRANULE);
    assert_eq!(info(&mut one), info(&mut other));
    takes_all_but_no_more(&mut other);
    // The dead one's share goes to its sibling.
    one.kill();
    until("the dead one's bytes are back", || {
        (info(&mut other).0 > free).then_some(())
    });
    takes_all_but_no_more(&mut other);
    assert!(used(&daemon, "pair", 0) <= 300 * MIB);
}

#[test]
fn two_devices_are_counted_apart() {
    let place = Place::new("quota-devices").gpus(2).memory("512MiB").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut one = probe(&place, "one", "200MiB", "200MiB");
    alloc(&mut one, 150 * MIB);
    assert_eq!(one.ask("device 1"), "ok");
    alloc(&mut one, 60 * MIB);
    let (free, total) = info(&mut one);
    assert_eq!(total, 200 * MIB);
    assert!(
        free >= 100 * MIB,
        "the first device's use does not count here: {free}"
    );
    takes_all_but_no_more(&mut one);
    assert_eq!(one.ask("device 0"), "ok");
    assert!(info(&mut one).0 < 50 * MIB);
    takes_all_but_no_more(&mut one);
    let first = used(&daemon, "one", 0);
    let second = used(&daemon, "one", 1);
    assert!(
        first >= 150 * MIB && (60 * MIB..150 * MIB).contains(&second),
        "{first} and {second}"
    );
    let _ = daemon.evict_when_idle("one");
    let workload = daemon.workload("one");
    for device in [0, 1] {
        let resident = workload["devices"][device]["resident_bytes"]
            .as_u64()
            .expect("a figure");
        let overhead = workload["devices"][device]["overhead_bytes"]
            .as_u64()
            .expect("a figure");
        assert_eq!(resident, overhead, "device {device}: {workload}");
    }
    assert_eq!(one.ask("fill 3"), "ok");
    assert_eq!(one.ask("check 3"), "ok");
    takes_all_but_no_more(&mut one);
}

#[test]
fn what_is_never_swapped_is_reserved() {
    let place = Place::new("quota-never").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let launch = place
        .client("driver-probe")
        .workload("fixed")
        .request("100MiB")
        .limit("500MiB");
    let mut fixed = ready(launch.var("SPILLWAY_SWAP", "never").start());
    let workload = daemon.workload("fixed");
    assert_eq!(
        (&workload["request_bytes"], &workload["swap"]),
        (&(500 * MIB).into(), &"never".into())
    );
    let answer = daemon.operate("fixed", "evict");
    assert_eq!(answer.status, 409, "{}", answer.body);
    assert!(answer.error().contains("never"), "{}", answer.error());
    // A borrower takes the rest, and no more: what is reserved is not lent.
    let mut borrower = probe(&place, "borrower", "64MiB", "1GiB");
    let mut got = 0;
    while borrower
        .ask(&format!("alloc {}", 16 * MIB))
        .starts_with("ok ")
    {
        got += 16;
    }
    assert!((400..=500).contains(&got), "{got} MiB");
    takes_all_but_no_more(&mut fixed);
    alloc(&mut fixed, 300 * MIB);
    assert_eq!(fixed.ask("fill 5"), "ok");
    assert_eq!(borrower.ask("fill 6"), "ok");
    assert_eq!(
        (fixed.ask("check 5"), borrower.ask("check 6")),
        ("ok".to_owned(), "ok".to_owned())
    );
    assert_eq!(daemon.workload("fixed")["swaps_out"], 0);
}

#[test]
fn without_a_coordinator_the_limit_holds_per_process_and_one_line_says_so() {
    let place = Place::new("quota-alone").build();
    let start = || {
        ready(
            place
                .client("driver-probe")
                .workload("alone")
                .limit("200MiB")
                .start(),
        )
    };
    let (mut one, mut other) = (start(), start());
    for client in [&mut one, &mut other] {
        let (free, total) = info(client);
        assert_eq!(total, 200 * MIB);
        refused(client, free + GRANULE);
        alloc(client, free / GRANULE * GRANULE);
        refused(client, GRANULE);
        assert_eq!(client.ask("free all"), "ok 1");
        let line = client.ask(&format!("race 8 20 {GRANULE}"));
        let won = free / GRANULE;
        assert_eq!(line, format!("won {won} refused {} other 0", 160 - won));
        assert_eq!(client.ask("fill 1"), "ok");
        assert_eq!(client.ask("check 1"), "ok");
        let said = client.stderr();
        assert_eq!(said.lines().count(), 1, "{said}");
        for part in ["no coordinator", "SPILLWAY_RUN_DIR", "this process alone"] {
            assert!(said.contains(part), "{part:?} in {said}");
        }
    }
    // Asked for: nothing is said.
    let launch = place
        .client("driver-probe")
        .limit("200MiB")
        .var("SPILLWAY_NO_COORDINATOR", "1");
    let quiet = ready(launch.start());
    assert_eq!(quiet.stderr(), "");
}

#[test]
fn without_a_limit_nothing_is_refused_that_the_device_has() {
    let place = Place::new("quota-none").memory("512MiB").build();
    let _daemon = place.daemon(&["--reserve", "0"]);
    let mut one = ready(place.client("driver-probe").workload("one").start());
    let (free, total) = info(&mut one);
    assert_eq!(total, 512 * MIB);
    takes_all_but_no_more(&mut one);
    alloc(&mut one, free);
    assert_eq!(one.ask("fill 9"), "ok");
    assert_eq!(one.ask("check 9"), "ok");
    // The control: the device is full for everybody.
    let mut outsider = place.client("driver-probe").bare().start();
    assert_eq!(outsider.line(), "context 2");
}
