//! Processes that do not keep to the protocol: their own session ends, and nobody else notices.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use spillway_protocol::message::{FromProcess, ToProcess};

use crate::client::{GIB, MIB, PATIENCE, Process, Wire, register};
use crate::host::Daemon;

#[test]
fn a_malformed_message_ends_its_session_alone() {
    let daemon = Daemon::usual();
    let mut good = Process::start(&daemon.dir, register("good", GIB, GIB));
    let grow = FromProcess::Grow {
        ticket: 1,
        device: 0,
        bytes: MIB,
        pageable: 0,
        no_wait: 0,
    }
    .encode();
    let wrong: [(Vec<u8>, &str); 5] = [
        (grow[..grow.len() - 3].to_vec(), "ends before no_wait"),
        (99u32.to_le_bytes().to_vec(), "unknown message kind 99"),
        (
            FromProcess::Register(register("bad", 0, 0)).encode(),
            "registered twice",
        ),
        (
            FromProcess::SegmentRelease { id: 77 }.encode(),
            "segment 77",
        ),
        (FromProcess::Adopt { id: 1, bytes: 1 }.encode(), "adopt"),
    ];
    for (bytes, part) in wrong {
        let bad = Process::start(&daemon.dir, register("bad", GIB, GIB));
        bad.wire.send_raw(&bytes, &[]).expect("sent");
        let text = bad.wire.refusal();
        assert!(text.contains(part), "{text:?} lacks {part:?}");
        daemon.until("it is out", |d| d.workload("bad").is_none());
    }
    assert_eq!(good.allocate(GIB).0, 0, "nobody else is affected");
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let daemon = Daemon::usual();
    let before = daemon.descriptors();
    let (pipe, _other) = nix::unistd::pipe().expect("a pipe");
    let many = vec![pipe.as_raw_fd(); 200];
    for _ in 0..20 {
        let bad = Process::start(&daemon.dir, register("bad", GIB, GIB));
        bad.wire
            .send_raw(&FromProcess::Wake.encode(), &many)
            .expect("sent");
        assert!(bad.wire.refusal().contains("descriptors"));
        let wire = Wire::connect(&daemon.dir);
        wire.send_raw(&[0], &many).expect("sent");
        wire.refusal();
    }
    daemon.until("all closed", |d| d.descriptors() <= before + 4);
}

#[test]
fn who_does_not_read_is_disconnected_and_blocks_nobody() {
    let daemon = Daemon::usual();
    let flood = Process::start(&daemon.dir, register("flood", GIB, GIB));
    let message = FromProcess::Refresh {
        ticket: 1,
        measure: 0,
    }
    .encode();
    let end = Instant::now() + PATIENCE;
    let mut closed = false;
    let mut sent = 0u32;
    while !closed && Instant::now() < end {
        // The daemon stops reading for nobody, so that sending blocks only while it catches up.
        closed = flood.wire.send_raw(&message, &[]).is_err();
        sent += 1;
        if sent.is_multiple_of(200) {
            let asked = Instant::now();
            daemon.status();
            assert!(asked.elapsed() < Duration::from_secs(5), "others wait");
        }
    }
    assert!(closed, "disconnected after {sent} messages without reading");
    daemon.until("it is out", |d| d.workload("flood").is_none());
    assert!(daemon.events().contains("does not read its messages"));
}

#[test]
fn floods_of_growths_are_bounded() {
    let daemon = Daemon::usual();
    let mut owner = Process::start(&daemon.dir, register("owner", 3 * GIB, 4 * GIB));
    owner.allocate(4 * GIB);
    owner.active(true);
    let flood = Process::start(&daemon.dir, register("flood", 0, 0));
    let mut refused = None;
    for ticket in 0..5000 {
        let grow = FromProcess::Grow {
            ticket,
            device: 0,
            bytes: MIB,
            pageable: MIB,
            no_wait: 0,
        };
        if flood.wire.send_raw(&grow.encode(), &[]).is_err() {
            break;
        }
    }
    while let Some((message, _)) = flood.wire.receive(PATIENCE) {
        if let ToProcess::Refused { text } = message {
            refused = Some(text);
        }
    }
    let text = refused.expect("sent away with a reason");
    assert!(text.contains("more growths at once"), "{text}");
    daemon.until("it is out", |d| d.workload("flood").is_none());
}

#[test]
fn notes_are_events_without_control_characters_and_not_too_many() {
    let daemon = Daemon::usual();
    let process = Process::start(&daemon.dir, register("w", GIB, GIB));
    for index in 0..500 {
        process.wire.send(&FromProcess::Note {
            text: format!("note {index}\u{1b}[31m\nmore"),
        });
    }
    daemon.until("heard", |d| d.events().contains("note 0[31mmore"));
    let notes = daemon.events().matches("\"kind\":\"note\"").count();
    assert!(notes <= 20, "{notes}");
}

fn resume(run_dir: &std::path::Path, file: &OwnedFd, segments: u32) -> Wire {
    let mut register = register("old", GIB, GIB);
    register.resumes = 1;
    register.segments = segments;
    let wire = Wire::connect(run_dir);
    let packet = FromProcess::Register(register).encode();
    wire.send_raw(&packet, &[file.as_raw_fd()]).expect("sent");
    wire
}

fn memfd(bytes: i64, seals: SealFlag) -> OwnedFd {
    let file = memfd_create("test", MFdFlags::MFD_ALLOW_SEALING).expect("a memfd");
    ftruncate(&file, bytes).expect("a size");
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seals");
    file
}

#[test]
fn a_resumption_with_the_wrong_descriptors_is_refused() {
    let daemon = Daemon::usual();
    let resize = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    let (pipe, _other) = nix::unistd::pipe().expect("a pipe");
    let wrong = [
        (pipe, "not a memfd"),
        (memfd(4096, SealFlag::empty()), "not sealed"),
        (memfd(4096, SealFlag::F_SEAL_SHRINK), "not sealed"),
        (memfd(0, resize), "0 bytes instead of 4096"),
        (memfd(1 << 20, resize), "instead of 4096"),
        (memfd(4096, resize), "its mark"),
    ];
    for (file, part) in wrong {
        let text = resume(&daemon.dir, &file, 0).refusal();
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
    // A good page, but bad segments.
    let page = memfd(4096, resize);
    let mark = spillway_protocol::page::OBSERVED_MAGIC.to_le_bytes();
    nix::unistd::write(&page, &mark).expect("written");
    let adopt = |file: &OwnedFd, bytes: u64| {
        let wire = resume(&daemon.dir, &page, 1);
        let message = FromProcess::Adopt { id: 1, bytes }.encode();
        wire.send_raw(&message, &[file.as_raw_fd()]).expect("sent");
        wire.refusal()
    };
    assert!(adopt(&memfd(2 << 20, SealFlag::empty()), 2 * MIB).contains("not sealed"));
    assert!(adopt(&memfd(2 << 20, resize), 4 * MIB).contains("instead of"));
    assert!(adopt(&memfd(2 << 20, resize), 0).contains("cannot be"));
    let wire = resume(&daemon.dir, &page, 1);
    wire.send(&FromProcess::Wake);
    assert!(wire.refusal().contains("segments were announced"));
    let wire = resume(&daemon.dir, &page, 1_000_000);
    assert!(wire.refusal().contains("too many"));
    assert_eq!(
        daemon.status()["pool"]["reserved_bytes"],
        0,
        "nothing is left behind"
    );
    daemon.until("emptied", |d| d.status()["pool"]["populated_bytes"] == 0);
}

#[test]
fn connections_that_say_nothing_are_closed() {
    let daemon = Daemon::usual();
    let wire = Wire::connect(&daemon.dir);
    let began = Instant::now();
    let text = match wire.receive(PATIENCE) {
        Some((ToProcess::Refused { text }, _)) => text,
        other => panic!("{other:?}"),
    };
    assert!(text.contains("too slowly"), "{text}");
    assert!(began.elapsed() >= Duration::from_secs(9));
}
