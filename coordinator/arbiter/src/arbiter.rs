//! The arbiter's state, and the events that it takes.

use std::collections::BTreeMap;

use crate::growth::Pending;
use crate::ledger::{At, Device, Phase, Process, Workload};
use crate::types::{
    Action, Config, DeviceId, Growth, Nanos, OperationId, Order, Outcome, Pages, ProcessId, Quota,
    Report, WorkloadId,
};

/// See the crate's documentation. Every method that takes `pages` ends with a pass of the plan;
/// afterwards [`Arbiter::take_actions`] has what is to be done.
#[derive(Debug)]
pub struct Arbiter {
    pub(crate) config: Config,
    pub(crate) devices: Vec<Device>,
    pub(crate) workloads: BTreeMap<WorkloadId, Workload>,
    pub(crate) processes: BTreeMap<ProcessId, Process>,
    pub(crate) growths: Vec<Pending>,
    pub(crate) actions: Vec<Action>,
    /// For people: what each waits for, as of the last plan.
    pub(crate) waiting: BTreeMap<WorkloadId, String>,
    pub(crate) wake_at: Nanos,
    /// Nothing new is given: a restarted coordinator waits for those who hold something.
    pub(crate) frozen: bool,
    pub(crate) next_workload: u64,
    next_number: u64,
}

/// A workload, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadView {
    /// Where it is.
    pub phase: Phase,
    /// Active now.
    pub active: bool,
    /// What it waits for.
    pub waiting_for: Option<String>,
    /// Its share of each device.
    pub shares: Vec<ShareView>,
}

/// A workload's share of a device, for display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShareView {
    /// Which.
    pub device: DeviceId,
    /// Request and limit.
    pub quota: Quota,
    /// U.
    pub usage: u64,
    /// Sum of grants.
    pub grant: u64,
    /// Sum of pinned bytes.
    pub pinned: u64,
    /// Sum of overhead.
    pub overhead: u64,
    /// Physical bytes set aside.
    pub charge: u64,
}

/// A process, for display and for what the caller publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessView {
    /// Its workload.
    pub workload: WorkloadId,
    /// What it was last told.
    pub order: Order,
    /// When.
    pub epoch: u64,
    /// Carried out.
    pub reached: bool,
}

impl Arbiter {
    /// With devices that have these rooms, in bytes.
    #[must_use]
    pub fn new(config: Config, rooms: &[u64]) -> Self {
        let device = |room: &u64| Device {
            room: *room,
            external: 0,
            returning: BTreeMap::new(),
        };
        Self {
            config,
            devices: rooms.iter().map(device).collect(),
            workloads: BTreeMap::new(),
            processes: BTreeMap::new(),
            growths: Vec::new(),
            actions: Vec::new(),
            waiting: BTreeMap::new(),
            wake_at: Nanos::MAX,
            frozen: false,
            next_workload: 0,
            next_number: 0,
        }
    }

    /// What is to be done since the last call, in order.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Time has passed, or pages may have changed.
    pub fn tick(&mut self, now: Nanos, pages: &mut dyn Pages) {
        self.plan(now, pages);
    }

    /// A process asks for more.
    pub fn grow(&mut self, now: Nanos, pages: &mut dyn Pages, growth: Growth) {
        let Some(process) = self.processes.get_mut(&growth.process) else {
            return;
        };
        process.last_growth = now;
        if !process.accounts.contains_key(&growth.device) {
            let text = "no such device in this session".to_owned();
            self.answer(&growth, Outcome::Invalid(text));
            return;
        }
        let number = self.next_number;
        self.next_number += 1;
        self.growths.push(Pending {
            growth,
            number,
            since: now,
            settling: None,
            displaced: false,
        });
        self.plan(now, pages);
    }

    /// How many growths of a process are not answered yet.
    #[must_use]
    pub fn growths_of(&self, id: ProcessId) -> usize {
        self.growths
            .iter()
            .filter(|pending| pending.growth.process == id)
            .count()
    }

    /// Bytes that a process's unanswered growths will make pageable.
    #[must_use]
    pub fn growing(&self, id: ProcessId) -> u64 {
        self.growths
            .iter()
            .filter(|pending| pending.growth.process == id)
            .map(|pending| pending.growth.bytes - pending.growth.pinned)
            .fold(0, u64::saturating_add)
    }

    /// Submits or waits; unlike [`Arbiter::is_active`] without the grace for newcomers.
    #[must_use]
    pub fn is_working(&self, now: Nanos, id: WorkloadId) -> bool {
        self.workloads.get(&id).is_some_and(|workload| {
            workload
                .processes
                .iter()
                .any(|process| self.is_process_active(now, *process))
        })
    }

    /// A process reports how far it is with the order of `epoch`.
    pub fn report(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        id: ProcessId,
        epoch: u64,
        report: Report,
    ) {
        self.observe(now, pages);
        self.apply_report(now, pages, id, epoch, report);
        self.plan(now, pages);
    }

    /// A resumed process looks at its new page.
    pub fn set_live(&mut self, now: Nanos, pages: &mut dyn Pages, id: ProcessId) {
        if let Some(process) = self.processes.get_mut(&id)
            && !process.live
        {
            process.live = true;
            self.plan(now, pages);
        }
    }

    /// A measurement of a process's overhead on a device.
    pub fn set_overhead(&mut self, id: ProcessId, device: DeviceId, bytes: u64) {
        if let Some(process) = self.processes.get_mut(&id)
            && let Some(account) = process.accounts.get_mut(&device)
        {
            account.overhead = bytes;
        }
    }

    /// What others than the sessions' processes hold of a device's room.
    pub fn set_external(&mut self, device: DeviceId, bytes: u64) {
        if let Some(at) = self.devices.get_mut(device) {
            at.external = bytes;
        }
    }

    /// While frozen nothing new is given.
    pub fn set_frozen(&mut self, now: Nanos, pages: &mut dyn Pages, frozen: bool) {
        self.frozen = frozen;
        self.plan(now, pages);
    }

    /// A process is gone. What it held on the devices stays charged, under the returned number,
    /// until [`Arbiter::returned`]. A workload without processes is gone, too.
    pub fn remove_process(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        id: ProcessId,
    ) -> Vec<(DeviceId, u64, u64)> {
        self.observe(now, pages);
        let Some(process) = self.processes.get(&id) else {
            return Vec::new();
        };
        let workload = process.workload;
        let evicted =
            self.workloads[&workload].phase == Phase::Evicted && process.at == At::Evicted;
        let mut held = Vec::new();
        for (device, account) in &process.accounts {
            let own = if evicted {
                account.pinned
            } else {
                account.grant
            };
            held.push((*device, own.saturating_add(account.overhead)));
        }
        self.processes.remove(&id);
        self.growths.retain(|pending| pending.growth.process != id);
        let mut returning = Vec::new();
        for (device, bytes) in held.into_iter().filter(|(_, bytes)| *bytes > 0) {
            let number = self.next_number;
            self.next_number += 1;
            self.devices[device].returning.insert(number, bytes);
            returning.push((device, number, bytes));
        }
        self.leave(now, pages, workload, id);
        self.plan(now, pages);
        returning
    }

    fn leave(&mut self, now: Nanos, pages: &mut dyn Pages, workload: WorkloadId, id: ProcessId) {
        let empty = self.workloads.get_mut(&workload).is_some_and(|entry| {
            entry.processes.remove(&id);
            entry.processes.is_empty()
        });
        if empty {
            let gone = Err("the workload has ended".to_owned());
            self.end_operations(workload, true, &gone);
            self.end_operations(workload, false, &gone);
            self.workloads.remove(&workload);
            return;
        }
        let entry = &self.workloads[&workload];
        let back = entry.phase == Phase::Evicted
            && entry.processes.iter().all(|p| {
                let process = &self.processes[p];
                process.at == At::Resident && process.order == Order::Run
            });
        if back {
            // Only residents are left of a workload that was partly away.
            if let Some(entry) = self.workloads.get_mut(&workload) {
                entry.phase = Phase::Resident;
                entry.phase_since = now;
                entry.turn_start = now;
            }
            self.end_operations(workload, false, &Ok(false));
        } else {
            self.advance(now, pages, workload);
        }
    }

    /// What a dead process held is free again.
    pub fn returned(&mut self, now: Nanos, pages: &mut dyn Pages, device: DeviceId, number: u64) {
        if let Some(at) = self.devices.get_mut(device)
            && at.returning.remove(&number).is_some()
        {
            self.plan(now, pages);
        }
    }

    /// An operator wants a workload on the host. Answered by [`Action::OperatorDone`].
    pub fn evict(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        id: WorkloadId,
        operation: OperationId,
    ) {
        self.observe(now, pages);
        self.operator_evict(now, id, operation);
        self.plan(now, pages);
    }

    /// An operator wants a workload back. Answered by [`Action::OperatorDone`].
    pub fn restore(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        id: WorkloadId,
        operation: OperationId,
    ) {
        self.operator_restore(id, operation);
        self.plan(now, pages);
    }

    /// An operator no longer waits. What has begun goes on.
    pub fn forget(&mut self, operation: OperationId) {
        for workload in self.workloads.values_mut() {
            workload.evict_operations.retain(|o| *o != operation);
            workload.restore_operations.retain(|o| *o != operation);
        }
    }

    /// When something changes by itself; the caller calls [`Arbiter::tick`] then at the latest.
    #[must_use]
    pub fn wake_at(&self) -> Nanos {
        self.wake_at
    }

    /// Somebody waits, or is on the move: pages are worth looking at often.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.waiting.is_empty()
            || !self.growths.is_empty()
            || self
                .workloads
                .values()
                .any(|w| !matches!(w.phase, Phase::Resident | Phase::Evicted))
    }

    /// A device's room, in bytes.
    #[must_use]
    pub fn room(&self, device: DeviceId) -> u64 {
        self.devices[device].room
    }

    /// Which workload has this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<WorkloadId> {
        self.workloads
            .iter()
            .find(|(_, workload)| workload.spec.name == name)
            .map(|(id, _)| *id)
    }

    /// All workloads.
    pub fn workload_ids(&self) -> impl Iterator<Item = WorkloadId> {
        self.workloads.keys().copied()
    }

    /// A workload's settings.
    #[must_use]
    pub fn spec(&self, id: WorkloadId) -> Option<&crate::WorkloadSpec> {
        self.workloads.get(&id).map(|workload| &workload.spec)
    }

    /// A workload's processes.
    #[must_use]
    pub fn processes_of(&self, id: WorkloadId) -> Vec<ProcessId> {
        self.workloads
            .get(&id)
            .map(|workload| workload.processes.iter().copied().collect())
            .unwrap_or_default()
    }

    /// A process.
    #[must_use]
    pub fn process(&self, id: ProcessId) -> Option<ProcessView> {
        let process = self.processes.get(&id)?;
        let reached = match process.order {
            Order::Run => process.at == At::Resident,
            Order::Drain => process.at == At::Drained,
            Order::Evict => process.at == At::Evicted,
        };
        Some(ProcessView {
            workload: process.workload,
            order: process.order,
            epoch: process.epoch,
            reached,
        })
    }

    /// What a process was granted on a device, and its overhead there.
    #[must_use]
    pub fn account(&self, id: ProcessId, device: DeviceId) -> (u64, u64) {
        self.processes
            .get(&id)
            .and_then(|process| process.accounts.get(&device))
            .map_or((0, 0), |account| (account.grant, account.overhead))
    }

    /// A workload, for display, with what was observed by the last event.
    #[must_use]
    pub fn view(&self, now: Nanos, id: WorkloadId) -> Option<WorkloadView> {
        let workload = self.workloads.get(&id)?;
        let share = |device: &DeviceId| {
            let accounts = || {
                workload
                    .processes
                    .iter()
                    .filter_map(|process| self.processes[process].accounts.get(device))
            };
            ShareView {
                device: *device,
                quota: workload.quota(*device),
                usage: self.usage(id, *device),
                grant: accounts().map(|account| account.grant).sum(),
                pinned: accounts().map(|account| account.pinned).sum(),
                overhead: accounts().map(|account| account.overhead).sum(),
                charge: self.charge(id, *device),
            }
        };
        Some(WorkloadView {
            phase: workload.phase,
            active: self.is_active(now, id),
            waiting_for: self.waiting.get(&id).cloned(),
            shares: workload.spec.quotas.keys().map(share).collect(),
        })
    }
}
