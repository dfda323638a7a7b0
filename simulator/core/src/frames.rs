//! Who owns each physical frame: one atomic word per frame, so that a process that dies between
//! any two instructions leaves a readable table.
//!
//! All changes are made under the machine's robust lock (`shared.rs`); a word alone says
//! everything about its frame, so a lock taken over from a dead holder has nothing to repair.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a frame's word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Free,
    /// The process in this slot.
    Slot(u16),
    /// An exported allocation, alive while any process holds its descriptor.
    Object(u16),
    /// The process in this slot, for its managed memory: used, and in no process's figure.
    Managed(u16),
    /// Released by the process in the slot; nobody else gets it before the time (us, monotonic).
    Cooling(u16, u64),
}

const BACKED: u64 = 1;
const KIND_SHIFT: u32 = 1;
const INDEX_SHIFT: u32 = 3;
const TIME_SHIFT: u32 = 19;

fn encode(owner: Owner) -> u64 {
    let (kind, index, time) = match owner {
        Owner::Free => (0, 0, 0),
        Owner::Slot(slot) => (1, slot, 0),
        Owner::Object(object) => (2, object, 0),
        Owner::Cooling(slot, until_us) => (3, slot, until_us),
        // A process's frames have no time: one of theirs tells the kinds apart.
        Owner::Managed(slot) => (1, slot, 1),
    };
    kind << KIND_SHIFT | u64::from(index) << INDEX_SHIFT | time << TIME_SHIFT
}

fn decode(word: u64) -> Owner {
    let index = (word >> INDEX_SHIFT) as u16;
    match word >> KIND_SHIFT & 3 {
        0 => Owner::Free,
        1 if word >> TIME_SHIFT != 0 => Owner::Managed(index),
        1 => Owner::Slot(index),
        2 => Owner::Object(index),
        _ => Owner::Cooling(index, word >> TIME_SHIFT),
    }
}

/// The frames of one GPU.
#[derive(Clone, Copy)]
pub struct Frames<'a>(pub &'a [AtomicU64]);

impl Frames<'_> {
    #[must_use]
    pub fn owner(&self, frame: u32) -> Owner {
        decode(self.0[frame as usize].load(Ordering::Acquire))
    }

    /// Whether the frame has storage behind it: it was handed out before.
    #[must_use]
    pub fn backed(&self, frame: u32) -> bool {
        self.0[frame as usize].load(Ordering::Acquire) & BACKED != 0
    }

    pub fn set_backed(&self, frame: u32) {
        self.0[frame as usize].fetch_or(BACKED, Ordering::AcqRel);
    }

    pub fn set_owner(&self, frame: u32, owner: Owner) {
        let word = &self.0[frame as usize];
        let backed = word.load(Ordering::Acquire) & BACKED;
        word.store(encode(owner) | backed, Ordering::Release);
    }

    /// All owners at one moment, without the lock: read until two readings agree. While frames change
    /// hands all the time it is the last of many readings: a frame that moved meanwhile may count twice.
    #[must_use]
    pub fn owners(&self) -> Vec<Owner> {
        const READINGS: usize = 100;
        let read = || -> Vec<u64> {
            let words = self.0.iter().map(|word| word.load(Ordering::Acquire));
            words.collect()
        };
        let mut last = read();
        for _ in 0..READINGS {
            let next = read();
            if next == last {
                break;
            }
            last = next;
        }
        last.into_iter().map(decode).collect()
    }

    /// Frames that count as used, at one moment: everything but free and cooling ones.
    #[must_use]
    pub fn used(&self) -> u64 {
        let owners = self.owners();
        let used = |owner: &&Owner| !matches!(owner, Owner::Free | Owner::Cooling(..));
        owners.iter().filter(used).count() as u64
    }

    /// Frames whose owner satisfies `which`.
    pub fn count(&self, which: impl Fn(Owner) -> bool) -> u64 {
        self.0
            .iter()
            .filter(|word| which(decode(word.load(Ordering::Acquire))))
            .count() as u64
    }

    /// Chooses `n` frames that `slot` may take at `now_us`, one run if there is one, else the
    /// lowest; nothing is changed. `None` if there are not that many.
    #[must_use]
    pub fn choose(&self, n: usize, slot: u16, now_us: u64) -> Option<Vec<u32>> {
        let mut available = Vec::new();
        let mut run = 0;
        for frame in 0..self.0.len() as u32 {
            let takes = match self.owner(frame) {
                Owner::Free => true,
                Owner::Cooling(by, until_us) => by == slot || until_us <= now_us,
                Owner::Slot(_) | Owner::Object(_) | Owner::Managed(_) => false,
            };
            if !takes {
                run = 0;
                continue;
            }
            run += 1;
            available.push(frame);
            if run == n {
                return Some(available.split_off(available.len() - n));
            }
        }
        (available.len() >= n).then(|| {
            available.truncate(n);
            available
        })
    }

    /// Gives every frame whose owner satisfies `which` to `owner`; returns how many.
    pub fn replace(&self, which: impl Fn(Owner) -> bool, owner: Owner) -> u64 {
        let mut changed = 0;
        for frame in 0..self.0.len() as u32 {
            if which(self.owner(frame)) {
                self.set_owner(frame, owner);
                changed += 1;
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(n: usize) -> Vec<AtomicU64> {
        (0..n).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn words_keep_what_they_say() {
        for owner in [
            Owner::Free,
            Owner::Slot(1023),
            Owner::Managed(1023),
            Owner::Object(7),
            Owner::Cooling(3, 1 << 44),
        ] {
            assert_eq!(decode(encode(owner)), owner);
            assert_eq!(decode(encode(owner) | BACKED), owner);
        }
    }

    #[test]
    fn a_run_is_preferred_to_scattered_frames() {
        let words = table(8);
        let frames = Frames(&words);
        frames.set_owner(1, Owner::Slot(9));
        assert_eq!(frames.choose(3, 0, 0), Some(vec![2, 3, 4]));
        frames.set_owner(4, Owner::Slot(9));
        frames.set_owner(6, Owner::Slot(9));
        assert_eq!(frames.choose(3, 0, 0), Some(vec![0, 2, 3]));
        assert_eq!(frames.choose(6, 0, 0), None);
        assert_eq!(frames.used(), 3);
        frames.set_owner(7, Owner::Managed(9));
        assert_eq!(frames.choose(5, 0, 0), None);
        assert_eq!(frames.used(), 4);
    }

    #[test]
    fn cooling_frames_wait_for_others_but_not_for_their_owner() {
        let words = table(2);
        let frames = Frames(&words);
        frames.set_owner(0, Owner::Cooling(5, 100));
        frames.set_owner(1, Owner::Cooling(5, 100));
        assert_eq!(frames.choose(2, 6, 99), None);
        assert_eq!(frames.choose(2, 5, 99), Some(vec![0, 1]));
        assert_eq!(frames.choose(2, 6, 100), Some(vec![0, 1]));
        assert_eq!(frames.used(), 0);
    }

    #[test]
    fn storage_is_remembered_across_owners() {
        let words = table(1);
        let frames = Frames(&words);
        frames.set_backed(0);
        frames.set_owner(0, Owner::Slot(1));
        frames.set_owner(0, Owner::Free);
        assert!(frames.backed(0));
    }
}
