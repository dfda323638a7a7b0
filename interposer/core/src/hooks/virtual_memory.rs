//! The program's own use of virtual memory management: handles, charged as pinned until they are
//! really gone. Our own mappings pass for classic memory here.

use core::ffi::c_void;

use crate::driver::Status;
use crate::lock;
use crate::runtime::Runtime;
use crate::table::sig;
use crate::vmm;

use super::limited;

/// The device on which a handle's memory would lie; `None`: not a device's memory.
fn device_of_prop(runtime: &Runtime, prop: *const c_void) -> Option<usize> {
    /// `CU_MEM_LOCATION_TYPE_DEVICE`
    const DEVICE: u32 = 1;
    // SAFETY: the application's property structure, checked against null by the caller.
    let prop = unsafe { prop.cast::<vmm::AllocationProp>().read_unaligned() };
    if prop.location_type != DEVICE {
        return None;
    }
    runtime.device_index(prop.location_id)
}

pub unsafe fn cuMemCreate(
    real: sig::cuMemCreate,
    handle: *mut u64,
    size: usize,
    prop: *const c_void,
    flags: u64,
) -> Status {
    let runtime = limited().filter(|_| !handle.is_null() && !prop.is_null());
    let device = runtime.and_then(|runtime| device_of_prop(runtime, prop));
    let (Some(runtime), Some(device)) = (runtime, device) else {
        // SAFETY: the application's own call.
        return unsafe { real(handle, size, prop, flags) };
    };
    let charged = runtime.charged(device, size as u64, || {
        // SAFETY: the application's own call.
        unsafe { real(handle, size, prop, flags) }
    });
    match charged {
        Ok(()) => {
            // SAFETY: checked against null, written by the driver.
            lock(&runtime.handles).created(unsafe { *handle }, (device, size as u64));
            Status::SUCCESS
        }
        Err(why) => why,
    }
}

pub unsafe fn cuMemRelease(real: sig::cuMemRelease, handle: u64) -> Status {
    let releasing =
        limited().and_then(|runtime| Some((runtime, lock(&runtime.handles).releasing(handle)?)));
    let _changing = releasing.as_ref().map(|(runtime, _)| runtime.changing());
    // SAFETY: the application's own call.
    let status = unsafe { real(handle) };
    if let Some((runtime, releasing)) = releasing {
        let ended = lock(&runtime.handles).release_ended(&releasing, status.is_success());
        runtime.ended(ended);
    }
    status
}

pub unsafe fn cuMemMap(
    real: sig::cuMemMap,
    ptr: u64,
    size: usize,
    offset: usize,
    handle: u64,
    flags: u64,
) -> Status {
    let Some(runtime) = limited() else {
        // SAFETY: the application's own call.
        return unsafe { real(ptr, size, offset, handle, flags) };
    };
    // An import tells its size here, and not before.
    let import = lock(&runtime.handles).unsized_import(handle);
    let mut sized_now = None;
    if let Some(device) = import {
        let bytes = size as u64;
        let charged = match runtime.charge_import(device, bytes, 0) {
            Ok(charged) => charged,
            Err(why) => return why,
        };
        let covered = if charged == 0 { bytes } else { 0 };
        if !lock(&runtime.handles).sized(handle, charged, covered) {
            runtime.uncharge_import(device, bytes, charged);
        } else {
            if charged > 0 {
                runtime.hold_size((device, charged));
            }
            sized_now = Some((device, bytes, charged));
        }
    }
    let inside = crate::gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(ptr, size, offset, handle, flags) };
    drop(inside);
    if status.is_success() {
        lock(&runtime.handles).mapped(ptr, handle);
    } else if let Some((device, bytes, charged)) = sized_now
        && lock(&runtime.handles).not_sized(handle)
    {
        // That was not its size: the next mapping tells.
        if charged > 0 {
            runtime.unhold_size((device, charged));
        }
        runtime.uncharge_import(device, bytes, charged);
    }
    status
}

pub unsafe fn cuMemUnmap(real: sig::cuMemUnmap, ptr: u64, size: usize) -> Status {
    // Ours pass for classic memory, which is not unmapped by hand.
    if limited().is_some_and(|runtime| super::report::ours(runtime, ptr).is_some()) {
        return Status::INVALID_VALUE;
    }
    let _changing = limited().map(Runtime::changing);
    // SAFETY: the application's own call.
    let status = unsafe { real(ptr, size) };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        let ended = lock(&runtime.handles).unmapped(ptr, size as u64);
        runtime.ended(ended);
    }
    status
}

pub unsafe fn cuMemRetainAllocationHandle(
    real: sig::cuMemRetainAllocationHandle,
    handle: *mut u64,
    addr: *mut c_void,
) -> Status {
    let Some(runtime) = limited() else {
        // SAFETY: the application's own call.
        return unsafe { real(handle, addr) };
    };
    // Our mappings pass for classic memory, which has no handle to retain; NCCL asks just this.
    if super::report::ours(runtime, addr as u64).is_some() {
        return Status::INVALID_VALUE;
    }
    // SAFETY: the application's own call.
    let status = unsafe { real(handle, addr) };
    if status.is_success() && !handle.is_null() {
        // SAFETY: checked against null, written by the driver.
        lock(&runtime.handles).retained(addr as u64, unsafe { *handle });
    }
    status
}

/// Access to memory of ours is ours to edit: it passes for classic memory, which the driver refuses here.
pub unsafe fn cuMemSetAccess(
    real: sig::cuMemSetAccess,
    ptr: u64,
    size: usize,
    desc: *const c_void,
    count: usize,
) -> Status {
    if limited().is_some_and(|runtime| super::report::ours(runtime, ptr).is_some()) {
        return Status::INVALID_VALUE;
    }
    let _inside = crate::gate::enter();
    // SAFETY: the application's own call.
    unsafe { real(ptr, size, desc, count) }
}
