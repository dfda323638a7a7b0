//! The command in front of the real daemon, which serves a device that does not exist.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cli::{spillway, text};
use crate::run::library;

struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let child = Command::new(env!("CARGO_BIN_EXE_spillwayd"))
            .args(["--fake-device", "4GiB", "--pool", "64MiB", "--run-dir"])
            .arg(dir.path())
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("spillwayd starts");
        let daemon = Self { child, dir };
        let end = Instant::now() + Duration::from_secs(20);
        while daemon.command(&["status"]).0 != Some(0) {
            assert!(Instant::now() < end, "spillwayd does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon
    }

    fn command(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = spillway(self.dir.path(), arguments)
            .env("SPILLWAY_LIBRARY", library())
            .output()
            .expect("spillway runs");
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("it lives");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn starting_programs_and_asking_leaves_no_trace_of_itself() {
    let daemon = Daemon::start();
    for _ in 0..3 {
        assert_eq!(daemon.command(&["run", "true"]).0, Some(0));
    }
    let (_, report, _) = daemon.command(&["doctor"]);
    assert!(report.contains("ok    a coordinator answers"), "{report}");
    let (code, events, _) = daemon.command(&["events", "--no-follow"]);
    assert_eq!(code, Some(0));
    assert!(!events.contains("refused"), "{events}");
    assert_eq!(events.lines().count(), 1, "{events}");
    let (code, _, error) = daemon.command(&["evict", "nobody"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("nobody"), "{error}");
}

#[test]
fn a_daemon_that_died_or_stopped_is_told_from_a_missing_one() {
    let mut daemon = Daemon::start();
    daemon.signal(Signal::SIGSTOP);
    let (code, _, error) = daemon.command(&["run", "true"]);
    assert_eq!(code, Some(125), "{error}");
    assert!(error.contains("is spillwayd stopped?"), "{error}");
    daemon.signal(Signal::SIGCONT);
    assert_eq!(daemon.command(&["run", "true"]).0, Some(0));

    daemon.signal(Signal::SIGKILL);
    daemon.child.wait().expect("it ended");
    let (code, _, error) = daemon.command(&["status"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("nobody listens on"), "{error}");
    assert_eq!(daemon.command(&["run", "true"]).0, Some(125));
    let (code, report, _) = daemon.command(&["doctor"]);
    assert_eq!(code, Some(1));
    assert!(
        report.contains("FAIL") && report.contains("start it again"),
        "{report}"
    );
}
