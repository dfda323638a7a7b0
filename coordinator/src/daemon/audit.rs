//! Who uses a device without an account, or beyond it: carrying out what
//! [`spillway_arbiter::audit`] finds.
//!
//! Promises: nobody is ended but by `--on-escape=kill`, and then never the daemon itself, the first
//! process, a process that draws, or one that is not surely the one that the driver means.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::SeqCst;

use serde_json::Value;
use spillway_arbiter::audit::{Audit, Escape, Member, Shown, Who};
use spillway_arbiter::{DeviceId, MILLISECOND, ProcessId, WorkloadId};
use spillway_protocol::format_bytes;

use super::gpus::format_uuid;
use super::handle::Waker;
use super::identity;
use super::options::OnEscape;
use super::people::{self, People, Person};
use super::sampler::{Held, Sample};
use super::session::Session;
use super::state::Daemon;
use crate::model::Stranger;

/// Processes whose end would be that of others that did nothing: the multi-process service's server.
const SPARED: &str = "nvidia-cuda-mps";

/// What is remembered of escapes.
#[derive(Debug)]
pub struct Auditor {
    audit: Audit,
    people: People,
    /// Escapes since the start, by reason.
    pub counts: BTreeMap<String, u64>,
    /// Confirmed strangers, as of the last sample.
    pub strangers: Vec<Stranger>,
    /// That the driver shows processes that are not to be seen here was said.
    unseen_said: bool,
}

impl Auditor {
    /// Starts the thread that looks at `/proc`.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn start(waker: Waker) -> io::Result<Self> {
        Ok(Self {
            audit: Audit::default(),
            people: People::start(waker)?,
            counts: BTreeMap::new(),
            strangers: Vec::new(),
            unseen_said: false,
        })
    }

    /// Takes in what was found out about strangers.
    pub fn listen(&mut self) {
        self.people.listen();
    }
}

impl Daemon {
    /// Compares a sample with the accounts.
    pub(super) fn audit(&mut self, sample: &Sample) {
        let shown = self.shown(sample);
        let settled = self.adopting_until.is_none();
        let auditor = &mut self.auditor;
        auditor.people.keep(|(pid, born)| {
            let stranger =
                |at: &Shown| matches!(at.who, Who::Stranger { born: b, .. } if b == *born);
            shown.iter().any(|at| at.pid == *pid && stranger(at))
        });
        let escapes = auditor.audit.look(sample.began, settled, &shown);
        let again = auditor.audit.look_again_at();
        if again != u64::MAX {
            self.sample_again = self.sample_again.min(again + MILLISECOND);
        }
        self.list_strangers(&shown);
        for escape in escapes {
            self.escaped(escape, sample);
        }
    }

    /// The sample, with what is known of everybody in it.
    fn shown(&mut self, sample: &Sample) -> Vec<Shown> {
        let mut sessions: BTreeMap<i32, ProcessId> = BTreeMap::new();
        let mut excused: BTreeSet<i32> = self.returning.iter().map(|entry| entry.pid).collect();
        excused.insert(own_pid());
        for (id, session) in &self.sessions {
            if session.as_live().is_some() {
                sessions.insert(session.identity.pid, *id);
            } else {
                excused.insert(session.identity.pid);
            }
        }
        let mut shown = Vec::new();
        for (device, measured) in sample.devices.iter().enumerate() {
            for pid in &measured.compute {
                let all = measured.processes.as_ref();
                let bytes = all.and_then(|all| all.get(pid).copied().flatten());
                let session = sessions.get(pid).copied();
                let member = session.and_then(|id| self.member(id, device, sample));
                let who = match (member, sample.born.get(pid)) {
                    (Some(member), _) => Who::Member(member),
                    _ if excused.contains(pid) => Who::Excused,
                    (None, None) => Who::Unseen,
                    (None, Some(born)) => {
                        let person = self.auditor.people.get((*pid, *born));
                        let library = person.is_none_or(may_return);
                        Who::Stranger {
                            born: *born,
                            // One with a session does not come back: it is on a device that is not
                            // its own.
                            may_return: library && session.is_none(),
                        }
                    }
                };
                shown.push(Shown {
                    pid: *pid,
                    device,
                    bytes,
                    who,
                });
            }
        }
        for session in self.sessions.values_mut() {
            if let Some(live) = session.live()
                && live.measure_asked.is_some_and(|at| at < sample.began)
            {
                live.measure_asked = None;
            }
        }
        shown
    }

    /// A registered process's account on a device; `None`: it has none there.
    fn member(&self, id: ProcessId, device: DeviceId, sample: &Sample) -> Option<Member> {
        let live = self.sessions.get(&id)?.as_live()?;
        let at = self.pages.0.get(&id)?.devices.iter();
        let index = at.copied().position(|at| at == device)?;
        let spec = self.arbiter.spec(live.workload)?;
        let held = sample.held.get(&id).and_then(Option::as_ref);
        let held = held.and_then(|held| held.get(index).copied());
        Some(Member {
            process: id,
            workload: live.workload,
            limit: spec
                .quotas
                .get(&device)
                .map_or(u64::MAX, |quota| quota.limit),
            held: held.map(|held| held.resident),
            maybe: held.map_or(0, |held| self.maybe(id, device, held)),
            covered: self.covered(id, device, held),
            asked: live.measure_asked.is_some(),
        })
    }

    /// What a process may have mapped on a device while somebody else is charged for it.
    fn covered(&self, id: ProcessId, device: DeviceId, held: Option<Held>) -> u64 {
        // It is known only how much was asked about, not what was let go of since.
        let says = held.map_or_else(
            || {
                let pair = self.pages.0.get(&id);
                let at = pair.and_then(|pair| pair.observed(device));
                at.map_or(0, |at| at.maybe.load(SeqCst))
            },
            |held| held.maybe,
        );
        self.claims.covered(id, device).min(says)
    }

    /// What `status` shows of strangers.
    fn list_strangers(&mut self, shown: &[Shown]) {
        let confirmed: BTreeSet<(i32, u64)> = self.auditor.audit.strangers().collect();
        let mut strangers = Vec::new();
        for at in shown {
            let Who::Stranger { born, .. } = at.who else {
                continue;
            };
            if !confirmed.contains(&(at.pid, born)) {
                continue;
            }
            let person = self.auditor.people.get((at.pid, born));
            let person = person.cloned().unwrap_or_default();
            strangers.push(Stranger {
                pid: at.pid,
                uid: person.uid,
                command: person.command,
                container: person.container,
                library: person.loaded.map(|loaded| loaded.library),
                device: u32::try_from(at.device).unwrap_or(u32::MAX),
                uuid: format_uuid(&self.devices[at.device].gpu.uuid),
                bytes: at.bytes,
            });
        }
        self.auditor.strangers = strangers;
    }

    fn escaped(&mut self, escape: Escape, sample: &Sample) {
        match escape {
            Escape::Stranger { pid, born, bytes } => self.stranger(pid, born, bytes, sample),
            Escape::Limit {
                workload,
                device,
                bytes,
                limit,
                process,
            } => self.passed_limit((workload, device), bytes, limit, process, sample),
            Escape::Uncharged {
                process,
                device,
                bytes,
            } => {
                let name = self.name_of_session(process);
                let Some(session) = self.sessions.get(&process) else {
                    return;
                };
                let pid = session.identity.pid;
                let text = format!(
                    "{} (pid {pid}) holds {} more on device {device} than any call of its explains: charged as overhead from now on",
                    session.identity.command,
                    format_bytes(bytes)
                );
                let numbers = [
                    ("pid", pid.into()),
                    ("device", device.into()),
                    ("bytes", bytes.into()),
                ];
                self.tell_escape("uncharged", name.as_deref(), text, &numbers);
            }
            Escape::Unseen { pid } => {
                if !std::mem::replace(&mut self.auditor.unseen_said, true) {
                    let text = format!(
                        "the driver shows a process {pid} that spillwayd cannot see: who it is cannot be told. Run spillwayd in the host's pid namespace"
                    );
                    self.event("note", None, text, &[("pid", pid.into())]);
                }
            }
        }
    }

    fn tell_escape(
        &mut self,
        reason: &str,
        workload: Option<&str>,
        text: String,
        numbers: &[(&str, Value)],
    ) {
        *self.auditor.counts.entry(reason.to_owned()).or_default() += 1;
        let mut all = vec![("reason", Value::from(reason))];
        all.extend_from_slice(numbers);
        self.event("escape", workload, text, &all);
    }

    fn stranger(&mut self, pid: i32, born: u64, bytes: u64, sample: &Sample) {
        let person = self.auditor.people.get((pid, born)).cloned();
        let registered = self
            .sessions
            .values()
            .any(|session| session.identity.pid == pid && session.as_live().is_some());
        let why = match person.as_ref().and_then(|person| person.loaded) {
            _ if registered => "it has registered, but not with that device",
            Some(loaded) if loaded.library => {
                "libspillway.so is loaded in it, but it has no session: SPILLWAY_DISABLE, SPILLWAY_NO_COORDINATOR, or it closed its descriptors"
            }
            Some(_) => "libspillway.so is not loaded in it",
            None => "what is loaded in it cannot be read",
        };
        let who = describe(pid, person.as_ref());
        let text = format!(
            "{who} uses {} of device memory without Spillway: {why}",
            format_bytes(bytes)
        );
        let person = person.unwrap_or_default();
        let numbers = [
            ("pid", pid.into()),
            ("uid", person.uid.into()),
            ("command", person.command.clone().into()),
            ("container", person.container.clone().into()),
            ("bytes", bytes.into()),
        ];
        self.tell_escape("stranger", None, text, &numbers);
        if self.options.on_escape != OnEscape::Kill {
            return;
        }
        let spared = spared(pid, &person.command, sample).or_else(|| {
            let meant = person.loaded.is_some_and(|loaded| loaded.driver);
            if registered {
                Some("it is registered")
            } else if meant {
                None
            } else {
                Some("the driver is not seen in it, so it may be another process of that number")
            }
        });
        let outcome = match spared {
            Some(why) => Err(why),
            None => match same_process(pid, born) {
                Some(pidfd) if identity::kill(&pidfd) => Ok(()),
                Some(_) => Err("spillwayd may not"),
                None => Err("it has ended, or the kernel has no pidfds"),
            },
        };
        self.tell_killed(None, &who, pid, "stranger", outcome);
    }

    fn passed_limit(
        &mut self,
        (workload, device): (WorkloadId, DeviceId),
        bytes: u64,
        limit: u64,
        process: ProcessId,
        sample: &Sample,
    ) {
        let name = self.name(workload);
        let Some(session) = self.sessions.get(&process) else {
            return;
        };
        let (pid, command) = (session.identity.pid, session.identity.command.clone());
        let text = format!(
            "{name} holds {} on device {device} and its limit is {}: most of it by {command} (pid {pid})",
            format_bytes(bytes),
            format_bytes(limit)
        );
        let numbers = [
            ("pid", pid.into()),
            ("device", device.into()),
            ("bytes", bytes.into()),
            ("limit_bytes", limit.into()),
        ];
        self.tell_escape("limit", Some(&name), text, &numbers);
        if self.options.on_escape != OnEscape::Kill {
            return;
        }
        let pidfd = self.sessions.get(&process).and_then(Session::pidfd);
        let outcome = match (spared(pid, &command, sample), pidfd) {
            (Some(why), _) => Err(why),
            (None, Some(pidfd)) if identity::kill(pidfd) => Ok(()),
            (None, Some(_)) => Err("spillwayd may not"),
            (None, None) => Err("the kernel has no pidfds"),
        };
        let who = format!("{command} (pid {pid})");
        self.tell_killed(Some(&name), &who, pid, "limit", outcome);
    }

    fn tell_killed(
        &mut self,
        workload: Option<&str>,
        who: &str,
        pid: i32,
        reason: &str,
        outcome: Result<(), &str>,
    ) {
        let numbers = [("pid", pid.into()), ("reason", reason.into())];
        match outcome {
            Ok(()) => {
                let text = format!("{who} was killed (--on-escape=kill)");
                self.event("killed", workload, text, &numbers);
            }
            Err(why) => {
                let text = format!("{who} is not killed: {why}");
                self.event("note", workload, text, &numbers);
            }
        }
    }

    /// Bytes that confirmed strangers hold on a device.
    pub(super) fn outside(&self, device: DeviceId) -> u64 {
        let here = |stranger: &&Stranger| stranger.device as usize == device;
        let strangers = self.auditor.strangers.iter().filter(here);
        strangers.fold(0, |sum, at| sum.saturating_add(at.bytes.unwrap_or(0)))
    }
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

/// The library is loaded in it, or that cannot be known.
fn may_return(person: &Person) -> bool {
    person.loaded.is_none_or(|loaded| loaded.library)
}

/// Why a process is never ended, whatever it does; `None`: it may be.
fn spared(pid: i32, command: &str, sample: &Sample) -> Option<&'static str> {
    let draws = |measured: &super::gpus::Measured| measured.graphics.contains(&pid);
    if pid == own_pid() || pid <= 1 {
        Some("the node needs it")
    } else if sample.devices.iter().any(draws) {
        Some("it draws, too: somebody may sit before it")
    } else if command.starts_with(SPARED) {
        Some("it serves others")
    } else {
        None
    }
}

/// A process by its number, if it is still the one that was started then.
fn same_process(pid: i32, when: u64) -> Option<OwnedFd> {
    // In this order: what the descriptor means does not change, so if the one that was meant lives
    // after it was made, it means that one.
    let pidfd = identity::open_pidfd(pid)?;
    (people::born(pid) == Some(when)).then_some(pidfd)
}

fn describe(pid: i32, person: Option<&Person>) -> String {
    let Some(person) = person else {
        return format!("pid {pid}");
    };
    let user = person.uid.map(|uid| format!(", user {uid}"));
    let container = person.container.as_ref().map(|name| format!(", {name}"));
    format!(
        "{} (pid {pid}{}{})",
        person.command,
        user.unwrap_or_default(),
        container.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::super::main_loop::now;
    use super::*;

    #[test]
    fn a_number_that_was_given_to_another_is_not_ended() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep runs");
        let pid = i32::try_from(child.id()).expect("a pid");
        let when = people::born(pid).expect("it runs");
        assert!(same_process(pid, when + 1).is_none(), "another process");
        let pidfd = same_process(pid, when).expect("the same");
        assert!(identity::kill(&pidfd));
        let status = child.wait().expect("ours");
        assert!(!status.success());
        assert!(same_process(pid, when).is_none(), "it is gone");
    }

    #[test]
    fn some_are_spared() {
        let sample = |graphics: &[i32]| Sample {
            began: now(),
            devices: vec![super::super::gpus::Measured {
                graphics: graphics.iter().copied().collect(),
                ..Default::default()
            }],
            born: BTreeMap::new(),
            held: BTreeMap::new(),
        };
        let quiet = sample(&[]);
        assert_eq!(spared(4711, "python3", &quiet), None);
        assert!(spared(1, "systemd", &quiet).is_some());
        assert!(spared(0, "", &quiet).is_some());
        assert!(spared(own_pid(), "spillwayd", &quiet).is_some());
        assert!(spared(4711, "nvidia-cuda-mps", &quiet).is_some());
        assert!(spared(4711, "game", &sample(&[4711])).is_some());
    }
}
