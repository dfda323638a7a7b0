//! The plan: one pass over all waiters. The only place where space is given and victims are chosen.
//!
//! Promises: a waiter is served from what is free beyond what earlier waiters are about to get. No
//! workload is moved unless the waiter for whom it moves fits afterwards, and none that could have
//! stayed. A waiter that only turns stand in the way of keeps its claim until they are over.

use std::collections::{BTreeMap, BTreeSet};

use spillway_protocol::format_bytes;

use crate::arbiter::Arbiter;
use crate::growth::{Pending, Verdict};
use crate::ledger::{At, Phase, signed};
use crate::order::{Candidate, WaiterRank};
use crate::types::{DeviceId, Nanos, Outcome, Pages, ProcessId, WorkloadId};

/// One that waits.
#[derive(Clone, Copy, Debug)]
enum Waiter {
    /// An evicted workload that wants back.
    Restore(WorkloadId),
    /// The growth with this number.
    Growth(u64),
}

/// What a pass has given away, but is not in the ledger yet.
#[derive(Debug, Default)]
struct Pass {
    /// By device: will be free soon.
    coming: BTreeMap<DeviceId, u64>,
    /// By device: is spoken for by waiters that could not be served yet.
    reserved: BTreeMap<DeviceId, u64>,
    /// Victims that wait for the end of their turn.
    claimed: BTreeSet<WorkloadId>,
}

impl Pass {
    /// What a waiter may take now, given what is free.
    fn now(&self, device: DeviceId, free: i64) -> i64 {
        let coming = self.coming.get(&device).copied().unwrap_or(0);
        let reserved = self.reserved.get(&device).copied().unwrap_or(0);
        free - signed(reserved.saturating_sub(coming))
    }

    /// What it may count on once everything that is on the move has arrived.
    fn later(&self, device: DeviceId, free: i64) -> i64 {
        let coming = self.coming.get(&device).copied().unwrap_or(0);
        let reserved = self.reserved.get(&device).copied().unwrap_or(0);
        free + signed(coming) - signed(reserved)
    }

    fn reserve(&mut self, device: DeviceId, bytes: u64) {
        let entry = self.reserved.entry(device).or_default();
        *entry = entry.saturating_add(bytes);
    }
}

/// How a waiter got on with its space.
#[derive(Debug, PartialEq, Eq)]
enum Space {
    /// It is free.
    Free,
    /// It will be, without further doing.
    Coming(String),
    /// Nobody can make room as things are.
    None(String),
}

impl Arbiter {
    /// Serves whom it can, moves whom it must.
    pub(crate) fn plan(&mut self, now: Nanos, pages: &mut dyn Pages) {
        self.observe(now, pages);
        self.wake_at = Nanos::MAX;
        self.waiting.clear();
        self.keep_limits(now, pages);
        self.check_deadlines(now);
        self.begin_ordered_evictions(now);
        self.settle_newcomers(now);
        self.note_wishes(now);
        let mut pass = self.new_pass();
        for (_, waiter) in self.waiters(now) {
            match waiter {
                Waiter::Restore(id) => self.serve_restore(now, pages, &mut pass, id),
                Waiter::Growth(number) => self.serve_growth(now, pages, &mut pass, number),
            }
        }
        self.plan_wakeup(now);
    }

    fn begin_ordered_evictions(&mut self, now: Nanos) {
        let due: Vec<WorkloadId> = self
            .workloads
            .iter()
            .filter(|(_, workload)| {
                workload.phase == Phase::Resident
                    && !workload.evict_operations.is_empty()
                    && workload.processes.iter().all(|p| self.processes[p].live)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.begin_evict(now, id, "an operator asked for it".to_owned());
        }
    }

    fn note_wishes(&mut self, now: Nanos) {
        let ids: Vec<WorkloadId> = self.workloads.keys().copied().collect();
        for id in ids {
            let wants = self.wants_back(id);
            if let Some(workload) = self.workloads.get_mut(&id) {
                match workload.phase {
                    Phase::Evicted if wants => {
                        workload.wants_since.get_or_insert(now);
                    }
                    // On its way: the wish stands until it has arrived.
                    Phase::Restoring => {}
                    _ => workload.wants_since = None,
                }
            }
        }
    }

    fn wants_back(&self, id: WorkloadId) -> bool {
        let workload = &self.workloads[&id];
        !workload.restore_operations.is_empty()
            || workload
                .processes
                .iter()
                .any(|process| self.processes[process].activity.wants)
            || self.growths.iter().any(|pending| {
                workload.processes.contains(&pending.growth.process)
                    && (pending.growth.pinned > 0
                        || self.processes[&pending.growth.process].at != At::Evicted)
            })
    }

    fn new_pass(&self) -> Pass {
        let mut pass = Pass::default();
        for (device, at) in self.devices.iter().enumerate() {
            let dead = at.returning.values().sum::<u64>();
            let leaving: u64 = self
                .workloads
                .iter()
                .filter(|(_, w)| matches!(w.phase, Phase::Draining | Phase::Evicting))
                .map(|(id, _)| self.release(*id, device))
                .sum();
            pass.coming.insert(device, dead.saturating_add(leaving));
        }
        pass
    }

    fn waiters(&self, now: Nanos) -> Vec<(WaiterRank, Waiter)> {
        let mut waiters = Vec::new();
        for (id, workload) in &self.workloads {
            if let (Phase::Evicted, Some(since), false) =
                (workload.phase, workload.wants_since, self.frozen)
            {
                let rank = self.waiter_rank(now, *id, self.is_borrower(*id), since);
                waiters.push((rank, Waiter::Restore(*id)));
            }
        }
        for pending in &self.growths {
            let growth = &pending.growth;
            let id = self.processes[&growth.process].workload;
            let after = self.usage(id, growth.device).saturating_add(growth.bytes);
            let borrows = after > self.workloads[&id].quota(growth.device).request;
            let rank = self.waiter_rank(now, id, borrows, pending.since);
            waiters.push((rank, Waiter::Growth(pending.number)));
        }
        waiters.sort_by_key(|(rank, _)| *rank);
        waiters
    }

    fn serve_restore(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        pass: &mut Pass,
        id: WorkloadId,
    ) {
        // Only what is used needs to come back.
        self.trim(now, pages, id);
        let needs = self.restore_needs(id);
        let borrows = self.is_borrower(id);
        match self.make_space(now, pages, pass, (id, None), borrows, &needs) {
            Space::Free => self.begin_restore(now, id),
            Space::Coming(why) | Space::None(why) => {
                self.waiting.insert(id, why);
            }
        }
    }

    fn serve_growth(&mut self, now: Nanos, pages: &mut dyn Pages, pass: &mut Pass, number: u64) {
        let Some(index) = self.growths.iter().position(|p| p.number == number) else {
            return;
        };
        let pending = self.growths[index].clone();
        let growth = pending.growth;
        let id = self.processes[&growth.process].workload;
        let overdue = now.saturating_sub(pending.since) >= self.config.growth_wait;
        let verdict = self.examine(now, pages, &pending);
        if !matches!(verdict, Verdict::Settle(_)) {
            self.growths[index].settling = None;
        }
        let (why, borrows) = match verdict {
            Verdict::Answer(outcome) => {
                self.growths.remove(index);
                if outcome == Outcome::Granted {
                    let account = &self.processes[&growth.process].accounts[&growth.device];
                    let to = account.floor(now).saturating_add(growth.bytes);
                    self.promise(now, &growth, to.min(account.grant));
                }
                self.answer(&growth, outcome);
                return;
            }
            Verdict::Settle(at) => {
                self.growths[index].settling.get_or_insert(now);
                self.wake_at = self.wake_at.min(at);
                return;
            }
            Verdict::Elsewhere { restore } => {
                let why = if restore {
                    "its memory to come back"
                } else {
                    "its own eviction to end"
                };
                (why.to_owned(), self.growth_borrows(&pending))
            }
            Verdict::Space { .. } if self.frozen => (
                "the processes that the restarted coordinator knew".to_owned(),
                false,
            ),
            Verdict::Space {
                grant,
                need,
                borrows,
            } => {
                if self.is_on_host(growth.process) {
                    self.growths.remove(index);
                    self.grant_growth(now, pages, &pending, grant, false);
                    return;
                }
                let needs = [(growth.device, need)];
                let waiter = (id, Some(growth.process));
                match self.make_space(now, pages, pass, waiter, borrows, &needs) {
                    Space::Free => {
                        self.growths.remove(index);
                        let plenty = pass.reserved.values().all(|bytes| *bytes == 0);
                        self.grant_growth(now, pages, &pending, grant, plenty);
                        return;
                    }
                    Space::Coming(why) => {
                        self.growths[index].displaced = true;
                        (why, borrows)
                    }
                    Space::None(why) => {
                        let hopeless = overdue && self.cannot_hold(id, growth.device, need);
                        (why, borrows || hopeless)
                    }
                }
            }
        };
        if growth.no_wait || (overdue && borrows) {
            self.growths.remove(index);
            let text = format!(
                "{} more asked: {} is waiting for {why}",
                format_bytes(growth.bytes),
                self.workloads[&id].spec.name,
            );
            self.answer(&growth, Outcome::Waited(text));
            return;
        }
        self.waiting.insert(id, why);
    }

    fn growth_borrows(&self, pending: &Pending) -> bool {
        let growth = &pending.growth;
        let id = self.processes[&growth.process].workload;
        self.usage(id, growth.device).saturating_add(growth.bytes)
            > self.workloads[&id].quota(growth.device).request
    }

    /// Finds space for a waiter: free, taken back, on its way, or from victims that it sends away.
    fn make_space(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        pass: &mut Pass,
        (id, asking): (WorkloadId, Option<ProcessId>),
        borrows: bool,
        needs: &[(DeviceId, u64)],
    ) -> Space {
        let mut short_now = false;
        for (device, need) in needs {
            let mut lacking = signed(*need) - pass.now(*device, self.free(*device));
            if lacking > 0 {
                let wanted = u64::try_from(lacking).unwrap_or(0);
                self.gather(now, pages, *device, wanted, asking);
                lacking = signed(*need) - pass.now(*device, self.free(*device));
            }
            short_now |= lacking > 0;
        }
        if !short_now {
            return Space::Free;
        }
        let lacking: Vec<(DeviceId, u64)> = needs
            .iter()
            .filter_map(|(device, need)| {
                let short = signed(*need) - pass.later(*device, self.free(*device));
                u64::try_from(short)
                    .ok()
                    .filter(|s| *s > 0)
                    .map(|s| (*device, s))
            })
            .collect();
        if lacking.is_empty() {
            for (device, need) in needs {
                pass.reserve(*device, *need);
            }
            return Space::Coming("space that is being freed".to_owned());
        }
        self.displace(now, pass, id, borrows, needs, &lacking)
    }

    fn displace(
        &mut self,
        now: Nanos,
        pass: &mut Pass,
        id: WorkloadId,
        borrows: bool,
        needs: &[(DeviceId, u64)],
        lacking: &[(DeviceId, u64)],
    ) -> Space {
        let devices: Vec<DeviceId> = lacking.iter().map(|(device, _)| *device).collect();
        let mut candidates = self.candidates(now, id, borrows, &devices);
        candidates.retain(|candidate| !pass.claimed.contains(&candidate.workload));
        let ready: Vec<Candidate> = candidates
            .iter()
            .copied()
            .filter(|candidate| candidate.turn_end.is_none())
            .collect();
        if let Some(victims) = self.choose(&ready, lacking) {
            let why = format!("{} needs its space", self.workloads[&id].spec.name);
            let names = self.names(&victims);
            for victim in victims {
                for device in 0..self.devices.len() {
                    let release = self.release(victim.workload, device);
                    *pass.coming.entry(device).or_default() += release;
                }
                self.begin_evict(now, victim.workload, why.clone());
            }
            for (device, need) in needs {
                pass.reserve(*device, *need);
            }
            return Space::Coming(format!("{names} to move to the host"));
        }
        if let Some(victims) = self.choose(&candidates, lacking) {
            let names = self.names(&victims);
            let mut left: BTreeMap<DeviceId, u64> = needs.iter().copied().collect();
            for victim in &victims {
                pass.claimed.insert(victim.workload);
                for (device, bytes) in &mut left {
                    *bytes = bytes.saturating_sub(self.release(victim.workload, *device));
                }
            }
            for (device, bytes) in left {
                pass.reserve(device, bytes);
            }
            if let Some(end) = victims.iter().filter_map(|victim| victim.turn_end).max() {
                self.wake_at = self.wake_at.min(end);
            }
            return Space::Coming(format!("the turn of {names} to end"));
        }
        Space::None(self.why_not(now, id, borrows, lacking))
    }

    /// The first candidates that cover what is lacking, without those that turn out not to be needed;
    /// `None` if all of them together do not.
    fn choose(
        &self,
        candidates: &[Candidate],
        lacking: &[(DeviceId, u64)],
    ) -> Option<Vec<Candidate>> {
        let covered = |chosen: &[Candidate], (device, bytes): &(DeviceId, u64)| {
            let released: u64 = chosen
                .iter()
                .map(|candidate| self.release(candidate.workload, *device))
                .fold(0, u64::saturating_add);
            released >= *bytes
        };
        let mut chosen: Vec<Candidate> = Vec::new();
        for candidate in candidates {
            let helps = lacking.iter().any(|need| {
                !covered(&chosen, need) && self.release(candidate.workload, need.0) > 0
            });
            if helps {
                chosen.push(*candidate);
            }
        }
        if !lacking.iter().all(|need| covered(&chosen, need)) {
            return None;
        }
        for index in (0..chosen.len()).rev() {
            let mut without = chosen.clone();
            without.remove(index);
            if lacking.iter().all(|need| covered(&without, need)) {
                chosen = without;
            }
        }
        Some(chosen)
    }

    fn names(&self, victims: &[Candidate]) -> String {
        let names: Vec<&str> = victims
            .iter()
            .map(|victim| self.workloads[&victim.workload].spec.name.as_str())
            .collect();
        names.join(", ")
    }

    /// For people: who is in the way.
    fn why_not(
        &self,
        now: Nanos,
        id: WorkloadId,
        borrows: bool,
        lacking: &[(DeviceId, u64)],
    ) -> String {
        let Some((device, bytes)) = lacking.first() else {
            return "space".to_owned();
        };
        let mut holders = Vec::new();
        for (other, workload) in &self.workloads {
            if *other == id || self.charge(*other, *device) == 0 {
                continue;
            }
            let reason = if workload.phase == Phase::Evicted || !self.is_swappable(*other) {
                "cannot be moved"
            } else if now < workload.retry_at {
                "did not drain"
            } else if workload.phase != Phase::Resident {
                "is on the move"
            } else if borrows && self.is_active(now, *other) && !self.is_borrower(*other) {
                "is active within its request"
            } else {
                "is not enough"
            };
            holders.push(format!("{} {reason}", workload.spec.name));
        }
        format!(
            "{} on device {device} ({})",
            format_bytes(*bytes),
            holders.join(", ")
        )
    }

    fn plan_wakeup(&mut self, now: Nanos) {
        let mut at = self.wake_at;
        for pending in &self.growths {
            let end = pending.since.saturating_add(self.config.growth_wait);
            if end > now {
                at = at.min(end);
            }
        }
        for (id, workload) in &self.workloads {
            if !workload.stuck {
                at = at.min(self.deadline(*id));
            }
            if !self.waiting.is_empty() && workload.retry_at > now {
                at = at.min(workload.retry_at);
            }
        }
        self.wake_at = at;
    }
}
