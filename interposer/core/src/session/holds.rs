//! Memory of this process that others may import, told to the coordinator, so that the node charges
//! it once.
//!
//! What is held is kept here beside what the coordinator was told, and the difference is sent: a
//! coordinator that was stopped, or is a new one, is brought up to date by the same code.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::TryLockError;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use spillway_protocol::PROTOCOL_VERSION_CLAIMS;
use spillway_protocol::message::FromProcess;

use super::join::Joined;
use super::{Answer, Session};
use crate::lock;

#[allow(dead_code, reason = "as below")]
/// How long an importer waits to hear whether somebody is charged already.
const CLAIM: Duration = Duration::from_secs(2);

/// One piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Hold {
    device: u32,
    bytes: u64,
    key: u64,
}

/// How often it is held, and how often the coordinator was told so.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    held: u32,
    told: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Holds {
    counts: BTreeMap<Hold, Count>,
    /// Those whose counts differ.
    behind: BTreeSet<Hold>,
}

impl Holds {
    fn change(&mut self, hold: Hold, change: impl FnOnce(&mut Count)) {
        let count = self.counts.entry(hold).or_default();
        change(count);
        if count.held == count.told {
            self.behind.remove(&hold);
        } else {
            self.behind.insert(hold);
        }
        if (count.held, count.told) == (0, 0) {
            self.counts.remove(&hold);
        }
    }

    /// The next message that brings the coordinator nearer, and what it is about.
    fn next(&self) -> Option<(Hold, bool, FromProcess)> {
        let hold = *self.behind.first()?;
        let count = self.counts.get(&hold)?;
        let Hold { device, bytes, key } = hold;
        let more = count.held > count.told;
        let message = if more {
            FromProcess::Hold { device, bytes, key }
        } else {
            FromProcess::Unhold { device, bytes, key }
        };
        Some((hold, more, message))
    }

    /// A coordinator that knows nothing.
    fn forget_told(&mut self) {
        self.counts.retain(|_, count| count.held > 0);
        for count in self.counts.values_mut() {
            count.told = 0;
        }
        self.behind = self.counts.keys().copied().collect();
    }
}

#[allow(dead_code, reason = "as below")]
fn hold_of(device: usize, bytes: u64, key: u64) -> Option<Hold> {
    let device = u32::try_from(device).ok()?;
    (bytes > 0).then_some(Hold { device, bytes, key })
}

#[allow(
    dead_code,
    reason = "for the hooks of memory that several processes share"
)]
impl Session {
    /// This process is charged for `bytes` on a device (its index here) that others may import.
    /// `key` identifies the memory on the node; 0: only device and size are known.
    pub fn hold(&self, device: usize, bytes: u64, key: u64) {
        let Some(hold) = hold_of(device, bytes, key) else {
            return;
        };
        let mut holds = lock(&self.holds);
        let waits = holds.behind.is_empty();
        holds.change(hold, |count| count.held = count.held.saturating_add(1));
        self.tell(&mut holds, waits);
    }

    /// Undoes one [`Session::hold`] with the same figures. One that was never made is ignored.
    pub fn unhold(&self, device: usize, bytes: u64, key: u64) {
        let Some(hold) = hold_of(device, bytes, key) else {
            return;
        };
        let mut holds = lock(&self.holds);
        let waits = holds.behind.is_empty();
        holds.change(hold, |count| count.held = count.held.saturating_sub(1));
        self.tell(&mut holds, waits);
    }

    /// This process imports memory: whether somebody on the node, this process included, is charged
    /// for it already. `false` also if nobody answers within 2 s, or the coordinator is too old to
    /// know.
    pub fn claim(&self, device: usize, bytes: u64, key: u64) -> bool {
        let Some(Hold { device, bytes, key }) = hold_of(device, bytes, key) else {
            return false;
        };
        if self.version.load(SeqCst) < PROTOCOL_VERSION_CLAIMS {
            return false;
        }
        // Our own memory counts, too.
        self.tell(&mut lock(&self.holds), true);
        let make = |ticket| FromProcess::Claim {
            ticket,
            device,
            bytes,
            key,
        };
        matches!(
            self.ask(&self.claims, make, CLAIM),
            Answer::Claim { covered: true }
        )
    }

    /// Tells the coordinator what it does not know yet. What cannot be sent now is sent with the next
    /// change, the next claim, or when the coordinator speaks next.
    fn tell(&self, holds: &mut Holds, waits: bool) {
        if self.version.load(SeqCst) < PROTOCOL_VERSION_CLAIMS {
            return;
        }
        while let Some((hold, more, message)) = holds.next() {
            if !self.send_waiting(&message, waits) {
                return;
            }
            holds.change(hold, |count| {
                if more {
                    count.told += 1;
                } else {
                    count.told -= 1;
                }
            });
        }
    }

    /// For the reading thread, which must not wait: not for another thread that sends, either.
    pub(super) fn tell_rest(&self) {
        let mut holds = match self.holds.try_lock() {
            Ok(holds) => holds,
            Err(TryLockError::Poisoned(holds)) => holds.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if !holds.behind.is_empty() {
            self.tell(&mut holds, false);
        }
    }

    /// A new coordinator has taken this process in.
    pub(super) fn rejoined(&self, joined: Joined) {
        let mut holds = lock(&self.holds);
        holds.forget_told();
        self.version.store(joined.version, SeqCst);
        self.desired
            .store(std::ptr::from_ref(joined.desired).cast_mut(), SeqCst);
        let socket = Arc::as_ptr(&joined.socket).cast_mut();
        lock(&self.shared).socket = Some(joined.socket);
        self.raw.store(socket, SeqCst);
        self.tell(&mut holds, true);
        drop(holds);
        self.tell_all_unknown();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD: Hold = Hold {
        device: 0,
        bytes: 2,
        key: 3,
    };

    fn add(holds: &mut Holds) {
        holds.change(HOLD, |count| count.held += 1);
    }

    /// What is sent until nothing is left to tell: `true` for a hold.
    fn sent(holds: &mut Holds) -> Vec<bool> {
        let mut sent = Vec::new();
        while let Some((hold, more, _)) = holds.next() {
            sent.push(more);
            holds.change(hold, |count| {
                count.told = if more { count.told + 1 } else { count.told - 1 };
            });
        }
        sent
    }

    #[test]
    fn only_the_difference_is_told() {
        let mut holds = Holds::default();
        add(&mut holds);
        add(&mut holds);
        assert_eq!(sent(&mut holds), [true, true]);
        holds.change(HOLD, |count| count.held -= 1);
        assert_eq!(sent(&mut holds), [false]);
        add(&mut holds);
        holds.change(HOLD, |count| count.held -= 1);
        assert_eq!(sent(&mut holds), [], "gone before it was told");
        holds.change(HOLD, |count| count.held -= 1);
        assert_eq!(sent(&mut holds), [false]);
        assert!(holds.counts.is_empty(), "nothing is left behind");
    }

    #[test]
    fn a_new_coordinator_is_told_everything() {
        let mut holds = Holds::default();
        add(&mut holds);
        add(&mut holds);
        assert_eq!(sent(&mut holds).len(), 2);
        holds.forget_told();
        assert_eq!(sent(&mut holds), [true, true]);
    }
}
