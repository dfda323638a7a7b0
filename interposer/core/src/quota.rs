//! Quota: what this process may use, reserved before the driver is asked.
//!
//! The fast path is one compare-exchange on the observed page (`spillway_protocol::page`). What
//! does not fit is first made to fit with what is ours to give back, then asked of the coordinator.
//! A refusal is final only after that round trip.

use std::sync::atomic::Ordering::SeqCst;

use spillway_protocol::{GRANULE, granules_up, page};

use crate::heap::small_size;
use crate::overhead::signed;
use crate::runtime::Runtime;
use crate::session::Grown;

/// What stands behind granted bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// The host pool has space for them: they may be moved.
    Pageable,
    /// They stay on the device.
    Pinned,
}

/// How often other threads may snatch what the coordinator granted before we give up.
const TRIES: usize = 64;

impl Runtime {
    /// `left`: what has to stay free below the limit.
    fn try_reserve(&self, device: usize, bytes: u64, pageable: bool, left: u64) -> Option<Backing> {
        let own = &self.observed.devices[device];
        if !page::reserve(&own.used, bytes, || &self.desired().devices[device].grant) {
            return None;
        }
        // A grant that was made before overhead grew may be more than the limit has left: the coordinator decides.
        if self.session.is_some() && self.headroom(device) < signed(left) {
            crate::take_off(&own.used, bytes);
            return None;
        }
        if !pageable {
            own.pinned.fetch_add(bytes, SeqCst);
            return Some(Backing::Pinned);
        }
        if page::reserve(&self.observed.pageable, bytes, || {
            &self.desired().host_grant
        }) {
            return Some(Backing::Pageable);
        }
        own.used.fetch_sub(bytes, SeqCst);
        None
    }

    /// Reserves `bytes` (whole granules) on a device, pageable if `pageable` and the host pool can
    /// back it. May wait for other workloads' memory: call it outside the gate and without a lock.
    ///
    /// # Errors
    /// The bytes would pass the limit, or could not be had in time. Nothing is reserved.
    pub fn reserve(&self, device: usize, bytes: u64, mut pageable: bool) -> Result<Backing, ()> {
        let left = self.settle_overhead(device, bytes);
        let mut drained = false;
        let demand = &self.observed.devices[device].demand;
        for _ in 0..TRIES {
            if let Some(backing) = self.try_reserve(device, bytes, pageable, left) {
                return Ok(backing);
            }
            if self.give_back_spare(device) {
                continue;
            }
            let Some(session) = &self.session else {
                // The limit is the grant; what is freed in stream order may still come.
                if !drained && self.wait_for_deferred(device) {
                    drained = true;
                    continue;
                }
                break;
            };
            if left > 0 && self.headroom(device) < signed(bytes.saturating_add(left)) {
                // A grant would not help.
                if !drained && self.wait_for_deferred(device) {
                    drained = true;
                    continue;
                }
                break;
            }
            let used = || self.observed.devices[device].used.load(SeqCst);
            let before = used();
            demand.fetch_add(bytes, SeqCst);
            let grown = session.grow(device, bytes, if pageable { bytes } else { 0 }, false);
            demand.fetch_sub(bytes, SeqCst);
            match grown {
                Grown::Granted { backed } => pageable &= backed,
                // Or another thread was faster: it has given back what was freed.
                Grown::Refused(..)
                    if !drained && (self.wait_for_deferred(device) || used() < before) =>
                {
                    drained = true;
                }
                Grown::Refused(text) => {
                    crate::say::info!(
                        "refused {} on device {device}: {text}",
                        spillway_protocol::format_bytes(bytes)
                    );
                    break;
                }
                Grown::Gone => break,
            }
        }
        self.observed.refused.fetch_add(1, SeqCst);
        Err(())
    }

    /// Gives bytes back, after the driver has released them.
    pub fn unreserve(&self, device: usize, bytes: u64, backing: Backing) {
        let own = &self.observed.devices[device];
        match backing {
            Backing::Pageable => crate::take_off(&self.observed.pageable, bytes),
            Backing::Pinned => crate::take_off(&own.pinned, bytes),
        }
        crate::take_off(&own.used, bytes);
    }

    /// Free and total bytes of a device as the program is told: of its own workload only.
    pub fn told(&self, device: usize) -> (u64, u64) {
        self.reap_deferred();
        if let Some(session) = &self.session
            && self.desired().flags.load(SeqCst) & page::FLAG_SIBLINGS != 0
        {
            session.refresh(false);
        }
        self.look_at_stores(device);
        self.look_at_descriptors();
        self.settle_ended();
        self.await_settled();
        self.measure_lingering(device);
        self.measure_if_changed();
        let desired = &self.desired().devices[device];
        let limit = desired.limit.load(SeqCst);
        let gone = self.observed.devices[device].used.load(SeqCst)
            + desired.overhead.load(SeqCst)
            + desired.others.load(SeqCst)
            + self.stacks_to_come(device);
        let spare = crate::lock(&self.heap).spare_bytes(device);
        let free = spillway_protocol::granules_down((limit + spare).saturating_sub(gone));
        (free.min(limit), limit)
    }
}

/// What small allocations of the driver's own cost: the driver packs those of one size into granules, so
/// they are charged by what a granule holds of them, and by their sum, in whole granules.
#[derive(Debug, Default)]
pub struct SmallMeter {
    bytes: u64,
    charged: u64,
}

/// A small allocation's share of a granule: of 700 KiB there are two in one, not three.
fn share(bytes: u64) -> u64 {
    let fit = GRANULE / small_size(bytes.max(1)).min(GRANULE);
    GRANULE.div_ceil(fit)
}

impl SmallMeter {
    /// What more has to be reserved before `bytes` more may be allocated.
    #[must_use]
    pub fn needs(&self, bytes: u64) -> u64 {
        granules_up(self.bytes + share(bytes)).saturating_sub(self.charged)
    }

    /// Counts an allocation, with what was reserved for it.
    pub fn add(&mut self, bytes: u64, reserved: u64) {
        self.bytes += share(bytes);
        self.charged += reserved;
    }

    /// Counts a free; returns what may be unreserved.
    #[must_use]
    pub fn remove(&mut self, bytes: u64) -> u64 {
        self.bytes = self.bytes.saturating_sub(share(bytes));
        let spare = self.charged.saturating_sub(granules_up(self.bytes));
        self.charged -= spare;
        spare
    }
}

#[cfg(test)]
mod tests {
    use super::{SmallMeter, share};
    const MIB: u64 = 1 << 20;

    #[test]
    fn small_driver_allocations_are_charged_by_their_sum() {
        let mut meter = SmallMeter::default();
        assert_eq!(meter.needs(1024), 2 * MIB);
        meter.add(1024, 2 * MIB);
        assert_eq!(meter.needs(MIB / 2), 0);
        meter.add(MIB / 2, 0);
        assert_eq!(meter.remove(1024), 0);
        assert_eq!(meter.remove(MIB / 2), 2 * MIB);
        assert_eq!(meter.needs(1), 2 * MIB);
    }

    #[test]
    fn what_does_not_fit_into_a_granule_a_third_time_is_not_charged_a_third() {
        let mut meter = SmallMeter::default();
        for _ in 0..2 {
            let needs = meter.needs(700 << 10);
            meter.add(700 << 10, needs);
        }
        assert_eq!(meter.needs(700 << 10), 2 * MIB);
        assert_eq!(share(100_000), (2 * MIB).div_ceil(20));
    }
}
