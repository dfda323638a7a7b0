//! The daemon under test, on a device that does not exist.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use spillway_coordinator::api::Client;
use spillway_protocol::names;

use crate::client::{PATIENCE, short};

pub struct Daemon {
    pub dir: PathBuf,
    _temporary: tempfile::TempDir,
    child: Child,
    arguments: Vec<String>,
}

impl Daemon {
    pub fn start(arguments: &[&str]) -> Self {
        let temporary = tempfile::Builder::new()
            .prefix("spw")
            .tempdir_in("/tmp")
            .expect("a directory");
        // Processes of other users have to get in.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(temporary.path(), mode).expect("a mode");
        let dir = short(&temporary.path().join("run"));
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let child = spawn(&dir, &arguments);
        let daemon = Self {
            dir,
            _temporary: temporary,
            child,
            arguments,
        };
        daemon.ready();
        daemon
    }

    /// 4 GiB, nothing reserved, some host memory.
    pub fn usual() -> Self {
        Self::start(&["--fake-device=4GiB", "--reserve=0", "--pool=8GiB"])
    }

    pub fn ready(&self) {
        let end = Instant::now() + PATIENCE;
        while self.try_get("/v1/status").is_none() {
            assert!(Instant::now() < end, "spillwayd does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"))
    }

    /// `kill -9`, and the next one.
    pub fn crash_and_restart(&mut self) {
        self.crash();
        self.restart();
    }

    /// The next one, after this one has ended.
    pub fn restart(&mut self) {
        self.child = spawn(&self.dir, &self.arguments);
        self.ready();
    }

    pub fn crash(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn end(&mut self) -> ExitStatus {
        kill(self.pid(), Signal::SIGTERM).expect("sent");
        self.child.wait().expect("waited for")
    }

    pub fn client(&self) -> Client {
        Client::new(names::api_socket(&self.dir))
    }

    pub fn try_get(&self, path: &str) -> Option<Value> {
        let answer = self.client().ask("GET", path, PATIENCE).ok()?;
        (answer.status == 200)
            .then(|| serde_json::from_slice(&answer.body).ok())
            .flatten()
    }

    pub fn status(&self) -> Value {
        self.try_get("/v1/status").expect("answers")
    }

    pub fn workload(&self, name: &str) -> Option<Value> {
        self.try_get(&format!("/v1/workloads/{name}"))
    }

    pub fn free(&self) -> u64 {
        self.status()["devices"][0]["free_bytes"]
            .as_u64()
            .expect("a number")
    }

    /// Waits until something is so.
    pub fn until(&self, what: &str, so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !so(self) {
            assert!(
                Instant::now() < end,
                "not in time: {what}: {}",
                self.status()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn state(&self, name: &str) -> String {
        self.workload(name)
            .and_then(|w| w["state"].as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    /// Evicts or restores from another thread: the answer comes when it is done.
    pub fn operate(&self, name: &str, what: &str) -> std::thread::JoinHandle<(u16, Value)> {
        let client = self.client();
        let path = format!("/v1/workloads/{name}/{what}?timeout=15");
        std::thread::spawn(move || {
            let answer = client.ask("POST", &path, PATIENCE).expect("answers");
            let body = serde_json::from_slice(&answer.body).unwrap_or(Value::Null);
            (answer.status, body)
        })
    }

    /// All kept events as text.
    pub fn events(&self) -> String {
        let answer = self
            .client()
            .ask("GET", "/v1/events?follow=0", PATIENCE)
            .expect("answers");
        String::from_utf8_lossy(&answer.body).into_owned()
    }

    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("ours")
            .count()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.crash();
        // A snapshot stays after a crash; these are nobody's.
        let name = spillway_coordinator::snapshot::name(&self.dir);
        let _ = nix::sys::mman::shm_unlink(name.as_str());
    }
}

pub fn command(dir: &Path, arguments: &[String]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spillwayd"));
    command
        .arg("--run-dir")
        .arg(dir)
        .args(["--adoption-window=500ms", "--log=warn"])
        .args(arguments)
        .stdin(Stdio::null());
    command
}

fn spawn(dir: &Path, arguments: &[String]) -> Child {
    command(dir, arguments).spawn().expect("spillwayd starts")
}

/// Runs a daemon that is expected to refuse to start; returns what it said.
pub fn refuses(mut command: Command) -> String {
    let mut child = command.stderr(Stdio::piped()).spawn().expect("starts");
    let end = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().expect("ours") {
            break status;
        }
        if Instant::now() > end {
            let _ = child.kill();
            panic!("it runs");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(!status.success());
    let mut text = String::new();
    child
        .stderr
        .take()
        .expect("piped")
        .read_to_string(&mut text)
        .expect("text");
    text
}
