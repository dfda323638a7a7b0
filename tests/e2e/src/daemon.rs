//! A `spillwayd` in a place.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::artifacts::artifact;
use crate::http::{Answer, request};
use crate::place::Place;
use crate::wait::until_within;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);

/// A finished evict or restore.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Operation {
    /// Bytes copied.
    pub bytes: u64,
    /// As the coordinator measured it.
    pub seconds: f64,
}

/// See the module. Killed when dropped.
pub struct Daemon<'a> {
    place: &'a Place,
    child: Child,
}

impl<'a> Daemon<'a> {
    /// Starts it and waits until both sockets answer.
    ///
    /// # Panics
    /// It does not within 20 s, or ends.
    #[must_use]
    pub fn start(place: &'a Place, flags: &[&str]) -> Self {
        let log = std::fs::File::create(place.log("spillwayd")).expect("a log");
        let mut command: Command = place.command(artifact("spillwayd"));
        command.arg("--run-dir").arg(place.run_dir()).args(flags);
        command
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .stdin(Stdio::null());
        let child = command.spawn().expect("spillwayd starts");
        let mut daemon = Self { place, child };
        let session = spillway_protocol::names::session_socket(&place.run_dir());
        until_within(Duration::from_secs(20), "spillwayd answers", || {
            if let Ok(Some(status)) = daemon.child.try_wait() {
                panic!("spillwayd ended: {status}");
            }
            // A socket file may be left over from a killed one: only an answer counts.
            let status = daemon
                .try_request("GET", "/v1/status", Duration::from_secs(5))
                .ok()?;
            let ours = status.json()["pid"].as_u64() == Some(u64::from(daemon.child.id()));
            (status.status == 200 && ours && session.exists()).then_some(())
        });
        daemon
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(0)
    }

    /// `SIGKILL`, and waits for its end.
    pub fn kill(mut self) {
        self.end();
    }

    /// `SIGTERM`, and waits for its end.
    ///
    /// # Panics
    /// It does not end within 10 s.
    pub fn terminate(mut self) {
        self.signal(Signal::SIGTERM);
        until_within(Duration::from_secs(10), "spillwayd ends on SIGTERM", || {
            self.child.try_wait().ok().flatten()
        });
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid()), signal);
    }

    /// One request, whatever its answer.
    ///
    /// # Errors
    /// The socket's.
    pub fn try_request(
        &self,
        method: &str,
        target: &str,
        time: Duration,
    ) -> std::io::Result<Answer> {
        let socket = spillway_protocol::names::api_socket(&self.place.run_dir());
        request(&socket, method, target, time)
    }

    /// One request, whatever its status.
    ///
    /// # Panics
    /// No answer.
    #[must_use]
    pub fn request(&self, method: &str, target: &str) -> Answer {
        self.try_request(method, target, ANSWER)
            .unwrap_or_else(|why| panic!("{method} {target}: {why}"))
    }

    /// The JSON of a 200 answer.
    ///
    /// # Panics
    /// Another status.
    #[must_use]
    pub fn get(&self, target: &str) -> Value {
        let answer = self.request("GET", target);
        assert_eq!(answer.status, 200, "GET {target}: {}", answer.body);
        answer.json()
    }

    /// `GET /v1/status`.
    #[must_use]
    pub fn status(&self) -> Value {
        self.get("/v1/status")
    }

    /// A workload; `None`: there is none of that name.
    ///
    /// # Panics
    /// Any other answer than 200 and 404.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Value> {
        let answer = self.request("GET", &format!("/v1/workloads/{name}"));
        match answer.status {
            200 => Some(answer.json()),
            404 => None,
            other => panic!("/v1/workloads/{name}: {other} {}", answer.body),
        }
    }

    /// A workload that is there.
    ///
    /// # Panics
    /// It is not.
    #[must_use]
    pub fn workload(&self, name: &str) -> Value {
        self.find(name)
            .unwrap_or_else(|| panic!("no workload {name}: {}", self.status()))
    }

    /// The state of a workload: `resident`, ...
    #[must_use]
    pub fn state(&self, name: &str) -> String {
        self.workload(name)["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Waits until a workload is in a state.
    ///
    /// # Panics
    /// It is not within 20 s.
    pub fn await_state(&self, name: &str, state: &str) {
        until_within(
            Duration::from_secs(20),
            &format!("{name} is {state}"),
            || (self.find(name)?["state"] == state).then_some(()),
        );
    }

    /// Waits until a workload is gone.
    ///
    /// # Panics
    /// It is not within 20 s.
    pub fn await_gone(&self, name: &str) {
        until_within(Duration::from_secs(20), &format!("{name} is gone"), || {
            self.find(name).is_none().then_some(())
        });
    }

    /// The kept events.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        let answer = self.request("GET", "/v1/events?follow=0");
        assert_eq!(answer.status, 200, "{}", answer.body);
        let lines = answer.body.lines().filter(|line| !line.trim().is_empty());
        lines
            .map(|line| serde_json::from_str(line).expect("an event is JSON"))
            .collect()
    }

    /// The kept events of a kind, of one workload.
    #[must_use]
    pub fn events_of(&self, workload: &str, kind: &str) -> Vec<Value> {
        let mut events = self.events();
        events.retain(|event| event["workload"] == workload && event["kind"] == kind);
        events
    }

    /// `POST /v1/workloads/{name}/{verb}`, whatever the answer.
    #[must_use]
    pub fn operate(&self, name: &str, verb: &str) -> Answer {
        self.request("POST", &format!("/v1/workloads/{name}/{verb}?timeout=20"))
    }

    /// Evicts a workload.
    ///
    /// # Panics
    /// The answer is not 200.
    pub fn evict(&self, name: &str) -> Operation {
        self.done(name, "evict")
    }

    /// Evicts a workload, again while it is busy, for up to 20 s.
    ///
    /// # Panics
    /// It is still busy then, or another answer.
    pub fn evict_when_idle(&self, name: &str) -> Operation {
        let start = Instant::now();
        loop {
            let answer = self.operate(name, "evict");
            if answer.status == 200 {
                return operation(&answer);
            }
            assert!(
                answer.status == 409 && start.elapsed() < Duration::from_secs(20),
                "evict {name}: {} {}",
                answer.status,
                answer.error()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Restores a workload.
    ///
    /// # Panics
    /// The answer is not 200.
    pub fn restore(&self, name: &str) -> Operation {
        self.done(name, "restore")
    }

    fn done(&self, name: &str, verb: &str) -> Operation {
        let answer = self.operate(name, verb);
        assert_eq!(answer.status, 200, "{verb} {name}: {}", answer.error());
        operation(&answer)
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn operation(answer: &Answer) -> Operation {
    let json = answer.json();
    Operation {
        bytes: json["bytes"].as_u64().expect("bytes"),
        seconds: json["seconds"].as_f64().expect("seconds"),
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
