//! Allocating and freeing: the heap's bookkeeping carried out with the driver.
//!
//! No lock is held over a driver call. Physical memory is created inside the gate, so that the pager
//! never sees half an allocation; waiting for quota happens outside.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use spillway_protocol::{GRANULE, granules_up};

use crate::driver::{Status, call};
use crate::gate;
use crate::handles::{Kind, Other};
use crate::heap::{Alloc, Block, Chunk, Place, SMALL};
use crate::lock;
use crate::quota::Backing;
use crate::runtime::Runtime;
use crate::vmm;

/// Physical memory comes in handles of at most this many bytes: large handles are cheap to map,
/// small ones let an eviction free space as it goes.
const CHUNK: u64 = 128 << 20;
/// The driver may report out of memory for some milliseconds after another process released.
const TRANSIENT: Duration = Duration::from_millis(200);

impl Runtime {
    /// `cuMemAlloc` and its like: device memory in the current context. `pool`: the own pool that it is to
    /// come from, or 0.
    ///
    /// # Errors
    /// What the driver would answer.
    pub fn allocate(&self, bytes: u64, pool: u64) -> Result<u64, Status> {
        if bytes == 0 {
            return Err(Status::INVALID_VALUE);
        }
        if pool == 0 {
            self.capture_allows()?;
        }
        let (context, device) = self.current()?;
        self.allocate_on(context, device, bytes, pool, bytes < SMALL)
    }

    /// The same on any device, for a context of any: `small` only where the device is the context's.
    ///
    /// # Errors
    /// What the driver would answer.
    pub fn allocate_on(
        &self,
        context: usize,
        device: usize,
        bytes: u64,
        pool: u64,
        small: bool,
    ) -> Result<u64, Status> {
        self.reap_deferred();
        self.finish_kept();
        if !self.paging || bytes > u64::MAX / 4 {
            return self.allocate_pinned(context, device, bytes, pool);
        }
        loop {
            if small && let Some(ptr) = lock(&self.heap).carve(context, bytes, pool) {
                return Ok(ptr);
            }
            let charge = if small { GRANULE } else { granules_up(bytes) };
            match self.reserve(device, charge, true) {
                Err(()) => return Err(Status::OUT_OF_MEMORY),
                Ok(Backing::Pinned) => {
                    self.unreserve(device, charge, Backing::Pinned);
                    return self.allocate_pinned(context, device, bytes, pool);
                }
                Ok(Backing::Pageable) => {}
            }
            let made = healthy().and_then(|()| {
                self.create_block(context, device, charge, |block| {
                    let mut heap = lock(&self.heap);
                    if small {
                        heap.add_slab(block.into_slab());
                    } else {
                        heap.add_own(block, bytes, pool);
                    }
                })
            });
            match made {
                Err(why) => {
                    self.unreserve(device, charge, Backing::Pageable);
                    return Err(why);
                }
                Ok(base) if !small => return Ok(base),
                // Another thread may have filled the slab already.
                Ok(_) => {}
            }
        }
    }

    /// While a stream captures, whether the driver would let this thread allocate: asked with an
    /// allocation of its own, so that a capture that forbids it is spoilt as it would be.
    fn capture_allows(&self) -> Result<(), Status> {
        if !self.paging || !self.glance.capturing() {
            return Ok(());
        }
        let mut ptr = 0;
        // SAFETY: the driver fills one address, which is freed at once.
        unsafe {
            call::cuMemAlloc_v2(&raw mut ptr, 1).ok()?;
            let _ = call::cuMemFree_v2(ptr);
        }
        Ok(())
    }

    /// Makes a block of `bytes` and hands it to `keep`, inside the gate.
    fn create_block(
        &self,
        context: usize,
        device: usize,
        bytes: u64,
        keep: impl FnOnce(Block),
    ) -> Result<u64, Status> {
        let start = Instant::now();
        let access = self.access_of(device);
        let ordinal = self.devices[device].ordinal;
        let mut keep = Some(keep);
        loop {
            let inside = gate::enter();
            self.observed.changes_begun.fetch_add(1, SeqCst);
            let made = vmm::reserve(bytes).and_then(|base| {
                let chunks = split(bytes);
                vmm::back(ordinal, base, chunks, &access)
                    .inspect_err(|_| vmm::unreserve(base, bytes))
                    .map(|chunks| Block::new(base, device, context, true, chunks))
            });
            let result = match made {
                Ok(block) => {
                    let base = block.base;
                    self.observed.devices[device]
                        .resident
                        .fetch_add(bytes, SeqCst);
                    if let Some(keep) = keep.take() {
                        keep(block);
                    }
                    Ok(base)
                }
                Err(why) => Err(why),
            };
            self.observed.changes_ended.fetch_add(1, SeqCst);
            drop(inside);
            match result {
                Err(Status::OUT_OF_MEMORY) if start.elapsed() < TRANSIENT => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => return other,
            }
        }
    }

    /// Memory of the driver's own, charged as pinned.
    fn allocate_pinned(
        &self,
        context: usize,
        device: usize,
        bytes: u64,
        pool: u64,
    ) -> Result<u64, Status> {
        let mut ptr = 0;
        self.charged(device, bytes, || {
            // SAFETY: the driver fills one address.
            unsafe {
                call::cuMemAlloc_v2(&raw mut ptr, usize::try_from(bytes).unwrap_or(usize::MAX))
            }
        })?;
        lock(&self.heap).add_driver((ptr, bytes), device, context, pool, Place::Driver);
        Ok(ptr)
    }

    /// Runs an allocating driver call inside the gate, with `bytes` charged as pinned if it
    /// succeeds. To be undone by [`Runtime::uncharge`] with the same figure.
    ///
    /// # Errors
    /// Out of memory by quota, or the driver's own answer.
    pub fn charged(
        &self,
        device: usize,
        bytes: u64,
        make: impl FnOnce() -> Status,
    ) -> Result<(), Status> {
        let reserved = self.charge(device, bytes)?;
        let inside = gate::enter();
        self.observed.changes_begun.fetch_add(1, SeqCst);
        let status = make();
        if status.is_success() {
            self.observed.devices[device]
                .resident
                .fetch_add(reserved, SeqCst);
        }
        self.observed.changes_ended.fetch_add(1, SeqCst);
        drop(inside);
        if !status.is_success() {
            self.uncharge_quota(device, bytes);
            return Err(status);
        }
        Ok(())
    }

    /// The same for managed memory: the driver may or may not have it on the device at any moment, and does not
    /// show it as this process's. So it is charged, and never among what is resident.
    ///
    /// # Errors
    /// As for [`Runtime::charged`].
    pub fn charged_managed(
        &self,
        device: usize,
        bytes: u64,
        make: impl FnOnce() -> Status,
    ) -> Result<(), Status> {
        self.reserve(device, granules_up(bytes), false)
            .map_err(|()| Status::OUT_OF_MEMORY)?;
        let inside = gate::enter();
        let status = make();
        drop(inside);
        if let Err(why) = status.ok() {
            self.unreserve(device, granules_up(bytes), Backing::Pinned);
            return Err(why);
        }
        Ok(())
    }

    /// Undoes [`Runtime::charged_managed`], after the driver has released the memory.
    pub fn uncharge_managed(&self, device: usize, bytes: u64) {
        self.unreserve(device, granules_up(bytes), Backing::Pinned);
    }

    /// An array, a managed allocation, or a pointer from another process's pool is gone.
    pub fn other_gone(&self, other: Other) {
        let (device, bytes) = other.charge;
        match other.kind {
            Kind::Held => self.uncharge(device, bytes),
            Kind::Managed => self.uncharge_managed(device, bytes),
            Kind::Covered => self.may_hold(device, bytes, false),
        }
    }

    /// Charges driver memory; returns what was reserved for it.
    fn charge(&self, device: usize, bytes: u64) -> Result<u64, Status> {
        if !self.limited {
            return Ok(0);
        }
        if bytes >= SMALL {
            let charge = granules_up(bytes);
            self.reserve(device, charge, false)
                .map_err(|()| Status::OUT_OF_MEMORY)?;
            return Ok(charge);
        }
        let needs = lock(&self.small[device]).needs(bytes);
        if needs > 0 {
            self.reserve(device, needs, false)
                .map_err(|()| Status::OUT_OF_MEMORY)?;
        }
        // A racing thread may have reserved the same granule: then both stand, which only errs on
        // the safe side until the next free.
        lock(&self.small[device]).add(bytes, needs);
        Ok(needs)
    }

    fn uncharge_quota(&self, device: usize, bytes: u64) -> u64 {
        if !self.limited {
            return 0;
        }
        let spare = if bytes >= SMALL {
            granules_up(bytes)
        } else {
            lock(&self.small[device]).remove(bytes)
        };
        if spare > 0 {
            self.unreserve(device, spare, Backing::Pinned);
        }
        spare
    }

    /// Undoes [`Runtime::charged`], after the driver has released the memory.
    pub fn uncharge(&self, device: usize, bytes: u64) {
        let spare = self.uncharge_quota(device, bytes);
        crate::take_off(&self.observed.devices[device].resident, spare);
    }

    /// `cuMemFree` of a pointer of ours; `None`: it is not.
    pub fn free(&self, ptr: u64) -> Option<Status> {
        let alloc = lock(&self.heap).take(ptr)?;
        if alloc.place.is_drivers() {
            let _changing = self.changing();
            let held = self.unhold(ptr);
            // SAFETY: the driver made it, and the record was taken once.
            let status = unsafe { call::cuMemFree_v2(ptr) };
            if status.is_success() {
                self.drivers_freed(&alloc);
            } else {
                self.hold_again(ptr, held);
                lock(&self.heap).put_back(alloc);
            }
            return Some(status);
        }
        if self.glance.capturing() {
            // To wait for all work that may use it would spoil the capture: kept until that ends.
            let mut kept = lock(&self.kept);
            kept.push(alloc);
            self.has_kept.store(true, SeqCst);
            return Some(Status::SUCCESS);
        }
        let waited = self.wait_idle(alloc.context);
        self.retire(&alloc);
        Some(match waited {
            Ok(()) => Status::SUCCESS,
            Err(why) => why,
        })
    }

    /// Gives back what was freed while a stream captured, if none does now.
    pub fn finish_kept(&self) {
        if !self.has_kept.load(SeqCst) || self.glance.capturing() {
            return;
        }
        let kept = {
            let mut kept = lock(&self.kept);
            self.has_kept.store(false, SeqCst);
            std::mem::take(&mut *kept)
        };
        let contexts: BTreeSet<usize> = kept.iter().map(|alloc| alloc.context).collect();
        for context in contexts {
            // A context that is broken or gone runs nothing any more.
            let _ = self.wait_idle(context);
        }
        for alloc in &kept {
            self.retire(alloc);
        }
    }

    /// The driver has freed, or will in stream order, an allocation of its own that was on record, and held no more.
    pub fn drivers_freed(&self, alloc: &Alloc) {
        if alloc.place == Place::Pool {
            self.pool_frees.store(true, SeqCst);
            self.look_at_pool(alloc.pool);
        } else {
            self.uncharge(alloc.device, alloc.bytes);
            lock(&self.pools).gone(alloc);
        }
    }

    /// The driver frees an allocation of its own, which was on record, as soon as a stream has come as far as now: so
    /// long it stays charged. Small ones are let go of at once.
    pub fn drivers_leaving(&self, alloc: Alloc, stream: usize, context: usize) {
        if alloc.place != Place::Driver || alloc.bytes < SMALL || !self.limited {
            self.drivers_freed(&alloc);
            return;
        }
        let marked = vmm::in_context(context, || {
            self.defer_charge(alloc, stream, context);
            Ok(())
        });
        if marked.is_err() {
            self.finish(&alloc);
        }
    }

    /// Makes a freed allocation's memory reusable, by its pool if it has one that keeps it: no work uses
    /// it any more.
    pub fn retire(&self, alloc: &Alloc) {
        if alloc.pool == 0 || !lock(&self.pools).keep(alloc) {
            self.leave(alloc);
        }
    }

    /// The same for what its pool does not keep.
    pub fn leave(&self, alloc: &Alloc) {
        self.finish(alloc);
        if alloc.pool != 0 {
            lock(&self.pools).left(alloc);
        }
    }

    /// Makes a freed allocation's memory reusable: no work uses it any more.
    pub fn finish(&self, alloc: &Alloc) {
        match alloc.place {
            Place::Own | Place::Slab(_) => {}
            Place::Pool => return,
            Place::Driver => return self.has_left((alloc.device, alloc.bytes)),
            Place::Managed => return self.uncharge_managed(alloc.device, alloc.bytes),
        }
        let block = lock(&self.heap).give_back(alloc);
        if let Some(block) = block {
            self.release_block(block);
        }
    }

    /// Releases a block that is in nobody's books any more.
    pub fn release_block(&self, block: Block) {
        let (resident, on_host): (Vec<&Chunk>, Vec<&Chunk>) =
            block.chunks.iter().partition(|c| c.handle != 0);
        self.observed.changes_begun.fetch_add(1, SeqCst);
        for chunk in &resident {
            vmm::unback(block.base, chunk);
        }
        vmm::unreserve(block.base, block.bytes);
        let bytes: u64 = resident.iter().map(|c| c.bytes).sum();
        crate::take_off(&self.observed.devices[block.device].resident, bytes);
        self.observed.changes_ended.fetch_add(1, SeqCst);
        let host: u64 = on_host.iter().map(|c| c.bytes).sum();
        crate::take_off(&self.observed.host_bytes, host);
        self.unreserve(block.device, block.bytes, Backing::Pageable);
    }

    /// Releases what a device holds that nobody uses: finished deferred frees, what pools keep, empty
    /// slabs; `false`: there was nothing.
    pub fn give_back_spare(&self, device: usize) -> bool {
        self.reap_deferred();
        let mut any = self.look_at_descriptors();
        any |= self.settle_ended() | self.await_settled();
        any |= self.drop_kept(|alloc| alloc.device == device);
        let blocks = lock(&self.heap).take_empty_slabs(device);
        any |= !blocks.is_empty();
        for block in blocks {
            self.release_block(block);
        }
        self.trim_stores(device) > 0 || any
    }

    /// Releases memory that own pools keep; `false`: there was none.
    pub fn drop_kept(&self, which: impl Fn(&Alloc) -> bool) -> bool {
        let kept = lock(&self.pools).take_all_kept(which);
        for alloc in &kept {
            self.leave(alloc);
        }
        !kept.is_empty()
    }

    /// Waits until no work in a context can use its memory, as the driver's `cuMemFree` does. Not
    /// while a stream captures.
    ///
    /// # Errors
    /// The context's error: what went wrong in earlier work.
    fn wait_idle(&self, context: usize) -> Result<(), Status> {
        vmm::in_context(context, || {
            // SAFETY: no pointers are involved.
            unsafe { call::cuCtxSynchronize() }.ok()
        })
    }

    /// Device ordinals that may access memory on `device`.
    pub fn access_of(&self, device: usize) -> Vec<i32> {
        let mut access = vec![self.devices[device].ordinal];
        for &(owner, accessor) in lock(&self.peers).iter() {
            if owner == device && accessor != device {
                access.push(self.devices[accessor].ordinal);
            }
        }
        access
    }

    /// Lets go of everything that a context owned, after the driver has destroyed it.
    pub fn context_gone(&self, context: usize) {
        self.forget_deferred_of(context);
        lock(&self.kept).retain(|alloc| alloc.context != context);
        // Their blocks are the context's, and go with it below.
        let kept = lock(&self.pools).take_all_kept(|alloc| alloc.context == context);
        lock(&self.contexts).remove(context);
        self.standing_gone(context);
        let (blocks, allocs) = lock(&self.heap).take_context(context);
        for block in blocks {
            self.release_block(block);
        }
        for alloc in &kept {
            lock(&self.pools).left(alloc);
        }
        for alloc in &allocs {
            if alloc.place == Place::Driver {
                self.unhold(alloc.ptr);
                self.drivers_freed(alloc);
            } else if alloc.pool != 0 {
                lock(&self.pools).gone(alloc);
            }
        }
        lock(&self.managed).forget_context(context);
        let (others, imports) = lock(&self.handles).take_context(context);
        for other in others {
            self.other_gone(other);
        }
        for (address, (device, bytes, charged)) in imports {
            self.unhold(address);
            self.uncharge_import(device, bytes, charged);
        }
        let externals = lock(&self.handles).external_context_gone(context);
        for external in externals {
            self.external_ended(external);
        }
    }
}

/// What the driver's own allocation would answer in a context that is broken or gone: our calls need
/// no context and would not notice.
fn healthy() -> Result<(), Status> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the driver fills two integers.
    let answer = unsafe { call::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
    if answer != Status::INVALID_CONTEXT {
        return answer.ok();
    }
    let (mut free, mut total) = (0, 0);
    // In a context of the first `cuCtxCreate` the old one answers, and only that.
    // SAFETY: as above.
    unsafe { call::cuMemGetInfo(&raw mut free, &raw mut total) }.ok()
}

/// Cuts a block into chunks.
fn split(bytes: u64) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut offset = 0;
    while offset < bytes {
        let bytes = CHUNK.min(bytes - offset);
        chunks.push(Chunk {
            offset,
            bytes,
            handle: 0,
            host: Vec::new(),
        });
        offset += bytes;
    }
    chunks
}
