//! Memory that several processes map is charged once: holds, claims, and names of unknown entry
//! points.

use std::time::Duration;

use spillway_protocol::message::{FromProcess, ToProcess};
use spillway_protocol::{MAX_ENTRY_POINTS, MAX_HOLDS, PROTOCOL_VERSION_OLDEST};

use crate::client::{GIB, MIB, PATIENCE, Process, Wire, device, register};
use crate::host::Daemon;

#[test]
fn memory_is_covered_while_somebody_holds_it() {
    let daemon = Daemon::usual();
    let one = Process::start(&daemon.dir, register("one", GIB, GIB));
    let mut two = Process::start(&daemon.dir, register("two", GIB, GIB));
    assert!(!two.claim(0, 64 * MIB, 7), "nobody has said anything");
    one.hold(0, 64 * MIB, 7);
    one.hold(0, 32 * MIB, 0);
    assert!(two.claim(0, 64 * MIB, 7));
    assert!(two.claim(0, 32 * MIB, 0));
    assert!(!two.claim(0, 64 * MIB, 8), "another handle");
    assert!(!two.claim(0, 64 * MIB, 0), "a key is not a size");
    assert!(!two.claim(0, 30 * MIB, 0), "another size");
    two.hold(0, 16 * MIB, 0);
    assert!(two.claim(0, 16 * MIB, 0), "one's own counts, too");
    one.unhold(0, 64 * MIB, 7);
    assert!(!two.claim(0, 64 * MIB, 7));
    one.unhold(0, 64 * MIB, 7);
    assert!(two.claim(0, 32 * MIB, 0), "one too many harms nothing");
    drop(one);
    daemon.until("it left", |d| d.workload("one").is_none());
    assert!(!two.claim(0, 32 * MIB, 0), "the dead hold nothing");
}

#[test]
fn devices_are_matched_by_what_they_are_not_by_their_number() {
    let daemon = Daemon::start(&[
        "--fake-device=4GiB",
        "--fake-device=4GiB",
        "--reserve=0",
        "--pool=8GiB",
    ]);
    let mut turned = register("turned", GIB, GIB);
    turned.devices = vec![device(1), device(0)];
    turned.grants = vec![0, 0];
    let turned = Process::start(&daemon.dir, turned);
    let mut one = Process::start(&daemon.dir, register("one", GIB, GIB));
    turned.hold(0, 64 * MIB, 0);
    turned.hold(1, 32 * MIB, 0);
    assert!(!one.claim(0, 64 * MIB, 0));
    assert!(one.claim(0, 32 * MIB, 0));
    assert!(!one.claim(1, 64 * MIB, 0), "it has no second device");
}

/// The importer's socket may be looked at before the exporter's, and the exporter's queue may be
/// longer than what is read at once.
#[test]
fn what_was_sent_before_the_question_counts() {
    let daemon = Daemon::usual();
    let mut two = Process::start(&daemon.dir, register("two", GIB, GIB));
    let one = Process::start(&daemon.dir, register("one", GIB, GIB));
    for key in 1..=200 {
        for _ in 0..100 {
            one.wire.send(&FromProcess::Wake);
        }
        one.hold(0, MIB, key);
        assert!(two.claim(0, MIB, key), "{key}");
    }
}

#[test]
fn a_daemon_that_restarts_is_told_again_and_waits_for_those_who_are_not_back() {
    let mut daemon = Daemon::usual();
    let one = Process::start(&daemon.dir, register("one", GIB, GIB));
    let two = Process::start(&daemon.dir, register("two", GIB, GIB));
    one.hold(0, 64 * MIB, 7);
    daemon.crash_and_restart();
    let mut two = two.resume(&daemon.dir);
    assert!(!two.claim(0, 64 * MIB, 7), "a new daemon knows nothing");
    let one = one.resume(&daemon.dir);
    one.hold(0, 64 * MIB, 7);
    assert!(two.claim(0, 64 * MIB, 7));
}

#[test]
fn nonsense_ends_its_session_alone() {
    let daemon = Daemon::usual();
    let mut good = Process::start(&daemon.dir, register("good", GIB, GIB));
    for (device, bytes) in [
        (0, 0),
        (0, 5 * GIB),
        (0, u64::MAX),
        (1, MIB),
        (u32::MAX, MIB),
    ] {
        let (key, ticket) = (1, 1);
        for message in [
            FromProcess::Hold { device, bytes, key },
            FromProcess::Unhold { device, bytes, key },
        ] {
            let bad = Process::start(&daemon.dir, register("bad", GIB, GIB));
            bad.wire.send(&message);
            assert!(bad.wire.refusal().contains("cannot be held"));
            daemon.until("it is out", |d| d.workload("bad").is_none());
        }
        let claim = FromProcess::Claim {
            ticket,
            device,
            bytes,
            key,
        };
        good.wire.send(&claim);
        let (covered, _) = good.answer(|message| match message {
            ToProcess::ClaimReply { ticket: 1, covered } => Some(*covered),
            _ => None,
        });
        assert_eq!(covered, 0, "asking is no offence");
    }
}

#[test]
fn who_holds_too_much_is_forgotten_from_the_oldest_on_with_one_event() {
    let daemon = Daemon::usual();
    let one = Process::start(&daemon.dir, register("one", GIB, GIB));
    let mut two = Process::start(&daemon.dir, register("two", GIB, GIB));
    for key in 1..=MAX_HOLDS as u64 + 100 {
        one.hold(0, MIB, key);
    }
    assert!(two.claim(0, MIB, MAX_HOLDS as u64 + 100));
    assert!(two.claim(0, MIB, 101));
    assert!(!two.claim(0, MIB, 100));
    assert!(!two.claim(0, MIB, 1));
    assert_eq!(daemon.events().matches("kept track of").count(), 1);
}

#[test]
fn the_version_before_is_served_without_any_of_it() {
    let daemon = Daemon::usual();
    let mut old = register("old", GIB, GIB);
    old.version = PROTOCOL_VERSION_OLDEST;
    // The client checks that it is welcomed with its own version.
    let mut old = Process::start(&daemon.dir, old);
    assert_eq!(old.allocate(GIB).0, 0);
    let mut before = register("before", GIB, GIB);
    before.version = PROTOCOL_VERSION_OLDEST - 1;
    let wire = Wire::connect(&daemon.dir);
    wire.send(&FromProcess::Register(before));
    assert!(wire.refusal().contains("update libspillway.so"));
}

#[test]
fn unknown_entry_points_are_kept_by_name_and_told_once() {
    let daemon = Daemon::usual();
    let process = Process::start(&daemon.dir, register("w", GIB, GIB));
    let name = |index: usize| format!("cuNew{index}_v2");
    for index in 0..MAX_ENTRY_POINTS + 20 {
        for _ in 0..3 {
            process
                .wire
                .send(&FromProcess::Unknown { name: name(index) });
        }
    }
    let names = |d: &Daemon| {
        let seen = d.workload("w").expect("there");
        seen["unknown_entry_point_names"]
            .as_array()
            .map_or(0, Vec::len)
    };
    daemon.until("they are seen", |d| names(d) == MAX_ENTRY_POINTS);
    std::thread::sleep(Duration::from_millis(100));
    let events = daemon.events();
    let told = events.matches("\"kind\":\"unknown_entry_point\"").count();
    assert_eq!(told, MAX_ENTRY_POINTS, "each once");
    assert!(events.contains("\"entry_point\":\"cuNew0_v2\""), "{events}");
    let mut bad = FromProcess::Unknown {
        name: "cuX".to_owned(),
    }
    .encode();
    *bad.last_mut().expect("not empty") = b'\n';
    process.wire.send_raw(&bad, &[]).expect("sent");
    let text = loop {
        match process.wire.receive(PATIENCE) {
            Some((ToProcess::Refused { text }, _)) => break text,
            Some(_) => {}
            None => panic!("not refused"),
        }
    };
    assert!(text.contains("name is outside its range"), "{text}");
}
