//! Who is served first, and who has to leave first.

use std::cmp::Reverse;

use crate::arbiter::Arbiter;
use crate::ledger::{At, Phase};
use crate::types::{DeviceId, Nanos, WorkloadId};

/// A waiter that has waited for this many turns goes before higher priorities of its class, so that
/// priority decides who goes first but never who goes at all.
const OVERDUE_TURNS: u64 = 4;

/// The smaller, the earlier served.
pub(crate) type WaiterRank = (bool, Reverse<bool>, Reverse<i32>, Nanos, WorkloadId);

/// What speaks against evicting a workload for a waiter now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Safety {
    /// Nothing.
    None,
    /// Its turn, which ends then.
    Turn(Nanos),
    /// It does not leave for this waiter at all.
    Always,
}

/// The smaller, the earlier evicted.
type VictimRank = (u8, i32, Nanos, WorkloadId);

/// One that could leave for a waiter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub workload: WorkloadId,
    pub turn_end: Option<Nanos>,
}

impl Arbiter {
    /// Where a waiter stands in the queue.
    pub(crate) fn waiter_rank(
        &self,
        now: Nanos,
        workload: WorkloadId,
        borrows: bool,
        since: Nanos,
    ) -> WaiterRank {
        let overdue = now.saturating_sub(since) > self.config.turn.saturating_mul(OVERDUE_TURNS);
        let priority = if overdue {
            i32::MAX
        } else {
            self.workloads[&workload].spec.priority
        };
        (
            borrows,
            Reverse(overdue),
            Reverse(priority),
            since,
            workload,
        )
    }

    /// Those that could leave for `waiter`, in the order in which they would have to: idle ones,
    /// lower priority first, least recently active first; then active borrowers; then, where requests
    /// are oversubscribed, those within theirs.
    pub(crate) fn candidates(
        &self,
        now: Nanos,
        waiter: WorkloadId,
        borrows: bool,
        devices: &[DeviceId],
    ) -> Vec<Candidate> {
        let mut ranked: Vec<(VictimRank, Candidate)> = Vec::new();
        for (id, workload) in &self.workloads {
            if *id == waiter || !self.is_movable(now, *id) {
                continue;
            }
            let turn_end = match self.safety(now, *id, borrows, devices) {
                Safety::None => None,
                Safety::Turn(end) => Some(end),
                Safety::Always => continue,
            };
            let class = match (self.is_active(now, *id), self.is_borrower(*id)) {
                (false, _) => 0,
                (true, true) => 1,
                (true, false) => 2,
            };
            let rank = (class, workload.spec.priority, self.last_active(*id), *id);
            let candidate = Candidate {
                workload: *id,
                turn_end,
            };
            ranked.push((rank, candidate));
        }
        ranked.sort_unstable_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, candidate)| candidate).collect()
    }

    /// Can be moved at all, by the arbiter's own choice, now.
    fn is_movable(&self, now: Nanos, id: WorkloadId) -> bool {
        let workload = &self.workloads[&id];
        workload.phase == Phase::Resident
            && now >= workload.retry_at
            && self.is_swappable(id)
            && workload.processes.iter().all(|process| {
                let process = &self.processes[process];
                process.live && process.at == At::Resident
            })
    }

    /// No process says that it cannot be moved, and the workload was not registered so.
    #[must_use]
    pub fn is_swappable(&self, id: WorkloadId) -> bool {
        let workload = &self.workloads[&id];
        !workload.spec.never
            && !workload
                .processes
                .iter()
                .any(|process| self.processes[process].activity.unswappable)
    }

    fn safety(
        &self,
        now: Nanos,
        id: WorkloadId,
        waiter_borrows: bool,
        devices: &[DeviceId],
    ) -> Safety {
        if !self.is_active(now, id) {
            return Safety::None;
        }
        let equals = match (waiter_borrows, self.is_borrower(id)) {
            // The guarantee: whoever asks for what is its own does not wait for a borrower's turn.
            (false, true) => return Safety::None,
            (true, false) => false,
            (true, true) => true,
            (false, false) => devices.iter().any(|device| self.is_oversubscribed(*device)),
        };
        if !equals {
            return Safety::Always;
        }
        let end = self.turn_end(id);
        if now >= end {
            Safety::None
        } else {
            Safety::Turn(end)
        }
    }
}
