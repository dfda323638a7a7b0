//! Growth: what becomes of a request for more memory, apart from where the space comes from.
//!
//! Promises: no grants of a workload ever exceed its limit together with its overhead. A refusal by
//! the limit is final only when no unused grant of a sibling, and no reservation that is about to
//! be undone, could have been the cause. Growth within the request is refused by nothing but the
//! limit, unless even an otherwise empty device could not hold it.

use spillway_protocol::format_bytes;

use crate::arbiter::Arbiter;
use crate::ledger::{At, PROMISE, Phase};
use crate::types::{
    Action, DeviceId, Growth, MILLISECOND, Nanos, Outcome, Pages, ProcessId, WorkloadId,
};

/// After a grant was lowered or promised, a refusal by the limit is looked at once more this much
/// later: a process may be between adding to `used` and taking it off again.
const SETTLE: Nanos = 5 * MILLISECOND;
/// But a refusal is never put off for longer than this.
const SETTLE_AT_MOST: Nanos = 50 * MILLISECOND;

/// A growth that is not answered yet.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub growth: Growth,
    /// Tells it from all others.
    pub number: u64,
    pub since: Nanos,
    /// Since when a refusal by the limit is put off.
    pub settling: Option<Nanos>,
    /// Someone had to make room for it.
    pub displaced: bool,
}

/// What stands between a growth and its answer.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Nothing: this is it.
    Answer(Outcome),
    /// Other threads or siblings are in the middle of something; look again then.
    Settle(Nanos),
    /// The workload has to be somewhere else first: it is on the move, or needs to be resident.
    Elsewhere {
        /// It has to be brought back.
        restore: bool,
    },
    /// Space: the grant is to become `grant`, for which the charge rises by `need`.
    Space {
        grant: u64,
        need: u64,
        /// U would be above R.
        borrows: bool,
    },
}

impl Arbiter {
    /// Looks at one growth. Takes back siblings' unused grants if the limit is in the way.
    pub(crate) fn examine(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        pending: &Pending,
    ) -> Verdict {
        let growth = &pending.growth;
        let device = growth.device;
        let Some(process) = self.processes.get(&growth.process) else {
            return invalid("the process is gone");
        };
        let id = process.workload;
        let Some(account) = process.accounts.get(&device) else {
            return invalid("no such device in this session");
        };
        if growth.bytes == 0 || growth.pinned > growth.bytes {
            return invalid("a growth has to have a size, and a part of it no more than that");
        }
        let quota = self.workloads[&id].quota(device);
        let (used, grant) = (account.used, account.grant);
        // What other threads of the process were promised and are about to take.
        let promised = account.floor(now);
        if growth.bytes > quota.limit {
            return self.limit_answer(id, growth, None);
        }
        let with_promises = promised.saturating_add(growth.bytes);
        let alone = used.saturating_add(growth.bytes);
        if with_promises <= grant {
            return Verdict::Answer(Outcome::Granted);
        }
        let fits = |arbiter: &Self, to: u64| {
            arbiter
                .granted(id, device)
                .saturating_add(to.saturating_sub(grant))
                <= quota.limit
        };
        let mut to = with_promises;
        if !fits(self, to) {
            let over = self
                .granted(id, device)
                .saturating_add(to.saturating_sub(grant))
                - quota.limit;
            self.gather_siblings(now, pages, id, growth.process, device, over);
        }
        if !fits(self, to) {
            if !growth.no_wait && self.is_unsettled(now, id, device, pending.settling) {
                return Verdict::Settle(now + SETTLE);
            }
            to = alone;
        }
        if !fits(self, to) {
            return self.limit_answer(id, growth, None);
        }
        if to <= grant {
            return Verdict::Answer(Outcome::Granted);
        }
        let borrows = self.usage(id, device).saturating_add(growth.bytes) > quota.request;
        if borrows && let Some(text) = self.never_fits(id, growth) {
            return Verdict::Answer(Outcome::Never(text));
        }
        self.where_from(id, growth, to, borrows)
    }

    /// Overhead may grow without asking. Grants that nobody uses make way for it, so that a workload
    /// does not pass its limit by what it was granted before.
    pub(crate) fn keep_limits(&mut self, now: Nanos, pages: &mut dyn Pages) {
        let shares: Vec<(WorkloadId, DeviceId, u64)> = self
            .workloads
            .iter()
            .flat_map(|(id, workload)| {
                let quotas = workload.spec.quotas.iter();
                quotas.map(|(device, quota)| (*id, *device, quota.limit))
            })
            .collect();
        for (id, device, limit) in shares {
            let mut over = self.granted(id, device).saturating_sub(limit);
            if over == 0 {
                continue;
            }
            let processes: Vec<ProcessId> = self.workloads[&id].processes.iter().copied().collect();
            for process in processes {
                over -= self.take_back(now, pages, process, device, over);
            }
        }
    }

    fn where_from(&self, id: WorkloadId, growth: &Growth, to: u64, borrows: bool) -> Verdict {
        let process = &self.processes[&growth.process];
        let workload = &self.workloads[&id];
        let grant = process.accounts[&growth.device].grant;
        match workload.phase {
            Phase::Evicted if process.at == At::Evicted && growth.pinned == 0 && !self.frozen => {
                // Address and quota now, the device at the next restore.
                Verdict::Space {
                    grant: to,
                    need: 0,
                    borrows,
                }
            }
            Phase::Evicted => Verdict::Elsewhere { restore: true },
            Phase::Draining | Phase::Evicting => Verdict::Elsewhere { restore: false },
            Phase::Resident | Phase::Restoring => {
                let more = to - grant;
                let charge = self.charge(id, growth.device);
                let need = if workload.spec.never {
                    let sum = self.granted(id, growth.device).saturating_add(more);
                    sum.saturating_sub(charge)
                } else {
                    more
                };
                Verdict::Space {
                    grant: to,
                    need,
                    borrows,
                }
            }
        }
    }

    /// A growth of an evicted workload takes nothing of the device.
    pub(crate) fn is_on_host(&self, process: ProcessId) -> bool {
        let process = &self.processes[&process];
        process.at == At::Evicted && self.workloads[&process.workload].phase == Phase::Evicted
    }

    fn gather_siblings(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        id: WorkloadId,
        asking: ProcessId,
        device: DeviceId,
        wanted: u64,
    ) {
        let siblings: Vec<ProcessId> = self.workloads[&id]
            .processes
            .iter()
            .copied()
            .filter(|sibling| *sibling != asking)
            .collect();
        let mut taken = 0;
        for sibling in siblings {
            taken += self.take_back(now, pages, sibling, device, wanted - taken);
            if taken >= wanted {
                return;
            }
        }
    }

    fn is_unsettled(
        &self,
        now: Nanos,
        id: WorkloadId,
        device: DeviceId,
        since: Option<Nanos>,
    ) -> bool {
        let workload = &self.workloads[&id];
        let lowered = workload
            .lowered_at
            .is_some_and(|at| now.saturating_sub(at) < SETTLE);
        let promised = workload.processes.iter().any(|process| {
            self.processes[process]
                .accounts
                .get(&device)
                .is_some_and(|account| account.floor(now) > account.used)
        });
        (lowered || promised) && now.saturating_sub(since.unwrap_or(now)) < SETTLE_AT_MOST
    }

    fn limit_answer(&self, id: WorkloadId, growth: &Growth, why: Option<&str>) -> Verdict {
        let limit = self.workloads[&id].quota(growth.device).limit;
        Verdict::Answer(Outcome::Limit(format!(
            "{} more asked with {} in use on device {}: the limit is {}{}",
            format_bytes(growth.bytes),
            format_bytes(self.usage(id, growth.device)),
            growth.device,
            format_bytes(limit),
            why.unwrap_or_default(),
        )))
    }

    /// Why some workload could not run at all after this growth.
    fn never_fits(&self, id: WorkloadId, growth: &Growth) -> Option<String> {
        let device = growth.device;
        let room = self.devices[device].room;
        for (other, workload) in &self.workloads {
            let own = *other == id;
            // Growth that can be moved away again is in nobody's way but its owner's.
            if !own && growth.pinned == 0 || !workload.spec.quotas.contains_key(&device) {
                continue;
            }
            let grown = if own { growth.bytes } else { 0 };
            let needs = self
                .usage(*other, device)
                .saturating_add(grown)
                .max(workload.quota(device).request);
            let stays = self
                .workloads
                .keys()
                .filter(|y| *y != other)
                .map(|y| {
                    let pinned = if *y == id { growth.pinned } else { 0 };
                    self.unmovable(*y, device).saturating_add(pinned)
                })
                .fold(0, u64::saturating_add);
            if needs.saturating_add(stays) > room {
                return Some(format!(
                    "{} more asked: {} would need {} on device {}, where {} of {} cannot be moved out of its way",
                    format_bytes(growth.bytes),
                    workload.spec.name,
                    format_bytes(needs),
                    device,
                    format_bytes(stays),
                    format_bytes(room),
                ));
            }
        }
        None
    }

    /// Even with everybody else on the host it would not fit: others' overhead has outgrown what was
    /// left for it.
    pub(crate) fn cannot_hold(&self, id: WorkloadId, device: DeviceId, need: u64) -> bool {
        let stays = self
            .workloads
            .keys()
            .filter(|other| **other != id)
            .map(|other| self.unmovable(*other, device))
            .fold(0, u64::saturating_add);
        self.charge(id, device)
            .saturating_add(need)
            .saturating_add(stays)
            > self.devices[device].room
    }

    /// Raises the grant as examined, with some slack if nobody is in need of it.
    pub(crate) fn grant_growth(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        pending: &Pending,
        to: u64,
        plenty: bool,
    ) {
        let growth = &pending.growth;
        let id = self.processes[&growth.process].workload;
        let slack = if plenty {
            self.slack(id, growth, to)
        } else {
            0
        };
        self.raise(pages, growth.process, growth.device, to + slack);
        self.promise(now, growth, to);
        if pending.displaced
            && let Some(workload) = self.workloads.get_mut(&id)
        {
            workload.turn_start = now;
        }
        self.answer(growth, Outcome::Granted);
    }

    /// Leaves a grant alone for a moment, so that who asked can take it.
    pub(crate) fn promise(&mut self, now: Nanos, growth: &Growth, to: u64) {
        // Who waited long for it must not look idle at the very moment it gets it.
        if let Some(process) = self.processes.get_mut(&growth.process) {
            process.last_growth = now;
        }
        let account = self
            .processes
            .get_mut(&growth.process)
            .and_then(|process| process.accounts.get_mut(&growth.device));
        if let Some(account) = account {
            let before = if now < account.promised_until {
                account.promised
            } else {
                0
            };
            account.promised = before.max(to);
            account.promised_until = now + PROMISE;
        }
    }

    /// A grant somewhat above what was asked saves round trips; never so much that the device gets
    /// short or the workload passes its limit.
    fn slack(&self, id: WorkloadId, growth: &Growth, to: u64) -> u64 {
        let device = growth.device;
        if self.is_on_host(growth.process) {
            return 0;
        }
        let grant = self.processes[&growth.process].accounts[&device].grant;
        let granted = self
            .granted(id, device)
            .saturating_add(to.saturating_sub(grant));
        let below_limit = self.workloads[&id]
            .quota(device)
            .limit
            .saturating_sub(granted);
        let needed = to.saturating_sub(grant);
        let free = u64::try_from(self.free(device))
            .unwrap_or(0)
            .saturating_sub(needed);
        let keep = self.devices[device].room / 8;
        self.config
            .slack
            .min(below_limit)
            .min(free.saturating_sub(keep))
    }

    pub(crate) fn answer(&mut self, growth: &Growth, outcome: Outcome) {
        self.actions.push(Action::Grown {
            process: growth.process,
            ticket: growth.ticket,
            outcome,
        });
    }
}

fn invalid(text: &str) -> Verdict {
    Verdict::Answer(Outcome::Invalid(text.to_owned()))
}
