//! The live allocations of one slab, by offset: dense arrays instead of a tree, since there may be very many
//! and each is looked up when it is freed.

use std::collections::BTreeMap;

use super::slab::{ALIGN, SMALL};

/// What is known of an allocation besides where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// See [`super::Alloc::id`].
    pub id: u64,
    /// See [`super::Alloc::pool`].
    pub pool: u64,
    /// What the application asked for, in bytes.
    pub bytes: u64,
}

/// The records of a slab. Offsets are whole alignment units.
#[derive(Debug)]
pub struct Records {
    /// One bit per unit: an allocation starts here.
    starts: Box<[u64]>,
    /// Per unit at which an allocation starts: its id above [`SIZE_BITS`], below them its bytes less 1. One
    /// word each, so that a free misses the caches once; pages of it come into being when they are used.
    words: Box<[u64]>,
    /// Of those that came from a pool: by offset.
    pools: BTreeMap<u64, u64>,
}

/// What holds the size of the largest small allocation, less 1.
const SIZE_BITS: u32 = 20;
const _: () = assert!(SMALL - 1 <= 1 << SIZE_BITS);
/// Ids that fit above it: 17 trillion allocations.
const IDS: u64 = u64::MAX >> SIZE_BITS;

fn unit(offset: u64) -> usize {
    usize::try_from(offset / ALIGN).unwrap_or(usize::MAX)
}

impl Records {
    /// None yet, for a slab of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let units = unit(size);
        Self {
            starts: vec![0; units.div_ceil(64)].into(),
            words: vec![0; units].into(),
            pools: BTreeMap::new(),
        }
    }

    fn starts_at(&self, unit: usize) -> bool {
        let word = self.starts.get(unit / 64).copied().unwrap_or(0);
        word >> (unit % 64) & 1 != 0
    }

    /// Notes an allocation at an offset that has none. `record.bytes` is not 0, and below [`SMALL`].
    pub fn insert(&mut self, offset: u64, record: Record) {
        let unit = unit(offset);
        debug_assert!(!self.starts_at(unit), "two allocations in one place");
        debug_assert!((1..SMALL).contains(&record.bytes), "not a small allocation");
        self.words[unit] = (record.id & IDS) << SIZE_BITS | record.bytes.saturating_sub(1);
        self.starts[unit / 64] |= 1 << (unit % 64);
        if record.pool != 0 {
            self.pools.insert(offset, record.pool);
        }
    }

    /// The allocation that starts at an offset.
    #[must_use]
    pub fn get(&self, offset: u64) -> Option<Record> {
        let unit = unit(offset);
        if !offset.is_multiple_of(ALIGN) || !self.starts_at(unit) {
            return None;
        }
        let word = self.words[unit];
        Some(Record {
            id: word >> SIZE_BITS,
            pool: self.pools.get(&offset).copied().unwrap_or(0),
            bytes: (word & ((1 << SIZE_BITS) - 1)) + 1,
        })
    }

    /// Forgets the allocation that starts at an offset.
    pub fn remove(&mut self, offset: u64) -> Option<Record> {
        let record = self.get(offset)?;
        let unit = unit(offset);
        self.starts[unit / 64] &= !(1 << (unit % 64));
        if record.pool != 0 {
            self.pools.remove(&offset);
        }
        Some(record)
    }

    /// The last allocation that starts at or before an offset, with its own offset.
    #[must_use]
    pub fn before(&self, offset: u64) -> Option<(u64, Record)> {
        let unit = unit(offset);
        let mut word = unit / 64;
        // Starts after the unit are not looked at.
        let mut bits = self.starts.get(word)? & (u64::MAX >> (63 - unit % 64));
        while bits == 0 {
            word = word.checked_sub(1)?;
            bits = self.starts[word];
        }
        let start = word as u64 * 64 + u64::from(bits.ilog2());
        Some((start * ALIGN, self.get(start * ALIGN)?))
    }

    /// All offsets with their records, in address order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Record)> {
        (0..self.words.len() as u64)
            .map(|unit| unit * ALIGN)
            .filter_map(|offset| Some((offset, self.get(offset)?)))
    }

    /// What came from a pool is of no pool from now on.
    pub fn forget_pool(&mut self, pool: u64) {
        self.pools.retain(|_, of| *of != pool);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u64) -> Record {
        Record {
            id,
            pool: id % 3,
            bytes: id + 1,
        }
    }

    #[test]
    fn finds_what_a_tree_would_find() {
        const UNITS: u64 = 4096;
        let (mut records, mut tree) = (Records::new(UNITS * 512), BTreeMap::new());
        let mut seed = 11_u64;
        for step in 0..20_000 {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let offset = (seed >> 40) % UNITS * 512;
            assert_eq!(records.get(offset), tree.get(&offset).copied());
            assert_eq!(records.get(offset + 1), None);
            let before = tree.range(..=offset + 511).next_back();
            assert_eq!(records.before(offset + 511), before.map(|(&o, &r)| (o, r)));
            if let Some(known) = tree.remove(&offset) {
                assert_eq!(records.remove(offset), Some(known));
                assert_eq!(records.remove(offset), None);
            } else if seed >> 63 == 0 {
                records.insert(offset, record(step));
                tree.insert(offset, record(step));
            }
        }
        assert!(records.iter().eq(tree.iter().map(|(&o, &r)| (o, r))));
        records.forget_pool(1);
        tree.values_mut()
            .filter(|r| r.pool == 1)
            .for_each(|r| r.pool = 0);
        assert!(records.iter().eq(tree.iter().map(|(&o, &r)| (o, r))));
    }

    #[test]
    fn the_largest_size_and_id_fit() {
        let mut records = Records::new(2 << 20);
        let largest = Record {
            id: IDS,
            pool: u64::MAX,
            bytes: SMALL - 1,
        };
        records.insert(512, largest);
        assert_eq!(records.get(512), Some(largest));
    }

    #[test]
    fn the_very_first_and_last_units_count() {
        let mut records = Records::new(2 << 20);
        assert_eq!(records.before(0), None);
        records.insert(0, record(1));
        records.insert((2 << 20) - 512, record(2));
        assert_eq!(records.before((2 << 20) - 513), Some((0, record(1))));
        assert_eq!(
            records.before((2 << 20) - 1),
            Some(((2 << 20) - 512, record(2)))
        );
    }
}
