//! Carrying out what the arbiter decided, and telling people.

use spillway_arbiter::{
    Action, Nanos, Note, OperationId, Order, Outcome, ProcessId, Report, WorkloadId,
};
use spillway_protocol::message::outcome;
use spillway_protocol::page::{command, state};

use super::identity;
use super::main_loop::now;
use super::session::Stage;
use super::state::{Daemon, Operation, Returning, add, seconds};
use crate::model::{ControlError, Done};

/// An order on the wire.
#[must_use]
pub fn code(order: Order) -> u8 {
    match order {
        Order::Run => command::RUN,
        Order::Drain => command::DRAIN,
        Order::Evict => command::EVICT,
    }
}

/// A state from the wire; what is not known counts as resident.
#[must_use]
pub fn report(code: u8) -> Report {
    match code {
        state::DRAINED => Report::Drained,
        state::EVICTED => Report::Evicted,
        state::DRAINING | state::EVICTING | state::RESTORING => Report::Moving,
        state::BUSY => Report::Busy,
        state::FAILED => Report::Failed,
        _ => Report::Resident,
    }
}

impl Daemon {
    /// Carries out everything that the arbiter has decided.
    pub(super) fn apply(&mut self) {
        for action in self.arbiter.take_actions() {
            match action {
                Action::Order {
                    process,
                    epoch,
                    order,
                } => {
                    self.store_command(process, order, epoch);
                    if let Some(session) = self.sessions.get_mut(&process) {
                        session.wake();
                    }
                }
                Action::Grown {
                    process,
                    ticket,
                    outcome,
                } => self.grown(process, ticket, outcome),
                Action::OperatorDone { operation, result } => self.operated(operation, result),
                Action::Kill { process } => self.kill(process),
                Action::Note { workload, note } => self.tell(workload, note),
            }
        }
    }

    fn grown(&mut self, id: ProcessId, ticket: u64, result: Outcome) {
        let backed = self
            .sessions
            .get_mut(&id)
            .and_then(|s| s.live())
            .and_then(|live| live.backed.remove(&ticket))
            .unwrap_or(false);
        let (number, reason, text) = match result {
            Outcome::Granted => {
                if backed {
                    self.host_granted(id);
                }
                return self.send_grown(id, ticket, outcome::GRANTED, backed, String::new());
            }
            Outcome::Limit(text) => (outcome::LIMIT, "limit", text),
            Outcome::Never(text) => (outcome::NEVER, "never", text),
            Outcome::Waited(text) => (outcome::WAITED, "waited", text),
            Outcome::Invalid(text) => (outcome::INVALID, "invalid", text),
        };
        self.send_grown(id, ticket, number, false, text.clone());
        let workload = self
            .sessions
            .get(&id)
            .and_then(|s| s.as_live())
            .map(|l| l.workload);
        let Some(state) = workload.and_then(|workload| self.workloads.get_mut(&workload)) else {
            return;
        };
        let refused = state.metrics.refused.entry(reason.to_owned()).or_default();
        *refused += 1;
        // A program that probes for the largest block that it can get is no news each time.
        if *refused <= 16 || refused.is_power_of_two() {
            let name = state.name.clone();
            let total = *refused;
            let numbers = [("reason", reason.into()), ("total", total.into())];
            self.event("growth_refused", Some(&name), text, &numbers);
        }
    }

    fn kill(&mut self, id: ProcessId) {
        let name = self.name_of_session(id);
        let Some(session) = self.sessions.get(&id) else {
            return;
        };
        let pid = session.identity.pid;
        let text = match &session.identity.pidfd {
            Some(pidfd) if identity::kill(pidfd) => {
                format!("pid {pid} does not drain and was killed (--on-stuck=kill)")
            }
            Some(_) => format!("pid {pid} does not drain and cannot be killed"),
            None => format!("pid {pid} does not drain; without pidfds it is not killed"),
        };
        self.event("killed", name.as_deref(), text, &[("pid", pid.into())]);
    }

    fn tell(&mut self, id: WorkloadId, note: Note) {
        let name = self.name(id);
        let counters = self.counters(id);
        let Some(state) = self.workloads.get_mut(&id) else {
            return;
        };
        let (out, back) = (counters.bytes_out, counters.bytes_in);
        let (kind, text, numbers) = match note {
            Note::Evicting { why } => {
                state.moved_before = (out, back);
                (
                    "evicting",
                    format!("{name} moves to the host: {why}"),
                    Vec::new(),
                )
            }
            Note::Evicted { took } => {
                add(&mut state.metrics.swap_out_seconds, took);
                let bytes = out.saturating_sub(state.moved_before.0);
                (
                    "evicted",
                    format!("{name} is on the host"),
                    moved(bytes, took),
                )
            }
            Note::Restoring => {
                state.moved_before = (out, back);
                ("restoring", format!("{name} moves back"), Vec::new())
            }
            Note::Restored { took, waited } => {
                add(&mut state.metrics.swap_in_seconds, took);
                add(&mut state.metrics.blocked_seconds, waited);
                let bytes = back.saturating_sub(state.moved_before.1);
                let mut numbers = moved(bytes, took);
                numbers.push(("waited_seconds", seconds(waited).into()));
                ("restored", format!("{name} is back"), numbers)
            }
            Note::Busy { process, again_in } => {
                let text = format!(
                    "{name} did not become idle in time and runs on; tried again in {} s at the earliest",
                    seconds(again_in)
                );
                ("busy", text, self.pid_of(process))
            }
            Note::Failed { process, again_in } => {
                let text = format!(
                    "{name} could not be moved and runs on; tried again in {} s at the earliest",
                    seconds(again_in)
                );
                ("failed", text, self.pid_of(process))
            }
            Note::Stuck { process, text } => ("stuck", text, self.pid_of(process)),
        };
        self.event(kind, Some(&name), text, &numbers);
    }

    fn pid_of(&self, id: ProcessId) -> Vec<(&'static str, serde_json::Value)> {
        self.sessions
            .get(&id)
            .map(|session| vec![("pid", session.identity.pid.into())])
            .unwrap_or_default()
    }

    /// Starts an operator's request.
    pub(super) fn operate(&mut self, number: u64, operation: Operation) {
        let Some(id) = self.arbiter.find(&operation.name) else {
            let text = format!(
                "there is no workload {:?}; `spillway status` lists them",
                operation.name
            );
            let _ = operation.reply.try_send(Err(ControlError::NotFound(text)));
            return;
        };
        if operation.evict
            && let Some(why) = self.not_swappable(id)
        {
            let text = format!("{} is not swappable: {why}", operation.name);
            let _ = operation.reply.try_send(Err(ControlError::Conflict(text)));
            return;
        }
        let counters = self.counters(id);
        let evict = operation.evict;
        let before = if evict {
            counters.bytes_out
        } else {
            counters.bytes_in
        };
        let operation = Operation {
            before,
            ..operation
        };
        let number = OperationId(number);
        self.operations.insert(number, operation);
        if evict {
            self.arbiter.evict(now(), &mut self.pages, id, number);
        } else {
            self.arbiter.restore(now(), &mut self.pages, id, number);
        }
    }

    fn operated(&mut self, number: OperationId, result: Result<bool, String>) {
        let Some(operation) = self.operations.remove(&number) else {
            return;
        };
        let counters = self
            .arbiter
            .find(&operation.name)
            .map(|id| self.counters(id))
            .unwrap_or_default();
        let after = if operation.evict {
            counters.bytes_out
        } else {
            counters.bytes_in
        };
        let answer = match result {
            Ok(moved) => Ok(Done {
                bytes: if moved {
                    after.saturating_sub(operation.before)
                } else {
                    0
                },
                seconds: seconds(now().saturating_sub(operation.began)),
                name: operation.name,
            }),
            Err(text) => {
                let text = self.reason_given(&operation.name).unwrap_or(text);
                Err(ControlError::Conflict(format!(
                    "{}: {text}",
                    operation.name
                )))
            }
        };
        let _ = operation.reply.try_send(answer);
    }

    /// What the workload's processes said about the eviction that has just failed: they know what
    /// they waited for.
    fn reason_given(&self, name: &str) -> Option<String> {
        let its_own = |event: &&crate::model::Event| event.workload.as_deref() == Some(name);
        self.events
            .kept()
            .rev()
            .filter(its_own)
            .take_while(|event| event.kind != "evicting")
            .find(|event| {
                let said = ["busy: ", "eviction undone: "];
                event.kind == "note" && said.iter().any(|start| event.text.starts_with(start))
            })
            .map(|event| event.text.clone())
    }

    /// A session is over: its process ended, left, or was sent away.
    pub(super) fn close(&mut self, id: ProcessId) {
        let Some(session) = self.sessions.remove(&id) else {
            return;
        };
        let counters = self.counters_of(id);
        let left = self.arbiter.remove_process(now(), &mut self.pages, id);
        self.pages.0.remove(&id);
        if self.claims.end(id) {
            // Somebody may be left with its memory: now, and when the driver has caught up.
            self.ask_sample();
            self.sample_soon();
        }
        self.overheads.retain(|(of, _), _| *of != id);
        self.sampler.targets.lock().remove(&id);
        self.refreshing
            .retain(|refreshing| refreshing.session != id);
        let pid = session.identity.pid;
        for (device, number, bytes) in left {
            self.returning.push(Returning {
                pid,
                device,
                number,
                bytes,
                since: now(),
            });
        }
        if !self.returning.is_empty() {
            self.ask_sample();
        }
        let why = session.end.as_deref().unwrap_or("ended").to_owned();
        let live = match session.stage {
            Stage::Live(live) => live,
            Stage::Adopting(adopting) => {
                for (_, segment) in adopting.segments {
                    segment.leave();
                }
                return;
            }
            Stage::New | Stage::Held(_) => return,
        };
        self.pool.release(live.host_grant);
        for (_, segment) in live.segments {
            // Who was sent away may still run, with memory on the host alone; it may come back.
            if session.sent_away {
                segment.leave();
            } else {
                self.workshop.discard(segment);
            }
        }
        let name = self.name(live.workload);
        let text = format!(
            "{} (pid {pid}) left {name}: {why}",
            session.identity.command
        );
        self.event("left", Some(&name), text, &[("pid", pid.into())]);
        if let Some(state) = self.workloads.get_mut(&live.workload) {
            state.gone = state.gone.plus(counters);
        }
        if self.arbiter.spec(live.workload).is_none() {
            self.workloads.remove(&live.workload);
        } else {
            self.publish_shares(live.workload);
        }
    }
}

fn moved(bytes: u64, took: Nanos) -> Vec<(&'static str, serde_json::Value)> {
    vec![("bytes", bytes.into()), ("seconds", seconds(took).into())]
}
