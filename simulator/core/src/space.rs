//! The device address space of this process: what is mapped where, and who may touch it.
//!
//! Addresses come from one inaccessible reservation, so that they are valid nowhere else and a
//! CPU access faults as it would with a GPU. Work reaches memory through [`Space::translate`]
//! only, each time it runs: what is not mapped, or not accessible to the device, is an
//! `ILLEGAL_ADDRESS`, and a frame that was unmapped meanwhile is never touched.

use crate::code::{ILLEGAL_ADDRESS, OUT_OF_MEMORY, R};
use crate::config::{FRAME, GPUS_MAX};
pub use crate::physical::{Physical, Place, fresh_id};
use crate::ranges::Ranges;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Reading and writing, as `CUmemAccess_flags` numbers them.
pub const READ: u8 = 1;
pub const READ_WRITE: u8 = 3;

/// One mapping of physical memory.
pub struct Region {
    pub length: u64,
    pub physical: Arc<Physical>,
    pub access: [u8; GPUS_MAX],
    /// What the CPU may do with it, at this address.
    pub host_access: u8,
    /// Mapped by `cuMemMap`, not by an allocation call.
    pub vmm: bool,
    /// Memory pool that it is of, or what stands for one; 0 if it is a context's or of `cuMemMap`.
    pub pool: u64,
}

/// What an address belongs to, as the application sees it.
#[derive(Clone, Debug)]
pub struct Allocation {
    pub start: u64,
    pub length: u64,
    pub gpu: u32,
    /// Owner context; 0 if it has none.
    pub context: u64,
    /// Memory pool; 0 if it came from none.
    pub pool: u64,
    pub id: u64,
}

/// The address space. Guarded by a lock in `driver.rs`; work holds it for one piece at a time.
pub struct Space {
    pub start: u64,
    pub end: u64,
    free: Ranges,
    /// The addresses below 4 GiB, for contexts whose addresses have 32 bits; empty until there is one.
    low: (u64, u64),
    low_free: Ranges,
    pub regions: BTreeMap<u64, Region>,
    pub reservations: BTreeMap<u64, u64>,
    pub allocations: BTreeMap<u64, Allocation>,
}

const ARENA: u64 = 8 << 40;
/// The last frame below 4 GiB is left out, so that the end of an allocation has 32 bits, too.
const LOW_END: u64 = (4 << 30) - FRAME;

/// A private reservation that nothing can access.
fn reserve(at: u64, length: u64, flags: i32) -> Option<u64> {
    // SAFETY: fresh addresses: with MAP_FIXED_NOREPLACE nothing that is mapped is touched.
    let base = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            length as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags,
            -1,
            0,
        )
    };
    (base != libc::MAP_FAILED).then_some(base as u64)
}

impl Space {
    /// Reserves the addresses.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if the process may not have that many addresses.
    pub fn new() -> R<Self> {
        let mut length = ARENA;
        let base = loop {
            if let Some(base) = reserve(0, length, 0) {
                break base;
            }
            length /= 2;
            if length < 64 << 30 {
                return Err(OUT_OF_MEMORY);
            }
        };
        let start = base.next_multiple_of(FRAME);
        let end = (base + length) / FRAME * FRAME;
        Ok(Self {
            start,
            end,
            free: Ranges::new(start, end - start),
            low: (0, 0),
            low_free: Ranges::default(),
            regions: BTreeMap::new(),
            reservations: BTreeMap::new(),
            allocations: BTreeMap::new(),
        })
    }

    /// Whether the address is a device address at all.
    #[must_use]
    pub fn holds(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address) || (self.low.0..self.low.1).contains(&address)
    }

    /// Addresses for `length` bytes (a multiple of [`FRAME`]), at `hint` if that is free.
    pub fn take_addresses(&mut self, length: u64, alignment: u64, hint: u64) -> Option<u64> {
        if hint != 0 && hint.is_multiple_of(alignment.max(FRAME)) && self.free.take_at(hint, length)
        {
            return Some(hint);
        }
        self.free.take(length, alignment.max(FRAME))
    }

    /// As [`Self::take_addresses`], below 4 GiB.
    pub fn take_low_addresses(&mut self, length: u64) -> Option<u64> {
        self.low_free.take(length, FRAME)
    }

    pub fn give_addresses(&mut self, start: u64, length: u64) {
        if start < self.low.1 {
            self.low_free.give(start, length);
        } else {
            self.free.give(start, length);
        }
    }

    /// Reserves addresses below 4 GiB, as many as the process has left in one piece there.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if it has too few.
    pub fn reserve_low(&mut self) -> R {
        if self.low.1 != 0 {
            return Ok(());
        }
        for start in [256_u64 << 20, 1 << 30, 2 << 30, 3 << 30] {
            let length = LOW_END - start;
            if reserve(start, length, libc::MAP_FIXED_NOREPLACE) == Some(start) {
                self.low = (start, LOW_END);
                self.low_free = Ranges::new(start, length);
                return Ok(());
            }
        }
        Err(OUT_OF_MEMORY)
    }

    /// The region that `address` lies in.
    #[must_use]
    pub fn region(&self, address: u64) -> Option<(u64, &Region)> {
        let (start, region) = self.regions.range(..=address).next_back()?;
        (address < start + region.length).then_some((*start, region))
    }

    /// The allocation that `address` lies in.
    #[must_use]
    pub fn allocation(&self, address: u64) -> Option<&Allocation> {
        let (start, allocation) = self.allocations.range(..=address).next_back()?;
        (address < start + allocation.length).then_some(allocation)
    }

    /// The reservation of `cuMemAddressReserve` that `address` lies in.
    #[must_use]
    pub fn reservation(&self, address: u64) -> Option<(u64, u64)> {
        let (start, length) = self.reservations.range(..=address).next_back()?;
        (address < start + length).then_some((*start, *length))
    }

    /// Whether any region overlaps the range.
    #[must_use]
    pub fn any_region(&self, start: u64, length: u64) -> bool {
        self.regions
            .range(..start + length)
            .next_back()
            .is_some_and(|(s, r)| s + r.length > start)
    }

    /// The starts of the regions that fill the range exactly, with no gap and none sticking out.
    #[must_use]
    pub fn exactly(&self, start: u64, length: u64) -> Option<Vec<u64>> {
        let mut at = start;
        let mut found = Vec::new();
        while at < start.checked_add(length)? {
            let region = self.regions.get(&at)?;
            found.push(at);
            at += region.length;
        }
        (at == start + length && !found.is_empty()).then_some(found)
    }

    /// Where `address` lies in this process, and how many of at most `length` bytes follow there.
    ///
    /// # Errors
    /// `ILLEGAL_ADDRESS` if it is not mapped or `device` may not do that; `None` as device asks
    /// on behalf of a copy engine: any device's access will do.
    pub fn translate(
        &self,
        address: u64,
        length: u64,
        device: Option<u32>,
        writes: bool,
    ) -> R<(*mut u8, u64)> {
        let (start, region) = self.region(address).ok_or(ILLEGAL_ADDRESS)?;
        let needed = if writes { READ_WRITE } else { READ };
        let may = |gpu: usize| region.access[gpu] & needed == needed;
        let allowed = match device {
            Some(gpu) => may(gpu as usize),
            None => (0..GPUS_MAX).any(may),
        };
        if !allowed {
            return Err(ILLEGAL_ADDRESS);
        }
        let offset = address - start;
        let (at, run) = region.physical.locate(offset).ok_or(ILLEGAL_ADDRESS)?;
        Ok((at, run.min(region.length - offset).min(length)))
    }
}
