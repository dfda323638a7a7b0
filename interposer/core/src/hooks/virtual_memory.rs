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
    // SAFETY: the application's own call.
    let status = unsafe { real(handle) };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        let ended = lock(&runtime.handles).released(handle);
        if let Some((device, bytes)) = ended {
            runtime.uncharge(device, bytes);
        }
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
    let inside = crate::gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(ptr, size, offset, handle, flags) };
    drop(inside);
    if status.is_success() {
        lock(&runtime.handles).mapped(ptr, handle);
    }
    status
}

pub unsafe fn cuMemUnmap(real: sig::cuMemUnmap, ptr: u64, size: usize) -> Status {
    // Ours pass for classic memory, which is not unmapped by hand.
    if limited().is_some_and(|runtime| super::report::ours(runtime, ptr).is_some()) {
        return Status::INVALID_VALUE;
    }
    // SAFETY: the application's own call.
    let status = unsafe { real(ptr, size) };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        let ended = lock(&runtime.handles).unmapped(ptr, size as u64);
        for (device, bytes) in ended {
            runtime.uncharge(device, bytes);
        }
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

/// Something would hold on to the physical memory behind a pointer of ours, which an eviction gives
/// back: said once, and refused as the driver refuses it for memory that cannot do it.
fn would_pin(ptr: u64, what: &str) -> bool {
    use std::sync::Once;
    static SAID: Once = Once::new();
    let ours = limited().is_some_and(|runtime| super::report::ours(runtime, ptr).is_some());
    if ours {
        SAID.call_once(|| {
            crate::say::warning!(
                "{what}: memory that can be swapped cannot be pinned for another device or process; \
                 set SPILLWAY_SWAP=never for this program"
            );
        });
    }
    ours
}

pub unsafe fn cuMemGetHandleForAddressRange(
    real: sig::cuMemGetHandleForAddressRange,
    handle: *mut c_void,
    dptr: u64,
    size: usize,
    handleType: u32,
    flags: u64,
) -> Status {
    if would_pin(dptr, "cuMemGetHandleForAddressRange") {
        return Status::NOT_SUPPORTED;
    }
    let _inside = crate::gate::enter();
    // SAFETY: the application's own call.
    unsafe { real(handle, dptr, size, handleType, flags) }
}

pub unsafe fn cuMulticastBindAddr(
    real: sig::cuMulticastBindAddr,
    mcHandle: u64,
    mcOffset: usize,
    memptr: u64,
    size: usize,
    flags: u64,
) -> Status {
    if would_pin(memptr, "cuMulticastBindAddr") {
        return Status::NOT_SUPPORTED;
    }
    let _inside = crate::gate::enter();
    // SAFETY: the application's own call.
    unsafe { real(mcHandle, mcOffset, memptr, size, flags) }
}

pub unsafe fn cuMulticastBindAddr_v2(
    real: sig::cuMulticastBindAddr_v2,
    mcHandle: u64,
    dev: i32,
    mcOffset: usize,
    memptr: u64,
    size: usize,
    flags: u64,
) -> Status {
    if would_pin(memptr, "cuMulticastBindAddr") {
        return Status::NOT_SUPPORTED;
    }
    let _inside = crate::gate::enter();
    // SAFETY: the application's own call.
    unsafe { real(mcHandle, dev, mcOffset, memptr, size, flags) }
}
