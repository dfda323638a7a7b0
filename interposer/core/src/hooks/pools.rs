//! Memory pools: which there are, which is current, what the program is told of them.
//!
//! A pool whose memory cannot leave this process is an own pool where memory is swapped: see
//! [`crate::pools`].

use core::ffi::c_void;
use std::sync::atomic::Ordering::SeqCst;

use crate::driver::{Status, call};
use crate::lock;
use crate::runtime::Runtime;
use crate::table::sig;

use super::limited;

/// `CU_MEM_ALLOCATION_TYPE_PINNED`
const TYPE_PINNED: u32 = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`
const LOCATION_DEVICE: u32 = 1;

/// The part of `CUmemPoolProps` that says what a pool is, raw.
#[repr(C)]
#[derive(Clone, Copy)]
struct PoolProps {
    kind: u32,
    handle_types: u32,
    location_type: u32,
    location_id: i32,
    windows: *mut c_void,
    /// Since 12.2; zero, as all that is reserved, before.
    max_size: usize,
}
const _: () = assert!(
    core::mem::offset_of!(PoolProps, max_size)
        == core::mem::offset_of!(cudarc::driver::sys::CUmemPoolProps, maxSize)
);

/// `CUmemLocation`, raw.
#[repr(C)]
#[derive(Clone, Copy)]
struct Location {
    kind: u32,
    id: i32,
}

/// `CUmemAccessDesc`, raw.
#[repr(C)]
#[derive(Clone, Copy)]
struct AccessDesc {
    location: Location,
    flags: u32,
}

impl Runtime {
    /// A pool that allocations may come from, and whether it is an own one; `None`: its memory is no
    /// device's, or it is not known.
    pub fn known_pool(&self, handle: u64) -> Option<(u64, bool)> {
        if let Some(own) = lock(&self.pools).is_own(handle) {
            return Some((handle, own));
        }
        // Devices' own pools are never made by the program.
        let device = self
            .devices
            .iter()
            .position(|device| default_pool(device.ordinal) == Some(handle))?;
        self.note_pool(handle, device, self.paging);
        Some((handle, self.paging))
    }

    fn note_pool(&self, handle: u64, device: usize, own: bool) {
        lock(&self.pools).note(handle, device, own);
        let first = if own {
            &self.has_own_pools
        } else {
            &self.has_stores
        };
        first.store(true, SeqCst);
    }

    /// The current pool of a context's device.
    pub fn current_pool(&self, context: usize) -> Option<(u64, bool)> {
        let known = lock(&self.contexts).device_of(context);
        let device = known.or_else(|| self.current().ok().map(|(_, device)| device))?;
        let word = &self.current_pools[device];
        let mut handle = word.load(SeqCst);
        if handle == 0 {
            let mut pool = core::ptr::null_mut();
            let ordinal = self.devices[device].ordinal;
            // SAFETY: the driver fills one handle.
            unsafe { call::cuDeviceGetMemPool(&raw mut pool, ordinal) }
                .ok()
                .ok()?;
            handle = pool as u64;
            // Another thread may make another pool current meanwhile: its word stands.
            let _ = word.compare_exchange(0, handle, SeqCst, SeqCst);
        }
        self.known_pool(handle)
    }

    /// The device of a known pool.
    pub fn device_of_pool(&self, handle: u64) -> Option<usize> {
        lock(&self.pools).device(handle)
    }

    /// The current pool of a device has changed.
    fn pool_is_current(&self, device: usize, pool: u64) {
        self.current_pools[device].store(pool, SeqCst);
    }
}

fn default_pool(ordinal: i32) -> Option<u64> {
    let mut pool = core::ptr::null_mut();
    // SAFETY: the driver fills one handle.
    let got = unsafe { call::cuDeviceGetDefaultMemPool(&raw mut pool, ordinal) };
    got.is_success().then_some(pool as u64)
}

pub unsafe fn cuMemPoolCreate(
    real: sig::cuMemPoolCreate,
    pool: *mut *mut c_void,
    poolProps: *const c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(pool, poolProps) };
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && !pool.is_null()
        && !poolProps.is_null()
    {
        // SAFETY: the driver has just read the one and written the other.
        let (props, handle) =
            unsafe { (poolProps.cast::<PoolProps>().read_unaligned(), *pool as u64) };
        if props.location_type == LOCATION_DEVICE
            && let Some(device) = runtime.device_index(props.location_id)
        {
            let own = runtime.paging && props.kind == TYPE_PINNED && props.handle_types == 0;
            runtime.note_pool(handle, device, own);
            lock(&runtime.pools).limit(handle, props.max_size as u64);
        }
    }
    status
}

pub unsafe fn cuMemPoolDestroy(real: sig::cuMemPoolDestroy, pool: *mut c_void) -> Status {
    let Some(runtime) = limited() else {
        // SAFETY: the application's own call.
        return unsafe { real(pool) };
    };
    let handle = pool as u64;
    let taken = runtime.take_pool(handle);
    // SAFETY: the application's own call.
    let status = unsafe { real(pool) };
    if !status.is_success() {
        if let Some(taken) = taken {
            lock(&runtime.pools).put_back(handle, taken);
        }
        return status;
    }
    for word in &runtime.current_pools {
        // Its device's default pool is current again; asked when needed.
        let _ = word.compare_exchange(handle, 0, SeqCst, SeqCst);
    }
    let known = taken.as_ref().and_then(crate::pools::Pool::meter);
    for alloc in taken.map_or_else(Vec::new, crate::pools::Pool::into_kept) {
        runtime.finish(&alloc);
    }
    runtime.pool_destroyed(handle, known);
    status
}

pub unsafe fn cuDeviceSetMemPool(
    real: sig::cuDeviceSetMemPool,
    dev: i32,
    pool: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(dev, pool) };
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && let Some(device) = runtime.device_index(dev)
    {
        runtime.pool_is_current(device, pool as u64);
    }
    status
}

pub unsafe fn cuMemSetMemPool(
    real: sig::cuMemSetMemPool,
    location: *mut c_void,
    type_: u32,
    pool: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(location, type_, pool) };
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && type_ == TYPE_PINNED
        && !location.is_null()
    {
        // SAFETY: the driver has just read it.
        let location = unsafe { location.cast::<Location>().read_unaligned() };
        if location.kind == LOCATION_DEVICE
            && let Some(device) = runtime.device_index(location.id)
        {
            runtime.pool_is_current(device, pool as u64);
        }
    }
    status
}

pub unsafe fn cuMemPoolGetAttribute(
    real: sig::cuMemPoolGetAttribute,
    pool: *mut c_void,
    attr: u32,
    value: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(pool, attr, value) };
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && !value.is_null()
        && runtime.known_pool(pool as u64).is_some_and(|(_, own)| own)
    {
        runtime.reap_deferred();
        let figure = lock(&runtime.pools).attribute(pool as u64, attr);
        if let Some(figure) = figure {
            // SAFETY: the driver has just written 64 bits there.
            unsafe { value.cast::<u64>().write_unaligned(figure) };
        }
    }
    status
}

pub unsafe fn cuMemPoolSetAttribute(
    real: sig::cuMemPoolSetAttribute,
    pool: *mut c_void,
    attr: u32,
    value: *mut c_void,
) -> Status {
    /// `CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`: the first of those that are 64 bits wide.
    const RELEASE_THRESHOLD: u32 = 4;
    // SAFETY: the application's own call.
    let status = unsafe { real(pool, attr, value) };
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && attr >= RELEASE_THRESHOLD
        && !value.is_null()
        && runtime.known_pool(pool as u64).is_some_and(|(_, own)| own)
    {
        // SAFETY: the driver has just read 64 bits there.
        let value = unsafe { value.cast::<u64>().read_unaligned() };
        // A watermark is reset to what is in use now.
        runtime.reap_deferred();
        lock(&runtime.pools).set_attribute(pool as u64, attr, value);
    }
    status
}

pub unsafe fn cuMemPoolTrimTo(
    real: sig::cuMemPoolTrimTo,
    pool: *mut c_void,
    minBytesToKeep: usize,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(pool, minBytesToKeep) };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        runtime.reap_deferred();
        let trimmed = lock(&runtime.pools).trim(pool as u64, minBytesToKeep as u64);
        for alloc in &trimmed {
            runtime.leave(alloc);
        }
        runtime.look_at_pool(pool as u64);
    }
    status
}

pub unsafe fn cuMemPoolSetAccess(
    real: sig::cuMemPoolSetAccess,
    pool: *mut c_void,
    map: *const c_void,
    count: usize,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(pool, map, count) };
    let Some(runtime) = limited().filter(|_| status.is_success() && !map.is_null()) else {
        return status;
    };
    if !runtime.known_pool(pool as u64).is_some_and(|(_, own)| own) {
        return status;
    }
    let Some(owner) = runtime.device_of_pool(pool as u64) else {
        return status;
    };
    for index in 0..count {
        // SAFETY: the driver has just read as many.
        let access = unsafe { map.cast::<AccessDesc>().add(index).read_unaligned() };
        // Access is given to all of our memory on the device, and never taken away again by a pool: more
        // than was asked for, and nothing that the program relies on.
        if access.location.kind == LOCATION_DEVICE
            && access.flags != 0
            && let Some(accessor) = runtime.device_index(access.location.id)
            && accessor != owner
        {
            super::context::give_access(runtime, owner, accessor, true);
        }
    }
    status
}
