//! Ends: of processes, and of the daemon.

use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use spillway_protocol::message::outcome;
use spillway_protocol::page::command;

use crate::client::{GIB, MIB, Process, register};
use crate::host::{Daemon, command as daemon_command, refuses};
use crate::identity::Child;

#[test]
fn kill_9_frees_the_share_although_a_child_inherited_the_socket() {
    let daemon = Daemon::usual();
    let mut child = Child::start(&daemon, "hold-and-fork", &|_| {});
    child.wait_for("READY");
    let sleeper = child.number("CHILD");
    assert_eq!(daemon.free(), GIB, "3 GiB are taken");
    child.kill();
    daemon.until("the share is free", |d| d.free() == 4 * GIB);
    // The child that holds the other end of the socket is still there.
    let alive = nix::sys::signal::kill(nix::unistd::Pid::from_raw(sleeper), None);
    assert!(alive.is_ok());
    let _ = nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(sleeper),
        nix::sys::signal::Signal::SIGKILL,
    );
    assert!(
        daemon.status()["workloads"]
            .as_array()
            .is_some_and(Vec::is_empty)
    );
    Process::start(&daemon.dir, register("next", 4 * GIB, 4 * GIB));
}

/// What [`kill_9_frees_the_share_although_a_child_inherited_the_socket`] runs.
pub fn hold_and_fork(run_dir: &std::path::Path) {
    let mut process = Process::start(run_dir, register("holder", 3 * GIB, 3 * GIB));
    assert_eq!(process.allocate(3 * GIB).0, outcome::GRANTED);
    fcntl(
        process.wire.socket.as_fd(),
        FcntlArg::F_SETFD(FdFlag::empty()),
    )
    .expect("inheritable");
    let mut child = Command::new("sleep")
        .arg("60")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("sleep runs");
    println!("CHILD {}", child.id());
    println!("READY");
    let _ = child.wait();
    drop(process);
}

#[test]
fn after_kill_9_of_the_daemon_everybody_goes_on_with_the_next() {
    let mut daemon = Daemon::usual();
    let mut here = Process::start(&daemon.dir, register("here", GIB, 2 * GIB));
    let mut away = Process::start(&daemon.dir, register("away", GIB, 2 * GIB));
    here.allocate(GIB);
    away.allocate(512 * MIB);
    away.segment(128 * MIB).expect("a segment");
    away.segment(64 * MIB).expect("a segment");
    let operator = daemon.operate("away", "evict");
    away.leave();
    assert_eq!(operator.join().expect("joined").0, 200);
    let (first, epoch) = (here.instance, away.command().epoch);
    daemon.crash_and_restart();
    let mut here = here.resume(&daemon.dir);
    let mut away = away.resume(&daemon.dir);
    assert_ne!(here.instance, first);
    assert!(here.grant() >= GIB, "what it holds it keeps");
    assert_eq!(here.command().code, command::RUN);
    assert_eq!(away.command().code, command::EVICT);
    assert_eq!(away.command().epoch, epoch + 1);
    let status = daemon.status();
    assert_eq!(status["pool"]["populated_bytes"], 192 * MIB);
    assert!(status["pool"]["reserved_bytes"].as_u64() >= Some(1536 * MIB));
    assert_eq!(daemon.state("away"), "evicted");
    // Segments have their old numbers, and new ones do not collide.
    away.segment(64 * MIB).expect("a third");
    let mut ids: Vec<u64> = away.segments.iter().map(|segment| segment.id).collect();
    ids.dedup();
    assert_eq!(ids.len(), 3);
    away.want(true);
    away.come_back();
    daemon.until("back", |d| d.state("away") == "resident");
    assert_eq!(here.allocate(GIB).0, outcome::GRANTED, "and may grow again");
    drop(away);
    daemon.until("its segments are emptied", |d| {
        d.status()["pool"]["populated_bytes"] == 0
    });
}

#[test]
fn a_process_that_was_killed_in_the_middle_of_an_eviction_frees_everything() {
    let daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("w", GIB, GIB));
    process.allocate(GIB);
    let operator = daemon.operate("w", "evict");
    process.told(command::EVICT);
    drop(process);
    let (status, body) = operator.join().expect("joined");
    assert!(status == 409 || status == 404, "{status} {body}");
    daemon.until("free", |d| d.free() == 4 * GIB);
}

#[test]
fn an_end_by_signal_is_clean_and_processes_keep_their_pages() {
    let mut daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("w", GIB, GIB));
    process.allocate(GIB);
    assert!(daemon.end().success());
    assert!(!daemon.dir.join("session/session.sock").exists());
    assert!(!daemon.dir.join("api.sock").exists());
    assert!(process.is_closed());
    assert_eq!(process.grant(), GIB, "the last grant holds");
}

#[test]
fn a_second_daemon_is_refused_and_the_first_unharmed() {
    let daemon = Daemon::usual();
    let text = refuses(daemon_command(
        &daemon.dir,
        &["--fake-device=1GiB".to_owned()],
    ));
    assert!(text.contains("another spillwayd"), "{text}");
    assert!(text.contains(&format!("pid {}", daemon.pid())), "{text}");
    Process::start(&daemon.dir, register("w", GIB, GIB));
}

#[test]
fn without_a_driver_the_message_names_the_library_and_the_remedy() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut command = daemon_command(dir.path(), &[]);
    // An empty directory first: whatever the machine has elsewhere is found all the same, so a real
    // driver makes this test say that it did not run.
    command.env("LD_LIBRARY_PATH", dir.path());
    let real = std::process::Command::new("ldconfig")
        .arg("-p")
        .output()
        .is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains("libnvidia-ml.so.1"));
    if real {
        eprintln!("skipped: this machine has a driver");
        return;
    }
    let text = refuses(command);
    assert!(text.contains("libnvidia-ml.so.1"), "{text}");
    assert!(text.contains("LD_LIBRARY_PATH"), "{text}");
}
