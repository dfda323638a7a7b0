//! Turns: for how long an active borrower is safe from its equals.
//!
//! Two borrowers that do not fit together and are both always active would otherwise move each other
//! out without end. A turn starts when a workload became resident, or was given space for which
//! others had to leave. In this version a turn has one fixed length ([`crate::Config::turn`]).

use crate::arbiter::Arbiter;
use crate::ledger::Phase;
use crate::types::{DeviceId, Nanos, ProcessId, WorkloadId};

impl Arbiter {
    /// When the workload's turn is over.
    #[must_use]
    pub fn turn_end(&self, id: WorkloadId) -> Nanos {
        self.workloads[&id]
            .turn_start
            .saturating_add(self.config.turn)
    }

    /// Has submitted within the idle time, has work in flight, waits, or has only just come back (and
    /// had no chance to submit yet).
    #[must_use]
    pub fn is_active(&self, now: Nanos, id: WorkloadId) -> bool {
        let workload = &self.workloads[&id];
        let recent = |at: Nanos| now.saturating_sub(at) < self.config.idle_after;
        (workload.phase == Phase::Resident && recent(workload.phase_since))
            || workload
                .processes
                .iter()
                .any(|process| self.is_process_active(now, *process))
            || self
                .growths
                .iter()
                .any(|pending| workload.processes.contains(&pending.growth.process))
    }

    pub(crate) fn is_process_active(&self, now: Nanos, id: ProcessId) -> bool {
        let process = &self.processes[&id];
        let last = process.activity.last_active.max(process.last_growth);
        process.activity.in_flight
            || process.activity.wants
            || (last > 0 && now.saturating_sub(last) < self.config.idle_after)
    }

    /// When it was last seen at work.
    pub(crate) fn last_active(&self, id: WorkloadId) -> Nanos {
        self.workloads[&id]
            .processes
            .iter()
            .map(|process| self.processes[process].activity.last_active)
            .max()
            .unwrap_or(0)
    }

    /// The requests on a device exceed its room, so that even they have to take turns.
    pub(crate) fn is_oversubscribed(&self, device: DeviceId) -> bool {
        let requests = self
            .workloads
            .values()
            .map(|workload| workload.quota(device).request)
            .fold(0, u64::saturating_add);
        requests > self.devices[device].room
    }
}
