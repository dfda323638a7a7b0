//! The driver's virtual memory management, as this library uses it: what is made together is undone
//! together.

use std::mem::MaybeUninit;

use crate::driver::{Status, call};
use crate::heap::Chunk;
use spillway_protocol::GRANULE;

/// `CU_MEM_ALLOCATION_TYPE_PINNED`
const TYPE_PINNED: u32 = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`
const LOCATION_DEVICE: u32 = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`
const READ_WRITE: u32 = 3;

/// `CUmemAllocationProp`
#[repr(C)]
pub struct AllocationProp {
    /// `CUmemAllocationType`, raw.
    pub kind: u32,
    /// `CUmemAllocationHandleType` bits.
    pub handle_types: u32,
    /// `CUmemLocationType`, raw.
    pub location_type: u32,
    /// Device ordinal or NUMA node.
    pub location_id: i32,
    /// Windows only.
    pub windows: *mut libc::c_void,
    /// compressionType, gpuDirectRDMACapable, usage (2 bytes), reserved.
    pub flags: [u8; 8],
}

/// `CUmemAccessDesc`
#[repr(C)]
struct AccessDesc {
    location_type: u32,
    location_id: i32,
    flags: u32,
}

/// Reserves addresses.
pub fn reserve(bytes: u64) -> Result<u64, Status> {
    let size = usize::try_from(bytes).map_err(|_| Status::OUT_OF_MEMORY)?;
    let alignment = usize::try_from(GRANULE).unwrap_or(0);
    let mut base = 0;
    // SAFETY: the driver fills one address.
    unsafe { call::cuMemAddressReserve(&raw mut base, size, alignment, 0, 0) }.ok()?;
    Ok(base)
}

/// Gives addresses back.
pub fn unreserve(base: u64, bytes: u64) {
    // SAFETY: reserved by `reserve`, nothing mapped there any more.
    let status = unsafe { call::cuMemAddressFree(base, usize::try_from(bytes).unwrap_or(0)) };
    if !status.is_success() {
        crate::say::debug!("cuMemAddressFree answers {}", status.0);
    }
}

/// Makes physical memory for every chunk that has none, maps it and gives access; undone whole when
/// a part fails.
pub fn back(
    ordinal: i32,
    base: u64,
    mut chunks: Vec<Chunk>,
    access: &[i32],
) -> Result<Vec<Chunk>, Status> {
    match back_in_place(ordinal, base, &mut chunks, access) {
        Ok(()) => Ok(chunks),
        Err(why) => Err(why),
    }
}

/// The same, on chunks in place.
pub fn back_in_place(
    ordinal: i32,
    base: u64,
    chunks: &mut [Chunk],
    access: &[i32],
) -> Result<(), Status> {
    let absent: Vec<usize> = chunks
        .iter()
        .enumerate()
        .filter(|(_, c)| c.handle == 0)
        .map(|(i, _)| i)
        .collect();
    let mut done = Ok(());
    for &index in &absent {
        let chunk = &mut chunks[index];
        done = create(ordinal, chunk.bytes).and_then(|handle| {
            map(base + chunk.offset, chunk.bytes, handle).inspect_err(|_| release(handle))?;
            chunk.handle = handle;
            Ok(())
        });
        if done.is_err() {
            break;
        }
    }
    let bytes = chunks.iter().map(|c| c.bytes).sum();
    let done = done.and_then(|()| set_access(base, bytes, access));
    if done.is_err() {
        for &index in &absent {
            if chunks[index].handle != 0 {
                unback(base, &chunks[index]);
                chunks[index].handle = 0;
            }
        }
    }
    done
}

fn create(ordinal: i32, bytes: u64) -> Result<u64, Status> {
    let prop = AllocationProp {
        kind: TYPE_PINNED,
        handle_types: 0,
        location_type: LOCATION_DEVICE,
        location_id: ordinal,
        windows: std::ptr::null_mut(),
        flags: [0; 8],
    };
    let size = usize::try_from(bytes).map_err(|_| Status::OUT_OF_MEMORY)?;
    let mut handle = 0;
    // SAFETY: the driver fills one handle and reads one prop of its own layout.
    unsafe { call::cuMemCreate(&raw mut handle, size, (&raw const prop).cast(), 0) }.ok()?;
    Ok(handle)
}

fn release(handle: u64) {
    // SAFETY: a handle that `create` returned, released once.
    let status = unsafe { call::cuMemRelease(handle) };
    if !status.is_success() {
        crate::say::debug!("cuMemRelease answers {}", status.0);
    }
}

fn map(address: u64, bytes: u64, handle: u64) -> Result<(), Status> {
    let size = usize::try_from(bytes).map_err(|_| Status::OUT_OF_MEMORY)?;
    // SAFETY: the range lies in a reservation of ours and is not mapped.
    unsafe { call::cuMemMap(address, size, 0, handle, 0) }.ok()
}

/// Gives every device of `access` read and write access to a fully mapped range.
pub fn set_access(base: u64, bytes: u64, access: &[i32]) -> Result<(), Status> {
    let descriptors: Vec<AccessDesc> = access
        .iter()
        .map(|&id| AccessDesc {
            location_type: LOCATION_DEVICE,
            location_id: id,
            flags: READ_WRITE,
        })
        .collect();
    let size = usize::try_from(bytes).map_err(|_| Status::OUT_OF_MEMORY)?;
    // SAFETY: the driver reads as many descriptors as we say.
    unsafe { call::cuMemSetAccess(base, size, descriptors.as_ptr().cast(), descriptors.len()) }.ok()
}

/// Unmaps and releases a chunk's physical memory.
pub fn unback(base: u64, chunk: &Chunk) {
    let size = usize::try_from(chunk.bytes).unwrap_or(0);
    // SAFETY: a whole mapping of ours, which nothing uses any more.
    let status = unsafe { call::cuMemUnmap(base + chunk.offset, size) };
    if !status.is_success() {
        crate::say::debug!("cuMemUnmap answers {}", status.0);
    }
    release(chunk.handle);
}

/// Runs driver calls with `context` current, and puts back what was.
///
/// # Errors
/// The context cannot be made current, or what `run` answers.
pub fn in_context<T>(context: usize, run: impl FnOnce() -> Result<T, Status>) -> Result<T, Status> {
    let mut before = std::ptr::null_mut();
    // SAFETY: the driver fills one handle.
    unsafe { call::cuCtxGetCurrent(&raw mut before) }.ok()?;
    if before as usize == context {
        return run();
    }
    // SAFETY: a context of the application; a destroyed one is refused by the driver.
    unsafe { call::cuCtxPushCurrent_v2(context as *mut _) }.ok()?;
    let result = run();
    let mut popped = MaybeUninit::uninit();
    // SAFETY: the driver fills one handle.
    let _ = unsafe { call::cuCtxPopCurrent_v2(popped.as_mut_ptr()) };
    result
}

/// Whether a stream captures, by the driver's word; a stream that cannot be asked does not.
pub fn is_capturing(stream: usize) -> bool {
    let mut status = 0;
    // SAFETY: the driver fills one integer.
    let got = unsafe { call::cuStreamIsCapturing(stream as *mut _, &raw mut status) };
    // An invalidated capture (2) is open, too, until it is ended.
    got.is_success() && status != 0
}

/// Takes a device's access to a range away.
pub fn remove_access(base: u64, bytes: u64, ordinal: i32) -> Result<(), Status> {
    let none = AccessDesc {
        location_type: LOCATION_DEVICE,
        location_id: ordinal,
        flags: 0,
    };
    let size = usize::try_from(bytes).map_err(|_| Status::OUT_OF_MEMORY)?;
    // SAFETY: the driver reads one descriptor.
    unsafe { call::cuMemSetAccess(base, size, (&raw const none).cast(), 1) }.ok()
}
