//! Every byte and every pointer survives swapping, while launches, allocations and frees go on.

use std::time::Duration;

use serde_json::Value;
use spillway_tests::{Client, Daemon, GIB, MIB, Place, until};

/// A verification of 1 GiB, on a machine that others use, too.
const VERIFY: Duration = Duration::from_secs(60);

fn verify(client: &mut Client, number: u64) {
    assert_eq!(client.ask_within("verify", VERIFY), format!("ok {number}"));
}

fn summary(mut client: Client) -> Value {
    client.send("quit");
    let line = client.line_within(VERIFY);
    assert_eq!(client.wait(VERIFY), Some(0), "{line}\n{}", client.stderr());
    assert_eq!(client.stderr(), "");
    serde_json::from_str(&line).expect("the summary is JSON")
}

fn swaps(daemon: &Daemon<'_>, name: &str) -> (u64, u64) {
    let workload = daemon.workload(name);
    let figure = |what: &str| workload[what].as_u64().expect("a figure");
    (figure("swaps_out"), figure("swaps_in"))
}

/// Runs `rounds` forced swaps, with a verification after every `each`: half of them asked for while
/// the memory is on the host, so that the program's own calls bring it back.
fn swap_and_verify(daemon: &Daemon<'_>, client: &mut Client, rounds: u64, each: u64) -> u64 {
    let mut verified = 0;
    for round in 1..=rounds {
        daemon.evict_when_idle("stress");
        if round % each != 0 {
            daemon.restore("stress");
            continue;
        }
        verified += 1;
        if verified % 2 == 0 {
            daemon.restore("stress");
        }
        verify(client, verified);
    }
    verified
}

#[test]
fn two_hundred_swaps_of_five_hundred_allocations_lose_nothing() {
    let place = Place::new("bytes")
        .memory("2GiB")
        .time(Duration::from_secs(240))
        .build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut client = place
        .client("alloc-stress")
        .args("--count 500 --bytes 1GiB --largest 512MiB --threads 4")
        .workload("stress")
        .start();
    assert_eq!(client.line_within(VERIFY), "ready");
    verify(&mut client, 1);
    let mut verified = 1;
    for round in 1..=200_u64 {
        let out = daemon.evict_when_idle("stress");
        assert!(out.bytes >= GIB, "round {round}: all of it moves: {out:?}");
        if round % 20 == 0 {
            // On the host, or on its way back because the launching threads want it.
            verified += 1;
            verify(&mut client, verified);
        }
        daemon.restore("stress");
        if round % 20 == 10 {
            verified += 1;
            verify(&mut client, verified);
        }
    }
    let (out, back) = swaps(&daemon, "stress");
    assert!(out >= 200 && back >= 200, "{out} swaps out, {back} in");
    let summary = summary(client);
    assert_eq!(summary["ok"], true, "{summary}");
    assert_eq!(summary["allocations"], 500);
    assert!(summary["bytes"].as_u64() >= Some(GIB - MIB), "{summary}");
    assert!(
        summary["launches"].as_u64() >= Some(1000),
        "launches went on: {summary}"
    );
    assert_eq!(summary["verified"], verified);
}

#[test]
fn allocating_and_freeing_meanwhile_loses_nothing() {
    let place = Place::new("bytes-churn")
        .memory("512MiB")
        .time(Duration::from_secs(120))
        .build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut client = place
        .client("alloc-stress")
        .args("--count 100 --bytes 96MiB --largest 32MiB --threads 2 --churn")
        .workload("stress")
        .limit("300MiB")
        .start();
    assert_eq!(client.line_within(VERIFY), "ready");
    let verified = swap_and_verify(&daemon, &mut client, 100, 10);
    let (out, back) = swaps(&daemon, "stress");
    assert!(out >= 100 && back >= 100, "{out} swaps out, {back} in");
    let summary = summary(client);
    assert_eq!(
        (&summary["ok"], &summary["verified"]),
        (&true.into(), &verified.into()),
        "{summary}"
    );
    assert!(summary["churned"].as_u64() >= Some(100), "{summary}");
    assert_eq!(
        summary["refused"], 0,
        "nothing of this passes the limit: {summary}"
    );
    daemon.await_gone("stress");
    until("its host memory is given back", || {
        let status = daemon.status();
        let pool = &status["pool"];
        (pool["reserved_bytes"] == 0 && pool["populated_bytes"] == 0).then_some(())
    });
}

#[test]
fn two_programs_that_do_not_fit_together_take_turns() {
    let place = Place::new("bytes-turns")
        .memory("512MiB")
        .time(Duration::from_secs(120))
        .build();
    let daemon = place.daemon(&["--reserve", "0", "--turn", "200ms"]);
    let start = |name: &str, seed: u64| {
        place
            .client("alloc-stress")
            .args("--count 60 --bytes 280MiB --largest 128MiB --threads 1 --churn")
            .args(&format!("--seed {seed}"))
            .workload(name)
            .request("200MiB")
            .limit("400MiB")
            .start()
    };
    let mut one = start("one", 1);
    assert_eq!(one.line_within(VERIFY), "ready");
    let mut other = start("other", 2);
    assert_eq!(other.line_within(VERIFY), "ready");
    for round in 1..=6 {
        verify(&mut one, round);
        verify(&mut other, round);
    }
    for name in ["one", "other"] {
        let (out, back) = swaps(&daemon, name);
        assert!(
            out >= 1 && back >= 1,
            "{name}: {out} swaps out, {back} in; {}",
            daemon.status()
        );
    }
    for client in [one, other] {
        let summary = summary(client);
        assert_eq!(summary["ok"], true, "{summary}");
    }
}

#[test]
fn a_driver_that_fails_now_and_then_loses_nothing() {
    let place = Place::new("bytes-faults").memory("512MiB").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    // Calls that only Spillway makes here: out of memory and other errors in the midst of restores,
    // and host memory that cannot be registered.
    let at = |name: &str, error: u32, first: u64, last: u64| -> Vec<String> {
        (first..=last)
            .map(|call| format!("{name}:{call}:error={error}"))
            .collect()
    };
    let mut faults = vec!["cuMemHostRegister:*:error=801".to_owned()];
    faults.extend(at("cuMemCreate", 2, 15, 24));
    faults.extend(at("cuMemCreate", 999, 40, 41));
    faults.extend(at("cuMemMap", 2, 20, 22));
    faults.extend(at("cuMemSetAccess", 2, 17, 19));
    faults.extend(at("cuMemSetAccess", 999, 33, 33));
    let mut client = place
        .client("gpu-hold")
        .args("--bytes 200MiB --step 40MiB")
        .workload("stress")
        .var("SPILLWAY_SIM_FAULTS", faults.join(","))
        .start();
    assert!(client.line().starts_with("held "));
    for round in 0..15 {
        let out = daemon.evict_when_idle("stress");
        assert!(out.bytes >= 200 * MIB, "round {round}: {out:?}");
        assert_eq!(client.ask("checksum"), "ok", "round {round}");
    }
    let said = client.stderr();
    for part in ["registered", "999"] {
        assert!(said.contains(part), "the faults struck: {part} in {said}");
    }
    daemon.evict_when_idle("stress");
    daemon.restore("stress");
    let status = daemon.status();
    let resident = status["workloads"][0]["devices"][0]["resident_bytes"].as_u64();
    assert!(
        resident < Some(300 * MIB),
        "failed tries leave nothing behind: {status}"
    );
}

#[test]
fn processes_of_one_workload_move_together() {
    let place = Place::new("bytes-together")
        .memory("512MiB")
        .time(Duration::from_secs(120))
        .build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut clients: Vec<Client> = (1..=3)
        .map(|seed| {
            place
                .client("alloc-stress")
                .args("--count 40 --bytes 64MiB --largest 24MiB --threads 1 --churn")
                .args(&format!("--seed {seed}"))
                .workload("stress")
                .limit("480MiB")
                .start()
        })
        .collect();
    for client in &mut clients {
        assert_eq!(client.line_within(VERIFY), "ready");
    }
    for round in 1..=40_u64 {
        let out = daemon.evict_when_idle("stress");
        assert!(
            out.bytes >= 3 * 63 * MIB,
            "round {round}: all three move: {out:?}"
        );
        daemon.restore("stress");
        if round % 8 == 0 {
            for client in &mut clients {
                verify(client, round / 8);
            }
        }
    }
    for client in clients {
        let summary = summary(client);
        assert_eq!(
            (&summary["ok"], &summary["refused"]),
            (&true.into(), &0.into()),
            "{summary}"
        );
    }
}

#[test]
fn contexts_and_streams_that_come_and_go_meanwhile_lose_nothing() {
    let place = Place::new("bytes-contexts")
        .memory("1GiB")
        .time(Duration::from_secs(120))
        .build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut client = place.client("driver-probe").workload("stress").start();
    assert_eq!(client.line(), "ready");
    assert!(
        client
            .ask(&format!("alloc {}", 20 * MIB))
            .starts_with("ok ")
    );
    assert_eq!(client.ask("fill 3"), "ok");
    client.send("storm 3 6000");
    let (mut moved, mut busy) = (0, 0);
    let line = loop {
        match daemon.operate("stress", "evict").status {
            200 => moved += 1,
            409 => busy += 1,
            other => panic!("{other}"),
        }
        if let Some(line) = client.try_line(Duration::from_millis(2)) {
            break line;
        }
    };
    println!("{line}, {moved} evictions, {busy} times busy");
    let rounds = line
        .strip_prefix("rounds ")
        .unwrap_or_else(|| panic!("{line}; {}", client.stderr()));
    assert!(rounds.parse::<u64>().expect("a number") > 10, "{line}");
    assert!(moved > 10, "{moved} evictions, {busy} times busy");
    assert_eq!(client.ask("check 3"), "ok");
    daemon.evict_when_idle("stress");
    assert_eq!(client.ask("check 3"), "ok");
    assert_eq!(client.stderr(), "");
}

#[test]
fn work_in_flight_is_finished_before_memory_leaves() {
    let place = Place::new("bytes-busy").memory("512MiB").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let launch = place.client("gpu-hold").args("--bytes 200MiB --step 25MiB");
    let mut client = launch.workload("stress").start();
    assert!(client.line().starts_with("held "));
    // Kernels that write to all of it, one after the other without a pause.
    assert_eq!(client.ask("busy"), "ok");
    for round in 0..30 {
        let out = daemon.evict_when_idle("stress");
        assert!(out.bytes >= 200 * MIB, "round {round}: {out:?}");
        if round % 5 == 0 {
            assert_eq!(client.ask("checksum"), "ok", "round {round}");
        }
    }
    assert_eq!(client.ask("idle"), "ok");
    assert_eq!(client.ask("checksum"), "ok");
    assert_eq!(client.stderr(), "");
}

#[test]
fn work_that_is_queued_is_waited_for() {
    let place = Place::new("bytes-queued").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut client = place.client("driver-probe").workload("stress").start();
    assert_eq!(client.line(), "ready");
    for bytes in [4096, 3 * MIB, 100 * MIB] {
        assert!(client.ask(&format!("alloc {bytes}")).starts_with("ok "));
    }
    assert_eq!(client.ask("fill 1"), "ok");
    for round in 2..=5 {
        assert_eq!(client.ask(&format!("late 400 {round}")), "ok");
        let out = daemon.evict("stress");
        assert!(out.seconds > 0.3, "it waited for the kernels: {out:?}");
        assert_eq!(client.ask(&format!("check {round}")), "ok");
    }
    // Longer than the deadline for it: nothing is moved, and nothing is lost.
    drop(daemon);
    let daemon = place.daemon(&["--reserve", "0", "--drain-deadline", "200ms"]);
    until("it is adopted", || daemon.find("stress"));
    assert_eq!(client.ask("late 1500 6"), "ok");
    let answer = daemon.operate("stress", "evict");
    assert_eq!(answer.status, 409, "{}", answer.body);
    assert!(
        answer.error().contains("did not finish"),
        "{}",
        answer.error()
    );
    assert_eq!(client.ask("check 6"), "ok");
    daemon.evict_when_idle("stress");
    assert_eq!(client.ask("check 6"), "ok");
}

/// The control for all of the above: who loses bytes cannot find them where they were before, because
/// the device hands the same memory out again.
#[test]
fn what_was_given_back_is_spoilt() {
    let place = Place::new("bytes-control").build();
    let mut client = place.client("driver-probe").bare().start();
    assert_eq!(client.line(), "ready");
    let first = client.ask(&format!("alloc {}", 64 * MIB));
    assert_eq!(client.ask("fill 7"), "ok");
    assert_eq!(client.ask("check 7"), "ok");
    assert_eq!(client.ask("free all"), "ok 1");
    assert_eq!(
        client.ask(&format!("alloc {}", 64 * MIB)),
        first,
        "the same address"
    );
    assert!(client.ask("check 7").starts_with("bad "));
}
