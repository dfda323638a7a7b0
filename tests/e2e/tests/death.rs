//! Whoever dies or stops, at whatever moment, holds nobody else up and loses nobody's bytes.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use spillway_tests::{Client, Daemon, MIB, Place, until, until_within};

/// Bounds on waits that depend on this machine's speed and load.
const BOUND: Duration = Duration::from_secs(20);

fn hold(place: &Place, name: &str, request: &str, limit: &str, bytes: &str) -> Client {
    let launch = place
        .client("gpu-hold")
        .workload(name)
        .request(request)
        .limit(limit);
    let mut client = launch.args("--bytes").arg(bytes).start();
    let line = client.line();
    assert!(
        line.starts_with("held ") && !line.ends_with("oom"),
        "{line}"
    );
    client
}

fn ok(client: &mut Client, line: &str) {
    let answer = client.ask_within(line, BOUND);
    assert!(answer.starts_with("ok"), "{line}: {answer}");
}

fn idle() {
    std::thread::sleep(Duration::from_millis(400));
}

/// Asks for `bytes` again and again until they are there.
fn gets(client: &mut Client, bytes: &str) -> Duration {
    let start = Instant::now();
    until_within(BOUND, &format!("{bytes} can be had"), || {
        (client.ask_within(&format!("alloc {bytes}"), BOUND) == "ok").then_some(())
    });
    start.elapsed()
}

#[test]
fn a_killed_client_frees_its_share() {
    let place = Place::new("death-client").build();
    let daemon = place.daemon(&["--reserve", "0", "--growth-wait", "300ms"]);
    let mut heir = hold(&place, "heir", "100MiB", "900MiB", "10MiB");
    let mut dying = hold(&place, "dying", "800MiB", "800MiB", "700MiB");
    ok(&mut dying, "busy");
    assert_eq!(
        heir.ask("alloc 800MiB"),
        "oom",
        "the control: while it lives it keeps its own"
    );
    dying.kill();
    let took = gets(&mut heir, "800MiB");
    println!("had the dead one's share after {took:?}");
    assert!(took < Duration::from_secs(8), "{took:?}");
    daemon.await_gone("dying");
    ok(&mut heir, "checksum");
}

#[test]
fn a_killed_client_frees_its_share_though_its_child_holds_its_sockets() {
    let place = Place::new("death-fork").build();
    let daemon = place.daemon(&["--reserve", "0", "--growth-wait", "300ms"]);
    let mut heir = hold(&place, "heir", "100MiB", "900MiB", "10MiB");
    let launch = place
        .client("driver-probe")
        .workload("dying")
        .request("800MiB")
        .limit("800MiB");
    let mut dying = launch.start();
    assert_eq!(dying.line(), "ready");
    assert!(
        dying
            .ask(&format!("alloc {}", 700 * MIB))
            .starts_with("ok ")
    );
    assert_eq!(dying.ask("fill 1"), "ok");
    let child: i32 = dying.ask("fork").parse().expect("a pid");
    dying.kill();
    until_within(Duration::from_secs(3), "its session is over", || {
        daemon.find("dying").is_none().then_some(())
    });
    assert!(
        std::path::Path::new(&format!("/proc/{child}")).exists(),
        "the child lives on"
    );
    let took = gets(&mut heir, "800MiB");
    assert!(took < Duration::from_secs(10), "{took:?}");
    ok(&mut heir, "checksum");
}

#[test]
fn a_client_killed_while_it_is_moved_or_evicted_leaves_nothing_behind() {
    let place = Place::new("death-moved").link("0.3").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    for moment in ["evicting", "evicted", "restoring"] {
        let mut client = hold(&place, "dying", "400MiB", "400MiB", "300MiB");
        idle();
        std::thread::scope(|scope| {
            let order = scope.spawn(|| {
                let evicted = daemon.operate("dying", "evict").status;
                if moment == "restoring" && evicted == 200 {
                    let _ = daemon.operate("dying", "restore");
                }
            });
            daemon.await_state("dying", moment);
            client.kill();
            order.join().expect("the request is answered");
        });
        daemon.await_gone("dying");
        until("all of its memory is given back", || {
            let status = daemon.status();
            let (device, pool) = (&status["devices"][0], &status["pool"]);
            let free = device["free_bytes"] == device["room_bytes"];
            (free && pool["reserved_bytes"] == 0 && pool["populated_bytes"] == 0).then_some(())
        });
    }
}

#[test]
fn a_client_that_ends_while_evicted_ends_at_once() {
    let place = Place::new("death-exit").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    for (way, code) in [("exit 5", 5), ("_exit 6", 6)] {
        let launch = place
            .client("driver-probe")
            .workload("leaving")
            .limit("600MiB");
        let mut client = launch.start();
        assert_eq!(client.line(), "ready");
        assert!(
            client
                .ask(&format!("alloc {}", 400 * MIB))
                .starts_with("ok ")
        );
        idle();
        daemon.evict("leaving");
        client.send(way);
        assert_eq!(client.wait(Duration::from_secs(3)), Some(code), "{way}");
        daemon.await_gone("leaving");
    }
    // One that frees everything and lets its context go.
    let mut client = hold(&place, "leaving", "600MiB", "600MiB", "400MiB");
    idle();
    daemon.evict("leaving");
    client.send("quit");
    assert_eq!(client.wait(Duration::from_secs(5)), Some(0));
    daemon.await_gone("leaving");
}

/// A coordinator with two clients that do not fit together: `moving` has a swap under way, `staying`
/// is resident.
fn pair(place: &Place) -> (Client, Client) {
    let mut staying = hold(place, "staying", "100MiB", "200MiB", "60MiB");
    let mut moving = hold(place, "moving", "400MiB", "400MiB", "300MiB");
    // What a checksum allocates stays with it: growth needs a coordinator.
    for client in [&mut staying, &mut moving] {
        ok(client, "checksum");
    }
    idle();
    (staying, moving)
}

/// Kills the coordinator while `moving` is in state `moment`, then starts the next one.
fn killed_in(moment: &str) {
    let place = Place::new(&format!("death-daemon-{moment}"))
        .link("0.3")
        .build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let (mut staying, mut moving) = pair(&place);
    let instance = daemon.status()["instance"].clone();
    if moment != "evicting" {
        daemon.evict("moving");
    }
    let verb = if moment == "restoring" {
        "restore"
    } else {
        "evict"
    };
    // From a thread of its own, as `curl` would: the answer never comes.
    let socket = spillway_protocol::names::api_socket(&place.run_dir());
    let order = std::thread::spawn(move || {
        let target = format!("/v1/workloads/moving/{verb}");
        let _ = spillway_tests::request(&socket, "POST", &target, BOUND);
    });
    daemon.await_state("moving", moment);
    daemon.kill();
    order.join().expect("the request ends");

    // Who is resident goes on computing.
    for _ in 0..5 {
        ok(&mut staying, "launch");
        ok(&mut staying, "checksum");
    }
    // Who is not waits, and loses nothing.
    moving.send("checksum");
    if moment == "evicted" {
        assert_eq!(
            moving.try_line(Duration::from_secs(1)),
            None,
            "it waits for a coordinator"
        );
    }
    let next = place.daemon(&["--reserve", "0"]);
    assert_ne!(next.status()["instance"], instance);
    assert_eq!(moving.line_within(BOUND), "ok", "{moment}");
    ok(&mut staying, "checksum");
    // Both belong to the next one: it can move them, and knows what they hold.
    for name in ["staying", "moving"] {
        until("it is adopted", || next.find(name));
        let held = if name == "moving" {
            300 * MIB
        } else {
            60 * MIB
        };
        let used = next.workload(name)["used_bytes"].as_u64();
        assert!(used >= Some(held), "{name} uses {used:?}");
        let out = next.evict_when_idle(name);
        assert!(out.bytes >= held, "{name}: {out:?}");
    }
    ok(&mut moving, "checksum");
    ok(&mut staying, "checksum");
    assert_eq!(moving.ask("alloc 200MiB"), "oom", "its limit still holds");
    for client in [staying, moving] {
        let said = client.stderr();
        assert!(
            !said.contains("panick") && !said.contains("internal error"),
            "{said}"
        );
    }
}

#[test]
fn the_coordinator_killed_in_the_middle_of_a_swap_out_loses_nothing() {
    killed_in("evicting");
}

#[test]
fn the_coordinator_killed_after_a_swap_out_loses_nothing() {
    killed_in("evicted");
}

#[test]
fn the_coordinator_killed_in_the_middle_of_a_swap_in_loses_nothing() {
    killed_in("restoring");
}

/// A restart of the service, as an operator does it: in order, by SIGTERM.
#[test]
fn a_coordinator_that_is_restarted_in_order_loses_nothing() {
    let place = Place::new("death-restart").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let mut out = hold(&place, "out", "300MiB", "400MiB", "300MiB");
    let mut in_place = hold(&place, "in", "300MiB", "400MiB", "300MiB");
    // Its segments have been used once, and are empty again.
    daemon.evict_when_idle("in");
    daemon.restore("in");
    daemon.evict_when_idle("out");
    daemon.terminate();
    let daemon = place.daemon(&["--reserve", "0"]);
    daemon.await_state("out", "evicted");
    ok(&mut out, "checksum");
    ok(&mut in_place, "checksum");
    for (client, name) in [(&mut out, "out"), (&mut in_place, "in")] {
        daemon.evict_when_idle(name);
        ok(client, "checksum");
    }
}

#[test]
fn without_a_next_coordinator_the_swapped_out_come_back_by_themselves() {
    let place = Place::new("death-alone").build();
    let daemon = place.daemon(&["--reserve", "0"]);
    let (mut staying, mut moving) = pair(&place);
    daemon.evict("moving");
    daemon.kill();
    let start = Instant::now();
    assert_eq!(moving.ask_within("checksum", Duration::from_secs(60)), "ok");
    println!("came back after {:?}", start.elapsed());
    assert!(
        start.elapsed() > Duration::from_secs(5),
        "it gives the next one time"
    );
    ok(&mut staying, "checksum");
    assert!(
        moving.stderr().contains("no coordinator"),
        "{}",
        moving.stderr()
    );
}

#[test]
fn coordinators_killed_again_and_again_lose_nothing() {
    let place = Place::new("death-again")
        .memory("512MiB")
        .time(Duration::from_secs(120))
        .build();
    let stress = place
        .client("alloc-stress")
        .args("--count 80 --bytes 128MiB --largest 48MiB --threads 2 --churn")
        .workload("stress")
        .limit("400MiB");
    let mut daemon = Some(place.daemon(&["--reserve", "0"]));
    let mut stress = stress.start();
    assert_eq!(stress.line_within(BOUND), "ready");
    for round in 1..=12_u64 {
        let current = daemon.take().expect("a coordinator");
        for _ in 0..3 {
            current.evict_when_idle("stress");
        }
        // At another moment of a swap each time.
        std::thread::scope(|scope| {
            let socket = spillway_protocol::names::api_socket(&place.run_dir());
            scope.spawn(move || {
                let _ =
                    spillway_tests::request(&socket, "POST", "/v1/workloads/stress/evict", BOUND);
            });
            std::thread::sleep(Duration::from_millis(round * 3));
            current.kill();
        });
        if round % 3 == 0 {
            std::thread::sleep(Duration::from_millis(500));
        }
        let next = place.daemon(&["--reserve", "0"]);
        assert_eq!(stress.ask_within("verify", BOUND), format!("ok {round}"));
        until("it is adopted", || next.find("stress"));
        daemon = Some(next);
    }
    stress.send("quit");
    let summary = stress.line_within(BOUND);
    assert_eq!(stress.wait(BOUND), Some(0), "{summary}");
    let daemon = daemon.expect("a coordinator");
    daemon.await_gone("stress");
    until("its host memory is given back", || {
        (daemon.status()["pool"]["populated_bytes"] == 0).then_some(())
    });
}

/// Its process does not run, so its eviction does not begin; the coordinator says so.
fn stuck(daemon: &Daemon<'_>, name: &str) {
    until_within(BOUND, "it is said who is stuck", || {
        (!daemon.events_of(name, "stuck").is_empty()).then_some(())
    });
}

#[test]
fn a_stopped_client_holds_up_nobody_but_who_needs_its_space() {
    let place = Place::new("death-stopped").build();
    let daemon = place.daemon(&["--reserve", "0", "--drain-deadline", "200ms"]);
    let mut bystander = hold(&place, "bystander", "64MiB", "64MiB", "10MiB");
    let mut lazy = hold(&place, "lazy", "64MiB", "900MiB", "700MiB");
    let mut other = hold(&place, "other", "600MiB", "600MiB", "10MiB");
    ok(&mut bystander, "checksum");
    idle();
    lazy.signal(Signal::SIGSTOP);
    other.send("alloc 500MiB");
    stuck(&daemon, "lazy");
    assert_eq!(
        other.try_line(Duration::from_millis(1)),
        None,
        "it is never refused its own"
    );
    let waits = daemon.workload("other")["waiting_for"].clone();
    assert!(
        waits.as_str().is_some_and(|why| why.contains("lazy")),
        "{waits}"
    );
    ok(&mut bystander, "launch");
    ok(&mut bystander, "checksum");
    assert!(daemon.evict_when_idle("bystander").bytes > 0);
    ok(&mut bystander, "checksum");
    // It goes on where it was, and gives way.
    lazy.signal(Signal::SIGCONT);
    assert_eq!(other.line_within(BOUND), "ok");
    for client in [&mut lazy, &mut other, &mut bystander] {
        ok(client, "checksum");
    }
}

#[test]
fn who_waits_for_a_stopped_client_is_served_by_another() {
    let place = Place::new("death-another").build();
    let daemon = place.daemon(&["--reserve", "0", "--drain-deadline", "200ms"]);
    let mut lazy = hold(&place, "lazy", "64MiB", "900MiB", "300MiB");
    idle();
    let mut spare = hold(&place, "spare", "64MiB", "900MiB", "450MiB");
    let mut other = hold(&place, "other", "600MiB", "600MiB", "10MiB");
    idle();
    lazy.signal(Signal::SIGSTOP);
    let start = Instant::now();
    assert_eq!(
        other.ask_within("alloc 300MiB", Duration::from_secs(40)),
        "ok"
    );
    println!("served by another after {:?}", start.elapsed());
    assert_eq!(daemon.state("spare"), "evicted", "{}", daemon.status());
    lazy.signal(Signal::SIGCONT);
    for client in [&mut lazy, &mut spare, &mut other] {
        ok(client, "checksum");
    }
}

#[test]
fn a_stopped_client_is_killed_where_the_operator_chose_so() {
    let place = Place::new("death-stuck-kill").build();
    let flags = [
        "--reserve",
        "0",
        "--drain-deadline",
        "200ms",
        "--on-stuck",
        "kill",
    ];
    let daemon = place.daemon(&flags);
    let mut lazy = hold(&place, "lazy", "64MiB", "900MiB", "700MiB");
    let mut other = hold(&place, "other", "600MiB", "600MiB", "10MiB");
    idle();
    lazy.signal(Signal::SIGSTOP);
    assert_eq!(
        other.ask_within("alloc 500MiB", Duration::from_secs(40)),
        "ok"
    );
    daemon.await_gone("lazy");
    assert_eq!(lazy.wait(Duration::from_secs(5)), None, "a signal ended it");
    ok(&mut other, "checksum");
}
