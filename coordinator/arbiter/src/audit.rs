//! The audit: what is an escape.
//!
//! # Problem
//! The library sees what goes through it. A program that was started without it, or found a way around
//! it, takes memory that nobody granted. The driver shows who holds how much; compare that with the
//! accounts, and say what is wrong without ever accusing a program that keeps to its limit.
//!
//! # Rules
//! 1. *Stranger*: a process that uses a device and has no session, in all samples for [`CONFIRM`]. Where
//!    the library is loaded, or may be, it has [`RETURN_WITHIN`]: a session that was closed comes back.
//! 2. *Limit*: what the driver shows for a workload's processes on a device is more than its limit and
//!    [`TOLERANCE`], in two samples [`CONFIRM`] apart during which all of them held still; or in all
//!    samples for [`NEVER_STILL`], since a process may claim for ever that it does not hold still.
//! 3. *Uncharged*: a process's [`overhead`] (shown minus held) has grown by more than [`TOLERANCE`] since
//!    the process last asked for a measurement, as it does when it makes a context or loads a module.
//!    It is charged as overhead from then on, so this is worth a look and nobody's death.
//! 4. Nothing is said before everybody had time to come back after the coordinator's restart.
//!
//! # The tolerance
//! Code that is loaded at its first launch, and stack that a kernel needs, come without a call that
//! the library could tie them to, also after a program has filled its limit to the last byte. Lazily
//! loaded libraries come in pieces of some ten MiB. [`TOLERANCE`] is several of these, and little
//! beside what a real way around a limit yields.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{DeviceId, Nanos, ProcessId, SECOND, WorkloadId};

/// Between the first and the second sample that show an escape.
pub const CONFIRM: Nanos = SECOND;
/// How long a process with the library may be without a session: it tries to join every 2 s.
pub const RETURN_WITHIN: Nanos = 10 * SECOND;
/// After this long what is shown counts, whether the processes held still or not.
pub const NEVER_STILL: Nanos = 10 * SECOND;
/// How long the driver may show a process that cannot be seen.
pub const UNSEEN_AFTER: Nanos = 10 * SECOND;
/// Bytes; see the module.
pub const TOLERANCE: u64 = 256 << 20;

/// A process's overhead, of which the driver's figure says only that it is `most` at most, and less by up
/// to `maybe`. A context costs the same before and after memory comes and goes of which nobody knows
/// whether the driver counts it: so it stays what it was, as far as the figures allow.
#[must_use]
pub fn overhead(before: u64, most: u64, maybe: u64) -> u64 {
    before.clamp(most.saturating_sub(maybe), most)
}

/// One process on one device, as the driver shows it in one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its id.
    pub pid: i32,
    /// Where.
    pub device: DeviceId,
    /// What it holds there; `None`: the driver does not say.
    pub bytes: Option<u64>,
    /// What is known of it.
    pub who: Who,
}

/// See [`Shown::who`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Nothing is to be said of it: the coordinator itself, a session that is not registered yet, the
    /// dead whose memory is on its way back.
    Excused,
    /// There is no process of that id: it has just ended, or is in a pid namespace elsewhere.
    Unseen,
    /// It has no session.
    Stranger {
        /// When it was started: tells processes apart that had the same id.
        born: u64,
        /// The library is, or may be, loaded in it.
        may_return: bool,
    },
    /// It is registered.
    Member(Member),
}

/// A registered process's account on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its session.
    pub process: ProcessId,
    /// Its workload.
    pub workload: WorkloadId,
    /// The workload's limit there.
    pub limit: u64,
    /// What it holds there by its own account, overhead not included; `None`: it did not hold still.
    pub held: Option<u64>,
    /// Bytes beyond `held` that the driver may or may not show for it, although they are no overhead.
    pub maybe: u64,
    /// What it may map there because somebody else is charged for it.
    pub covered: u64,
    /// It has asked for a measurement since the sample before: its overhead has a reason to be
    /// another.
    pub asked: bool,
}

/// A confirmed escape. Each is told once, and again only after it was over meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// It uses devices without a session.
    Stranger {
        /// Its id.
        pid: i32,
        /// See [`Who::Stranger`].
        born: u64,
        /// What it holds, over all devices, as far as the driver says.
        bytes: u64,
    },
    /// A workload holds more than its limit.
    Limit {
        /// Which.
        workload: WorkloadId,
        /// Where.
        device: DeviceId,
        /// What it holds there.
        bytes: u64,
        /// Its limit there.
        limit: u64,
        /// The one of its processes that holds most there.
        process: ProcessId,
    },
    /// A process holds more than before, and no call explains it.
    Uncharged {
        /// Which.
        process: ProcessId,
        /// Where.
        device: DeviceId,
        /// How much more.
        bytes: u64,
    },
    /// The driver shows a process that is not to be seen here.
    Unseen {
        /// Its id.
        pid: i32,
    },
}

#[derive(Debug)]
struct Seen {
    since: Nanos,
    told: bool,
}

#[derive(Debug)]
struct Over {
    since: Nanos,
    /// The first sample that counts by itself.
    still_since: Option<Nanos>,
    told: bool,
}

#[derive(Debug)]
struct Overhead {
    /// The last one that has a reason.
    explained: u64,
    /// A measurement was asked for, and none was valid yet.
    asked: bool,
    grown_since: Option<Nanos>,
}

/// What is remembered from one sample to the next.
#[derive(Debug, Default)]
pub struct Audit {
    strangers: BTreeMap<(i32, u64), Seen>,
    unseen: BTreeMap<i32, Seen>,
    over: BTreeMap<(WorkloadId, DeviceId), Over>,
    overheads: BTreeMap<(ProcessId, DeviceId), Overhead>,
    looked: Nanos,
}

/// What the processes of a workload hold on a device together.
#[derive(Default)]
struct Sum {
    bytes: u64,
    limit: u64,
    covered: u64,
    /// All of them held still, and the driver says what each holds.
    still: bool,
    known: bool,
    most: Option<(u64, ProcessId)>,
}

impl Audit {
    /// Looks at one sample. `settled`: everybody had time to come back after a restart.
    pub fn look(&mut self, at: Nanos, settled: bool, shown: &[Shown]) -> Vec<Escape> {
        if !settled {
            *self = Self::default();
            return Vec::new();
        }
        self.looked = at;
        let mut escapes = Vec::new();
        self.look_for_strangers(at, shown, &mut escapes);
        self.look_at_limits(at, shown, &mut escapes);
        self.look_at_overheads(at, shown, &mut escapes);
        escapes
    }

    /// When another sample may confirm what was first seen lately; `Nanos::MAX`: there is nothing.
    /// What needs longer is found by the samples that are taken anyway.
    #[must_use]
    pub fn look_again_at(&self) -> Nanos {
        let strangers = self.strangers.values().map(|seen| seen.since);
        let over = self.over.values().filter_map(|over| over.still_since);
        let grown = self.overheads.values().filter_map(|o| o.grown_since);
        strangers
            .chain(over)
            .chain(grown)
            .map(|since| since.saturating_add(CONFIRM))
            .filter(|time| *time > self.looked)
            .min()
            .unwrap_or(Nanos::MAX)
    }

    /// Confirmed strangers.
    pub fn strangers(&self) -> impl Iterator<Item = (i32, u64)> {
        let told = self.strangers.iter().filter(|(_, seen)| seen.told);
        told.map(|(who, _)| *who)
    }

    fn look_for_strangers(&mut self, at: Nanos, shown: &[Shown], escapes: &mut Vec<Escape>) {
        let mut strangers: BTreeMap<(i32, u64), (u64, bool)> = BTreeMap::new();
        let mut unseen = BTreeSet::new();
        for entry in shown {
            match entry.who {
                Who::Stranger { born, may_return } => {
                    let at = strangers.entry((entry.pid, born)).or_default();
                    at.0 = at.0.saturating_add(entry.bytes.unwrap_or(0));
                    at.1 |= may_return;
                }
                Who::Unseen => {
                    unseen.insert(entry.pid);
                }
                Who::Excused | Who::Member(_) => {}
            }
        }
        self.strangers.retain(|who, _| strangers.contains_key(who));
        self.unseen.retain(|pid, _| unseen.contains(pid));
        for ((pid, born), (bytes, may_return)) in strangers {
            let patience = if may_return { RETURN_WITHIN } else { CONFIRM };
            let seen = self.strangers.entry((pid, born)).or_insert(Seen {
                since: at,
                told: false,
            });
            if seen.confirmed(at, patience) {
                escapes.push(Escape::Stranger { pid, born, bytes });
            }
        }
        for pid in unseen {
            let seen = self.unseen.entry(pid).or_insert(Seen {
                since: at,
                told: false,
            });
            if seen.confirmed(at, UNSEEN_AFTER) {
                escapes.push(Escape::Unseen { pid });
            }
        }
    }

    fn look_at_limits(&mut self, at: Nanos, shown: &[Shown], escapes: &mut Vec<Escape>) {
        let mut sums: BTreeMap<(WorkloadId, DeviceId), Sum> = BTreeMap::new();
        for entry in shown {
            let Who::Member(member) = entry.who else {
                continue;
            };
            let key = (member.workload, entry.device);
            let sum = sums.entry(key).or_insert(Sum {
                still: true,
                known: true,
                ..Sum::default()
            });
            let bytes = entry.bytes.unwrap_or(0);
            sum.limit = member.limit;
            sum.bytes = sum.bytes.saturating_add(bytes);
            sum.covered = sum.covered.saturating_add(member.covered);
            sum.known &= entry.bytes.is_some();
            sum.still &= member.held.is_some();
            sum.most = sum.most.max(Some((bytes, member.process)));
        }
        sums.retain(|_, sum| {
            let allowed = sum.limit.saturating_add(TOLERANCE);
            sum.known && sum.bytes > allowed.saturating_add(sum.covered)
        });
        self.over.retain(|key, _| sums.contains_key(key));
        for ((workload, device), sum) in sums {
            let over = self.over.entry((workload, device)).or_insert(Over {
                since: at,
                still_since: None,
                told: false,
            });
            let since = |then: Nanos| at.saturating_sub(then);
            let confirmed = sum.still && since(*over.still_since.get_or_insert(at)) >= CONFIRM;
            if over.told || !(confirmed || since(over.since) >= NEVER_STILL) {
                continue;
            }
            over.told = true;
            if let Some((_, process)) = sum.most {
                escapes.push(Escape::Limit {
                    workload,
                    device,
                    bytes: sum.bytes,
                    limit: sum.limit,
                    process,
                });
            }
        }
    }

    fn look_at_overheads(&mut self, at: Nanos, shown: &[Shown], escapes: &mut Vec<Escape>) {
        let mut there = BTreeSet::new();
        for entry in shown {
            let Who::Member(member) = entry.who else {
                continue;
            };
            let key = (member.process, entry.device);
            there.insert(key);
            if let Some(known) = self.overheads.get_mut(&key) {
                known.asked |= member.asked;
            }
            let (Some(held), Some(bytes)) = (member.held, entry.bytes) else {
                continue;
            };
            let most = bytes.saturating_sub(held);
            let known = self.overheads.entry(key).or_insert(Overhead {
                explained: overhead(0, most, member.maybe),
                asked: false,
                grown_since: None,
            });
            let overhead = overhead(known.explained, most, member.maybe);
            if std::mem::take(&mut known.asked) || overhead < known.explained {
                known.explained = overhead;
            }
            let grown = overhead - known.explained;
            if grown <= TOLERANCE {
                known.grown_since = None;
                continue;
            }
            let since = *known.grown_since.get_or_insert(at);
            if at.saturating_sub(since) >= CONFIRM {
                known.explained = overhead;
                known.grown_since = None;
                escapes.push(Escape::Uncharged {
                    process: member.process,
                    device: entry.device,
                    bytes: grown,
                });
            }
        }
        self.overheads.retain(|key, _| there.contains(key));
    }
}

impl Seen {
    /// Seen for so long, and not told yet.
    fn confirmed(&mut self, at: Nanos, patience: Nanos) -> bool {
        let long = at.saturating_sub(self.since) >= patience;
        long && !std::mem::replace(&mut self.told, long)
    }
}
