//! Memory that several processes map: charged once on the node, to whoever has it already. Whether that is
//! so is asked of the coordinator; without one, only this process itself is known.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Instant;

use spillway_protocol::{GRANULE, granules_up};

use crate::driver::Status;
use crate::handles::{Charge, Descriptor, Ended, ExternalEnded};
use crate::idle::{AT_MOST, comes};
use crate::lock;
use crate::quota::Backing;
use crate::runtime::Runtime;

/// What is told to others: device index, bytes, key.
pub type Held = (usize, u64, u64);

/// Names of one piece of memory that are kept. Who imports it by an older one is charged for it.
const NAMES_AT_MOST: usize = 16;

/// What this process is charged for and others may map.
#[derive(Debug, Default)]
pub struct Shares {
    /// By the pointer whose end ends it. The driver may give one piece of memory several names.
    by_pointer: Mutex<HashMap<u64, Vec<Held>>>,
    /// Memory known by its size only, with how often.
    by_size: Mutex<HashMap<(usize, u64), u32>>,
    /// How many pointers there are.
    count: AtomicU64,
    /// Some descriptor was handed out, and may be open.
    descriptors: AtomicBool,
    /// Memory of ours that had been handed out was let go of, and some other process or an open descriptor
    /// may keep it: while it does, it is overhead beyond this many bytes, per device. 0: nothing.
    lingering: Mutex<HashMap<usize, u64>>,
    any_lingering: AtomicBool,
    /// What of it is charged still, until it is measured.
    unsettled: Mutex<Vec<Charge>>,
    /// Threads that have taken some of it out, and measure.
    settling: AtomicU32,
}

impl Shares {
    /// `None`: that is known. Otherwise what is forgotten for it, if that is too much for one pointer.
    fn hold(&self, pointer: u64, held: Held) -> Option<Option<Held>> {
        let mut known = lock(&self.by_pointer);
        let names = known.entry(pointer).or_default();
        if names.contains(&held) {
            return None;
        }
        let oldest = (names.len() == NAMES_AT_MOST).then(|| names.remove(0));
        names.push(held);
        self.count.store(known.len() as u64, SeqCst);
        Some(oldest)
    }

    fn unhold(&self, pointer: u64) -> Vec<Held> {
        if self.count.load(SeqCst) == 0 {
            return Vec::new();
        }
        let mut known = lock(&self.by_pointer);
        let held = known.remove(&pointer).unwrap_or_default();
        self.count.store(known.len() as u64, SeqCst);
        held
    }
}

/// What is open under a number in this process.
#[must_use]
pub fn descriptor(number: i32) -> Option<Descriptor> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel fills one structure, or says that the number is not open.
    let stat = unsafe {
        if libc::fstat(number, stat.as_mut_ptr()) != 0 {
            return None;
        }
        stat.assume_init()
    };
    Some(Descriptor {
        number,
        file: (stat.st_dev, stat.st_ino),
    })
}

/// The key of memory that is known by a handle of 64 bytes: never 0.
#[must_use]
pub fn key_of(handle: &[u8]) -> u64 {
    // FNV-1a, 64 bits (http://www.isthe.com/chongo/tech/comp/fnv/): spread is all that is needed.
    let hash = handle
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    hash.max(1)
}

/// See [`Runtime::changing`].
#[must_use]
pub struct Changing<'a>(&'a Runtime);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.observed.changes_ended.fetch_add(1, SeqCst);
    }
}

/// One thread measures what was let go of.
struct Settling<'a>(&'a AtomicU32);

impl<'a> Settling<'a> {
    fn begin(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, SeqCst);
        Self(count)
    }
}

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Runtime {
    /// Memory at `pointer`, which this process is charged for, can be mapped by others under `key`.
    pub fn hold(&self, pointer: u64, held: Held) {
        let Some(oldest) = self.shares.hold(pointer, held) else {
            return;
        };
        if let Some(session) = &self.session {
            session.hold(held.0, held.1, held.2);
            if let Some((device, bytes, key)) = oldest {
                session.unhold(device, bytes, key);
            }
        }
    }

    /// The memory at `pointer` is about to go: before the driver is asked, since the address may come again, and be
    /// held again, at once. To be held once more, as returned, if the driver refuses.
    pub fn unhold(&self, pointer: u64) -> Vec<Held> {
        let all = self.shares.unhold(pointer);
        if let Some(session) = &self.session {
            for &(device, bytes, key) in &all {
                session.unhold(device, bytes, key);
            }
        }
        all
    }

    /// The driver has refused to let go of the memory at `pointer`.
    pub fn hold_again(&self, pointer: u64, all: Vec<Held>) {
        for held in all {
            self.hold(pointer, held);
        }
    }

    /// A descriptor of memory was handed out: others know it by its size only.
    pub fn hold_size(&self, (device, bytes): Charge) {
        *lock(&self.shares.by_size)
            .entry((device, bytes))
            .or_default() += 1;
        if let Some(session) = &self.session {
            session.hold(device, bytes, 0);
        }
    }

    /// Undoes one [`Runtime::hold_size`].
    pub fn unhold_size(&self, (device, bytes): Charge) {
        let mut known = lock(&self.shares.by_size);
        if let Some(count) = known.get_mut(&(device, bytes)) {
            *count -= 1;
            if *count == 0 {
                known.remove(&(device, bytes));
            }
        }
        drop(known);
        if let Some(session) = &self.session {
            session.unhold(device, bytes, 0);
        }
    }

    /// Charges memory that this process maps and did not make, unless somebody on this node is charged for
    /// it already. Returns what this process is charged.
    ///
    /// # Errors
    /// It would pass the limit.
    pub fn charge_import(&self, device: usize, bytes: u64, key: u64) -> Result<u64, Status> {
        let covered = match &self.session {
            Some(session) => session.claim(device, bytes, key),
            None if key == 0 => lock(&self.shares.by_size).contains_key(&(device, bytes)),
            None => lock(&self.shares.by_pointer)
                .values()
                .flatten()
                .any(|&(d, _, k)| (d, k) == (device, key)),
        };
        if covered {
            self.imports();
            if self.is_full(device) {
                self.observed.refused.fetch_add(1, SeqCst);
                return Err(Status::OUT_OF_MEMORY);
            }
            // Whether the driver counts it as held by us, too, is its secret.
            self.may_hold(device, bytes, true);
            return Ok(0);
        }
        let charge = granules_up(bytes);
        self.reserve(device, charge, false)
            .map_err(|()| Status::OUT_OF_MEMORY)?;
        self.changes_resident(device, charge, 0);
        Ok(bytes)
    }

    /// Undoes [`Runtime::charge_import`].
    pub fn uncharge_import(&self, device: usize, bytes: u64, charged: u64) {
        if charged == 0 {
            self.may_hold(device, bytes, false);
            return;
        }
        let charge = granules_up(charged);
        self.changes_resident(device, 0, charge);
        self.unreserve(device, charge, Backing::Pinned);
    }

    /// Publishes that `bytes` on a device may or may not be among what the driver shows for this process.
    pub fn may_hold(&self, device: usize, bytes: u64, more: bool) {
        let maybe = &self.observed.devices[device].maybe;
        self.observed.changes_begun.fetch_add(1, SeqCst);
        if more {
            maybe.fetch_add(granules_up(bytes), SeqCst);
        } else {
            crate::take_off(maybe, granules_up(bytes));
        }
        self.observed.changes_ended.fetch_add(1, SeqCst);
    }

    /// From before the driver is asked to give memory back until it is off the books here: nobody measures in
    /// between, since what would be missing from the driver's figure would look like less overhead.
    pub fn changing(&self) -> Changing<'_> {
        self.observed.changes_begun.fetch_add(1, SeqCst);
        Changing(self)
    }

    fn changes_resident(&self, device: usize, more: u64, less: u64) {
        let resident = &self.observed.devices[device].resident;
        self.observed.changes_begun.fetch_add(1, SeqCst);
        resident.fetch_add(more, SeqCst);
        crate::take_off(resident, less);
        self.observed.changes_ended.fetch_add(1, SeqCst);
    }

    /// External memory is gone with all that was mapped from it.
    pub fn external_ended(&self, ended: ExternalEnded) {
        if let Some((device, bytes, charged)) = ended.import {
            self.uncharge_import(device, bytes, charged);
        }
        self.ended(ended.ended);
    }

    /// Nothing of this process refers to this memory any more.
    pub fn ended(&self, ended: Vec<Ended>) {
        for one in ended {
            let Ended {
                charge,
                exported,
                covered,
            } = one;
            let (device, bytes) = charge;
            if covered > 0 {
                self.may_hold(device, covered, false);
            }
            if bytes == 0 {
                continue;
            }
            if !exported {
                self.uncharge(device, bytes);
                continue;
            }
            self.unhold_size(charge);
            // Whoever holds a descriptor keeps it. It stays charged until the driver's own figure says
            // whether it is still there; if it is, it is overhead from then on.
            let before = self.desired().devices[device].overhead.load(SeqCst);
            self.changes_resident(device, 0, granules_up(bytes));
            if self.session.is_some() {
                lock(&self.shares.lingering).entry(device).or_insert(before);
                self.shares.any_lingering.store(true, SeqCst);
                lock(&self.shares.unsettled).push(charge);
            } else {
                self.unreserve(device, granules_up(bytes), Backing::Pinned);
            }
        }
    }

    /// The driver has freed memory that is charged, at some time before now. Who measured since then has missed it in
    /// the driver's figure, and took that for less overhead: so it is taken off the quota when it is measured again.
    pub fn has_left(&self, charge: Charge) {
        let (device, bytes) = charge;
        self.changes_resident(device, 0, granules_up(bytes));
        if self.session.is_some() {
            lock(&self.shares.unsettled).push(charge);
            self.shares.any_lingering.store(true, SeqCst);
        } else {
            self.unreserve(device, granules_up(bytes), Backing::Pinned);
        }
    }

    /// Measures what had been handed out and was let go of since, or was freed in stream order, and takes it off the
    /// quota; `false`: there was nothing. All of it at once, since a measurement may take milliseconds.
    pub fn settle_ended(&self) -> bool {
        if !self.shares.any_lingering.load(SeqCst) {
            return false;
        }
        let (ended, _settling) = {
            let mut unsettled = lock(&self.shares.unsettled);
            if unsettled.is_empty() {
                return false;
            }
            let settling = Settling::begin(&self.shares.settling);
            (std::mem::take(&mut *unsettled), settling)
        };
        self.measure_now();
        for (device, bytes) in ended {
            self.unreserve(device, granules_up(bytes), Backing::Pinned);
        }
        true
    }

    /// Waits for threads that are in [`Runtime::settle_ended`]: what they take off the quota is free. `false`: there
    /// were none.
    pub fn await_settled(&self) -> bool {
        let settled = || self.shares.settling.load(SeqCst) == 0;
        !settled() && comes(Instant::now() + AT_MOST, settled)
    }

    /// A descriptor of memory was handed out to the program.
    pub fn descriptor_made(&self) {
        self.shares.descriptors.store(true, SeqCst);
    }

    /// Looks whether descriptors that kept memory are closed by now; `false`: nothing came of it.
    pub fn look_at_descriptors(&self) -> bool {
        if !self.shares.descriptors.load(SeqCst) {
            return false;
        }
        let ended = lock(&self.handles)
            .descriptors_closed(|known| descriptor(known.number).as_ref() == Some(known));
        let any = !ended.is_empty();
        self.ended(ended);
        any
    }

    /// Has what others may still keep measured again, where there is such.
    pub fn measure_lingering(&self, device: usize) {
        if self.session.is_none() || !self.shares.any_lingering.load(SeqCst) {
            return;
        }
        let Some(before) = lock(&self.shares.lingering).get(&device).copied() else {
            return;
        };
        if !self.settle_ended() && self.measured_long_ago() {
            self.measure_now();
        }
        let overhead = self.desired().devices[device].overhead.load(SeqCst);
        if overhead <= before + GRANULE / 2 {
            lock(&self.shares.lingering).remove(&device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{NAMES_AT_MOST, Shares, key_of};

    #[test]
    fn memory_goes_with_all_its_names() {
        let shares = Shares::default();
        assert_eq!(shares.hold(100, (0, 10, 1)), Some(None));
        assert_eq!(shares.hold(100, (0, 10, 1)), None, "told once");
        assert_eq!(shares.hold(100, (0, 10, 2)), Some(None), "a second name");
        assert_eq!(shares.hold(200, (0, 10, 3)), Some(None));
        assert_eq!(shares.unhold(100), vec![(0, 10, 1), (0, 10, 2)]);
        assert_eq!(shares.unhold(100), vec![]);
        assert_eq!(shares.unhold(200), vec![(0, 10, 3)]);
        for key in 1..=NAMES_AT_MOST as u64 {
            assert_eq!(shares.hold(100, (0, 10, key)), Some(None));
        }
        assert_eq!(shares.hold(100, (0, 10, 99)), Some(Some((0, 10, 1))));
        assert_eq!(shares.unhold(100).len(), NAMES_AT_MOST);
    }

    #[test]
    fn keys_tell_handles_apart_and_are_never_zero() {
        assert_ne!(key_of(&[0; 64]), 0);
        assert_ne!(key_of(&[0; 64]), key_of(&[1; 64]));
        let mut other = [0; 64];
        other[63] = 1;
        assert_ne!(key_of(&[0; 64]), key_of(&other));
    }
}
