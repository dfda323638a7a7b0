//! Memory pools of the program: what each holds. Pure bookkeeping.
//!
//! Two kinds. The memory of an *own* pool comes from the heap here and can be swapped: its figures and
//! its cache of freed memory are kept here, and the driver's pool of that handle stays empty. The memory
//! of a *driver's* pool (shared with other processes, or nothing is swapped in this process) is the
//! driver's, charged by a [`Meter`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use spillway_protocol::granules_up;

use crate::heap::{Alloc, Place, small_size};
use crate::meter::Meter;

/// `CUmemPool_attribute`, raw: those that have an answer of ours.
mod attribute {
    pub const RELEASE_THRESHOLD: u32 = 4;
    pub const RESERVED_CURRENT: u32 = 5;
    pub const RESERVED_HIGH: u32 = 6;
    pub const USED_CURRENT: u32 = 7;
    pub const USED_HIGH: u32 = 8;
}

/// What an allocation takes of a pool.
#[must_use]
pub fn rounded(alloc: &Alloc) -> u64 {
    match alloc.place {
        Place::Slab(_) => small_size(alloc.bytes),
        _ => granules_up(alloc.bytes),
    }
}

/// Figures of an own pool.
#[derive(Debug, Default)]
struct Own {
    /// What it may hold at most, in bytes; 0: no maximum.
    max: u64,
    threshold: u64,
    used: u64,
    used_high: u64,
    kept_bytes: u64,
    /// On its way back to the device: reserved until it is there.
    leaving: u64,
    reserved_high: u64,
    /// Freed, and kept for the next allocation of the same size; the oldest first.
    kept: Vec<Alloc>,
}

impl Own {
    fn mark(&mut self) {
        self.used_high = self.used_high.max(self.used);
        self.reserved_high = self.reserved_high.max(self.reserved());
    }

    fn reserved(&self) -> u64 {
        self.used + self.kept_bytes + self.leaving
    }
}

#[derive(Debug)]
enum Kind {
    Own(Own),
    Driver(Arc<Mutex<Meter>>),
}

/// A pool of either kind.
#[derive(Debug)]
pub struct Pool {
    device: usize,
    kind: Kind,
}

impl Pool {
    /// Device and meter, if it is a driver's.
    #[must_use]
    pub fn meter(&self) -> Option<(usize, Arc<Mutex<Meter>>)> {
        match &self.kind {
            Kind::Driver(meter) => Some((self.device, Arc::clone(meter))),
            Kind::Own(_) => None,
        }
    }

    /// What an own pool keeps, for the caller to release once the pool is destroyed.
    #[must_use]
    pub fn into_kept(self) -> Vec<Alloc> {
        match self.kind {
            Kind::Own(own) => own.kept,
            Kind::Driver(_) => Vec::new(),
        }
    }
}

/// All pools that allocations were asked of, by the driver's handle.
#[derive(Debug, Default)]
pub struct Pools {
    known: HashMap<u64, Pool>,
    /// Pools that threads of ours ask the driver about now.
    in_use: HashMap<u64, u32>,
}

impl Pools {
    /// Notes the maximum that the program has set for an own pool, in bytes.
    pub fn limit(&mut self, handle: u64, max: u64) {
        if let Some(own) = self.own(handle) {
            own.max = max;
        }
    }

    /// Whether `bytes` more keep an own pool within its maximum. What it keeps unused does not count: it is
    /// given back first.
    #[must_use]
    pub fn fits(&mut self, handle: u64, bytes: u64) -> bool {
        self.own(handle).is_none_or(|own| {
            own.max == 0 || granules_up(own.used.saturating_add(bytes)) <= own.max
        })
    }

    /// Notes a pool, if it is not known.
    pub fn note(&mut self, handle: u64, device: usize, own: bool) {
        self.known.entry(handle).or_insert_with(|| Pool {
            device,
            kind: if own {
                Kind::Own(Own::default())
            } else {
                Kind::Driver(Arc::default())
            },
        });
    }

    fn own(&mut self, handle: u64) -> Option<&mut Own> {
        match &mut self.known.get_mut(&handle)?.kind {
            Kind::Own(own) => Some(own),
            Kind::Driver(_) => None,
        }
    }

    /// Whether a pool is known, and own.
    #[must_use]
    pub fn is_own(&self, handle: u64) -> Option<bool> {
        let pool = self.known.get(&handle)?;
        Some(matches!(pool.kind, Kind::Own(_)))
    }

    /// A known pool's device.
    #[must_use]
    pub fn device(&self, handle: u64) -> Option<usize> {
        self.known.get(&handle).map(|pool| pool.device)
    }

    /// Device and meter of a driver's pool.
    #[must_use]
    pub fn meter(&self, handle: u64) -> Option<(usize, Arc<Mutex<Meter>>)> {
        self.known.get(&handle)?.meter()
    }

    /// The same, for a thread of ours that is about to ask the driver about it: the driver may crash on a
    /// pool that another thread destroys, so that waits. To be ended by [`Pools::unuse`].
    pub fn try_use(&mut self, handle: u64) -> Option<(usize, Arc<Mutex<Meter>>)> {
        let found = self.meter(handle)?;
        *self.in_use.entry(handle).or_default() += 1;
        Some(found)
    }

    /// See [`Pools::try_use`].
    pub fn unuse(&mut self, handle: u64) {
        if let Some(users) = self.in_use.get_mut(&handle) {
            *users = users.saturating_sub(1);
            if *users == 0 {
                self.in_use.remove(&handle);
            }
        }
    }

    /// A thread of ours asks the driver about it now.
    #[must_use]
    pub fn is_used(&self, handle: u64) -> bool {
        self.in_use.contains_key(&handle)
    }

    /// The program is about to destroy a pool: off the record before the driver does so, since another
    /// thread may get the same handle for a new one at once. What is allocated from it lives on.
    pub fn take(&mut self, handle: u64) -> Option<Pool> {
        self.known.remove(&handle)
    }

    /// The driver has refused to destroy it.
    pub fn put_back(&mut self, handle: u64, pool: Pool) {
        self.known.insert(handle, pool);
    }

    /// The driver's pools, of one device or of all.
    #[must_use]
    pub fn drivers(&self, device: Option<usize>) -> Vec<u64> {
        self.known
            .iter()
            .filter(|(_, pool)| device.is_none_or(|device| pool.device == device))
            .filter(|(_, pool)| matches!(pool.kind, Kind::Driver(_)))
            .map(|(&handle, _)| handle)
            .collect()
    }

    /// An allocation came from an own pool.
    pub fn took(&mut self, handle: u64, bytes: u64) {
        if let Some(own) = self.own(handle) {
            own.used += bytes;
            own.mark();
        }
    }

    /// A taken allocation of an own pool is finished: whether the pool keeps it, below its threshold. If not,
    /// it leaves: see [`Pools::left`].
    pub fn keep(&mut self, alloc: &Alloc) -> bool {
        let bytes = rounded(alloc);
        let Some(own) = self.own(alloc.pool) else {
            return false;
        };
        own.used = own.used.saturating_sub(bytes);
        // Small ones lie in slabs, which are kept anyway.
        let keep =
            matches!(alloc.place, Place::Own) && own.used + own.kept_bytes + bytes <= own.threshold;
        if keep {
            own.kept.push(*alloc);
            own.kept_bytes += bytes;
        } else {
            own.leaving += bytes;
        }
        keep
    }

    /// The device has back what [`Pools::keep`] did not keep, or what was taken out of what is kept.
    pub fn left(&mut self, alloc: &Alloc) {
        if let Some(own) = self.own(alloc.pool) {
            own.leaving = own.leaving.saturating_sub(rounded(alloc));
        }
    }

    /// An allocation of an own pool is gone, whatever its threshold.
    pub fn gone(&mut self, alloc: &Alloc) {
        if let Some(own) = self.own(alloc.pool) {
            own.used = own.used.saturating_sub(rounded(alloc));
        }
    }

    /// Kept memory for an allocation of `bytes` (rounded) in a context.
    pub fn take_kept(&mut self, handle: u64, context: usize, bytes: u64) -> Option<Alloc> {
        let own = self.own(handle)?;
        let fits = |alloc: &Alloc| alloc.context == context && rounded(alloc) == bytes;
        let alloc = own.kept.remove(own.kept.iter().rposition(fits)?);
        own.kept_bytes -= bytes;
        own.used += bytes;
        own.mark();
        Some(alloc)
    }

    /// Takes kept memory out until the pool has no more than `keep` bytes, for the caller to release; see
    /// [`Pools::left`].
    #[must_use]
    pub fn trim(&mut self, handle: u64, keep: u64) -> Vec<Alloc> {
        let mut out = Vec::new();
        if let Some(own) = self.own(handle) {
            while own.used + own.kept_bytes > keep && !own.kept.is_empty() {
                let alloc = own.kept.remove(0);
                own.kept_bytes -= rounded(&alloc);
                own.leaving += rounded(&alloc);
                out.push(alloc);
            }
        }
        out
    }

    /// Takes out all kept memory that `which` says, for the caller to release; see [`Pools::left`].
    #[must_use]
    pub fn take_all_kept(&mut self, which: impl Fn(&Alloc) -> bool) -> Vec<Alloc> {
        let mut out = Vec::new();
        for pool in self.known.values_mut() {
            if let Kind::Own(own) = &mut pool.kind {
                out.extend(own.kept.extract_if(.., |alloc| which(alloc)));
                let kept = own.kept.iter().map(rounded).sum();
                own.leaving += own.kept_bytes - kept;
                own.kept_bytes = kept;
            }
        }
        out
    }

    /// An attribute of an own pool; `None`: the driver's answer stands.
    #[must_use]
    pub fn attribute(&mut self, handle: u64, which: u32) -> Option<u64> {
        let own = self.own(handle)?;
        match which {
            // The driver reserves whole pages of a device.
            attribute::RESERVED_CURRENT => Some(granules_up(own.reserved())),
            attribute::RESERVED_HIGH => Some(granules_up(own.reserved_high)),
            attribute::USED_CURRENT => Some(own.used),
            attribute::USED_HIGH => Some(own.used_high),
            _ => None,
        }
    }

    /// The driver has accepted a new value of an attribute of an own pool.
    pub fn set_attribute(&mut self, handle: u64, which: u32, value: u64) {
        if let Some(own) = self.own(handle) {
            match which {
                attribute::RELEASE_THRESHOLD => own.threshold = value,
                // It accepts no other value than 0; as it is reset, it shows what is now.
                attribute::RESERVED_HIGH => own.reserved_high = own.reserved(),
                attribute::USED_HIGH => own.used_high = own.used,
                _ => {}
            }
        }
    }

    /// Bytes that own pools hold beyond their thresholds: what a synchronisation gives back.
    #[must_use]
    pub fn over_threshold(&mut self) -> Vec<Alloc> {
        let over: Vec<(u64, u64)> = self
            .known
            .iter()
            .filter_map(|(&handle, pool)| match &pool.kind {
                Kind::Own(own) if own.used + own.kept_bytes > own.threshold => {
                    Some((handle, own.threshold))
                }
                _ => None,
            })
            .collect();
        over.into_iter()
            .flat_map(|(handle, threshold)| self.trim(handle, threshold))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const MIB: u64 = 1 << 20;

    fn alloc(ptr: u64, bytes: u64) -> Alloc {
        Alloc {
            ptr,
            bytes,
            id: ptr,
            place: Place::Own,
            context: 1,
            device: 0,
            pool: 7,
        }
    }

    #[test]
    fn figures_follow_allocations_and_frees() {
        let mut pools = Pools::default();
        pools.note(7, 0, true);
        pools.took(7, 4 * MIB);
        pools.took(7, 2 * MIB);
        assert!(!pools.keep(&alloc(1, 4 * MIB)), "the threshold is 0");
        assert_eq!(pools.attribute(7, attribute::USED_CURRENT), Some(2 * MIB));
        assert_eq!(pools.attribute(7, attribute::USED_HIGH), Some(6 * MIB));
        pools.set_attribute(7, attribute::USED_HIGH, 0);
        assert_eq!(pools.attribute(7, attribute::USED_HIGH), Some(2 * MIB));
        assert_eq!(
            pools.attribute(7, attribute::RELEASE_THRESHOLD),
            None,
            "the driver's"
        );
        assert_eq!(pools.attribute(8, attribute::USED_CURRENT), None);
    }

    #[test]
    fn what_is_freed_below_the_threshold_is_kept_and_comes_again() {
        let mut pools = Pools::default();
        pools.note(7, 0, true);
        pools.set_attribute(7, attribute::RELEASE_THRESHOLD, 6 * MIB);
        pools.took(7, 4 * MIB);
        pools.took(7, 4 * MIB);
        assert!(!pools.keep(&alloc(1, 4 * MIB)), "8 MiB are above 6");
        assert!(pools.keep(&alloc(2, 4 * MIB)));
        assert_eq!(
            pools.attribute(7, attribute::RESERVED_CURRENT),
            Some(8 * MIB),
            "one is kept, one has not left yet"
        );
        assert_eq!(pools.take_kept(7, 2, 4 * MIB), None, "another context's");
        assert_eq!(pools.take_kept(7, 1, 2 * MIB), None, "another size");
        assert_eq!(pools.take_kept(7, 1, 4 * MIB), Some(alloc(2, 4 * MIB)));
        assert!(pools.keep(&alloc(2, 4 * MIB)));
        assert_eq!(pools.trim(7, 0), vec![alloc(2, 4 * MIB)]);
        let reserved = |pools: &mut Pools| pools.attribute(7, attribute::RESERVED_CURRENT);
        assert_eq!(reserved(&mut pools), Some(8 * MIB), "until they are there");
        pools.left(&alloc(1, 4 * MIB));
        pools.left(&alloc(2, 4 * MIB));
        assert_eq!(reserved(&mut pools), Some(0));
    }

    #[test]
    fn a_lower_threshold_gives_back_at_the_next_synchronisation() {
        let mut pools = Pools::default();
        pools.note(7, 0, true);
        pools.set_attribute(7, attribute::RELEASE_THRESHOLD, u64::MAX);
        pools.took(7, 2 * MIB);
        assert!(pools.keep(&alloc(1, 2 * MIB)));
        assert_eq!(pools.over_threshold(), vec![]);
        pools.set_attribute(7, attribute::RELEASE_THRESHOLD, 0);
        assert_eq!(pools.over_threshold(), vec![alloc(1, 2 * MIB)]);
    }

    #[test]
    fn a_pool_has_a_maximum_and_reserves_whole_granules() {
        let mut pools = Pools::default();
        pools.note(7, 0, true);
        assert!(pools.fits(7, u64::MAX / 2), "none was set");
        pools.limit(7, 4 * MIB);
        pools.took(7, MIB);
        assert_eq!(
            pools.attribute(7, attribute::RESERVED_CURRENT),
            Some(2 * MIB)
        );
        assert!(pools.fits(7, 3 * MIB));
        assert!(!pools.fits(7, 4 * MIB));
    }

    #[test]
    fn a_destroyed_pool_keeps_nothing() {
        let mut pools = Pools::default();
        pools.note(7, 0, true);
        pools.set_attribute(7, attribute::RELEASE_THRESHOLD, u64::MAX);
        pools.took(7, 2 * MIB);
        pools.took(7, 2 * MIB);
        assert!(pools.keep(&alloc(1, 2 * MIB)));
        let taken = pools.take(7).expect("it is known");
        assert_eq!(taken.into_kept(), vec![alloc(1, 2 * MIB)]);
        assert_eq!(pools.is_own(7), None);
        assert!(!pools.keep(&alloc(2, 2 * MIB)));
    }

    #[test]
    fn nobody_asks_about_a_pool_that_is_being_destroyed() {
        let mut pools = Pools::default();
        pools.note(8, 1, false);
        assert!(pools.try_use(8).is_some());
        let taken = pools.take(8).expect("it is known");
        assert!(pools.is_used(8), "who asks already is waited for");
        assert!(pools.try_use(8).is_none(), "and nobody begins to");
        pools.unuse(8);
        assert!(!pools.is_used(8));
        // The same handle for a new one, while the old one's end is not through.
        pools.note(8, 0, true);
        assert_eq!(pools.is_own(8), Some(true));
        assert_eq!(taken.meter().map(|(device, _)| device), Some(1));
    }

    #[test]
    fn drivers_pools_are_told_apart() {
        let mut pools = Pools::default();
        pools.note(7, 0, true);
        pools.note(8, 1, false);
        assert_eq!(pools.drivers(None), vec![8]);
        assert_eq!(pools.drivers(Some(0)), vec![]);
        assert!(pools.meter(7).is_none());
        assert_eq!(pools.meter(8).map(|(device, _)| device), Some(1));
    }
}
