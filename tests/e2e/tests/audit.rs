//! Who uses a GPU without an account, or beyond it, is found out; who keeps to its limit is not
//! accused.

use std::time::{Duration, Instant};

use serde_json::Value;
use spillway_tests::{Client, Daemon, Launch, MIB, Place, until_within};

/// A program without Spillway is to be shown after this long.
const SOON: Duration = Duration::from_secs(3);
/// The same on a machine that has other things to do, and for what needs several samples.
const PATIENCE: Duration = Duration::from_secs(20);

fn ready(launch: Launch<'_>) -> Client {
    let mut client = launch.start();
    assert_eq!(client.line(), "ready");
    client
}

fn probe(place: &Place, name: &str, limit: &str) -> Client {
    let probe = place.client("driver-probe").workload(name);
    ready(probe.request("2MiB").limit(limit))
}

fn fine(client: &mut Client, line: &str) {
    let answer = client.ask(line);
    assert!(answer.starts_with("ok"), "{line}: {answer}");
}

/// Events of a kind, whoever they are about.
fn told(daemon: &Daemon<'_>, kind: &str) -> Vec<Value> {
    let mut events = daemon.events();
    events.retain(|event| event["kind"] == kind);
    events
}

/// The escapes with a reason.
fn escapes(daemon: &Daemon<'_>, reason: &str) -> Vec<Value> {
    let mut escapes = told(daemon, "escape");
    escapes.retain(|event| event["reason"] == reason);
    escapes
}

fn escape(daemon: &Daemon<'_>, reason: &str, time: Duration) -> Value {
    until_within(time, &format!("an escape is told: {reason}"), || {
        escapes(daemon, reason).pop()
    })
}

/// A metric by its name and labels.
fn metric(daemon: &Daemon<'_>, line: &str) -> f64 {
    let page = daemon.request("GET", "/metrics").body;
    let found = page
        .lines()
        .find_map(|at| at.strip_prefix(line)?.trim().parse().ok());
    found.unwrap_or_else(|| panic!("no {line}: {page}"))
}

fn accuses_nobody(daemon: &Daemon<'_>) {
    assert_eq!(told(daemon, "escape"), [] as [Value; 0]);
    assert_eq!(daemon.status()["strangers"], serde_json::json!([]));
    for reason in ["stranger", "limit", "uncharged"] {
        let line = format!("spillway_escapes_total{{reason=\"{reason}\"}}");
        assert!(metric(daemon, &line).abs() < 0.5, "{line}");
    }
}

#[test]
fn a_program_without_spillway_is_shown() {
    let place = Place::new("audit-stranger").build();
    let daemon = place.daemon(&[]);
    let mut good = probe(&place, "good", "512MiB");
    fine(&mut good, "alloc 67108864");
    let mut bare = ready(place.client("driver-probe").bare());
    let start = Instant::now();
    fine(&mut bare, "alloc 100663296");
    let stranger = until_within(PATIENCE, "the stranger is shown", || {
        let status = daemon.status();
        let stranger = status["strangers"].get(0)?.clone();
        (stranger["bytes"].as_u64()? >= 96 * MIB).then_some(stranger)
    });
    let took = start.elapsed();
    assert!(took <= SOON, "{took:?}");
    assert_eq!(stranger["pid"], bare.pid());
    assert_eq!(stranger["command"], "driver-probe");
    assert_eq!(stranger["uid"], nix::unistd::geteuid().as_raw());
    assert_eq!(stranger["library"], false);
    assert_eq!(stranger["device"], 0);
    let event = escape(&daemon, "stranger", PATIENCE);
    assert_eq!(event["pid"], bare.pid());
    let text = event["text"].as_str().expect("text");
    assert!(text.contains("libspillway.so is not loaded"), "{text}");
    let total = "spillway_escapes_total{reason=\"stranger\"}";
    assert!((metric(&daemon, total) - 1.0).abs() < 0.1);
    let uuid = daemon.status()["devices"][0]["uuid"].clone();
    let uuid = uuid.as_str().expect("a uuid");
    let outside = format!("spillway_outside_bytes{{device=\"0\",uuid=\"{uuid}\"}}");
    until_within(PATIENCE, "what it holds is counted", || {
        #[expect(clippy::cast_precision_loss, reason = "a few MiB")]
        let enough = metric(&daemon, &outside) >= (96 * MIB) as f64;
        enough.then_some(())
    });
    let shown = place.spillway(&["status"]).stdout;
    let row = shown
        .lines()
        .skip_while(|line| !line.starts_with("WITHOUT SPILLWAY"))
        .nth(1);
    let row = row.unwrap_or_else(|| panic!("{shown}"));
    assert!(row.contains(&bare.pid().to_string()), "{shown}");

    // Told once, and only reported; gone when it is gone.
    assert!(bare.alive());
    bare.kill();
    until_within(PATIENCE, "it is forgotten", || {
        (daemon.status()["strangers"] == serde_json::json!([])).then_some(())
    });
    assert_eq!(told(&daemon, "escape").len(), 1);
    assert!(metric(&daemon, &outside).abs() < 0.5);
    assert!(good.alive());
}

#[test]
fn a_program_without_spillway_is_ended_where_that_is_wanted() {
    let place = Place::new("audit-kill").build();
    let daemon = place.daemon(&["--on-escape", "kill"]);
    let mut good = probe(&place, "good", "256MiB");
    fine(&mut good, "alloc 67108864");
    let mut bare = ready(place.client("driver-probe").bare());
    let start = Instant::now();
    assert_eq!(bare.wait(PATIENCE), None, "a signal ended it");
    let took = start.elapsed();
    assert!(took <= SOON, "{took:?}");
    let event = until_within(PATIENCE, "it is told", || told(&daemon, "killed").pop());
    assert_eq!(
        (&event["pid"], &event["reason"]),
        (&bare.pid().into(), &"stranger".into())
    );
    assert_eq!(event["workload"], Value::Null);
    assert!(good.alive());
    assert_eq!(told(&daemon, "killed").len(), 1);
}

/// What is loaded says nothing of who uses it: the library may have been told to stand aside.
#[test]
fn a_program_that_turned_spillway_off_is_shown() {
    let place = Place::new("audit-disabled").build();
    let daemon = place.daemon(&[]);
    let mut disabled = ready(place.client("driver-probe").var("SPILLWAY_DISABLE", "1"));
    fine(&mut disabled, "alloc 67108864");
    // It might be on its way back to the daemon: it has some seconds.
    let event = escape(&daemon, "stranger", PATIENCE);
    assert_eq!(event["pid"], disabled.pid());
    let text = event["text"].as_str().expect("text");
    assert!(text.contains("SPILLWAY_DISABLE"), "{text}");
    assert_eq!(daemon.status()["strangers"][0]["library"], true);
}

#[test]
fn memory_taken_past_the_library_is_found_out() {
    let place = Place::new("audit-limit").memory("2GiB").build();
    let daemon = place.daemon(&[]);
    let mut good = probe(&place, "good", "256MiB");
    fine(&mut good, "alloc 67108864");
    let mut bad = probe(&place, "bad", "128MiB");
    fine(&mut bad, "alloc 67108864");
    fine(&mut bad, "past 536870912");
    let event = escape(&daemon, "limit", PATIENCE);
    assert_eq!(
        (&event["workload"], &event["pid"]),
        (&"bad".into(), &bad.pid().into())
    );
    assert_eq!(event["limit_bytes"], 128 * MIB);
    assert!(
        event["bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes >= 576 * MIB),
        "{event}"
    );
    assert!(bad.alive() && good.alive(), "only reported");
    // It takes up room that was not its own, so it is charged for it.
    let mut roomy = probe(&place, "roomy", "1GiB");
    until_within(PATIENCE, "it is measured", || {
        let share = daemon.workload("roomy")["devices"][0].clone();
        (share["overhead_bytes"].as_u64()? > 0).then_some(())
    });
    std::thread::sleep(Duration::from_millis(1500));
    fine(&mut roomy, "past 402653184");
    let event = until_within(PATIENCE, "growth that nothing explains is told", || {
        let mut told = escapes(&daemon, "uncharged");
        told.retain(|event| event["workload"] == "roomy");
        told.pop()
    });
    assert_eq!(event["bytes"], 384 * MIB);
    let overhead = daemon.workload("roomy")["devices"][0]["overhead_bytes"].clone();
    assert!(
        overhead.as_u64().is_some_and(|bytes| bytes >= 384 * MIB),
        "{overhead}"
    );
    assert_eq!(escapes(&daemon, "limit").len(), 1, "told once");
}

#[test]
fn who_passes_its_limit_is_ended_where_that_is_wanted() {
    let place = Place::new("audit-limit-kill").memory("2GiB").build();
    let daemon = place.daemon(&["--on-escape=kill"]);
    let mut good = probe(&place, "good", "256MiB");
    fine(&mut good, "alloc 67108864");
    let mut bad = probe(&place, "bad", "128MiB");
    fine(&mut bad, "past 536870912");
    assert_eq!(bad.wait(PATIENCE), None, "a signal ended it");
    let event = until_within(PATIENCE, "it is told", || {
        daemon.events_of("bad", "killed").pop()
    });
    assert_eq!(
        (&event["pid"], &event["reason"]),
        (&bad.pid().into(), &"limit".into())
    );
    daemon.await_gone("bad");
    assert!(good.alive());
    assert_eq!(told(&daemon, "killed").len(), 1);
}

/// Two that do not fit together take turns, with all kinds of memory, contexts that come and go, and
/// allocations that are refused at the limit, for longer than anything takes to be confirmed.
#[test]
fn who_keeps_to_its_limit_is_never_accused() {
    let place = Place::new("audit-honest").memory("1GiB").build();
    let flags = [
        "--reserve=0",
        "--turn=300ms",
        "--idle-after=50ms",
        "--on-escape=kill",
    ];
    let daemon = place.daemon(&flags);
    let mut clients = ["one", "two"].map(|name| probe(&place, name, "700MiB"));
    for client in &mut clients {
        fine(client, "alloc 314572800");
        fine(client, "managed 67108864");
        fine(client, "fill 7");
    }
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(13) {
        for client in &mut clients {
            let storm = client.ask("storm 3 300");
            assert!(storm.starts_with("rounds "), "{storm}");
            let race = client.ask("race 4 40 8388608");
            assert!(race.ends_with("other 0"), "{race}");
            fine(client, "managed 33554432");
            fine(client, "fill 9");
            assert_eq!(client.ask("check 9"), "ok");
            let won = race.split(' ').nth(1).and_then(|won| won.parse().ok());
            let won: u32 = won.unwrap_or_else(|| panic!("{race}"));
            assert!(won > 0, "{race}");
            for _ in 0..=won {
                fine(client, "free last");
            }
        }
    }
    let swaps = daemon.workload("one")["swaps_out"].as_u64();
    assert!(swaps.is_some_and(|swaps| swaps >= 2), "{swaps:?}");
    accuses_nobody(&daemon);
    for mut client in clients {
        assert!(client.alive());
    }
    assert_eq!(told(&daemon, "killed"), [] as [Value; 0]);
}

/// Two programs of which one maps the other's 512 MiB, with a limit of 64 MiB.
fn sharing(place: &Place) -> (Client, Client) {
    let fixed = |name: &str, limit: &str| {
        let probe = place.client("driver-probe").workload(name).limit(limit);
        ready(probe.var("SPILLWAY_SWAP", "never"))
    };
    let mut maker = fixed("maker", "768MiB");
    let mut user = fixed("user", "64MiB");
    fine(&mut maker, "alloc 536870912");
    let handle = maker.ask("export");
    let handle = handle
        .strip_prefix("ok ")
        .unwrap_or_else(|| panic!("{handle}"));
    fine(&mut user, &format!("import {handle}"));
    (maker, user)
}

/// Memory that another is charged for is not one's own, as long as the other is.
#[test]
fn imported_memory_counts_once_nobody_else_is_charged_for_it() {
    let place = Place::new("audit-import").memory("2GiB").build();
    let daemon = place.daemon(&[]);
    let (mut maker, mut user) = sharing(&place);
    let overhead = || overhead_of(&daemon, "user");
    std::thread::sleep(Duration::from_millis(3500));
    accuses_nobody(&daemon);
    assert!(overhead().is_some_and(|bytes| bytes <= 64 * MIB));
    maker.kill();
    let event = escape(&daemon, "limit", PATIENCE);
    assert_eq!(event["workload"], "user");
    assert!(overhead().is_some_and(|bytes| bytes >= 512 * MIB));
    assert!(user.alive());
}

/// A daemon that was killed comes back to programs that it does not know yet.
#[test]
fn a_restart_accuses_nobody() {
    let place = Place::new("audit-restart").memory("2GiB").build();
    let daemon = place.daemon(&["--on-escape=kill"]);
    let mut client = probe(&place, "away", "512MiB");
    fine(&mut client, "alloc 268435456");
    fine(&mut client, "managed 67108864");
    let (mut maker, mut user) = sharing(&place);
    daemon.kill();
    std::thread::sleep(Duration::from_secs(1));
    let daemon = place.daemon(&["--on-escape=kill"]);
    for name in ["away", "maker", "user"] {
        until_within(PATIENCE, "all are back", || daemon.find(name).map(|_| ()));
    }
    std::thread::sleep(Duration::from_secs(5));
    assert!(client.alive() && maker.alive() && user.alive());
    accuses_nobody(&daemon);
}

fn overhead_of(daemon: &Daemon<'_>, workload: &str) -> Option<u64> {
    daemon.workload(workload)["devices"][0]["overhead_bytes"].as_u64()
}

/// The first overhead that is known.
fn measured(overhead: &impl Fn() -> Option<u64>) -> u64 {
    until_within(PATIENCE, "it is measured", || {
        overhead().filter(|bytes| *bytes > 0)
    })
}

/// What the driver takes for itself is charged also beside managed memory, which it shows as no process's.
#[test]
fn overhead_does_not_hide_behind_managed_memory() {
    let place = Place::new("audit-behind").build();
    let daemon = place.daemon(&[]);
    let mut client = probe(&place, "w", "768MiB");
    let overhead = || overhead_of(&daemon, "w");
    let before = measured(&overhead);
    fine(&mut client, "managed 402653184");
    for touched in [false, true] {
        if touched {
            fine(&mut client, "fill 7");
        }
        let was = if touched { before + 32 * MIB } else { before };
        std::thread::sleep(Duration::from_millis(1500));
        assert_eq!(overhead(), Some(was), "touched: {touched}");
        fine(&mut client, "past 33554432");
        until_within(PATIENCE, "what is taken beside it is charged", || {
            (overhead() == Some(was + 32 * MIB)).then_some(())
        });
    }
    let used = daemon.workload("w")["used_bytes"].as_u64();
    assert_eq!(used, Some(before + (384 + 64) * MIB));
}

/// An import that others are charged for may be shown as the importer's or not; once it is freed, that is over.
#[test]
fn overhead_does_not_hide_behind_an_import_that_was_freed() {
    let place = Place::new("audit-freed").build();
    let daemon = place.daemon(&[]);
    let mut client = probe(&place, "w", "768MiB");
    let overhead = || overhead_of(&daemon, "w");
    fine(&mut client, "pass 67108864");
    std::thread::sleep(Duration::from_millis(2500));
    let before = overhead().expect("it is measured");
    fine(&mut client, "past 33554432");
    until_within(PATIENCE, "what is taken beside it is charged", || {
        (overhead() == Some(before + 32 * MIB)).then_some(())
    });
    client.kill();
}

/// Managed memory may or may not be on the device: its coming and going is no overhead.
#[test]
fn overhead_stays_what_it_is_while_managed_memory_comes_and_goes() {
    let place = Place::new("audit-managed").build();
    let daemon = place.daemon(&[]);
    let mut client = probe(&place, "w", "768MiB");
    let overhead = || overhead_of(&daemon, "w");
    let before = measured(&overhead);
    fine(&mut client, "managed 402653184");
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(overhead(), Some(before));
    }
    let used = daemon.workload("w")["used_bytes"].as_u64();
    assert_eq!(used, Some(before + 384 * MIB), "it is charged once");
    fine(&mut client, "free all");
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(overhead(), Some(before));
    }
    accuses_nobody(&daemon);
}

/// Through a private table a library may submit work that no hook sees, also while its memory is away.
#[test]
fn a_private_driver_table_makes_a_process_unswappable_and_says_so() {
    let place = Place::new("audit-table").build();
    let daemon = place.daemon(&[]);
    let mut client = probe(&place, "w", "256MiB");
    fine(&mut client, "alloc 67108864");
    assert_eq!(daemon.workload("w")["not_swappable"], Value::Null);
    daemon.evict("w");
    fine(&mut client, "fill 3");
    fine(&mut client, "table");
    let why = until_within(PATIENCE, "status says so", || {
        daemon.workload("w")["not_swappable"]
            .as_str()
            .map(str::to_owned)
    });
    assert!(why.contains("private driver table"), "{why}");
    let refused = daemon.operate("w", "evict");
    assert_eq!(refused.status, 409, "{}", refused.body);
    assert!(
        refused.error().contains("private driver table"),
        "{}",
        refused.error()
    );
    let id: String = b"spillwaysimtable"
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    until_within(PATIENCE, "the table is named in an event", || {
        let notes = daemon.events_of("w", "note");
        let named = |event: &Value| {
            event["text"]
                .as_str()
                .is_some_and(|text| text.contains(&id))
        };
        notes.iter().any(named).then_some(())
    });
    let told = daemon.events_of("w", "swappable");
    assert!(
        told.iter()
            .any(|event| event.to_string().contains("private driver table")),
        "{told:?}"
    );
    let shown = place.spillway(&["status"]).stdout;
    assert!(
        shown.contains("not swappable: uses a private driver table"),
        "{shown}"
    );
    assert_eq!(client.ask("check 3"), "ok");
}
