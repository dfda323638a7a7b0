//! Who may come in, and with what.
//!
//! Promises: on every device the sum of requests stays within room x oversubscription; a later
//! process of a workload never widens its share.

use std::collections::BTreeMap;

use spillway_protocol::format_bytes;

use crate::arbiter::Arbiter;
use crate::ledger::{Account, At, Phase, Process, Workload};
use crate::types::{
    Activity, DeviceId, Nanos, Order, Pages, ProcessId, Quota, Resume, WorkloadId, WorkloadSpec,
};

/// The share that settings mean on a device with `room`: only a request: the limit is the same; only
/// a limit: the request is the same; neither: nothing guaranteed, everything allowed. The limit is
/// capped at the room. `never` reserves what it may use.
///
/// # Errors
/// One line with the numbers: the request is above the limit or the room.
pub fn effective_quota(
    request: Option<u64>,
    limit: Option<u64>,
    never: bool,
    room: u64,
) -> Result<Quota, String> {
    let (request, limit) = match (request, limit) {
        (Some(request), Some(limit)) if request > limit => {
            return Err(format!(
                "the request of {} is above the limit of {}: lower SPILLWAY_REQUEST or raise SPILLWAY_LIMIT",
                format_bytes(request),
                format_bytes(limit)
            ));
        }
        (Some(request), Some(limit)) => (request, limit),
        (Some(request), None) => (request, request),
        (None, Some(limit)) => (limit.min(room), limit),
        (None, None) => (0, room),
    };
    if request > room {
        return Err(format!(
            "the request of {} is more than the {} that the device has to give: lower SPILLWAY_REQUEST",
            format_bytes(request),
            format_bytes(room)
        ));
    }
    let limit = limit.min(room);
    Ok(Quota {
        request: if never { limit } else { request },
        limit,
    })
}

impl Arbiter {
    /// Takes a workload in, without a process yet. `guaranteed: false` takes it in even where its
    /// request cannot be kept, with a request of 0 there: for processes that a restarted coordinator
    /// finds running.
    ///
    /// # Errors
    /// One line with the numbers: the requests would exceed the room.
    pub fn add_workload(
        &mut self,
        now: Nanos,
        mut spec: WorkloadSpec,
        guaranteed: bool,
    ) -> Result<WorkloadId, String> {
        self.check_requests(&mut spec.quotas, spec.never, guaranteed)?;
        let id = WorkloadId(self.next_workload);
        self.next_workload += 1;
        let workload = Workload {
            spec,
            processes: std::collections::BTreeSet::new(),
            phase: Phase::Resident,
            phase_since: now,
            undoing: false,
            stuck: false,
            turn_start: now,
            wants_since: None,
            busy_count: 0,
            retry_at: 0,
            evict_operations: Vec::new(),
            restore_operations: Vec::new(),
            lowered_at: None,
        };
        self.workloads.insert(id, workload);
        Ok(id)
    }

    /// Takes a workload out again that never had a process.
    pub fn remove_empty(&mut self, id: WorkloadId) {
        if self
            .workloads
            .get(&id)
            .is_some_and(|workload| workload.processes.is_empty())
        {
            self.workloads.remove(&id);
        }
    }

    /// Adds devices that the workload's earlier processes did not have.
    ///
    /// # Errors
    /// One line with the numbers: the requests would exceed the room.
    pub fn add_devices(
        &mut self,
        id: WorkloadId,
        mut quotas: BTreeMap<DeviceId, Quota>,
        guaranteed: bool,
    ) -> Result<(), String> {
        let Some(workload) = self.workloads.get(&id) else {
            return Err("no such workload".to_owned());
        };
        quotas.retain(|device, _| !workload.spec.quotas.contains_key(device));
        self.check_requests(&mut quotas, workload.spec.never, guaranteed)?;
        if let Some(workload) = self.workloads.get_mut(&id) {
            workload.spec.quotas.extend(quotas);
        }
        Ok(())
    }

    fn check_requests(
        &self,
        quotas: &mut BTreeMap<DeviceId, Quota>,
        never: bool,
        guaranteed: bool,
    ) -> Result<(), String> {
        for (device, quota) in quotas {
            let Some(at) = self.devices.get(*device) else {
                return Err(format!("there is no device {device}"));
            };
            let taken = self
                .workloads
                .values()
                .map(|workload| workload.quota(*device).request)
                .fold(0, u64::saturating_add);
            // What is never moved cannot take turns: it has to fit whatever the others have.
            let factor = if never {
                1.0
            } else {
                self.config.oversubscription
            };
            let most = scaled(at.room, factor);
            if quota.request > 0 && taken.saturating_add(quota.request) > most {
                if !guaranteed {
                    quota.request = 0;
                    continue;
                }
                return Err(format!(
                    "the request of {} does not fit on device {device}: of {} there, {} are already guaranteed to others; lower SPILLWAY_REQUEST, end a workload, or start spillwayd with a higher --oversubscription",
                    format_bytes(quota.request),
                    format_bytes(most),
                    format_bytes(taken)
                ));
            }
        }
        Ok(())
    }

    /// Adds a process to a workload. A fresh one is resident with nothing; its first order is
    /// [`Order::Run`] with epoch 1, or what [`Arbiter::process`] says after a resumption. Returns the
    /// order and its epoch, which the caller publishes.
    pub fn add_process(
        &mut self,
        now: Nanos,
        pages: &mut dyn Pages,
        id: ProcessId,
        workload: WorkloadId,
        devices: &[DeviceId],
        resume: Option<Resume>,
    ) -> (Order, u64) {
        let mut accounts: BTreeMap<DeviceId, Account> = devices
            .iter()
            .map(|device| (*device, Account::default()))
            .collect();
        let evicted = resume.as_ref().is_some_and(|resume| resume.evicted);
        let evicting = resume.as_ref().is_some_and(|resume| resume.evicting) && !evicted;
        let epoch = resume
            .as_ref()
            .map_or(0, |resume| resume.epoch)
            .saturating_add(1);
        let live = resume.is_none();
        let order = if evicted || evicting {
            Order::Evict
        } else {
            Order::Run
        };
        if let Some(resume) = resume {
            for (device, account) in &mut accounts {
                let limit = self.workloads[&workload].quota(*device).limit;
                let room = limit.saturating_sub(self.granted(workload, *device));
                account.grant = resume.grants.get(device).copied().unwrap_or(0).min(room);
            }
        }
        for (device, account) in &accounts {
            if account.grant > 0 {
                pages.raise_grant(id, *device, account.grant);
            }
        }
        let process = Process {
            workload,
            accounts,
            epoch,
            order,
            at: match (evicted, evicting) {
                (true, _) => At::Evicted,
                (_, true) => At::Moving,
                _ => At::Resident,
            },
            live,
            activity: Activity::default(),
            last_growth: 0,
            retry_at: 0,
        };
        self.processes.insert(id, process);
        let first = self.workloads[&workload].processes.is_empty();
        if let Some(entry) = self.workloads.get_mut(&workload) {
            entry.processes.insert(id);
            if (evicted || evicting) && (first || entry.phase == Phase::Resident) {
                // Resident siblings run on; the workload is complete when the evicted are back.
                entry.phase = if first && evicting {
                    Phase::Evicting
                } else {
                    Phase::Evicted
                };
                entry.phase_since = now;
            }
        }
        self.follow(id, workload);
        self.plan(now, pages);
        let process = &self.processes[&id];
        (process.order, process.epoch)
    }

    /// A newcomer of a workload that is about to move goes along.
    fn follow(&mut self, id: ProcessId, workload: WorkloadId) {
        let order = match self.workloads[&workload].phase {
            Phase::Draining => Order::Drain,
            Phase::Evicting => Order::Evict,
            _ => return,
        };
        if let Some(process) = self.processes.get_mut(&id)
            && process.at == At::Resident
        {
            process.order = order;
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a factor on a device's bytes; fractions of a byte do not matter"
)]
fn scaled(bytes: u64, factor: f64) -> u64 {
    if factor <= 1.0 {
        bytes
    } else {
        (bytes as f64 * factor) as u64
    }
}
