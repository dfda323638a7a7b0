//! Memory that crosses a process: exports, imports by descriptor, IPC and pool pointers, external memory.
//! Charged to the importer only if nobody on this node is charged already.

use core::ffi::c_void;
use core::mem::MaybeUninit;
use std::sync::atomic::Ordering::SeqCst;

use cudarc::driver::sys;
use spillway_protocol::granules_up;

use crate::driver::{Status, call};
use crate::gate;
use crate::handles::{Kind, Other};
use crate::heap::Place;
use crate::lock;
use crate::runtime::Runtime;
use crate::shares::{descriptor, key_of};
use crate::table::{CUipcMemHandle, sig};
use crate::vmm::AllocationProp;

use super::limited;
use super::report::ours;

/// `CU_MEM_LOCATION_TYPE_DEVICE`
const DEVICE: u32 = 1;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`
const POSIX_FD: u32 = 1;
/// `CU_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD`
const OPAQUE_FD: u32 = 1;
/// Bytes of an IPC handle and of a pool pointer's export data.
const HANDLE: usize = 64;

pub unsafe fn cuMemExportToShareableHandle(
    real: sig::cuMemExportToShareableHandle,
    shareableHandle: *mut c_void,
    handle: u64,
    handleType: u32,
    flags: u64,
) -> Status {
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(shareableHandle, handle, handleType, flags) };
    drop(inside);
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        let made = (handleType == POSIX_FD && !shareableHandle.is_null())
            // SAFETY: checked against null; the driver has just written a descriptor.
            .then(|| descriptor(unsafe { shareableHandle.cast::<i32>().read_unaligned() }))
            .flatten();
        if let Some(made) = made {
            let closed = lock(&runtime.handles).number_reused(made.number);
            runtime.ended(closed);
        }
        let exported = lock(&runtime.handles).exported(handle, made);
        if made.is_some() {
            runtime.descriptor_made();
        }
        if let Some(charge) = exported {
            runtime.hold_size(charge);
        }
    }
    status
}

/// The device that a handle's memory lies on.
fn device_of_handle(runtime: &Runtime, handle: u64) -> Option<usize> {
    let mut prop = MaybeUninit::<AllocationProp>::zeroed();
    // SAFETY: the driver fills one structure of this layout, or refuses the handle.
    let got =
        unsafe { call::cuMemGetAllocationPropertiesFromHandle(prop.as_mut_ptr().cast(), handle) };
    if !got.is_success() {
        return None;
    }
    // SAFETY: zeroed, then filled by the driver; every field is plain.
    let prop = unsafe { prop.assume_init() };
    (prop.location_type == DEVICE)
        .then(|| runtime.device_index(prop.location_id))
        .flatten()
}

pub unsafe fn cuMemImportFromShareableHandle(
    real: sig::cuMemImportFromShareableHandle,
    handle: *mut u64,
    osHandle: *mut c_void,
    shHandleType: u32,
) -> Status {
    // Before, since nothing is to be held for a moment either; on which device it lies shows afterwards.
    if let Some(runtime) = limited() {
        let current = runtime.current().ok().map(|(_, device)| device);
        let full = |device| runtime.is_full(device);
        if current.map_or_else(|| (0..runtime.devices.len()).any(full), full) {
            runtime.observed.refused.fetch_add(1, SeqCst);
            return Status::OUT_OF_MEMORY;
        }
    }
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(handle, osHandle, shHandleType) };
    drop(inside);
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && !handle.is_null()
    {
        // SAFETY: checked against null, written by the driver.
        let handle = unsafe { *handle };
        if let Some(device) = device_of_handle(runtime, handle) {
            #[allow(
                clippy::cast_possible_truncation,
                reason = "a descriptor, passed as a pointer"
            )]
            let from = (shHandleType == POSIX_FD)
                .then(|| descriptor(osHandle as usize as i32))
                .flatten();
            lock(&runtime.handles).imported(handle, device, from);
            runtime.imports();
        }
    }
    status
}

/// What the driver says of a pointer: its device and its range.
fn range_of(runtime: &Runtime, ptr: u64) -> Option<(usize, u64)> {
    /// `CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL`
    const ORDINAL: u32 = 9;
    let (mut base, mut size, mut ordinal) = (0, 0, -1);
    // SAFETY: the driver fills two words, then one.
    unsafe {
        call::cuMemGetAddressRange_v2(&raw mut base, &raw mut size, ptr)
            .ok()
            .ok()?;
        call::cuPointerGetAttribute((&raw mut ordinal).cast(), ORDINAL, ptr)
            .ok()
            .ok()?;
    }
    Some((runtime.device_index(ordinal)?, size as u64))
}

pub unsafe fn cuIpcGetMemHandle(
    real: sig::cuIpcGetMemHandle,
    pHandle: *mut c_void,
    dptr: u64,
) -> Status {
    let runtime = limited();
    if runtime.is_some_and(|runtime| ours(runtime, dptr).is_some()) {
        crate::say::warning!(
            "cuIpcGetMemHandle: memory that can be swapped cannot be shared between processes; \
             set SPILLWAY_SWAP=never for this program"
        );
        return Status::NOT_SUPPORTED;
    }
    // SAFETY: the application's own call.
    let status = unsafe { real(pHandle, dptr) };
    if let (true, Some(runtime)) = (status.is_success(), runtime)
        && !pHandle.is_null()
    {
        let found = lock(&runtime.heap).containing(dptr);
        if let Some(alloc) = found {
            // SAFETY: the driver has just written a handle of this size.
            let handle = unsafe { pHandle.cast::<[u8; HANDLE]>().read_unaligned() };
            runtime.hold(alloc.ptr, (alloc.device, alloc.bytes, key_of(&handle)));
        }
    }
    status
}

/// Opens memory of another process, and charges it if nobody is charged for it.
unsafe fn open(pdptr: *mut u64, handle: &CUipcMemHandle, real: impl FnOnce() -> Status) -> Status {
    let inside = gate::enter();
    let status = real();
    drop(inside);
    let Some(runtime) = limited().filter(|_| status.is_success() && !pdptr.is_null()) else {
        return status;
    };
    // SAFETY: checked against null, written by the driver.
    let ptr = unsafe { *pdptr };
    let key = key_of(&handle.0);
    let known = lock(&runtime.handles).open_again(ptr);
    if let Some((device, bytes, charged)) = known {
        if charged > 0 {
            // It may go by another name than the first time.
            runtime.hold(ptr, (device, bytes, key));
        }
        return status;
    }
    let (Some((device, bytes)), Ok((context, _))) = (range_of(runtime, ptr), runtime.current())
    else {
        return status;
    };
    match runtime.charge_import(device, bytes, key) {
        Ok(charged) => {
            if !lock(&runtime.handles).opened(ptr, (device, bytes, charged), context) {
                runtime.uncharge_import(device, bytes, charged);
            } else if charged > 0 {
                // Others may have it from the same owner, who is not on this node's books.
                runtime.hold(ptr, (device, bytes, key));
            }
            status
        }
        Err(why) => {
            // SAFETY: opened above; the application has not been told of it.
            let _ = unsafe { call::cuIpcCloseMemHandle(ptr) };
            why
        }
    }
}

pub unsafe fn cuIpcOpenMemHandle(
    real: sig::cuIpcOpenMemHandle,
    pdptr: *mut u64,
    handle: CUipcMemHandle,
    Flags: u32,
) -> Status {
    // SAFETY: the application's own call.
    unsafe { open(pdptr, &handle, || real(pdptr, handle, Flags)) }
}

pub unsafe fn cuIpcOpenMemHandle_v2(
    real: sig::cuIpcOpenMemHandle_v2,
    pdptr: *mut u64,
    handle: CUipcMemHandle,
    Flags: u32,
) -> Status {
    // SAFETY: the application's own call.
    unsafe { open(pdptr, &handle, || real(pdptr, handle, Flags)) }
}

pub unsafe fn cuIpcCloseMemHandle(real: sig::cuIpcCloseMemHandle, dptr: u64) -> Status {
    // SAFETY: the application's own call.
    close(dptr, || unsafe { real(dptr) })
}

/// Closes what was opened under a key, and uncharges it if that was the last time.
fn close(key: u64, close: impl FnOnce() -> Status) -> Status {
    let closing =
        limited().and_then(|runtime| Some((runtime, lock(&runtime.handles).closing(key)?)));
    let held = match &closing {
        Some((runtime, closing)) if closing.last.is_some() => runtime.unhold(key),
        _ => Vec::new(),
    };
    let _changing = closing.as_ref().map(|(runtime, _)| runtime.changing());
    let status = close();
    if let Some((runtime, closing)) = closing {
        if !status.is_success() {
            lock(&runtime.handles).not_closed(key, &closing);
            runtime.hold_again(key, held);
        } else if let Some((device, bytes, charged)) = closing.last {
            runtime.uncharge_import(device, bytes, charged);
        }
    }
    status
}

pub unsafe fn cuMemPoolExportPointer(
    real: sig::cuMemPoolExportPointer,
    shareData_out: *mut c_void,
    ptr: u64,
) -> Status {
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(shareData_out, ptr) };
    drop(inside);
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && !shareData_out.is_null()
    {
        let found = lock(&runtime.heap).containing(ptr);
        if let Some(alloc) = found {
            // SAFETY: the driver has just written data of this size.
            let data = unsafe { shareData_out.cast::<[u8; HANDLE]>().read_unaligned() };
            runtime.hold(alloc.ptr, (alloc.device, alloc.bytes, key_of(&data)));
        }
    }
    status
}

pub unsafe fn cuMemPoolImportPointer(
    real: sig::cuMemPoolImportPointer,
    ptr_out: *mut u64,
    pool: *mut c_void,
    shareData: *mut c_void,
) -> Status {
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(ptr_out, pool, shareData) };
    drop(inside);
    let Some(runtime) =
        limited().filter(|_| status.is_success() && !ptr_out.is_null() && !shareData.is_null())
    else {
        return status;
    };
    // SAFETY: checked against null; the driver has written the one and read the other.
    let (ptr, data) = unsafe { (*ptr_out, shareData.cast::<[u8; HANDLE]>().read_unaligned()) };
    let Some((device, bytes)) = range_of(runtime, ptr) else {
        return status;
    };
    match runtime.charge_import(device, bytes, key_of(&data)) {
        Ok(0) => {
            let covered = Other {
                charge: (device, bytes),
                kind: Kind::Covered,
            };
            let context = runtime.current().map_or(0, |(context, _)| context);
            let mut handles = lock(&runtime.handles);
            let again = handles.take_address(ptr);
            handles.add_other(ptr, covered, context);
            drop(handles);
            if let Some((known, _)) = again {
                // The driver has given out the same address: one free ends both.
                runtime.other_gone(known);
            }
            status
        }
        Ok(charged) => {
            let context = runtime.current().map_or(0, |(context, _)| context);
            // In whole granules, as it is charged: what is smaller is given back as a part of one.
            let charged = granules_up(charged);
            lock(&runtime.heap).add_driver((ptr, charged), device, context, 0, Place::Driver);
            status
        }
        Err(why) => {
            // SAFETY: imported above; the application has not been told of it.
            let _ = unsafe { call::cuMemFree_v2(ptr) };
            why
        }
    }
}

/// `CUDA_EXTERNAL_MEMORY_HANDLE_DESC` with raw fields, up to the size.
#[repr(C)]
#[derive(Clone, Copy)]
struct ExternalDesc {
    kind: u32,
    pad: u32,
    /// The union's other members are pointers.
    fd: i32,
    rest: [u32; 3],
    size: u64,
}
const _: () = {
    type Theirs = sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC;
    assert!(core::mem::offset_of!(ExternalDesc, size) == core::mem::offset_of!(Theirs, size));
};

pub unsafe fn cuImportExternalMemory(
    real: sig::cuImportExternalMemory,
    extMem_out: *mut *mut c_void,
    memHandleDesc: *const c_void,
) -> Status {
    let current = limited().and_then(|runtime| Some((runtime, runtime.current().ok()?)));
    let Some((runtime, (context, device))) =
        current.filter(|_| !extMem_out.is_null() && !memHandleDesc.is_null())
    else {
        let _inside = gate::enter();
        // SAFETY: the application's own call.
        return unsafe { real(extMem_out, memHandleDesc) };
    };
    // SAFETY: the application's descriptor, not null.
    let desc = unsafe { memHandleDesc.cast::<ExternalDesc>().read_unaligned() };
    let charged = match runtime.charge_import(device, desc.size, 0) {
        Ok(charged) => charged,
        Err(why) => return why,
    };
    // The driver takes the descriptor over, so it is looked up before.
    let kept = (desc.kind == OPAQUE_FD)
        .then(|| descriptor(desc.fd))
        .flatten()
        .and_then(|descriptor| lock(&runtime.handles).external_importing(&descriptor));
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(extMem_out, memHandleDesc) };
    drop(inside);
    if status.is_success() {
        // SAFETY: checked against null, written by the driver.
        let key = unsafe { *extMem_out } as u64;
        let import = (device, desc.size, charged);
        lock(&runtime.handles).external_opened(key, import, context, kept);
    } else {
        let ended = lock(&runtime.handles).external_refused(kept);
        runtime.ended(ended);
        runtime.uncharge_import(device, desc.size, charged);
    }
    status
}

/// What is mapped from external memory keeps it, even when that itself is destroyed.
fn mapped(memory: *mut c_void, map: impl FnOnce() -> (Status, u64)) -> Status {
    let inside = gate::enter();
    let (status, made) = map();
    drop(inside);
    if let (true, Some(runtime)) = (status.is_success() && made != 0, limited()) {
        lock(&runtime.handles).external_mapped(memory as u64, made);
    }
    status
}

pub unsafe fn cuExternalMemoryGetMappedBuffer(
    real: sig::cuExternalMemoryGetMappedBuffer,
    devPtr: *mut u64,
    extMem: *mut c_void,
    bufferDesc: *const c_void,
) -> Status {
    mapped(extMem, || {
        // SAFETY: the application's own call.
        let status = unsafe { real(devPtr, extMem, bufferDesc) };
        // SAFETY: the driver has written it if it answers success.
        let made = (status.is_success() && !devPtr.is_null()).then(|| unsafe { *devPtr });
        (status, made.unwrap_or(0))
    })
}

pub unsafe fn cuExternalMemoryGetMappedMipmappedArray(
    real: sig::cuExternalMemoryGetMappedMipmappedArray,
    mipmap: *mut *mut c_void,
    extMem: *mut c_void,
    mipmapDesc: *const c_void,
) -> Status {
    mapped(extMem, || {
        // SAFETY: the application's own call.
        let status = unsafe { real(mipmap, extMem, mipmapDesc) };
        // SAFETY: the driver has written it if it answers success.
        let made = (status.is_success() && !mipmap.is_null()).then(|| unsafe { *mipmap });
        (status, made.map_or(0, |made| made as u64))
    })
}

pub unsafe fn cuDestroyExternalMemory(
    real: sig::cuDestroyExternalMemory,
    extMem: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let destroy = || unsafe { real(extMem) };
    match limited() {
        Some(runtime) => super::memory::destroy_other(runtime, extMem as u64, destroy),
        None => destroy(),
    }
}
