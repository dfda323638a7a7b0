//! Growth, eviction, restore: the handshakes.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use spillway_protocol::message::outcome;
use spillway_protocol::page::{command, state};

use crate::client::{GIB, MIB, Process, register};
use crate::host::Daemon;

#[test]
fn growth_is_granted_backed_and_bounded() {
    let daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("grows", GIB, GIB));
    let (code, backed, _) = process.allocate(600 * MIB);
    assert_eq!((code, backed), (outcome::GRANTED, true));
    assert!(process.desired().host_grant.load(SeqCst) >= 600 * MIB);
    let (code, _, _) = process.allocate(424 * MIB);
    assert_eq!(code, outcome::GRANTED, "exactly the rest");
    let (code, _, text) = process.allocate(2 * MIB);
    assert_eq!(code, outcome::LIMIT);
    assert!(text.contains("the limit is 1 GiB"), "{text}");
    let seen = daemon.workload("grows").expect("there");
    assert_eq!(seen["used_bytes"], GIB);
    let status = daemon.status();
    assert!(status["pool"]["reserved_bytes"].as_u64() >= Some(GIB));
    let metrics = daemon
        .client()
        .ask("GET", "/metrics", crate::client::PATIENCE)
        .expect("answers");
    let metrics = String::from_utf8_lossy(&metrics.body).into_owned();
    let refused = metrics
        .lines()
        .find(|line| line.starts_with("spillway_refused_total{") && line.contains("limit"));
    assert!(
        refused.is_some_and(|line| line.ends_with(" 1")),
        "{metrics}"
    );
}

#[test]
fn a_pool_that_is_full_leaves_memory_pinned() {
    let daemon = Daemon::start(&["--fake-device=4GiB", "--reserve=0", "--pool=256MiB"]);
    let mut process = Process::start(&daemon.dir, register("p", GIB, GIB));
    assert_eq!(
        process.allocate(256 * MIB),
        (outcome::GRANTED, true, String::new())
    );
    let ticket = process.ask_grow(128 * MIB, 128 * MIB);
    let (code, backed, _) = process.grown(ticket);
    assert_eq!((code, backed), (outcome::GRANTED, false));
    // Reserved but unused host memory is taken back for others.
    process.release(256 * MIB);
    let mut other = Process::start(&daemon.dir, register("q", GIB, GIB));
    assert_eq!(
        other.allocate(256 * MIB),
        (outcome::GRANTED, true, String::new())
    );
    assert_eq!(process.desired().host_grant.load(SeqCst), 0);
}

#[test]
fn an_operator_evicts_and_the_next_submit_restores() {
    let daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("w", GIB, GIB));
    process.allocate(512 * MIB);
    let operator = daemon.operate("w", "evict");
    process.leave();
    let (status, body) = operator.join().expect("joined");
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["bytes"], 512 * MIB);
    let seen = daemon.workload("w").expect("there");
    assert_eq!(seen["state"], "evicted");
    assert_eq!(seen["host_bytes"], 512 * MIB);
    assert_eq!(seen["devices"][0]["resident_bytes"], 0);
    assert_eq!(daemon.free(), 4 * GIB);
    // Again: it is there already.
    let (status, body) = daemon.operate("w", "evict").join().expect("joined");
    assert_eq!((status, body["bytes"].as_u64()), (200, Some(0)));
    // Growth while evicted is quota only.
    let (code, _, _) = process.allocate(512 * MIB);
    assert_eq!(code, outcome::GRANTED);
    assert_eq!(daemon.free(), 4 * GIB);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(daemon.state("w"), "evicted", "nobody wants it back yet");
    process.want(true);
    process.come_back();
    daemon.until("resident", |d| d.state("w") == "resident");
    assert_eq!(daemon.workload("w").expect("there")["swaps_in"], 1);
    let events = daemon.events();
    for kind in ["evicting", "evicted", "restoring", "restored"] {
        assert!(
            events.contains(&format!("\"kind\":\"{kind}\"")),
            "{kind} in {events}"
        );
    }
}

#[test]
fn an_operator_restores_before_anybody_submits() {
    let daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("w", GIB, GIB));
    process.allocate(GIB);
    let operator = daemon.operate("w", "evict");
    process.leave();
    assert_eq!(operator.join().expect("joined").0, 200);
    let operator = daemon.operate("w", "restore");
    process.come_back();
    let (status, body) = operator.join().expect("joined");
    assert_eq!((status, body["bytes"].as_u64()), (200, Some(GIB)));
    let (status, body) = daemon.operate("nobody", "restore").join().expect("joined");
    assert_eq!(status, 404, "{body}");
}

#[test]
fn a_busy_process_is_reported_with_409_and_runs_on() {
    let daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("w", GIB, GIB));
    process.allocate(GIB);
    let operator = daemon.operate("w", "evict");
    process.reply(command::EVICT, state::BUSY);
    let (status, body) = operator.join().expect("joined");
    assert_eq!(status, 409);
    assert!(
        body["error"].as_str().expect("text").contains("busy"),
        "{body}"
    );
    process.reply(command::RUN, state::RESIDENT);
    daemon.until("runs on", |d| d.state("w") == "resident");
}

#[test]
fn an_unswappable_process_is_refused_with_the_reason() {
    let daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("w", GIB, GIB));
    process.allocate(GIB);
    process
        .observed()
        .unswappable
        .store(spillway_protocol::page::unswappable::CAPTURE, SeqCst);
    process.want(false);
    daemon.until("seen", |d| {
        d.workload("w").expect("there")["not_swappable"].is_string()
    });
    let (status, body) = daemon.operate("w", "evict").join().expect("joined");
    assert_eq!(status, 409);
    assert!(
        body["error"].as_str().expect("text").contains("capture"),
        "{body}"
    );
}

#[test]
fn an_idle_neighbour_leaves_for_who_wants_in_and_comes_back() {
    let daemon = Daemon::start(&["--fake-device=2GiB", "--reserve=0", "--pool=8GiB"]);
    let mut one = Process::start(&daemon.dir, register("one", 512 * MIB, 1536 * MIB));
    let mut two = Process::start(&daemon.dir, register("two", 512 * MIB, 1536 * MIB));
    assert_eq!(one.allocate(1200 * MIB).0, outcome::GRANTED);
    let ticket = two.ask_grow(1200 * MIB, 1200 * MIB);
    one.leave();
    assert_eq!(two.grown(ticket).0, outcome::GRANTED);
    assert!(two.take(1200 * MIB));
    one.want(true);
    two.leave();
    one.come_back();
    daemon.until("swapped", |d| {
        d.state("one") == "resident" && d.state("two") == "evicted"
    });
}

#[test]
fn several_processes_drain_together() {
    let daemon = Daemon::usual();
    let mut one = Process::start(&daemon.dir, register("ranks", GIB, GIB));
    let mut two = Process::start(&daemon.dir, register("ranks", 0, 0));
    one.allocate(256 * MIB);
    two.allocate(256 * MIB);
    let operator = daemon.operate("ranks", "evict");
    one.reply(command::DRAIN, state::DRAINED);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(
        one.command().code,
        command::DRAIN,
        "not before the other is idle, too"
    );
    two.reply(command::DRAIN, state::DRAINED);
    one.leave();
    two.leave();
    let (status, body) = operator.join().expect("joined");
    assert_eq!(
        (status, body["bytes"].as_u64()),
        (200, Some(512 * MIB)),
        "{body}"
    );
}

#[test]
fn segments_come_populated_sealed_and_bounded() {
    let daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("w", GIB, GIB));
    process.allocate(64 * MIB);
    process.segment(64 * MIB).expect("a segment");
    let file = &process.segments[0].file;
    assert!(nix::unistd::ftruncate(file, 0).is_err(), "sealed");
    let stat = nix::sys::stat::fstat(file).expect("a file");
    assert_eq!(stat.st_size, 64 << 20);
    assert_eq!(stat.st_blocks * 512, 64 << 20, "populated");
    assert_eq!(daemon.status()["pool"]["populated_bytes"], 64 * MIB);
    for (bytes, part) in [(0, "cannot be"), (MIB, "cannot be"), (2 * GIB, "cannot be")] {
        let text = process.segment(bytes).expect_err("refused");
        assert!(text.contains(part), "{text}");
    }
    process
        .segment(GIB)
        .expect("up to one more segment than reserved");
    let text = process.segment(128 * MIB).expect_err("refused");
    assert!(text.contains("reserved"), "{text}");
    let id = process.segments[1].id;
    process
        .wire
        .send(&spillway_protocol::message::FromProcess::SegmentRelease { id });
    daemon.until("emptied", |d| {
        d.status()["pool"]["populated_bytes"] == 64 * MIB
    });
}

#[test]
fn a_former_owner_of_a_segment_reads_zeros() {
    use nix::sys::mman::ProtFlags;
    let daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("w", GIB, GIB));
    process.allocate(16 * MIB);
    process.segment(16 * MIB).expect("a segment");
    let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let segment = process.segments.pop().expect("one");
    let mut kept = crate::client::Map::new(&segment.file, 16 << 20, both).expect("maps");
    kept.bytes().fill(0x5a);
    drop(process);
    daemon.until("emptied", |d| d.status()["pool"]["populated_bytes"] == 0);
    assert!(kept.bytes().iter().all(|byte| *byte == 0));
    let mut next = Process::start(&daemon.dir, register("next", GIB, GIB));
    next.allocate(16 * MIB);
    next.segment(16 * MIB).expect("a segment");
    let mut theirs = crate::client::Map::new(&next.segments[0].file, 16 << 20, both).expect("maps");
    theirs.bytes().fill(0xa5);
    assert!(kept.bytes().iter().all(|byte| *byte == 0), "another file");
}
