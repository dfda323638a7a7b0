//! Managed memory: it may become resident on a device as work touches it, which nobody can see or stop.
//!
//! So it is charged whole, while that fits. What does not fit is not refused: it stays on the host, by the
//! advice "preferred on the host, and accessed from there by the device", which the driver follows by
//! mapping it instead of moving it. It is charged when the program has it moved after all, by a prefetch
//! or by advice of its own.
//!
//! Source: CUDA C++ Programming Guide, "Unified Memory Programming", data usage hints: with a preferred
//! location and a mapping by `SetAccessedBy`, a touch does not migrate.

use core::ffi::c_void;
use std::collections::BTreeMap;

use crate::driver::{Status, call};
use crate::gate;
use crate::handles::{Kind, Other};
use crate::lock;
use crate::runtime::Runtime;
use crate::table::{CUmemLocation, sig};

use super::limited;
use super::memory::made;

/// `CU_DEVICE_CPU`
const CPU: i32 = -1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`
const LOCATION_DEVICE: u32 = 1;
/// `CUmem_advise`, raw.
mod advice {
    pub const SET_PREFERRED_LOCATION: u32 = 3;
    pub const UNSET_PREFERRED_LOCATION: u32 = 4;
    pub const SET_ACCESSED_BY: u32 = 5;
}

/// A managed allocation that is kept on the host.
#[derive(Clone, Copy, Debug)]
pub struct OnHost {
    bytes: u64,
    context: usize,
}

/// Those that are.
#[derive(Debug, Default)]
pub struct Managed {
    on_host: BTreeMap<u64, OnHost>,
}

impl Managed {
    fn containing(&self, ptr: u64) -> Option<(u64, OnHost)> {
        let (&base, &region) = self.on_host.range(..=ptr).next_back()?;
        (ptr - base < region.bytes.max(1)).then_some((base, region))
    }

    /// It is about to be freed.
    pub fn take(&mut self, base: u64) -> Option<OnHost> {
        self.on_host.remove(&base)
    }

    /// The driver has refused to free it.
    pub fn put_back(&mut self, base: u64, region: OnHost) {
        self.on_host.insert(base, region);
    }

    /// A context is gone with what it owned.
    pub fn forget_context(&mut self, context: usize) {
        self.on_host.retain(|_, region| region.context != context);
    }
}

/// The record of managed memory that is charged.
fn resident(device: usize, bytes: u64) -> Other {
    Other {
        charge: (device, bytes),
        kind: Kind::Managed,
    }
}

/// Keeps a range on the host; a driver or device that does not do that refuses.
fn keep_on_host(ptr: u64, bytes: usize, ordinal: i32) -> Result<(), Status> {
    // SAFETY: a managed allocation made by the caller; the driver reads plain values.
    unsafe {
        call::cuMemAdvise(ptr, bytes, advice::SET_PREFERRED_LOCATION, CPU).ok()?;
        call::cuMemAdvise(ptr, bytes, advice::SET_ACCESSED_BY, ordinal).ok()
    }
}

pub unsafe fn cuMemAllocManaged(
    real: sig::cuMemAllocManaged,
    dptr: *mut u64,
    bytesize: usize,
    flags: u32,
) -> Status {
    let current = limited().and_then(|runtime| Some((runtime, runtime.current().ok()?)));
    let Some((runtime, (context, device))) = current.filter(|_| !dptr.is_null()) else {
        // SAFETY: the application's own call.
        return unsafe { real(dptr, bytesize, flags) };
    };
    let mut asked = None;
    let charged = runtime.charged_managed(device, bytesize as u64, || {
        // SAFETY: the application's own call.
        let status = unsafe { real(dptr, bytesize, flags) };
        asked = Some(status);
        status
    });
    if charged.is_ok() {
        // SAFETY: checked against null, written by the driver.
        let key = unsafe { made(Status::SUCCESS, dptr) };
        lock(&runtime.handles).add_other(key, resident(device, bytesize as u64), context);
        return Status::SUCCESS;
    }
    if let Some(status) = asked {
        return status;
    }
    // Over the limit, were all of it to become resident.
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(dptr, bytesize, flags) };
    drop(inside);
    if !status.is_success() {
        return status;
    }
    // SAFETY: checked against null, written by the driver.
    let ptr = unsafe { *dptr };
    if keep_on_host(ptr, bytesize, runtime.devices[device].ordinal).is_err() {
        // SAFETY: made above; the application has not been told of it.
        let _ = unsafe { call::cuMemFree_v2(ptr) };
        return Status::OUT_OF_MEMORY;
    }
    let region = OnHost {
        bytes: bytesize as u64,
        context,
    };
    lock(&runtime.managed).on_host.insert(ptr, region);
    Status::SUCCESS
}

/// A range is to move to a device: charges what lies in an allocation kept on the host. The whole
/// allocation, since from then on the driver may move any of it.
fn may_move(ptr: u64, ordinal: i32) -> Result<(), Status> {
    let Some(runtime) = limited() else {
        return Ok(());
    };
    let (Some((base, region)), Some(device)) = (
        lock(&runtime.managed).containing(ptr),
        runtime.device_index(ordinal),
    ) else {
        return Ok(());
    };
    charge_moved(runtime, base, region, device)
}

fn charge_moved(runtime: &Runtime, base: u64, region: OnHost, device: usize) -> Result<(), Status> {
    runtime.charged_managed(device, region.bytes, || Status::SUCCESS)?;
    if lock(&runtime.managed).on_host.remove(&base).is_none() {
        // Another thread was faster, and has charged it.
        runtime.uncharge_managed(device, region.bytes);
        return Ok(());
    }
    lock(&runtime.handles).add_other(base, resident(device, region.bytes), region.context);
    let bytes = usize::try_from(region.bytes).unwrap_or(0);
    // SAFETY: a managed allocation of the application; the driver reads plain values.
    let _ = unsafe { call::cuMemAdvise(base, bytes, advice::UNSET_PREFERRED_LOCATION, CPU) };
    Ok(())
}

/// What becomes of advice for a range that is kept on the host: none may move it unless it is charged.
/// `None`: the driver is to hear it.
fn advised(ptr: u64, which: u32, to_device: Option<i32>) -> Option<Status> {
    let runtime = limited()?;
    lock(&runtime.managed).containing(ptr)?;
    match (which, to_device) {
        (advice::SET_PREFERRED_LOCATION, Some(ordinal)) => may_move(ptr, ordinal).err(),
        // It is mapped there, and stays where it is.
        (advice::SET_ACCESSED_BY, _) | (advice::SET_PREFERRED_LOCATION, None) => None,
        // Advice may be ignored: copies for reading, or no preference, would take device memory.
        _ => Some(Status::SUCCESS),
    }
}

pub unsafe fn cuMemAdvise(
    real: sig::cuMemAdvise,
    devPtr: u64,
    count: usize,
    advice: u32,
    device: i32,
) -> Status {
    let answer = advised(devPtr, advice, (device >= 0).then_some(device));
    // SAFETY: the application's own call.
    answer.unwrap_or_else(|| unsafe { real(devPtr, count, advice, device) })
}

pub unsafe fn cuMemAdvise_v2(
    real: sig::cuMemAdvise_v2,
    devPtr: u64,
    count: usize,
    advice: u32,
    location: CUmemLocation,
) -> Status {
    let device = (location.kind == LOCATION_DEVICE).then_some(location.id);
    let answer = advised(devPtr, advice, device);
    // SAFETY: the application's own call.
    answer.unwrap_or_else(|| unsafe { real(devPtr, count, advice, location) })
}

macro_rules! prefetches {
    ($($name:ident ($($argument:ident: $type:ty),*) $to:expr;)*) => {$(
        pub unsafe fn $name(
            real: sig::$name,
            devPtr: u64,
            count: usize,
            $($argument: $type),*
        ) -> Status {
            if let Some(ordinal) = $to
                && let Err(why) = may_move(devPtr, ordinal)
            {
                return why;
            }
            let _inside = gate::enter();
            // SAFETY: the application's own call.
            unsafe { real(devPtr, count, $($argument),*) }
        }
    )*};
}
prefetches! {
    cuMemPrefetchAsync (dstDevice: i32, hStream: *mut c_void) (dstDevice >= 0).then_some(dstDevice);
    cuMemPrefetchAsync_ptsz (dstDevice: i32, hStream: *mut c_void) (dstDevice >= 0).then_some(dstDevice);
    cuMemPrefetchAsync_v2 (location: CUmemLocation, flags: u32, hStream: *mut c_void)
        (location.kind == LOCATION_DEVICE).then_some(location.id);
    cuMemPrefetchAsync_v2_ptsz (location: CUmemLocation, flags: u32, hStream: *mut c_void)
        (location.kind == LOCATION_DEVICE).then_some(location.id);
}

/// The ranges of a batch that go to devices.
///
/// # Safety
/// The arrays are the application's, with the numbers of entries that it says.
unsafe fn batch_may_move(
    (dptrs, count): (*mut u64, usize),
    (locations, indices, kinds): (*mut c_void, *mut usize, usize),
) -> Result<(), Status> {
    if dptrs.is_null() || locations.is_null() || indices.is_null() {
        return Ok(());
    }
    for group in 0..kinds {
        // Each location holds from its index up to the next one's.
        // SAFETY: the caller's promise.
        let (location, from, to) = unsafe {
            (
                locations
                    .cast::<CUmemLocation>()
                    .add(group)
                    .read_unaligned(),
                *indices.add(group),
                if group + 1 < kinds {
                    *indices.add(group + 1)
                } else {
                    count
                },
            )
        };
        if location.kind != LOCATION_DEVICE {
            continue;
        }
        for index in from..to.min(count) {
            // SAFETY: the caller's promise.
            may_move(unsafe { *dptrs.add(index) }, location.id)?;
        }
    }
    Ok(())
}

macro_rules! batches {
    ($($name:ident)*) => {$(
        pub unsafe fn $name(
            real: sig::$name,
            dptrs: *mut u64,
            sizes: *mut usize,
            count: usize,
            prefetchLocs: *mut c_void,
            prefetchLocIdxs: *mut usize,
            numPrefetchLocs: usize,
            flags: u64,
            hStream: *mut c_void,
        ) -> Status {
            let locations = (prefetchLocs, prefetchLocIdxs, numPrefetchLocs);
            let any = limited().is_some_and(|runtime| !lock(&runtime.managed).on_host.is_empty());
            if any {
                // SAFETY: the application's own arrays.
                if let Err(why) = unsafe { batch_may_move((dptrs, count), locations) } {
                    return why;
                }
            }
            let _inside = gate::enter();
            // SAFETY: the application's own call.
            unsafe {
                real(
                    dptrs, sizes, count, prefetchLocs, prefetchLocIdxs, numPrefetchLocs, flags, hStream,
                )
            }
        }
    )*};
}
batches! {
    cuMemPrefetchBatchAsync
    cuMemPrefetchBatchAsync_ptsz
    cuMemDiscardAndPrefetchBatchAsync
    cuMemDiscardAndPrefetchBatchAsync_ptsz
}
