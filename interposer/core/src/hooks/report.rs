//! What the program is told about memory: its own quota, and its own allocations as classic ones.
//!
//! Answers about pointers come from the heap's records, so they stand while the memory is on the
//! host, too.

use core::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::driver::Status;
use crate::heap::Alloc;
use crate::lock;
use crate::runtime::Runtime;
use crate::table::sig;

use super::limited;

/// The allocation of ours that a pointer lies in. The driver's own allocations are the driver's to
/// describe.
pub(super) fn ours(runtime: &Runtime, ptr: u64) -> Option<Alloc> {
    lock(&runtime.heap)
        .containing(ptr)
        .filter(|alloc| !alloc.place.is_drivers())
}

fn clamped(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// Free and total of the current context's device; `None`: no context is current.
fn told(runtime: &Runtime) -> Option<(u64, u64)> {
    let (_, device) = runtime.current().ok()?;
    Some(runtime.told(device))
}

pub unsafe fn cuMemGetInfo_v2(
    real: sig::cuMemGetInfo_v2,
    free: *mut usize,
    total: *mut usize,
) -> Status {
    if let Some(runtime) = limited()
        && !free.is_null()
        && !total.is_null()
        && !runtime.old_interface()
        && let Some((ours_free, ours_total)) = told(runtime)
    {
        // SAFETY: checked against null.
        unsafe {
            *free = clamped(ours_free);
            *total = clamped(ours_total);
        }
        return Status::SUCCESS;
    }
    // SAFETY: the application's own call.
    unsafe { real(free, total) }
}

pub unsafe fn cuMemGetInfo(real: sig::cuMemGetInfo, free: *mut u32, total: *mut u32) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(free, total) };
    if status.is_success()
        && let Some(runtime) = limited()
        && let Some((ours_free, ours_total)) = told(runtime)
    {
        // SAFETY: the driver has just written both.
        unsafe {
            *free = u32::try_from(ours_free).unwrap_or(u32::MAX).min(*free);
            *total = u32::try_from(ours_total).unwrap_or(u32::MAX).min(*total);
        }
    }
    status
}

fn device_total(dev: i32) -> Option<u64> {
    use std::sync::atomic::Ordering::SeqCst;
    let runtime = limited()?;
    let device = runtime.device_index(dev)?;
    Some(runtime.desired().devices[device].limit.load(SeqCst))
}

pub unsafe fn cuDeviceTotalMem_v2(
    real: sig::cuDeviceTotalMem_v2,
    bytes: *mut usize,
    dev: i32,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(bytes, dev) };
    if let (true, Some(total)) = (status.is_success(), device_total(dev)) {
        // SAFETY: the driver has just written it.
        unsafe { *bytes = clamped(total) };
    }
    status
}

pub unsafe fn cuDeviceTotalMem(real: sig::cuDeviceTotalMem, bytes: *mut u32, dev: i32) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(bytes, dev) };
    if let (true, Some(total)) = (status.is_success(), device_total(dev)) {
        // SAFETY: the driver has just written it.
        unsafe { *bytes = u32::try_from(total).unwrap_or(u32::MAX).min(*bytes) };
    }
    status
}

pub unsafe fn cuMemGetAddressRange_v2(
    real: sig::cuMemGetAddressRange_v2,
    pbase: *mut u64,
    psize: *mut usize,
    dptr: u64,
) -> Status {
    if let Some(alloc) = limited().and_then(|runtime| ours(runtime, dptr)) {
        // Either may be null: then it is not asked for.
        // SAFETY: the application's pointers, checked against null.
        unsafe {
            if !pbase.is_null() {
                *pbase = alloc.ptr;
            }
            if !psize.is_null() {
                *psize = clamped(alloc.bytes);
            }
        }
        return Status::SUCCESS;
    }
    // SAFETY: the application's own call.
    unsafe { real(pbase, psize, dptr) }
}

pub unsafe fn cuMemGetAddressRange(
    real: sig::cuMemGetAddressRange,
    pbase: *mut u32,
    psize: *mut u32,
    dptr: u32,
) -> Status {
    // 32-bit addresses are never ours.
    // SAFETY: the application's own call.
    unsafe { real(pbase, psize, dptr) }
}

/// `CUpointer_attribute`, raw.
mod attribute {
    pub const CONTEXT: u32 = 1;
    pub const MEMORY_TYPE: u32 = 2;
    pub const DEVICE_POINTER: u32 = 3;
    pub const HOST_POINTER: u32 = 4;
    pub const SYNC_MEMOPS: u32 = 6;
    pub const BUFFER_ID: u32 = 7;
    pub const IS_MANAGED: u32 = 8;
    pub const DEVICE_ORDINAL: u32 = 9;
    pub const IS_LEGACY_CUDA_IPC_CAPABLE: u32 = 10;
    pub const RANGE_START_ADDR: u32 = 11;
    pub const RANGE_SIZE: u32 = 12;
    pub const MAPPED: u32 = 13;
    pub const ALLOWED_HANDLE_TYPES: u32 = 14;
    pub const IS_GPU_DIRECT_RDMA_CAPABLE: u32 = 15;
    pub const ACCESS_FLAGS: u32 = 16;
    pub const MEMPOOL_HANDLE: u32 = 17;
    pub const MAPPING_SIZE: u32 = 18;
    pub const MAPPING_BASE_ADDR: u32 = 19;
    pub const MEMORY_BLOCK_ID: u32 = 20;
    pub const IS_HW_DECOMPRESS_CAPABLE: u32 = 21;
}

/// A value as wide as the driver writes it.
enum Value {
    Word(u32),
    Long(u64),
}

/// What the driver would say of classic memory in this place.
fn value_of(runtime: &Runtime, alloc: &Alloc, ptr: u64, which: u32) -> Result<Value, Status> {
    use attribute as a;
    /// `CU_MEMORYTYPE_DEVICE`
    const DEVICE_MEMORY: u32 = 2;
    /// `CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE`
    const READ_WRITE: u32 = 3;
    let ordinal = runtime.devices[alloc.device].ordinal;
    Ok(match which {
        a::CONTEXT => Value::Long(alloc.context as u64),
        a::MEMORY_TYPE => Value::Word(DEVICE_MEMORY),
        a::DEVICE_POINTER => Value::Long(ptr),
        a::BUFFER_ID | a::MEMORY_BLOCK_ID => Value::Long(alloc.id),
        a::SYNC_MEMOPS => Value::Word(u32::from(
            lock(&runtime.heap).sync_memops().contains(&alloc.ptr),
        )),
        a::IS_MANAGED
        | a::IS_LEGACY_CUDA_IPC_CAPABLE
        | a::IS_GPU_DIRECT_RDMA_CAPABLE
        | a::IS_HW_DECOMPRESS_CAPABLE => Value::Word(0),
        a::DEVICE_ORDINAL => Value::Word(u32::try_from(ordinal).unwrap_or(0)),
        a::RANGE_START_ADDR | a::MAPPING_BASE_ADDR => Value::Long(alloc.ptr),
        a::RANGE_SIZE | a::MAPPING_SIZE => Value::Long(alloc.bytes),
        a::MAPPED => Value::Word(1),
        a::ALLOWED_HANDLE_TYPES => Value::Long(0),
        a::ACCESS_FLAGS => Value::Word(READ_WRITE),
        a::MEMPOOL_HANDLE => Value::Long(alloc.pool),
        // A host pointer, peer tokens, and what later versions add: not for this memory.
        _ => return Err(Status::INVALID_VALUE),
    })
}

/// # Safety
/// `data` is the application's buffer for this attribute, not null.
unsafe fn write(data: *mut c_void, value: &Value) {
    // SAFETY: the caller's promise; the buffer may be unaligned.
    unsafe {
        match *value {
            Value::Word(word) => data.cast::<u32>().write_unaligned(word),
            Value::Long(long) => data.cast::<u64>().write_unaligned(long),
        }
    }
}

pub unsafe fn cuPointerGetAttribute(
    real: sig::cuPointerGetAttribute,
    data: *mut c_void,
    attribute: u32,
    ptr: u64,
) -> Status {
    let found = limited().and_then(|runtime| Some((runtime, ours(runtime, ptr)?)));
    let Some((runtime, alloc)) = found.filter(|_| !data.is_null()) else {
        // SAFETY: the application's own call.
        return unsafe { real(data, attribute, ptr) };
    };
    match value_of(runtime, &alloc, ptr, attribute) {
        Ok(value) => {
            // SAFETY: checked against null.
            unsafe { write(data, &value) };
            Status::SUCCESS
        }
        Err(why) => why,
    }
}

pub unsafe fn cuPointerGetAttributes(
    real: sig::cuPointerGetAttributes,
    numAttributes: u32,
    attributes: *mut u32,
    data: *mut *mut c_void,
    ptr: u64,
) -> Status {
    let found = limited().and_then(|runtime| Some((runtime, ours(runtime, ptr)?)));
    let Some((runtime, alloc)) = found.filter(|_| !attributes.is_null() && !data.is_null()) else {
        // SAFETY: the application's own call.
        return unsafe { real(numAttributes, attributes, data, ptr) };
    };
    for index in 0..numAttributes as usize {
        // SAFETY: the application's arrays have this many entries.
        let (which, out) = unsafe { (*attributes.add(index), *data.add(index)) };
        if out.is_null() {
            return Status::INVALID_VALUE;
        }
        match value_of(runtime, &alloc, ptr, which) {
            // SAFETY: checked against null.
            Ok(value) => unsafe { write(out, &value) },
            // What does not apply reads as null here, instead of failing the call.
            Err(_) if which == attribute::HOST_POINTER => {
                // SAFETY: checked against null.
                unsafe { write(out, &Value::Long(0)) };
            }
            Err(why) => return why,
        }
    }
    Status::SUCCESS
}

pub unsafe fn cuPointerSetAttribute(
    real: sig::cuPointerSetAttribute,
    value: *const c_void,
    attribute: u32,
    ptr: u64,
) -> Status {
    let inside = crate::gate::enter();
    // SAFETY: the application's own call; the gate keeps the memory in place.
    let status = unsafe { real(value, attribute, ptr) };
    drop(inside);
    if attribute == attribute::SYNC_MEMOPS
        && let Some(runtime) = limited()
        && let Some(alloc) = ours(runtime, ptr)
    {
        if !status.is_success() {
            // Drivers have it for cuMemAlloc's memory alone. Who asks is about to let another device reach in
            // (GPUDirect), which must not happen to memory that moves: a refusal is right, its reason is told.
            static TOLD: AtomicBool = AtomicBool::new(false);
            if !TOLD.swap(true, Relaxed) {
                crate::say::warning!(
                    "CU_POINTER_ATTRIBUTE_SYNC_MEMOPS is refused (driver error {}) for memory that can be \
                     swapped; a program that uses GPUDirect needs SPILLWAY_SWAP=never",
                    status.0
                );
            }
            return status;
        }
        // SAFETY: the driver has just read it.
        let on = unsafe { value.cast::<u8>().read() } != 0;
        lock(&runtime.heap).set_sync_memops(alloc.ptr, on);
    }
    status
}

/// Keeps a program's private driver tables in mind: see [`super::context`].
pub unsafe fn cuGetExportTable(
    real: sig::cuGetExportTable,
    ppExportTable: *mut *const c_void,
    pExportTableId: *const c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(ppExportTable, pExportTableId) };
    if status.is_success() && !pExportTableId.is_null() {
        // SAFETY: the driver has just read it: a uuid of 16 bytes.
        let id = unsafe { pExportTableId.cast::<[u8; 16]>().read_unaligned() };
        super::export_tables::handed_out(&id);
    }
    status
}
