//! What a process can do with the pages it was given.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering::SeqCst;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::mman::ProtFlags;
use nix::unistd::ftruncate;
use spillway_protocol::page::PAGE_BYTES;

use crate::client::{GIB, MIB, Map, Process, register};
use crate::host::Daemon;

#[test]
fn the_desired_page_cannot_be_written_through_any_path() {
    let daemon = Daemon::usual();
    let process = Process::start(&daemon.dir, register("w", GIB, GIB));
    let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    assert!(
        Map::new(&process.desired_file, PAGE_BYTES, both).is_err(),
        "mapped writable"
    );
    assert!(Map::new(&process.desired_file, PAGE_BYTES, ProtFlags::PROT_WRITE).is_err());
    assert!(
        nix::unistd::write(&process.desired_file, &[1; 8]).is_err(),
        "written"
    );
    let path = format!("/proc/self/fd/{}", process.desired_file.as_raw_fd());
    if let Ok(mut again) = OpenOptions::new().read(true).write(true).open(&path) {
        assert!(
            again.write_all(&[1; 8]).is_err(),
            "written after opening again"
        );
        assert!(
            Map::new(&again, PAGE_BYTES, both).is_err(),
            "mapped after opening again"
        );
        assert!(ftruncate(&again, 0).is_err());
    }
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert!(
        fallocate(&process.desired_file, hole, 0, 4096).is_err(),
        "punched"
    );
    let clear = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE);
    assert!(
        fcntl(process.desired_file.as_fd(), clear).is_err(),
        "sealed further"
    );
    assert_eq!(process.desired().devices[0].limit.load(SeqCst), GIB);
}

#[test]
fn the_observed_page_cannot_be_resized_under_the_daemon() {
    let daemon = Daemon::usual();
    let process = Process::start(&daemon.dir, register("w", GIB, GIB));
    assert!(ftruncate(&process.observed_file, 0).is_err());
    assert!(ftruncate(&process.observed_file, 8192).is_err());
    daemon.status();
}

/// Whatever stands in the observed page, the daemon's own figures stay within what it granted.
#[test]
fn lies_in_the_observed_page_gain_nothing() {
    let daemon = Daemon::usual();
    let mut liar = Process::start(&daemon.dir, register("liar", GIB, 2 * GIB));
    liar.allocate(512 * MIB);
    for lie in [u64::MAX, u64::MAX / 2, 1 << 63, 0] {
        let page = liar.observed();
        let device = &page.devices[0];
        for word in [
            &device.used,
            &device.resident,
            &device.pinned,
            &device.demand,
        ] {
            word.store(lie, SeqCst);
        }
        for word in [
            &page.state,
            &page.calls,
            &page.in_flight,
            &page.last_active_ns,
            &page.host_bytes,
            &page.pageable,
            &page.bytes_out,
            &page.bytes_in,
            &page.swaps_out,
            &page.blocked_ns,
            &page.last_out_ns,
            &page.unknown_entries,
            &page.changes_begun,
        ] {
            word.store(lie, SeqCst);
        }
        liar.want(lie % 2 == 1);
        let ticket = liar.ask_grow(GIB, GIB);
        liar.grown(ticket);
        let seen = daemon.workload("liar").expect("there");
        assert!(seen["used_bytes"].as_u64() <= Some(2 * GIB), "{seen}");
        assert!(liar.grant() <= 2 * GIB);
        let status = daemon.status();
        assert!(
            status["devices"][0]["granted_bytes"].as_u64() <= Some(2 * GIB),
            "{status}"
        );
    }
    // Its neighbours get what is theirs.
    let mut honest = Process::start(&daemon.dir, register("honest", 2 * GIB, 2 * GIB));
    assert_eq!(honest.allocate(2 * GIB).0, 0);
}
