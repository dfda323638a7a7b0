//! What `spillwayd` tells and does, as plain data: the JSON of `api.sock`, and [`Control`], the
//! interface between the daemon's main loop and whoever serves it (the HTTP server, tests).
//!
//! All byte figures are bytes, all times seconds. A structure here is a copy: nothing in it changes
//! after it was handed out, and holding one holds no lock.

use std::collections::BTreeMap;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `GET /v1/status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Version of the session protocol.
    pub protocol: u32,
    /// Random id of this run of the daemon, in hexadecimal.
    pub instance: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Seconds since the daemon started.
    pub uptime_seconds: f64,
    /// The run directory.
    pub run_dir: String,
    /// The daemon restarted and still waits for processes that knew its predecessor; nothing new is
    /// granted meanwhile.
    pub adopting: bool,
    /// The devices that are served.
    pub devices: Vec<Device>,
    /// Host memory for what is swapped out.
    pub pool: Pool,
    /// The workloads, by name.
    pub workloads: Vec<Workload>,
    /// Processes that use devices without Spillway, by process id and device.
    #[serde(default)]
    pub strangers: Vec<Stranger>,
}

/// A process that uses a device without Spillway, on one device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stranger {
    /// Process id, as the coordinator sees it.
    pub pid: i32,
    /// User id; `None`: it cannot be read.
    pub uid: Option<u32>,
    /// The program's name (`/proc/PID/comm`).
    pub command: String,
    /// The container it runs in.
    pub container: Option<String>,
    /// `libspillway.so` is loaded in it, although it has no session; `None`: that cannot be read.
    pub library: Option<bool>,
    /// [`Device::index`].
    pub device: u32,
    /// [`Device::uuid`].
    pub uuid: String,
    /// What it holds there; `None`: NVML did not say.
    pub bytes: Option<u64>,
}

/// `GET /v1/workloads`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Workloads {
    /// The workloads, by name.
    pub workloads: Vec<Workload>,
}

/// One device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// The coordinator's number for it (NVML's index).
    pub index: u32,
    /// `GPU-...`.
    pub uuid: String,
    /// The product's name.
    pub name: String,
    /// What the coordinator shares out: the device's memory, or less by `--capacity`.
    pub capacity_bytes: u64,
    /// The part of the capacity that is never granted.
    pub reserve_bytes: u64,
    /// `capacity_bytes - reserve_bytes`.
    pub room_bytes: u64,
    /// Physical bytes charged: grants and overhead of who is resident, pinned memory and overhead of
    /// who is not, and what the dead have not given back yet.
    pub granted_bytes: u64,
    /// `room_bytes - granted_bytes`, at least 0.
    pub free_bytes: u64,
    /// What NVML shows as used; `None`: NVML did not say.
    pub nvml_used_bytes: Option<u64>,
    /// The part of it that belongs to processes without Spillway.
    #[serde(default)]
    pub outside_bytes: u64,
}

/// Host memory for what is swapped out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pool {
    /// What may be reserved.
    pub capacity_bytes: u64,
    /// What workloads have reserved.
    pub reserved_bytes: u64,
    /// What is populated in segments.
    pub populated_bytes: u64,
}

/// One workload: `GET /v1/workloads/{name}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Unique on the node.
    pub name: String,
    /// `resident`, `evicting`, `evicted`, `restoring`, or `waiting` (wants in, or wants more, and
    /// has to wait).
    pub state: String,
    /// Higher wins.
    pub priority: i32,
    /// `auto` or `never`.
    pub swap: String,
    /// Has submitted work within the idle time, has work in flight, or waits.
    pub active: bool,
    /// Share of the time since the workload came for which it was active, 0 to 1.
    pub active_ratio: f64,
    /// Guaranteed bytes on its first device.
    pub request_bytes: u64,
    /// Most bytes on its first device.
    pub limit_bytes: u64,
    /// Its share of each device.
    pub devices: Vec<DeviceShare>,
    /// Bytes used over all devices: pageable, pinned and overhead, resident or not.
    pub used_bytes: u64,
    /// Bytes whose only copy is on the host.
    pub host_bytes: u64,
    /// Completed evictions.
    pub swaps_out: u64,
    /// Completed restores.
    pub swaps_in: u64,
    /// Bytes copied to the host so far.
    pub bytes_out: u64,
    /// Bytes copied to the device so far.
    pub bytes_in: u64,
    /// Duration of the last eviction; 0: none yet.
    pub last_out_seconds: f64,
    /// Duration of the last restore; 0: none yet.
    pub last_in_seconds: f64,
    /// Time that calls have spent waiting at the gate so far, over all threads.
    pub blocked_seconds: f64,
    /// What it waits for.
    pub waiting_for: Option<String>,
    /// Why it cannot be swapped.
    pub not_swappable: Option<String>,
    /// Entry points of the driver seen that the hook table does not know.
    pub unknown_entry_points: u64,
    /// Their names, as far as they are known; at most 64.
    #[serde(default)]
    pub unknown_entry_point_names: Vec<String>,
    /// Its processes.
    pub processes: Vec<Process>,
}

/// A workload's share of one device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceShare {
    /// [`Device::index`].
    pub index: u32,
    /// [`Device::uuid`].
    pub uuid: String,
    /// Guaranteed bytes.
    pub request_bytes: u64,
    /// Most bytes.
    pub limit_bytes: u64,
    /// Bytes used: pageable, pinned and overhead, resident or not.
    pub used_bytes: u64,
    /// Physical bytes on the device now, overhead included.
    pub resident_bytes: u64,
    /// The part of `used_bytes` that cannot be moved, without overhead.
    pub pinned_bytes: u64,
    /// Measured bytes of contexts, modules and code.
    pub overhead_bytes: u64,
    /// What its processes may use without asking again, overhead not included.
    pub grant_bytes: u64,
}

/// One process of a workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// Process id, as the coordinator sees it.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// The program's name (`/proc/PID/comm`).
    pub command: String,
    /// `resident`, `draining`, `drained`, `evicting`, `evicted`, `restoring`.
    pub state: String,
}

/// One line of `GET /v1/events`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When, in seconds since 1970.
    pub time_unix: f64,
    /// Whom it concerns.
    pub workload: Option<String>,
    /// `registered`, `left`, `refused`, `evicting`, `evicted`, `restoring`, `restored`, `busy`,
    /// `failed`, `stuck`, `growth_refused`, `coordinator_started`, `overhead_unknown`, `note`, ...
    pub kind: String,
    /// One line for people.
    pub text: String,
    /// Further figures, each a field of its own in JSON: `bytes`, `seconds`, `pid`, ...
    #[serde(flatten)]
    pub numbers: BTreeMap<String, serde_json::Value>,
}

/// A finished evict or restore.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// The workload.
    pub name: String,
    /// Bytes copied; 0 if nothing had to be moved.
    pub bytes: u64,
    /// From the request to the end.
    pub seconds: f64,
}

/// Upper bounds of [`Histogram::counts`]' buckets, in seconds; one more bucket has no bound.
pub const HISTOGRAM_BOUNDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// Durations, counted by length.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// How many were at most as long as [`HISTOGRAM_BOUNDS`] at the same index and longer than the
    /// bound before (not cumulative); the last entry counts what is longer than all.
    pub counts: [u64; HISTOGRAM_BOUNDS.len() + 1],
    /// Sum of all durations, in seconds.
    pub sum_seconds: f64,
}

impl Histogram {
    /// Counts one duration.
    pub fn add(&mut self, seconds: f64) {
        let bucket = HISTOGRAM_BOUNDS.iter().position(|bound| seconds <= *bound);
        self.counts[bucket.unwrap_or(HISTOGRAM_BOUNDS.len())] += 1;
        self.sum_seconds += seconds;
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// What `/metrics` needs beyond [`Status`]. Counters live as long as the workload.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// The same moment's status.
    pub status: Status,
    /// By workload's name.
    pub workloads: BTreeMap<String, WorkloadMetrics>,
    /// Registrations refused since the daemon started, by reason (`version`, `quota`, `identity`,
    /// `device`, `malformed`, `busy`).
    pub refused_registrations: BTreeMap<String, u64>,
    /// Escapes since the daemon started, by reason (`stranger`, `limit`, `uncharged`).
    pub escapes: BTreeMap<String, u64>,
    /// Since the daemon started: time that a workload was active on the device, as a share of all,
    /// 0 to 1. By device, in the order of [`Status::devices`].
    pub device_active_ratio: Vec<f64>,
}

/// A workload's counters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkloadMetrics {
    /// Durations of evictions, from the command to the last process's report.
    pub swap_out_seconds: Histogram,
    /// Durations of restores.
    pub swap_in_seconds: Histogram,
    /// Waits of the workload for its restore, from when the coordinator saw that it wants in until
    /// it was resident.
    pub blocked_seconds: Histogram,
    /// Growth refused, by reason: `limit`, `never`, `waited`, `invalid`.
    pub refused: BTreeMap<String, u64>,
}

/// Why [`Control`] did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// No workload has the name (404).
    #[error("{0}")]
    NotFound(String),
    /// It cannot be done as things are (409). The text says why and what to do.
    #[error("{0}")]
    Conflict(String),
    /// It was not done in time (504). It may still happen later.
    #[error("{0}")]
    Timeout(String),
    /// The daemon is ending (503).
    #[error("{0}")]
    Unavailable(String),
}

/// The daemon, as seen by its servers. Every call may come from any thread, at the same time as
/// others, and never blocks the daemon itself.
pub trait Control: Send + Sync {
    /// What is. Answered from a copy made at most a few tens of milliseconds ago.
    fn status(&self) -> Status;

    /// The same with the counters for `/metrics`.
    fn metrics(&self) -> Metrics;

    /// The kept events (at most 256, oldest first), and the ones to come. The channel is bounded:
    /// who does not read it fast enough finds it closed (`recv` returns an error after what was
    /// queued), and so does everybody when the daemon ends. Dropping the receiver unsubscribes.
    fn subscribe(&self) -> (Vec<Event>, Receiver<Event>);

    /// Moves the workload to the host, whatever the arbiter would do. Blocks until it is done, at
    /// most for `timeout`.
    ///
    /// # Errors
    /// Unknown name; busy or unswappable, with the reason; not done in time; the daemon is ending.
    fn evict(&self, name: &str, timeout: Duration) -> Result<Done, ControlError>;

    /// Brings the workload back without waiting for it to submit work; others are evicted for it by
    /// the arbiter's rules. Blocks until it is done, at most for `timeout`.
    ///
    /// # Errors
    /// Unknown name; not done in time; the daemon is ending.
    fn restore(&self, name: &str, timeout: Duration) -> Result<Done, ControlError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_carry_their_numbers_as_fields() {
        let event = Event {
            time_unix: 1.5,
            workload: Some("w".into()),
            kind: "evicted".into(),
            text: "evicted w".into(),
            numbers: BTreeMap::from([("bytes".to_owned(), serde_json::json!(7))]),
        };
        let text = serde_json::to_string(&event).expect("an event is JSON");
        assert!(text.contains("\"bytes\":7"), "{text}");
        assert_eq!(serde_json::from_str::<Event>(&text).expect("parses"), event);
    }

    #[test]
    fn histograms_count_each_duration_once() {
        let mut histogram = Histogram::default();
        for seconds in [0.0, 0.001, 0.0011, 31.0] {
            histogram.add(seconds);
        }
        assert_eq!(histogram.counts[0], 2);
        assert_eq!(histogram.counts[1], 1);
        assert_eq!(histogram.counts[HISTOGRAM_BOUNDS.len()], 1);
        assert_eq!(histogram.count(), 4);
    }
}
