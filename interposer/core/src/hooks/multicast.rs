//! What binds memory to something outside of this process's address space: multicast objects, logical
//! endpoints, dma-buf descriptors. A binding keeps the memory, so it keeps the charge. Memory that can be
//! swapped is refused: the binding would hold on to what an eviction gives back.

use core::ffi::c_void;

use crate::driver::Status;
use crate::gate;
use crate::lock;
use crate::table::sig;

use super::limited;

/// Refuses for memory of ours, as the driver refuses it for memory that cannot do it; said once.
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
    let _inside = gate::enter();
    // SAFETY: the application's own call.
    unsafe { real(handle, dptr, size, handleType, flags) }
}

/// Tells a logical endpoint's name from a multicast handle in the records.
const ENDPOINT: u64 = 1 << 63;

fn bound(object: u64, offset: u64, bytes: u64, handle: Option<u64>, address: u64) {
    if let Some(runtime) = limited() {
        lock(&runtime.handles).bound(object, offset, bytes, handle, address);
    }
}

fn unbound(object: u64, offset: u64, bytes: u64) {
    if let Some(runtime) = limited() {
        let ended = lock(&runtime.handles).unbound(object, offset, bytes);
        runtime.ended(ended);
    }
}

pub unsafe fn cuMulticastCreate(
    real: sig::cuMulticastCreate,
    mcHandle: *mut u64,
    prop: *const c_void,
) -> Status {
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(mcHandle, prop) };
    drop(inside);
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && !mcHandle.is_null()
    {
        // The object has no memory of its own.
        // SAFETY: checked against null, written by the driver.
        lock(&runtime.handles).created(unsafe { *mcHandle }, (0, 0));
    }
    status
}

macro_rules! bindings {
    ($($name:ident ($($argument:ident: $type:ty),*)
       $object:expr, $offset:expr, $bytes:expr, $handle:expr, $address:expr;)*) => {$(
        pub unsafe fn $name(real: sig::$name, $($argument: $type),*) -> Status {
            let (handle, address): (Option<u64>, u64) = ($handle, $address);
            if handle.is_none() && would_pin(address, stringify!($name)) {
                return Status::NOT_SUPPORTED;
            }
            let inside = gate::enter();
            // SAFETY: the application's own call.
            let status = unsafe { real($($argument),*) };
            drop(inside);
            if status.is_success() {
                bound($object, $offset, $bytes, handle, address);
            }
            status
        }
    )*};
}
bindings! {
    cuMulticastBindAddr (mcHandle: u64, mcOffset: usize, memptr: u64, size: usize, flags: u64)
        mcHandle, mcOffset as u64, size as u64, None, memptr;
    cuMulticastBindAddr_v2 (mcHandle: u64, dev: i32, mcOffset: usize, memptr: u64, size: usize, flags: u64)
        mcHandle, mcOffset as u64, size as u64, None, memptr;
    cuMulticastBindMem (mcHandle: u64, mcOffset: usize, memHandle: u64, memOffset: usize, size: usize, flags: u64)
        mcHandle, mcOffset as u64, size as u64, Some(memHandle), 0;
    cuMulticastBindMem_v2 (mcHandle: u64, dev: i32, mcOffset: usize, memHandle: u64, memOffset: usize, size: usize, flags: u64)
        mcHandle, mcOffset as u64, size as u64, Some(memHandle), 0;
    cuLogicalEndpointBindAddr (leId: u32, dev: i32, offset: u64, ptr: *mut c_void, size: u64, flags: u64)
        ENDPOINT | u64::from(leId), offset, size, None, ptr as u64;
    cuLogicalEndpointBindMem (leId: u32, dev: i32, offset: u64, memHandle: u64, memOffset: u64, size: u64, flags: u64)
        ENDPOINT | u64::from(leId), offset, size, Some(memHandle), 0;
}

pub unsafe fn cuMulticastUnbind(
    real: sig::cuMulticastUnbind,
    mcHandle: u64,
    dev: i32,
    mcOffset: usize,
    size: usize,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(mcHandle, dev, mcOffset, size) };
    if status.is_success() {
        unbound(mcHandle, mcOffset as u64, size as u64);
    }
    status
}

pub unsafe fn cuLogicalEndpointCreate(
    real: sig::cuLogicalEndpointCreate,
    leId: u32,
    prop: *const c_void,
) -> Status {
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(leId, prop) };
    drop(inside);
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        lock(&runtime.handles).created(ENDPOINT | u64::from(leId), (0, 0));
    }
    status
}

pub unsafe fn cuLogicalEndpointUnbind(
    real: sig::cuLogicalEndpointUnbind,
    leId: u32,
    dev: i32,
    offset: u64,
    size: u64,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(leId, dev, offset, size) };
    if status.is_success() {
        unbound(ENDPOINT | u64::from(leId), offset, size);
    }
    status
}

pub unsafe fn cuLogicalEndpointDestroy(real: sig::cuLogicalEndpointDestroy, leId: u32) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(leId) };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        let ended = lock(&runtime.handles).released(ENDPOINT | u64::from(leId));
        runtime.ended(ended);
    }
    status
}
