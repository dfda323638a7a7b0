//! Status and metrics, made when somebody asks.

use std::sync::atomic::Ordering::SeqCst;

use spillway_arbiter::{Phase, ProcessId, WorkloadId};
use spillway_protocol::PROTOCOL_VERSION;
use spillway_protocol::page::{State, state, unswappable};

use super::gpus::format_uuid;
use super::main_loop::now;
use super::state::{Daemon, seconds};
use crate::model::{Device, DeviceShare, Metrics, Pool, Process, Status, Workload};

/// Why a process is not swappable, for people; `None`: it is.
#[must_use]
pub fn unswappable_text(bits: u64) -> Option<String> {
    if bits == 0 {
        return None;
    }
    let mut texts: Vec<String> = unswappable::TEXTS
        .iter()
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, text)| (*text).to_owned())
        .collect();
    let known = unswappable::TEXTS.iter().fold(0, |sum, (bit, _)| sum | bit);
    if bits & !known != 0 {
        texts.push(format!(
            "reasons {:#x}, which this version does not know",
            bits & !known
        ));
    }
    Some(texts.join("; "))
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        (part as f64 / whole as f64).min(1.0)
    }
}

impl Daemon {
    /// Everything, as of now.
    pub(super) fn metrics(&mut self) -> Metrics {
        let time = now();
        self.count_activity();
        self.arbiter.tick(time, &mut self.pages);
        let status = self.status();
        let workloads = self
            .workloads
            .values()
            .map(|state| (state.name.clone(), state.metrics.clone()))
            .collect();
        let uptime = time.saturating_sub(self.started);
        Metrics {
            status,
            workloads,
            refused_registrations: self.refused.clone(),
            escapes: self.auditor.counts.clone(),
            device_active_ratio: self
                .devices
                .iter()
                .map(|device| ratio(device.active, uptime))
                .collect(),
        }
    }

    pub(super) fn status(&self) -> Status {
        let mut workloads: Vec<Workload> = self
            .arbiter
            .workload_ids()
            .filter_map(|id| self.workload(id))
            .collect();
        workloads.sort_by(|a, b| a.name.cmp(&b.name));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION,
            instance: format!("{:016x}", self.instance),
            pid: std::process::id(),
            uptime_seconds: seconds(now().saturating_sub(self.started)),
            run_dir: self.run_dir.display().to_string(),
            adopting: self.adopting_until.is_some(),
            devices: (0..self.devices.len())
                .map(|index| self.device(index))
                .collect(),
            pool: Pool {
                capacity_bytes: self.pool.capacity(),
                reserved_bytes: self.pool.reserved(),
                populated_bytes: self.pool.populated(),
            },
            workloads,
            strangers: self.auditor.strangers.clone(),
        }
    }

    fn device(&self, index: usize) -> Device {
        let device = &self.devices[index];
        Device {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            uuid: format_uuid(&device.gpu.uuid),
            name: device.gpu.name.clone(),
            capacity_bytes: device.capacity,
            reserve_bytes: device.reserve,
            room_bytes: self.arbiter.room(index),
            granted_bytes: self.arbiter.charged(index),
            free_bytes: u64::try_from(self.arbiter.free(index)).unwrap_or(0),
            nvml_used_bytes: device.used,
            outside_bytes: self.outside(index),
        }
    }

    /// Why a workload cannot be swapped now; `None`: it can.
    pub(super) fn not_swappable(&self, id: WorkloadId) -> Option<String> {
        let never = self.arbiter.spec(id).is_some_and(|spec| spec.never);
        let bits = self
            .arbiter
            .processes_of(id)
            .iter()
            .filter_map(|process| self.pages.0.get(process))
            .map(|pair| pair.observed.unswappable.load(SeqCst))
            .fold(0, |all, bits| all | bits);
        unswappable_text(if never {
            bits | unswappable::NEVER
        } else {
            bits
        })
    }

    fn workload(&self, id: WorkloadId) -> Option<Workload> {
        let time = now();
        let view = self.arbiter.view(time, id)?;
        let spec = self.arbiter.spec(id)?;
        let state = self.workloads.get(&id)?;
        let counters = self.counters(id);
        let processes = self.arbiter.processes_of(id);
        let devices: Vec<DeviceShare> = view
            .shares
            .iter()
            .map(|share| DeviceShare {
                index: u32::try_from(share.device).unwrap_or(u32::MAX),
                uuid: format_uuid(&self.devices[share.device].gpu.uuid),
                request_bytes: share.quota.request,
                limit_bytes: share.quota.limit,
                used_bytes: share.usage,
                resident_bytes: processes
                    .iter()
                    .map(|process| self.held(*process, share.device))
                    .fold(share.overhead, u64::saturating_add),
                pinned_bytes: share.pinned,
                overhead_bytes: share.overhead,
                grant_bytes: share.grant,
            })
            .collect();
        let pairs = || {
            processes
                .iter()
                .filter_map(|process| self.pages.0.get(process))
        };
        let last = |word: fn(&spillway_protocol::page::Observed) -> u64| {
            pairs().map(|pair| word(&pair.observed)).max().unwrap_or(0)
        };
        let name = match view.phase {
            Phase::Draining | Phase::Evicting => "evicting",
            Phase::Restoring => "restoring",
            _ if view.waiting_for.is_some() => "waiting",
            Phase::Evicted => "evicted",
            Phase::Resident => "resident",
        };
        Some(Workload {
            name: state.name.clone(),
            state: name.to_owned(),
            priority: spec.priority,
            swap: if spec.never { "never" } else { "auto" }.to_owned(),
            active: view.active,
            active_ratio: ratio(state.active, time.saturating_sub(state.since)),
            request_bytes: devices.first().map_or(0, |share| share.request_bytes),
            limit_bytes: devices.first().map_or(0, |share| share.limit_bytes),
            used_bytes: devices.iter().map(|share| share.used_bytes).sum(),
            host_bytes: pairs()
                .map(|pair| pair.observed.host_bytes.load(SeqCst).min(pair.pageable()))
                .fold(0, u64::saturating_add),
            devices,
            swaps_out: counters.swaps_out,
            swaps_in: counters.swaps_in,
            bytes_out: counters.bytes_out,
            bytes_in: counters.bytes_in,
            last_out_seconds: seconds(last(|page| page.last_out_ns.load(SeqCst))),
            last_in_seconds: seconds(last(|page| page.last_in_ns.load(SeqCst))),
            blocked_seconds: seconds(counters.blocked_ns),
            waiting_for: view.waiting_for,
            not_swappable: self.not_swappable(id),
            unknown_entry_points: counters.unknown_entries,
            unknown_entry_point_names: state.unknown_names.iter().cloned().collect(),
            processes: processes
                .iter()
                .filter_map(|id| self.process(*id))
                .collect(),
        })
    }

    fn process(&self, id: ProcessId) -> Option<Process> {
        let session = self.sessions.get(&id)?;
        let pair = self.pages.0.get(&id)?;
        let name = match State::unpack(pair.observed.state.load(SeqCst)).code {
            state::DRAINING => "draining",
            state::DRAINED => "drained",
            state::EVICTING => "evicting",
            state::EVICTED => "evicted",
            state::RESTORING => "restoring",
            _ => "resident",
        };
        Some(Process {
            pid: session.identity.pid,
            uid: session.identity.uid,
            command: session.identity.command.clone(),
            state: name.to_owned(),
        })
    }

    /// Adds up for how long workloads were active.
    pub(super) fn count_activity(&mut self) {
        let time = now();
        let passed = time.saturating_sub(self.counted);
        self.counted = time;
        let mut busy = vec![false; self.devices.len()];
        let ids: Vec<WorkloadId> = self.workloads.keys().copied().collect();
        for id in ids {
            if !self.arbiter.is_working(time, id) {
                continue;
            }
            if let Some(state) = self.workloads.get_mut(&id) {
                state.active += passed;
            }
            for share in self
                .arbiter
                .view(time, id)
                .into_iter()
                .flat_map(|view| view.shares)
            {
                busy[share.device] |= share.usage > 0;
            }
        }
        for (device, busy) in self.devices.iter_mut().zip(busy) {
            if busy {
                device.active += passed;
            }
        }
    }
}
