//! Writing the snapshot.
//!
//! Promises: the memory is fresh and ours alone (what somebody else put under its name is removed, not
//! reused), and all of it exists before the first write, so that a full `/dev/shm` costs the snapshot
//! and not the daemon. Without it the daemon serves all the same.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{OFlag, posix_fallocate};
use nix::sys::mman::{shm_open, shm_unlink};
use nix::sys::stat::Mode;
use shared_memory::{Shmem, ShmemConf};
use spillway_arbiter::{MILLISECOND, Nanos, SECOND};

use super::events::Events;
use crate::model::{Status, Workload};
use crate::snapshot::layout::{
    MAGIC, MAX_DECISIONS, MAX_DEVICES, MAX_WORKLOADS, Node, STATES, Snapshot, UNKNOWN, VERSION, put,
};
use crate::snapshot::name;

/// With news, published at most this often.
const NEWS_PERIOD: Nanos = 50 * MILLISECOND;
/// Without, this often.
const QUIET_PERIOD: Nanos = SECOND;

/// See the module.
pub struct Publisher {
    memory: Shmem,
    node: Box<Node>,
    sequence: u64,
    published: Nanos,
    events: u64,
}

impl Publisher {
    /// Makes the memory for a run directory.
    ///
    /// # Errors
    /// One line: why there will be no snapshot.
    pub fn new(run_dir: &Path, instance: u64) -> Result<Self, String> {
        let name = name(run_dir);
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            format!("no snapshot in {name}: {what}: {error}")
        };
        match shm_unlink(name.as_str()) {
            Ok(()) | Err(nix::Error::ENOENT) => {}
            Err(error) => return Err(failed("cannot remove the old one", &error)),
        }
        let size = size_of::<Snapshot>();
        let memory = ShmemConf::new()
            .os_id(&name)
            .size(size)
            .create()
            .map_err(|error| failed("cannot make it", &error))?;
        let file = shm_open(name.as_str(), OFlag::O_RDWR, Mode::empty())
            .map_err(|error| failed("cannot open it", &error))?;
        posix_fallocate(&file, 0, i64::try_from(size).unwrap_or(i64::MAX))
            .map_err(|error| failed("/dev/shm has no space for it", &error))?;
        let mut this = Self {
            memory,
            node: Node::zeroed(),
            sequence: 0,
            published: 0,
            events: u64::MAX,
        };
        this.begin(instance);
        Ok(this)
    }

    fn at(&self) -> *mut Snapshot {
        self.memory.as_ptr().cast()
    }

    fn begin(&mut self, instance: u64) {
        let at = self.at();
        // SAFETY: the mapping is as large as a Snapshot, page-aligned, and written by this thread
        // alone; readers take nothing for valid before the magic is there.
        unsafe {
            (&raw mut (*at).version).write(VERSION);
            (&raw mut (*at).pid).write(std::process::id());
            (&raw mut (*at).size).write(size_of::<Snapshot>() as u64);
            (&raw mut (*at).instance).write(instance);
            AtomicU64::from_ptr(&raw mut (*at).magic).store(MAGIC, Ordering::Release);
        }
    }

    /// Whether a publication is due.
    #[must_use]
    pub fn is_due(&self, now: Nanos, busy: bool, events: &Events) -> bool {
        let news = busy || events.count != self.events;
        let period = if news { NEWS_PERIOD } else { QUIET_PERIOD };
        now.saturating_sub(self.published) >= period
    }

    /// Publishes.
    pub fn publish(&mut self, now: Nanos, status: &Status, events: &Events) {
        fill(&mut self.node, status, events);
        self.published = now;
        self.events = events.count;
        self.sequence += 1;
        let at = self.at();
        // SAFETY: as in `begin`. This writes the copy that the sequence does not name; a reader that
        // is still copying it finds the sequence changed afterwards. The release store makes the
        // copy visible before the number that names it.
        unsafe {
            let copies = (&raw mut (*at).copies).cast::<Node>();
            let copy = copies.add(usize::from(self.sequence % 2 == 1));
            std::sync::atomic::fence(Ordering::SeqCst);
            std::ptr::copy_nonoverlapping(&raw const *self.node, copy, 1);
            AtomicU64::from_ptr(&raw mut (*at).sequence).store(self.sequence, Ordering::Release);
        }
    }
}

fn nanos(seconds: f64) -> u64 {
    std::time::Duration::try_from_secs_f64(seconds)
        .ok()
        .and_then(|time| u64::try_from(time.as_nanos()).ok())
        .unwrap_or(0)
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn fill(node: &mut Node, status: &Status, events: &Events) {
    node.time_unix_ns = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| nanos(time.as_secs_f64()));
    node.pool_capacity_bytes = status.pool.capacity_bytes;
    node.pool_reserved_bytes = status.pool.reserved_bytes;
    node.pool_populated_bytes = status.pool.populated_bytes;
    node.device_count = count(status.devices.len().min(MAX_DEVICES));
    for (entry, device) in node.devices.iter_mut().zip(&status.devices) {
        entry.uuid = super::gpus::parse_uuid(&device.uuid).unwrap_or_default();
        put(&mut entry.name, &device.name);
        entry.capacity_bytes = device.capacity_bytes;
        entry.reserve_bytes = device.reserve_bytes;
        entry.room_bytes = device.room_bytes;
        entry.granted_bytes = device.granted_bytes;
        entry.free_bytes = device.free_bytes;
        entry.nvml_used_bytes = device.nvml_used_bytes.unwrap_or(UNKNOWN);
    }
    node.workloads_total = count(status.workloads.len());
    node.workload_count = count(status.workloads.len().min(MAX_WORKLOADS));
    for (entry, workload) in node.workloads.iter_mut().zip(&status.workloads) {
        fill_workload(entry, workload);
    }
    let kept = events.kept().count();
    node.decision_count = count(kept.min(MAX_DECISIONS));
    let last = events.kept().skip(kept.saturating_sub(MAX_DECISIONS));
    for (entry, event) in node.decisions.iter_mut().zip(last) {
        entry.time_unix_ns = nanos(event.time_unix);
        put(&mut entry.workload, event.workload.as_deref().unwrap_or(""));
        put(&mut entry.kind, &event.kind);
        put(&mut entry.text, &event.text);
    }
}

fn fill_workload(entry: &mut crate::snapshot::layout::Workload, workload: &Workload) {
    put(&mut entry.name, &workload.name);
    put(
        &mut entry.waiting_for,
        workload.waiting_for.as_deref().unwrap_or(""),
    );
    put(
        &mut entry.not_swappable,
        workload.not_swappable.as_deref().unwrap_or(""),
    );
    let state = STATES.iter().find(|(name, _)| *name == workload.state);
    entry.state = state.map_or(u32::MAX, |(_, number)| *number);
    entry.priority = workload.priority;
    entry.active = u32::from(workload.active);
    entry.processes = count(workload.processes.len());
    entry.used_bytes = workload.used_bytes;
    entry.host_bytes = workload.host_bytes;
    entry.swaps_out = workload.swaps_out;
    entry.swaps_in = workload.swaps_in;
    entry.bytes_out = workload.bytes_out;
    entry.bytes_in = workload.bytes_in;
    for share in &mut entry.shares {
        *share = crate::snapshot::layout::Share {
            request_bytes: 0,
            limit_bytes: 0,
            used_bytes: 0,
            resident_bytes: 0,
            pinned_bytes: 0,
            overhead_bytes: 0,
        };
    }
    for share in &workload.devices {
        let Some(at) = entry.shares.get_mut(share.index as usize) else {
            continue;
        };
        at.request_bytes = share.request_bytes;
        at.limit_bytes = share.limit_bytes;
        at.used_bytes = share.used_bytes;
        at.resident_bytes = share.resident_bytes;
        at.pinned_bytes = share.pinned_bytes;
        at.overhead_bytes = share.overhead_bytes;
    }
}
