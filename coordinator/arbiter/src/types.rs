//! The arbiter's vocabulary: what goes in and what comes out.

use std::collections::BTreeMap;

/// A point in time, in nanoseconds of a monotonic clock.
pub type Nanos = u64;

/// One second.
pub const SECOND: Nanos = 1_000_000_000;
/// One millisecond.
pub const MILLISECOND: Nanos = 1_000_000;

/// Index of a device, as given to [`crate::Arbiter::new`].
pub type DeviceId = usize;

/// A session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(pub u64);

/// A workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkloadId(pub u64);

/// An operator's request, for [`Action::OperatorDone`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperationId(pub u64);

/// Settings.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How long an active borrower is safe from its equals.
    pub turn: Nanos,
    /// Without work for this long, a process is idle.
    pub idle_after: Nanos,
    /// How long growth above the request waits for space.
    pub growth_wait: Nanos,
    /// How long a process may take to drain before it reports busy.
    pub drain_deadline: Nanos,
    /// The sum of requests on a device may be this many times its room; at least 1.
    pub oversubscription: f64,
    /// A grant is rounded up by at most this many bytes while space is plentiful.
    pub slack: u64,
    /// End processes that do not drain while others wait.
    pub kill_stuck: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            turn: 2 * SECOND,
            idle_after: 200 * MILLISECOND,
            growth_wait: 10 * SECOND,
            drain_deadline: 5 * SECOND,
            oversubscription: 1.0,
            slack: 64 << 20,
            kill_stuck: false,
        }
    }
}

/// A workload's share of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Guaranteed bytes.
    pub request: u64,
    /// Most bytes.
    pub limit: u64,
}

/// What a workload is, fixed by its first registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadSpec {
    /// For texts.
    pub name: String,
    /// Higher wins.
    pub priority: i32,
    /// `true`: never moved; the request is reserved on the device.
    pub never: bool,
    /// Its devices.
    pub quotas: BTreeMap<DeviceId, Quota>,
}

/// What a process brings along from before the coordinator's restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The epoch reached.
    pub epoch: u64,
    /// Its memory is on the host.
    pub evicted: bool,
    /// Its memory is on its way there.
    pub evicting: bool,
    /// The grants that it holds, per device.
    pub grants: BTreeMap<DeviceId, u64>,
}

/// What a process shows of itself, read once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Work is in flight.
    pub in_flight: bool,
    /// When it was last active; at most now.
    pub last_active: Nanos,
    /// A call waits for the process to be resident.
    pub wants: bool,
    /// It cannot be moved.
    pub unswappable: bool,
}

/// The shared pages, as far as the arbiter needs them. What a process wrote arrives here unchecked;
/// the arbiter clamps it to what the process was granted.
pub trait Pages {
    /// Bytes that the process has taken of its grant.
    fn used(&self, process: ProcessId, device: DeviceId) -> u64;
    /// The part of it that cannot be moved.
    fn pinned(&self, process: ProcessId, device: DeviceId) -> u64;
    /// What it is doing.
    fn activity(&self, process: ProcessId) -> Activity;
    /// Publishes a higher grant.
    fn raise_grant(&mut self, process: ProcessId, device: DeviceId, to: u64);
    /// Lowers a grant towards `target` by the handshake; returns what stands.
    fn lower_grant(&mut self, process: ProcessId, device: DeviceId, target: u64) -> u64;
}

/// A request for more memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// Who asks.
    pub process: ProcessId,
    /// Echoed in the answer.
    pub ticket: u64,
    /// Where.
    pub device: DeviceId,
    /// How many bytes more than are used now.
    pub bytes: u64,
    /// The part of `bytes` that will not be movable.
    pub pinned: u64,
    /// Answer at once.
    pub no_wait: bool,
}

/// What a process is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Be resident and run.
    Run,
    /// Close the gate and become idle; move nothing.
    Drain,
    /// Move everything to the host.
    Evict,
}

/// What a process reports about its current order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Resident, running.
    Resident,
    /// Gate closed, idle, still resident.
    Drained,
    /// On the host.
    Evicted,
    /// On the way to wherever it was ordered.
    Moving,
    /// Could not drain in time; runs on.
    Busy,
    /// Could not be moved; runs on.
    Failed,
}

/// Answers to a growth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The grant was raised.
    Granted,
    /// The workload would pass its limit.
    Limit(String),
    /// Some workload could not run at all afterwards.
    Never(String),
    /// Nothing became free in time.
    Waited(String),
    /// The request makes no sense.
    Invalid(String),
}

/// What the caller has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Publish an order and wake the process.
    Order {
        /// To whom.
        process: ProcessId,
        /// Grows by one with every order to this process.
        epoch: u64,
        /// What.
        order: Order,
    },
    /// Answer a growth. The grants were raised already.
    Grown {
        /// Whose.
        process: ProcessId,
        /// Which.
        ticket: u64,
        /// What became of it.
        outcome: Outcome,
    },
    /// Answer an operator. `Ok(false)`: it was so already.
    OperatorDone {
        /// Which request.
        operation: OperationId,
        /// Whether something was moved, or why it was not done.
        result: Result<bool, String>,
    },
    /// End a process: it does not drain, and the operator has chosen so.
    Kill {
        /// Which.
        process: ProcessId,
    },
    /// Tell people.
    Note {
        /// Whom it concerns.
        workload: WorkloadId,
        /// What happened.
        note: Note,
    },
}

/// News for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// An eviction began.
    Evicting {
        /// For whom.
        why: String,
    },
    /// An eviction ended.
    Evicted {
        /// How long it took.
        took: Nanos,
    },
    /// A restore began.
    Restoring,
    /// A restore ended.
    Restored {
        /// How long it took.
        took: Nanos,
        /// How long the workload had wanted it.
        waited: Nanos,
    },
    /// An eviction was given up because a process could not drain.
    Busy {
        /// Which process.
        process: ProcessId,
        /// When it may be tried again.
        again_in: Nanos,
    },
    /// An eviction was given up because a process could not move its memory.
    Failed {
        /// Which process.
        process: ProcessId,
        /// When it may be tried again.
        again_in: Nanos,
    },
    /// A process does not carry out an order.
    Stuck {
        /// Which process.
        process: ProcessId,
        /// One line.
        text: String,
    },
}
