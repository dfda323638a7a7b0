//! Everything that the main loop owns.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender};

use nix::sys::epoll::Epoll;
use serde_json::Value;
use spillway_arbiter::{Arbiter, DeviceId, Nanos, OperationId, ProcessId, WorkloadId};

use super::audit::Auditor;
use super::claims::Claims;
use super::events::Events;
use super::gpus::Gpu;
use super::handle::{Request, Waker};
use super::options::Options;
use super::pages::PageTable;
use super::pool::{Pool, Workshop};
use super::sampler::Sampler;
use super::session::Session;
use crate::model::{ControlError, Done, Histogram, WorkloadMetrics};

/// A device that is served.
#[derive(Debug)]
pub struct DeviceState {
    /// What it is.
    pub gpu: Gpu,
    /// What is shared out of it.
    pub capacity: u64,
    /// The part of it that is never granted.
    pub reserve: u64,
    /// Bytes in use by the last sample.
    pub used: Option<u64>,
    /// What the last two samples showed beyond everything that we know of.
    pub foreign: [u64; 2],
    /// Charged when the sample under way was asked for.
    pub charged_before: u64,
    /// Time during which a workload was active here.
    pub active: Nanos,
}

/// What is known of a workload beyond the arbiter's figures.
#[derive(Debug)]
pub struct WorkloadState {
    /// Its name.
    pub name: String,
    /// Its user.
    pub uid: u32,
    /// The control group of its first process.
    pub cgroup: String,
    /// When it came.
    pub since: Nanos,
    /// Time during which it was active.
    pub active: Nanos,
    /// Counters.
    pub metrics: WorkloadMetrics,
    /// Entry points of the driver that it asked for and that the hook table does not know.
    pub unknown_names: BTreeSet<String>,
    /// What its former processes had counted.
    pub gone: Counters,
    /// `bytes_out` and `bytes_in` when the move under way began.
    pub moved_before: (u64, u64),
}

/// What processes count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Completed evictions.
    pub swaps_out: u64,
    /// Completed restores.
    pub swaps_in: u64,
    /// Bytes to the host.
    pub bytes_out: u64,
    /// Bytes to the device.
    pub bytes_in: u64,
    /// Time that calls were blocked.
    pub blocked_ns: u64,
    /// Unknown entry points.
    pub unknown_entries: u64,
}

impl Counters {
    /// The sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            swaps_out: self.swaps_out.saturating_add(other.swaps_out),
            swaps_in: self.swaps_in.saturating_add(other.swaps_in),
            bytes_out: self.bytes_out.saturating_add(other.bytes_out),
            bytes_in: self.bytes_in.saturating_add(other.bytes_in),
            blocked_ns: self.blocked_ns.saturating_add(other.blocked_ns),
            unknown_entries: self.unknown_entries.saturating_add(other.unknown_entries),
        }
    }
}

/// An operator's request under way.
#[derive(Debug)]
pub struct Operation {
    /// The workload's name.
    pub name: String,
    /// Else a restore.
    pub evict: bool,
    /// When it came.
    pub began: Nanos,
    /// Bytes that had been moved in its direction before.
    pub before: u64,
    /// To be answered once.
    pub reply: SyncSender<Result<Done, ControlError>>,
}

/// What a dead process held on a device.
#[derive(Debug)]
pub struct Returning {
    /// The process.
    pub pid: i32,
    /// Where.
    pub device: DeviceId,
    /// The arbiter's number.
    pub number: u64,
    /// How much.
    pub bytes: u64,
    /// When it died.
    pub since: Nanos,
}

/// A refresh that waits for a measurement.
#[derive(Debug)]
pub struct Refreshing {
    /// Whose.
    pub session: ProcessId,
    /// Echoed.
    pub ticket: u64,
    /// Since when.
    pub since: Nanos,
}

/// See the module.
pub struct Daemon {
    pub(super) options: Options,
    pub(super) run_dir: std::path::PathBuf,
    pub(super) instance: u64,
    pub(super) started: Nanos,
    pub(super) devices: Vec<DeviceState>,
    pub(super) arbiter: Arbiter,
    pub(super) pages: PageTable,
    pub(super) sessions: BTreeMap<ProcessId, Session>,
    pub(super) next_session: u64,
    pub(super) claims: Claims,
    pub(super) workloads: BTreeMap<WorkloadId, WorkloadState>,
    pub(super) pool: Pool,
    pub(super) workshop: Workshop,
    pub(super) sampler: Sampler,
    pub(super) events: Events,
    pub(super) operations: BTreeMap<OperationId, Operation>,
    pub(super) returning: Vec<Returning>,
    pub(super) refreshing: Vec<Refreshing>,
    /// When to ask for a sample; `Nanos::MAX`: only as ever.
    pub(super) sample_again: Nanos,
    /// What processes have been measured to take beside their memory, by process and device.
    pub(super) overheads: BTreeMap<(ProcessId, DeviceId), super::measure::Overhead>,
    pub(super) refused: BTreeMap<String, u64>,
    pub(super) auditor: Auditor,
    /// Until then nothing new is given; `None`: that time is over.
    pub(super) adopting_until: Option<Nanos>,
    /// Sessions with something to look at before this round ends.
    pub(super) news: BTreeSet<ProcessId>,
    /// When activity was last added up.
    pub(super) counted: Nanos,
    pub(super) requests: Receiver<Request>,
    pub(super) waker: Waker,
    pub(super) epoll: Epoll,
    pub(super) listener: OwnedFd,
    /// That there are no descriptors left is said again after this.
    pub(super) accept_again: Nanos,
}

impl Daemon {
    /// An event.
    pub(super) fn event(
        &mut self,
        kind: &str,
        workload: Option<&str>,
        text: String,
        numbers: &[(&str, Value)],
    ) {
        self.events.add(kind, workload, text, numbers);
    }

    /// A workload's name, for texts.
    pub(super) fn name(&self, id: WorkloadId) -> String {
        self.workloads
            .get(&id)
            .map_or_else(|| format!("workload {}", id.0), |state| state.name.clone())
    }

    /// The name of a session's workload.
    pub(super) fn name_of_session(&self, id: ProcessId) -> Option<String> {
        let live = self.sessions.get(&id)?.as_live()?;
        Some(self.name(live.workload))
    }

    /// What a workload's processes have counted, those that are gone included.
    pub(super) fn counters(&self, id: WorkloadId) -> Counters {
        let gone = self
            .workloads
            .get(&id)
            .map_or_else(Counters::default, |state| state.gone);
        self.arbiter
            .processes_of(id)
            .into_iter()
            .map(|process| self.counters_of(process))
            .fold(gone, Counters::plus)
    }

    /// What one process has counted.
    pub(super) fn counters_of(&self, id: ProcessId) -> Counters {
        use std::sync::atomic::Ordering::SeqCst;
        let Some(pair) = self.pages.0.get(&id) else {
            return Counters::default();
        };
        let page = &pair.observed;
        Counters {
            swaps_out: page.swaps_out.load(SeqCst),
            swaps_in: page.swaps_in.load(SeqCst),
            bytes_out: page.bytes_out.load(SeqCst),
            bytes_in: page.bytes_in.load(SeqCst),
            blocked_ns: page.blocked_ns.load(SeqCst),
            unknown_entries: page.unknown_entries.load(SeqCst),
        }
    }

    /// Counts and tells a refused registration.
    pub(super) fn refuse(&mut self, id: ProcessId, reason: &str, text: &str) {
        *self.refused.entry(reason.to_owned()).or_default() += 1;
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.refuse(text);
        let (pid, uid) = (session.identity.pid, session.identity.uid);
        let command = session.identity.command.clone();
        self.event(
            "refused",
            None,
            format!("{command} (pid {pid}): {text}"),
            &[
                ("pid", pid.into()),
                ("uid", uid.into()),
                ("reason", reason.into()),
            ],
        );
    }
}

/// Nanoseconds as seconds.
#[expect(
    clippy::cast_precision_loss,
    reason = "durations for people; sums of years stay exact to a microsecond"
)]
pub fn seconds(nanos: Nanos) -> f64 {
    nanos as f64 / 1e9
}

/// Adds a duration in nanoseconds.
pub fn add(histogram: &mut Histogram, nanos: Nanos) {
    histogram.add(seconds(nanos));
}
