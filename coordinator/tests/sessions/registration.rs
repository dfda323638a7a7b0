//! Who comes in, and who is told what to change.

use spillway_protocol::Amount;
use spillway_protocol::message::FromProcess;

use crate::client::{GIB, MIB, Process, Wire, device, register};
use crate::host::Daemon;

#[test]
fn a_process_registers_and_is_seen() {
    let daemon = Daemon::usual();
    let process = Process::start(&daemon.dir, register("one", GIB, 2 * GIB));
    assert_eq!(process.workload, "one");
    let page = &process.desired().devices[0];
    use std::sync::atomic::Ordering::SeqCst;
    assert_eq!(page.limit.load(SeqCst), 2 * GIB);
    assert_eq!(page.request.load(SeqCst), GIB);
    assert_eq!(process.grant(), 0);
    let seen = daemon.workload("one").expect("listed");
    assert_eq!(seen["state"], "resident");
    assert_eq!(seen["request_bytes"], GIB);
    assert_eq!(seen["limit_bytes"], 2 * GIB);
    assert_eq!(seen["processes"][0]["pid"], std::process::id());
    drop(process);
    daemon.until("it is dropped", |d| d.workload("one").is_none());
}

#[test]
fn shares_are_fractions_of_the_device() {
    let daemon = Daemon::start(&["--fake-device=4GiB", "--capacity=2GiB", "--reserve=0"]);
    let mut half = register("half", 0, 0);
    half.request = Some(Amount::Fraction(0.25));
    half.limit = Some(Amount::Fraction(1.0));
    let process = Process::start(&daemon.dir, half);
    use std::sync::atomic::Ordering::SeqCst;
    let page = &process.desired().devices[0];
    assert_eq!(page.request.load(SeqCst), GIB);
    assert_eq!(page.limit.load(SeqCst), 2 * GIB, "no more than the room");
}

#[test]
fn nameless_processes_are_workloads_of_their_own() {
    let daemon = Daemon::usual();
    let one = Process::start(&daemon.dir, register("", 0, 0));
    assert!(
        one.workload.ends_with(&format!("-{}", std::process::id())),
        "{}",
        one.workload
    );
}

#[test]
fn what_is_wrong_is_named_and_the_session_closed() {
    let daemon = Daemon::usual();
    let _first = Process::start(&daemon.dir, register("first", 3 * GIB, 3 * GIB));
    let refused = |change: &dyn Fn(&mut spillway_protocol::message::Register)| {
        let mut register = register("second", 0, 0);
        change(&mut register);
        match Process::try_start(&daemon.dir, register) {
            Err(text) => text,
            Ok(_) => panic!("registered"),
        }
    };
    let has = |text: String, parts: &[&str]| {
        for part in parts {
            assert!(text.contains(part), "{text:?} lacks {part:?}");
        }
    };
    has(
        refused(&|r| r.version = 7),
        &["version 7", "update spillwayd"],
    );
    has(
        refused(&|r| r.workload = "-x".into()),
        &["SPILLWAY_WORKLOAD"],
    );
    has(
        refused(&|r| {
            r.request = Some(Amount::Bytes(2 * GIB));
            r.limit = Some(Amount::Bytes(GIB));
        }),
        &["2 GiB", "1 GiB", "SPILLWAY_REQUEST", "SPILLWAY_LIMIT"],
    );
    has(
        refused(&|r| r.request = Some(Amount::Bytes(5 * GIB))),
        &["5 GiB", "4 GiB"],
    );
    has(
        refused(&|r| r.request = Some(Amount::Bytes(2 * GIB))),
        &["2 GiB", "4 GiB", "3 GiB", "--oversubscription"],
    );
    has(
        refused(&|r| r.devices = vec![device(9)]),
        &[
            "GPU-00000000-0000-0000-0000-000000000009",
            "GPU-00000000-0000-0000-0000-000000000000",
        ],
    );
    has(
        refused(&|r| {
            r.devices = vec![device(0), device(0)];
            r.grants = vec![0, 0];
        }),
        &["listed twice"],
    );
    assert_eq!(
        daemon.status()["workloads"].as_array().map(Vec::len),
        Some(1)
    );
    assert!(daemon.events().contains("\"kind\":\"refused\""));
}

#[test]
fn whatever_comes_first_but_a_registration_is_refused() {
    let daemon = Daemon::usual();
    let good = FromProcess::Register(register("x", 0, 0)).encode();
    let mut longer = good.clone();
    longer.push(0);
    let wrong: [(&[u8], &str); 6] = [
        (&good[..good.len() - 1], "ends before"),
        (&good[..7], "malformed"),
        (&longer, "after the message's last field"),
        (
            &FromProcess::SegmentRelease { id: 1 }.encode(),
            "register first",
        ),
        (&77u32.to_le_bytes(), "unknown message kind 77"),
        (&vec![1; 9000], "longer than any can be"),
    ];
    for (bytes, part) in wrong {
        let wire = Wire::connect(&daemon.dir);
        wire.send_raw(bytes, &[]).expect("sent");
        let text = wire.refusal();
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    // Nobody else is affected.
    Process::start(&daemon.dir, register("good", GIB, GIB));
}

#[test]
fn a_first_registration_with_descriptors_is_refused() {
    use std::os::fd::AsRawFd;
    let daemon = Daemon::usual();
    let wire = Wire::connect(&daemon.dir);
    let (pipe, _other) = nix::unistd::pipe().expect("a pipe");
    let packet = FromProcess::Register(register("x", 0, 0)).encode();
    wire.send_raw(&packet, &[pipe.as_raw_fd()]).expect("sent");
    assert!(wire.refusal().contains("descriptors"));
}

#[test]
fn siblings_join_and_may_not_widen_the_workload() {
    let daemon = Daemon::usual();
    let mut first = Process::start(&daemon.dir, register("team", GIB, 2 * GIB));
    let mut second = Process::start(&daemon.dir, register("team", 0, 0));
    let third = Process::start(&daemon.dir, register("team", GIB, 2 * GIB));
    let refused = |register| match Process::try_start(&daemon.dir, register) {
        Err(text) => text,
        Ok(_) => panic!("widened"),
    };
    let text = refused(register("team", GIB, 3 * GIB));
    assert!(
        text.contains("SPILLWAY_LIMIT") && text.contains("3 GiB"),
        "{text}"
    );
    let text = refused(register("team", 2 * GIB, 2 * GIB));
    assert!(text.contains("SPILLWAY_REQUEST"), "{text}");
    let mut never = register("team", 0, 0);
    never.swap = false;
    assert!(refused(never).contains("SPILLWAY_SWAP"));
    // The limit is the workload's, not each process's.
    assert_eq!(first.allocate(GIB).0, 0);
    assert_eq!(second.allocate(GIB).0, 0);
    let (outcome, _, text) = second.allocate(2 * MIB);
    assert_eq!(outcome, spillway_protocol::message::outcome::LIMIT);
    assert!(text.contains("2 GiB"), "{text}");
    use std::sync::atomic::Ordering::SeqCst;
    second.refresh(false);
    assert_eq!(second.desired().devices[0].others.load(SeqCst), GIB);
    assert_eq!(second.desired().flags.load(SeqCst), 1);
    drop((first, third));
    daemon.until("they left", |d| {
        d.workload("team").expect("there")["processes"]
            .as_array()
            .map(Vec::len)
            == Some(1)
    });
    second.refresh(true);
    assert_eq!(second.desired().devices[0].others.load(SeqCst), 0);
    assert_eq!(second.desired().flags.load(SeqCst), 0);
}
