//! The shared pages as the arbiter sees them. Every word that a process wrote is loaded once per
//! question; the arbiter clamps what it gets.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use spillway_arbiter::{Activity, DeviceId, Pages, ProcessId};
use spillway_protocol::page::{self, Desired, DesiredDevice, Observed, ObservedDevice};

use super::shared::Shared;

/// A session's two pages.
#[derive(Debug)]
pub struct Pair {
    /// Ours.
    pub desired: Shared<Desired>,
    /// The process's.
    pub observed: Arc<Shared<Observed>>,
    /// Its devices, in its order.
    pub devices: Vec<DeviceId>,
}

impl Pair {
    fn index(&self, device: DeviceId) -> Option<usize> {
        self.devices.iter().position(|at| *at == device)
    }

    /// Our words about a device.
    pub fn desired(&self, device: DeviceId) -> Option<&DesiredDevice> {
        self.desired.devices.get(self.index(device)?)
    }

    /// The process's words about a device.
    pub fn observed(&self, device: DeviceId) -> Option<&ObservedDevice> {
        self.observed.devices.get(self.index(device)?)
    }

    /// All that the process was granted, over its devices.
    pub fn granted(&self) -> u64 {
        self.desired
            .devices
            .iter()
            .map(|device| device.grant.load(SeqCst))
            .fold(0, u64::saturating_add)
    }

    /// Pageable bytes that the process reports, at most as many as it was granted.
    pub fn pageable(&self) -> u64 {
        self.observed.pageable.load(SeqCst).min(self.granted())
    }
}

/// All sessions' pages.
#[derive(Debug, Default)]
pub struct PageTable(pub BTreeMap<ProcessId, Pair>);

impl PageTable {
    fn word(
        &self,
        process: ProcessId,
        device: DeviceId,
        word: impl Fn(&ObservedDevice) -> &AtomicU64,
    ) -> u64 {
        self.0
            .get(&process)
            .and_then(|pair| pair.observed(device))
            .map_or(0, |device| word(device).load(SeqCst))
    }
}

impl Pages for PageTable {
    fn used(&self, process: ProcessId, device: DeviceId) -> u64 {
        self.word(process, device, |at| &at.used)
    }

    fn pinned(&self, process: ProcessId, device: DeviceId) -> u64 {
        self.word(process, device, |at| &at.pinned)
    }

    fn activity(&self, process: ProcessId) -> Activity {
        let Some(pair) = self.0.get(&process) else {
            return Activity::default();
        };
        let page = &pair.observed;
        Activity {
            in_flight: page.in_flight.load(SeqCst) != 0,
            last_active: page.last_active_ns.load(SeqCst),
            wants: page.wants.load(SeqCst) != 0,
            unswappable: page.unswappable.load(SeqCst) != 0,
        }
    }

    fn raise_grant(&mut self, process: ProcessId, device: DeviceId, to: u64) {
        if let Some(at) = self.0.get(&process).and_then(|pair| pair.desired(device)) {
            at.grant.store(to, SeqCst);
        }
    }

    fn lower_grant(&mut self, process: ProcessId, device: DeviceId, target: u64) -> u64 {
        let Some(pair) = self.0.get(&process) else {
            return target;
        };
        match (pair.desired(device), pair.observed(device)) {
            (Some(ours), Some(theirs)) => page::lower_grant(&ours.grant, &theirs.used, target),
            _ => target,
        }
    }
}
