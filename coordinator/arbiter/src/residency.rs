//! Where a workload is, and how it gets elsewhere.
//!
//! Promises: at most one move of a workload is under way. Nothing of a workload with several
//! processes is moved before all of them are idle behind closed gates. Its charge drops only when
//! all of it is on the host, so that a move can always be undone without asking anybody for space.
//! A process that does not answer holds nobody but itself.

use crate::arbiter::Arbiter;
use crate::ledger::{At, Phase};
use crate::types::{
    Action, DeviceId, Nanos, Note, OperationId, Order, Pages, ProcessId, Report, SECOND, WorkloadId,
};

/// The slowest move that is still believed to be one: nanoseconds per byte (256 MiB/s).
const SLOWEST_NANOS_PER_BYTE: u64 = 4;
/// Added to the drain deadline for everything else that a process may have to do.
const GRACE: Nanos = 10 * SECOND;
/// After the first eviction that was given up, the next is tried this much later, then twice that ...
const RETRY_FIRST: Nanos = SECOND;
/// ... up to this.
const RETRY_MOST: Nanos = 30 * SECOND;
/// Evictions given up in a row after which a workload counts as one that does not drain.
const STUCK_AFTER: u32 = 3;

impl Arbiter {
    fn order(&mut self, id: ProcessId, order: Order) {
        if let Some(process) = self.processes.get_mut(&id) {
            process.epoch += 1;
            process.order = order;
            self.actions.push(Action::Order {
                process: id,
                epoch: process.epoch,
                order,
            });
        }
    }

    pub(crate) fn note(&mut self, workload: WorkloadId, note: Note) {
        self.actions.push(Action::Note { workload, note });
    }

    fn enter(&mut self, now: Nanos, id: WorkloadId, phase: Phase) {
        if let Some(workload) = self.workloads.get_mut(&id) {
            workload.phase = phase;
            workload.phase_since = now;
            workload.stuck = false;
        }
    }

    fn members(&self, id: WorkloadId) -> Vec<ProcessId> {
        self.workloads[&id].processes.iter().copied().collect()
    }

    /// Starts to move a resident workload to the host.
    pub(crate) fn begin_evict(&mut self, now: Nanos, id: WorkloadId, why: String) {
        let members = self.members(id);
        let (order, phase) = if members.len() > 1 {
            (Order::Drain, Phase::Draining)
        } else {
            (Order::Evict, Phase::Evicting)
        };
        self.enter(now, id, phase);
        self.note(id, Note::Evicting { why });
        for process in members {
            self.order(process, order);
        }
    }

    /// Starts to move an evicted workload back. The caller has made sure that its need is free.
    pub(crate) fn begin_restore(&mut self, now: Nanos, id: WorkloadId) {
        self.enter(now, id, Phase::Restoring);
        self.note(id, Note::Restoring);
        if let Some(workload) = self.workloads.get_mut(&id) {
            workload.undoing = false;
        }
        for process in self.members(id) {
            self.order(process, Order::Run);
            if let Some(process) = self.processes.get_mut(&process) {
                process.at = At::Moving;
            }
        }
    }

    /// A process reports how far it is. Reports about anything but its newest order are old news.
    pub(crate) fn apply_report(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        id: ProcessId,
        epoch: u64,
        report: Report,
    ) {
        let Some(process) = self.processes.get_mut(&id) else {
            return;
        };
        if process.epoch != epoch {
            return;
        }
        let workload = process.workload;
        match (process.order, report) {
            (Order::Drain, Report::Drained) => process.at = At::Drained,
            (Order::Evict, Report::Evicted) => process.at = At::Evicted,
            (Order::Run, Report::Resident) => process.at = At::Resident,
            (Order::Drain | Order::Evict, Report::Moving) => process.at = At::Moving,
            (Order::Drain | Order::Evict, Report::Busy | Report::Failed) => {
                self.give_up(now, workload, id, report);
                return;
            }
            // A gate that was drained for an eviction that follows, a state from before the order:
            // nothing that ends anything.
            _ => return,
        }
        self.advance(now, pages, workload);
    }

    /// Goes on to the next phase if all processes have reached the end of this one.
    pub(crate) fn advance(&mut self, now: Nanos, pages: &mut dyn Pages, id: WorkloadId) {
        let workload = &self.workloads[&id];
        let all = |at: At| {
            workload
                .processes
                .iter()
                .all(|p| self.processes[p].at == at)
        };
        let took = now.saturating_sub(workload.phase_since);
        match workload.phase {
            Phase::Draining if all(At::Drained) => {
                // The clock of the whole eviction keeps running.
                let since = workload.phase_since;
                self.enter(now, id, Phase::Evicting);
                if let Some(workload) = self.workloads.get_mut(&id) {
                    workload.phase_since = since;
                }
                for process in self.members(id) {
                    self.order(process, Order::Evict);
                }
            }
            Phase::Evicting if all(At::Evicted) => {
                self.enter(now, id, Phase::Evicted);
                self.trim(now, pages, id);
                if let Some(workload) = self.workloads.get_mut(&id) {
                    workload.busy_count = 0;
                    workload.wants_since = None;
                }
                self.note(id, Note::Evicted { took });
                self.end_operations(id, true, &Ok(true));
            }
            Phase::Restoring if all(At::Resident) => self.end_restore(now, id, took),
            _ => {}
        }
    }

    fn end_restore(&mut self, now: Nanos, id: WorkloadId, took: Nanos) {
        self.enter(now, id, Phase::Resident);
        let Some(workload) = self.workloads.get_mut(&id) else {
            return;
        };
        let wanted = workload.wants_since.take();
        let undone = std::mem::take(&mut workload.undoing);
        if undone {
            // It never left: its turn goes on.
            self.end_operations(id, false, &Ok(false));
        } else {
            workload.turn_start = now;
            let waited = wanted.map_or(took, |since| now.saturating_sub(since));
            self.note(id, Note::Restored { took, waited });
            self.end_operations(id, false, &Ok(true));
        }
        // An operator asked for the eviction while it was coming back.
        if !self.workloads[&id].evict_operations.is_empty() {
            self.begin_evict(now, id, "an operator asked for it".to_owned());
        }
    }

    /// Undoes an eviction: everybody runs on.
    fn give_up(&mut self, now: Nanos, id: WorkloadId, culprit: ProcessId, report: Report) {
        let again_in = self.cool_down(now, id);
        let note = if report == Report::Failed {
            Note::Failed {
                process: culprit,
                again_in,
            }
        } else {
            Note::Busy {
                process: culprit,
                again_in,
            }
        };
        self.note(id, note);
        if self.workloads[&id].phase == Phase::Evicted {
            // A newcomer of an evicted workload that could not follow it: it alone runs on.
            self.order(culprit, Order::Run);
            if let Some(process) = self.processes.get_mut(&culprit) {
                process.at = At::Resident;
                process.retry_at = now + again_in;
            }
            return;
        }
        self.undo(now, id);
        let text = if report == Report::Failed {
            "its memory could not be moved; see `spillway events`"
        } else {
            "busy: it did not become idle within the drain deadline"
        };
        self.end_operations(id, true, &Err(text.to_owned()));
        let workload = &self.workloads[&id];
        if workload.busy_count >= STUCK_AFTER {
            let text = format!(
                "{} did not become idle in {} evictions in a row",
                workload.spec.name, workload.busy_count
            );
            self.stuck(id, culprit, text);
        }
    }

    fn undo(&mut self, now: Nanos, id: WorkloadId) {
        self.enter(now, id, Phase::Restoring);
        if let Some(workload) = self.workloads.get_mut(&id) {
            workload.undoing = true;
        }
        for process in self.members(id) {
            self.order(process, Order::Run);
            if let Some(process) = self.processes.get_mut(&process) {
                process.at = At::Moving;
            }
        }
    }

    fn cool_down(&mut self, now: Nanos, id: WorkloadId) -> Nanos {
        let Some(workload) = self.workloads.get_mut(&id) else {
            return RETRY_FIRST;
        };
        let again_in = RETRY_FIRST
            .saturating_mul(1 << workload.busy_count.min(10))
            .min(RETRY_MOST);
        workload.busy_count = workload.busy_count.saturating_add(1);
        workload.retry_at = now + again_in;
        again_in
    }

    fn stuck(&mut self, id: WorkloadId, process: ProcessId, text: String) {
        self.note(id, Note::Stuck { process, text });
        if self.config.kill_stuck {
            self.actions.push(Action::Kill { process });
        }
    }

    /// Gives up on moves that take too long.
    pub(crate) fn check_deadlines(&mut self, now: Nanos) {
        let ids: Vec<WorkloadId> = self.workloads.keys().copied().collect();
        for id in ids {
            if self.workloads[&id].stuck || now < self.deadline(id) {
                continue;
            }
            let phase = self.workloads[&id].phase;
            let late = |at: At| match phase {
                Phase::Draining => at != At::Drained,
                Phase::Evicting => at != At::Evicted,
                _ => at != At::Resident,
            };
            let members = self.members(id);
            let Some(culprit) = members.iter().find(|p| late(self.processes[p].at)) else {
                continue;
            };
            let culprit = *culprit;
            let seconds = now.saturating_sub(self.workloads[&id].phase_since) / SECOND;
            let name = self.workloads[&id].spec.name.clone();
            match phase {
                Phase::Draining | Phase::Evicting => {
                    self.cool_down(now, id);
                    self.undo(now, id);
                    let text = format!(
                        "{name} has not carried out an eviction for {seconds} s (stopped?)"
                    );
                    self.end_operations(id, true, &Err(text.clone()));
                    self.stuck(id, culprit, text);
                }
                Phase::Restoring => {
                    if let Some(workload) = self.workloads.get_mut(&id) {
                        workload.stuck = true;
                    }
                    let text = format!("{name} has not come back for {seconds} s (stopped?)");
                    self.note(
                        id,
                        Note::Stuck {
                            process: culprit,
                            text,
                        },
                    );
                }
                Phase::Resident | Phase::Evicted => {}
            }
        }
    }

    /// When a move counts as stuck.
    pub(crate) fn deadline(&self, id: WorkloadId) -> Nanos {
        let workload = &self.workloads[&id];
        if matches!(workload.phase, Phase::Resident | Phase::Evicted) {
            return Nanos::MAX;
        }
        let bytes = workload
            .processes
            .iter()
            .flat_map(|process| self.processes[process].accounts.values())
            .map(|account| account.grant)
            .fold(0, u64::saturating_add);
        workload
            .phase_since
            .saturating_add(2 * self.config.drain_deadline)
            .saturating_add(GRACE)
            .saturating_add(bytes.saturating_mul(SLOWEST_NANOS_PER_BYTE))
    }

    /// Answers the operators that wait for an eviction (`evict`) or a restore.
    pub(crate) fn end_operations(
        &mut self,
        id: WorkloadId,
        evict: bool,
        result: &Result<bool, String>,
    ) {
        let Some(workload) = self.workloads.get_mut(&id) else {
            return;
        };
        let list = if evict {
            &mut workload.evict_operations
        } else {
            &mut workload.restore_operations
        };
        for operation in std::mem::take(list) {
            self.actions.push(Action::OperatorDone {
                operation,
                result: result.clone(),
            });
        }
    }

    /// An operator wants the workload on the host, whatever the rules would say.
    pub(crate) fn operator_evict(&mut self, now: Nanos, id: WorkloadId, operation: OperationId) {
        let done = |result| Action::OperatorDone { operation, result };
        if !self.workloads.contains_key(&id) {
            self.actions.push(done(Err("no such workload".to_owned())));
            return;
        }
        if !self.is_swappable(id) {
            self.actions
                .push(done(Err("it cannot be swapped".to_owned())));
            return;
        }
        let phase = self.workloads[&id].phase;
        if phase == Phase::Evicted {
            self.actions.push(done(Ok(false)));
            return;
        }
        if let Some(workload) = self.workloads.get_mut(&id) {
            workload.evict_operations.push(operation);
        }
        let live = self.members(id).iter().all(|p| self.processes[p].live);
        if phase == Phase::Resident && live {
            self.begin_evict(now, id, "an operator asked for it".to_owned());
        }
    }

    /// An operator wants the workload back before it asks itself.
    pub(crate) fn operator_restore(&mut self, id: WorkloadId, operation: OperationId) {
        let Some(workload) = self.workloads.get_mut(&id) else {
            self.actions.push(Action::OperatorDone {
                operation,
                result: Err("no such workload".to_owned()),
            });
            return;
        };
        if workload.phase == Phase::Resident {
            self.actions.push(Action::OperatorDone {
                operation,
                result: Ok(false),
            });
        } else {
            workload.restore_operations.push(operation);
        }
    }

    /// Newcomers of an evicted workload are resident and would hold space that nobody planned for:
    /// they follow it. A resumed workload whose processes all came back is completed.
    pub(crate) fn settle_newcomers(&mut self, now: Nanos) {
        let newcomers: Vec<ProcessId> = self
            .processes
            .iter()
            .filter(|(_, process)| {
                process.live
                    && process.at == At::Resident
                    && process.order == Order::Run
                    && now >= process.retry_at
                    && !process.activity.unswappable
                    && self.workloads[&process.workload].phase == Phase::Evicted
            })
            .map(|(id, _)| *id)
            .collect();
        for id in newcomers {
            self.order(id, Order::Evict);
        }
    }

    /// What a whole workload would need to be back, per device.
    pub(crate) fn restore_needs(&self, id: WorkloadId) -> Vec<(DeviceId, u64)> {
        self.workloads[&id]
            .spec
            .quotas
            .keys()
            .map(|device| (*device, self.restore_need(id, *device)))
            .filter(|(_, need)| *need > 0)
            .collect()
    }
}
