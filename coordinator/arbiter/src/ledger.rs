//! The accounts: who holds what, and what that leaves.
//!
//! Promises: [`Arbiter::free`] is room minus everything charged, and the only figure from which
//! space is given. A charge drops only when all of a workload is on the host, or when what a dead
//! process held was seen to be free.

use std::collections::{BTreeMap, BTreeSet};

use crate::arbiter::Arbiter;
use crate::types::{
    Activity, DeviceId, MILLISECOND, Nanos, OperationId, Order, Pages, ProcessId, Quota,
    WorkloadId, WorkloadSpec,
};

/// For how long a fresh grant is left to the process that asked for it. Longer than a process needs
/// from the answer to its reservation, short enough not to be felt.
pub(crate) const PROMISE: Nanos = 20 * MILLISECOND;

/// One device.
#[derive(Debug)]
pub(crate) struct Device {
    pub room: u64,
    pub external: u64,
    /// What the dead held, until it is seen to be free: by the number given out.
    pub returning: BTreeMap<u64, u64>,
}

/// A process's account on one device.
#[derive(Debug, Default)]
pub(crate) struct Account {
    pub grant: u64,
    pub overhead: u64,
    /// Clamped to the grant.
    pub used: u64,
    /// Clamped to used.
    pub pinned: u64,
    /// A growth was granted up to here; left alone until the time beside it.
    pub promised: u64,
    pub promised_until: Nanos,
}

impl Account {
    /// Below this the grant must not be lowered.
    pub fn floor(&self, now: Nanos) -> u64 {
        if now < self.promised_until {
            self.used.max(self.promised.min(self.grant))
        } else {
            self.used
        }
    }
}

/// How far a process is with its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// All of it on the device.
    Resident,
    /// Idle behind a closed gate.
    Drained,
    /// Pageable memory on the host.
    Evicted,
    /// On its way.
    Moving,
}

#[derive(Debug)]
pub(crate) struct Process {
    pub workload: WorkloadId,
    pub accounts: BTreeMap<DeviceId, Account>,
    pub epoch: u64,
    pub order: Order,
    pub at: At,
    /// `false`: resumed, and not yet known to look at its new page; its grants stay as they are.
    pub live: bool,
    pub activity: Activity,
    pub last_growth: Nanos,
    /// A resident newcomer of an evicted workload could not be evicted; not before this again.
    pub retry_at: Nanos,
}

/// Where a workload is, as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// All of it on the device, running.
    Resident,
    /// All its processes are closing their gates.
    Draining,
    /// Moving to the host.
    Evicting,
    /// On the host.
    Evicted,
    /// Moving back.
    Restoring,
}

#[derive(Debug)]
pub(crate) struct Workload {
    pub spec: WorkloadSpec,
    pub processes: BTreeSet<ProcessId>,
    pub phase: Phase,
    pub phase_since: Nanos,
    /// An eviction that was given up is being undone: not a swap.
    pub undoing: bool,
    pub stuck: bool,
    /// Start of the turn: became resident, or was given space that others had to leave.
    pub turn_start: Nanos,
    /// Since when it wants to be back.
    pub wants_since: Option<Nanos>,
    /// Evictions in a row that were given up.
    pub busy_count: u32,
    /// Not to be evicted by the arbiter's own choice before this.
    pub retry_at: Nanos,
    pub evict_operations: Vec<OperationId>,
    pub restore_operations: Vec<OperationId>,
    /// The last time one of its grants was lowered.
    pub lowered_at: Option<Nanos>,
}

impl Workload {
    pub fn quota(&self, device: DeviceId) -> Quota {
        self.spec.quotas.get(&device).copied().unwrap_or_default()
    }
}

/// Bytes as the difference of two figures.
pub(crate) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl Arbiter {
    /// Reads the pages of all processes once. Everything later in this event uses these figures.
    pub(crate) fn observe(&mut self, now: Nanos, pages: &dyn Pages) {
        for (id, process) in &mut self.processes {
            process.activity = pages.activity(*id);
            process.activity.last_active = process.activity.last_active.min(now);
            for (device, account) in &mut process.accounts {
                account.used = pages.used(*id, *device).min(account.grant);
                account.pinned = pages.pinned(*id, *device).min(account.used);
            }
        }
    }

    /// Physical bytes set aside for a process.
    fn process_charge(&self, id: ProcessId, device: DeviceId, resident: bool) -> u64 {
        let process = &self.processes[&id];
        let Some(account) = process.accounts.get(&device) else {
            return 0;
        };
        let evicted =
            self.workloads[&process.workload].phase == Phase::Evicted && process.at == At::Evicted;
        let own = if evicted && !resident {
            account.pinned
        } else {
            account.grant
        };
        own.saturating_add(account.overhead)
    }

    fn charge_as(&self, id: WorkloadId, device: DeviceId, resident: bool) -> u64 {
        let workload = &self.workloads[&id];
        let sum = workload
            .processes
            .iter()
            .map(|process| self.process_charge(*process, device, resident))
            .fold(0, u64::saturating_add);
        if workload.spec.never {
            sum.max(workload.quota(device).request)
        } else {
            sum
        }
    }

    /// Physical bytes set aside for a workload on a device.
    #[must_use]
    pub fn charge(&self, id: WorkloadId, device: DeviceId) -> u64 {
        self.charge_as(id, device, false)
    }

    /// What its restore adds to the charge.
    pub(crate) fn restore_need(&self, id: WorkloadId, device: DeviceId) -> u64 {
        self.charge_as(id, device, true)
            .saturating_sub(self.charge(id, device))
    }

    /// What its eviction takes off the charge.
    pub(crate) fn release(&self, id: WorkloadId, device: DeviceId) -> u64 {
        let workload = &self.workloads[&id];
        if workload.spec.never || workload.phase == Phase::Evicted {
            return 0;
        }
        workload
            .processes
            .iter()
            .filter_map(|process| self.processes[process].accounts.get(&device))
            .map(|account| account.grant - account.pinned)
            .fold(0, u64::saturating_add)
    }

    /// All physical bytes set aside on a device, those of the dead included.
    #[must_use]
    pub fn charged(&self, device: DeviceId) -> u64 {
        let dead = self.devices[device].returning.values().sum::<u64>();
        self.workloads
            .keys()
            .map(|workload| self.charge(*workload, device))
            .fold(dead, u64::saturating_add)
    }

    /// Room minus everything charged. Below zero when measured overhead exceeds what is left.
    #[must_use]
    pub fn free(&self, device: DeviceId) -> i64 {
        let at = &self.devices[device];
        signed(at.room) - signed(at.external) - signed(self.charged(device))
    }

    /// U: what a workload uses, overhead included, resident or not.
    #[must_use]
    pub fn usage(&self, id: WorkloadId, device: DeviceId) -> u64 {
        self.accounts(id, device)
            .map(|account| account.used.saturating_add(account.overhead))
            .fold(0, u64::saturating_add)
    }

    /// What a workload may come to use without asking, overhead included.
    pub(crate) fn granted(&self, id: WorkloadId, device: DeviceId) -> u64 {
        self.accounts(id, device)
            .map(|account| account.grant.saturating_add(account.overhead))
            .fold(0, u64::saturating_add)
    }

    /// What of a workload cannot leave the device.
    pub(crate) fn unmovable(&self, id: WorkloadId, device: DeviceId) -> u64 {
        let workload = &self.workloads[&id];
        let held = self
            .accounts(id, device)
            .map(|account| account.pinned.saturating_add(account.overhead))
            .fold(0, u64::saturating_add);
        if workload.spec.never {
            held.max(workload.quota(device).request)
        } else {
            held
        }
    }

    fn accounts(&self, id: WorkloadId, device: DeviceId) -> impl Iterator<Item = &Account> {
        self.workloads[&id]
            .processes
            .iter()
            .filter_map(move |process| self.processes[process].accounts.get(&device))
    }

    /// U > R somewhere: it runs on what others do not need.
    #[must_use]
    pub fn is_borrower(&self, id: WorkloadId) -> bool {
        let workload = &self.workloads[&id];
        workload
            .spec
            .quotas
            .iter()
            .any(|(device, quota)| self.usage(id, *device) > quota.request)
    }

    /// Raises a grant and publishes it.
    pub(crate) fn raise(
        &mut self,
        pages: &mut dyn Pages,
        process: ProcessId,
        device: DeviceId,
        to: u64,
    ) {
        let account = self
            .processes
            .get_mut(&process)
            .and_then(|p| p.accounts.get_mut(&device));
        if let Some(account) = account
            && to > account.grant
        {
            account.grant = to;
            pages.raise_grant(process, device, to);
        }
    }

    /// Takes back at most `most` bytes of a process's unused grant; returns how many it were.
    pub(crate) fn take_back(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        id: ProcessId,
        device: DeviceId,
        most: u64,
    ) -> u64 {
        let Some(process) = self.processes.get_mut(&id).filter(|p| p.live) else {
            return 0;
        };
        let Some(account) = process.accounts.get_mut(&device) else {
            return 0;
        };
        let spare = account.grant - account.floor(now).min(account.grant);
        if spare == 0 || most == 0 {
            return 0;
        }
        let before = account.grant;
        let stands = pages.lower_grant(id, device, before - spare.min(most));
        account.grant = stands.min(before);
        account.used = account.used.min(account.grant);
        account.pinned = account.pinned.min(account.used);
        let taken = before - account.grant;
        if taken > 0
            && let Some(workload) = self.workloads.get_mut(&process.workload)
        {
            workload.lowered_at = Some(now);
        }
        taken
    }

    /// Takes unused grants back on a device until `wanted` bytes came together or none are left.
    /// Those with the most go first, so that few are disturbed. The process for whose growth it is
    /// done is left out: what it has unused is a part of that growth already.
    pub(crate) fn gather(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        device: DeviceId,
        wanted: u64,
        except: Option<ProcessId>,
    ) -> u64 {
        let mut spare: Vec<(u64, ProcessId)> = self
            .processes
            .iter()
            .filter(|(id, process)| process.live && Some(**id) != except)
            // What the evicted have unused is not on the device.
            .filter(|(_, process)| process.at != At::Evicted)
            .filter_map(|(id, process)| {
                let account = process.accounts.get(&device)?;
                let spare = account.grant.saturating_sub(account.floor(now));
                (spare > 0).then_some((spare, *id))
            })
            .collect();
        spare.sort_unstable_by(|a, b| b.cmp(a));
        let mut taken = 0;
        for (_, id) in spare {
            if taken >= wanted {
                break;
            }
            taken += self.take_back(now, pages, id, device, wanted - taken);
        }
        taken
    }

    /// Takes back all that the workload's processes have unused: before it moves in or has moved
    /// out, nothing is to be carried that nobody uses.
    pub(crate) fn trim(&mut self, now: Nanos, pages: &mut dyn Pages, id: WorkloadId) {
        let processes: Vec<ProcessId> = self.workloads[&id].processes.iter().copied().collect();
        for process in processes {
            let devices: Vec<DeviceId> =
                self.processes[&process].accounts.keys().copied().collect();
            for device in devices {
                self.take_back(now, pages, process, device, u64::MAX);
            }
        }
    }
}
