//! Allocations and frees: `cuMemAlloc` and its kin, stream-ordered ones, arrays, managed memory.

use core::ffi::c_void;

use crate::driver::{Status, call};
use crate::heap::Place;
use crate::lock;
use crate::runtime::Runtime;
use crate::table::sig;
use crate::vmm;

use super::limited;

/// `CU_STREAM_PER_THREAD`
const PER_THREAD: usize = 2;
/// The pitch of `cuMemAllocPitch`: what suits every device so far.
const PITCH: u64 = 512;

/// Writes an address to where the application wants it.
///
/// # Safety
/// `out` is the application's pointer, checked against null by the caller.
unsafe fn answer(out: *mut u64, made: Result<u64, Status>) -> Status {
    match made {
        Ok(ptr) => {
            // SAFETY: the caller's promise.
            unsafe { *out = ptr };
            Status::SUCCESS
        }
        Err(why) => why,
    }
}

pub unsafe fn cuMemAlloc_v2(real: sig::cuMemAlloc_v2, dptr: *mut u64, bytesize: usize) -> Status {
    match limited() {
        // SAFETY: checked against null; otherwise the application's own call.
        Some(runtime) if !dptr.is_null() => unsafe {
            answer(dptr, runtime.allocate(bytesize as u64, false))
        },
        // SAFETY: the application's own call.
        _ => unsafe { real(dptr, bytesize) },
    }
}

/// What the driver wrote, if it says success.
///
/// # Safety
/// `out` was given to the driver for its answer, and is not null.
unsafe fn made<T: Copy + Made>(status: Status, out: *const T) -> T {
    if status.is_success() {
        // SAFETY: the caller's promise.
        unsafe { *out }
    } else {
        T::NOTHING
    }
}

/// What a driver writes as the name of something that it made.
trait Made {
    const NOTHING: Self;
}
impl Made for u64 {
    const NOTHING: Self = 0;
}
impl Made for u32 {
    const NOTHING: Self = 0;
}
impl Made for *mut c_void {
    const NOTHING: Self = core::ptr::null_mut();
}

/// An allocation by an entry point whose memory stays the driver's: charged as pinned.
fn pass_charged(
    runtime: &Runtime,
    bytes: u64,
    ordered: bool,
    make: impl FnOnce() -> (Status, u64),
) -> Status {
    let (context, device) = match runtime.current() {
        Ok(current) => current,
        // Without a context the driver refuses for a reason of its own.
        Err(_) => return make().0,
    };
    let mut ptr = 0;
    let charged = runtime.charged(device, bytes, || {
        let (status, made) = make();
        ptr = made;
        status
    });
    match charged {
        Ok(()) => {
            lock(&runtime.heap).add_driver(ptr, bytes, device, context, ordered);
            Status::SUCCESS
        }
        Err(why) => why,
    }
}

pub unsafe fn cuMemAlloc(real: sig::cuMemAlloc, dptr: *mut u32, bytesize: u32) -> Status {
    match limited() {
        Some(runtime) if !dptr.is_null() => {
            pass_charged(runtime, u64::from(bytesize), false, || {
                // SAFETY: the application's own call; the driver has written the address if it says success.
                unsafe {
                    let status = real(dptr, bytesize);
                    (status, u64::from(made(status, dptr)))
                }
            })
        }
        // SAFETY: the application's own call.
        _ => unsafe { real(dptr, bytesize) },
    }
}

pub unsafe fn cuMemAllocPitch_v2(
    real: sig::cuMemAllocPitch_v2,
    dptr: *mut u64,
    pPitch: *mut usize,
    WidthInBytes: usize,
    Height: usize,
    ElementSizeBytes: u32,
) -> Status {
    let bytes = (WidthInBytes as u64)
        .checked_next_multiple_of(PITCH)
        .and_then(|pitch| Some((pitch, pitch.checked_mul(Height as u64)?)));
    match (limited(), bytes) {
        (Some(runtime), Some((pitch, bytes)))
            if bytes > 0
                && !dptr.is_null()
                && !pPitch.is_null()
                && matches!(ElementSizeBytes, 4 | 8 | 16) =>
        {
            let made = runtime.allocate(bytes, false);
            if made.is_ok() {
                // SAFETY: checked against null.
                unsafe { *pPitch = usize::try_from(pitch).unwrap_or(0) };
            }
            // SAFETY: checked against null.
            unsafe { answer(dptr, made) }
        }
        // What the driver refuses it refuses itself.
        // SAFETY: the application's own call.
        _ => unsafe { real(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes) },
    }
}

pub unsafe fn cuMemAllocPitch(
    real: sig::cuMemAllocPitch,
    dptr: *mut u32,
    pPitch: *mut u32,
    WidthInBytes: u32,
    Height: u32,
    ElementSizeBytes: u32,
) -> Status {
    let bytes = u64::from(WidthInBytes).next_multiple_of(PITCH) * u64::from(Height);
    match limited() {
        Some(runtime) if !dptr.is_null() => pass_charged(runtime, bytes, false, || {
            // SAFETY: as in `cuMemAlloc`.
            unsafe {
                let status = real(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
                (status, u64::from(made(status, dptr)))
            }
        }),
        // SAFETY: the application's own call.
        _ => unsafe { real(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes) },
    }
}

/// What is charged for memory that `cuMemFree` of a pointer not in the heap gives back.
fn uncharge_other(runtime: &Runtime, key: u64) {
    let charge = lock(&runtime.handles).remove_other(key);
    if let Some((device, bytes)) = charge {
        runtime.uncharge(device, bytes);
    }
}

pub unsafe fn cuMemFree_v2(real: sig::cuMemFree_v2, dptr: u64) -> Status {
    let Some(runtime) = limited() else {
        // SAFETY: the application's own call.
        return unsafe { real(dptr) };
    };
    if let Some(status) = runtime.free(dptr) {
        return status;
    }
    // SAFETY: the application's own call.
    let status = unsafe { real(dptr) };
    if status.is_success() {
        uncharge_other(runtime, dptr);
    }
    status
}

pub unsafe fn cuMemFree(real: sig::cuMemFree, dptr: u32) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(dptr) };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        let taken = lock(&runtime.heap).take(u64::from(dptr));
        if let Some(alloc) = taken {
            runtime.uncharge(alloc.device, alloc.bytes);
        }
    }
    status
}

/// The stream is part of a capture: what is allocated or freed there are nodes of a graph.
fn capturing(runtime: &Runtime, stream: usize) -> bool {
    // Two statements: the lock must not be held over the driver's call.
    let any = lock(&runtime.contexts).any_capture();
    any && vmm::is_capturing(stream)
}

/// The name under which a stream's frees may be reused: 0 for streams that differ by thread.
fn reuse_name(stream: usize) -> usize {
    match stream {
        PER_THREAD => 0,
        0 => 1,
        other => other,
    }
}

/// The program has made another pool than the default one current: its allocations come from there.
fn own_pool(runtime: &Runtime) -> bool {
    use std::sync::atomic::Ordering::SeqCst;
    let devices = runtime.own_pools.load(SeqCst);
    devices != 0
        && runtime
            .current()
            .is_ok_and(|(_, device)| devices >> device & 1 != 0)
}

pub unsafe fn cuDeviceSetMemPool(
    real: sig::cuDeviceSetMemPool,
    dev: i32,
    pool: *mut c_void,
) -> Status {
    use std::sync::atomic::Ordering::SeqCst;
    // SAFETY: the application's own call.
    let status = unsafe { real(dev, pool) };
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && let Some(device) = runtime.device_index(dev)
    {
        let mut default = core::ptr::null_mut();
        // SAFETY: the driver fills one handle.
        let known = unsafe { call::cuDeviceGetDefaultMemPool(&raw mut default, dev) };
        if known.is_success() && default == pool {
            runtime.own_pools.fetch_and(!(1 << device), SeqCst);
        } else {
            runtime.own_pools.fetch_or(1 << device, SeqCst);
        }
    }
    status
}

unsafe fn alloc_async(
    dptr: *mut u64,
    bytes: usize,
    stream: usize,
    real: impl FnOnce() -> Status,
) -> Status {
    let Some(runtime) = limited() else {
        return real();
    };
    if dptr.is_null() || bytes == 0 || capturing(runtime, stream) {
        return real();
    }
    if !runtime.paging || own_pool(runtime) {
        return pass_charged(runtime, bytes as u64, true, || {
            let status = real();
            // SAFETY: checked against null; written by the driver if it says success.
            unsafe { (status, made(status, dptr)) }
        });
    }
    let owner = lock(&runtime.contexts).context_of_stream(stream);
    let (context, made) = match owner {
        Some(context) => (context, None),
        None => match runtime.current() {
            Ok((context, _)) => (context, None),
            Err(why) => (0, Some(Err(why))),
        },
    };
    let made = made.unwrap_or_else(|| {
        let name = reuse_name(stream);
        if name != 0
            && let Some(ptr) = runtime.reuse(name, context, bytes as u64)
        {
            return Ok(ptr);
        }
        vmm::in_context(context, || runtime.allocate(bytes as u64, true))
    });
    // SAFETY: checked against null.
    unsafe { answer(dptr, made) }
}

pub unsafe fn cuMemAllocAsync(
    real: sig::cuMemAllocAsync,
    dptr: *mut u64,
    bytesize: usize,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        alloc_async(dptr, bytesize, hStream as usize, || {
            real(dptr, bytesize, hStream)
        })
    }
}

/// Stream 0 of a per-thread entry point is the calling thread's own.
fn per_thread(stream: *mut c_void) -> usize {
    if stream.is_null() {
        PER_THREAD
    } else {
        stream as usize
    }
}

pub unsafe fn cuMemAllocAsync_ptsz(
    real: sig::cuMemAllocAsync_ptsz,
    dptr: *mut u64,
    bytesize: usize,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        alloc_async(dptr, bytesize, per_thread(hStream), || {
            real(dptr, bytesize, hStream)
        })
    }
}

unsafe fn alloc_from_pool(
    dptr: *mut u64,
    bytes: usize,
    stream: usize,
    real: impl FnOnce() -> Status,
) -> Status {
    match limited() {
        Some(runtime) if !dptr.is_null() && !capturing(runtime, stream) => {
            pass_charged(runtime, bytes as u64, true, || {
                let status = real();
                // SAFETY: checked against null; written by the driver if it says success.
                unsafe { (status, made(status, dptr)) }
            })
        }
        _ => real(),
    }
}

pub unsafe fn cuMemAllocFromPoolAsync(
    real: sig::cuMemAllocFromPoolAsync,
    dptr: *mut u64,
    bytesize: usize,
    pool: *mut c_void,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        alloc_from_pool(dptr, bytesize, hStream as usize, || {
            real(dptr, bytesize, pool, hStream)
        })
    }
}

pub unsafe fn cuMemAllocFromPoolAsync_ptsz(
    real: sig::cuMemAllocFromPoolAsync_ptsz,
    dptr: *mut u64,
    bytesize: usize,
    pool: *mut c_void,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        alloc_from_pool(dptr, bytesize, per_thread(hStream), || {
            real(dptr, bytesize, pool, hStream)
        })
    }
}

fn free_async(ptr: u64, stream: usize, real: impl FnOnce() -> Status) -> Status {
    let Some(runtime) = limited() else {
        return real();
    };
    let found = lock(&runtime.heap).find(ptr);
    match found {
        None => real(),
        Some(_) if capturing(runtime, stream) => real(),
        Some(alloc) if alloc.place == Place::Driver => {
            let status = real();
            if status.is_success() && lock(&runtime.heap).take(ptr).is_some() {
                runtime.uncharge(alloc.device, alloc.bytes);
            }
            status
        }
        Some(_) => {
            // Somebody else may have freed it meanwhile: the driver refuses the second.
            let Some(alloc) = lock(&runtime.heap).take(ptr) else {
                return real();
            };
            let owner = lock(&runtime.contexts).context_of_stream(stream);
            // A default stream is the current context's, whoever owns the memory.
            let context = owner
                .or_else(|| runtime.current().ok().map(|(context, _)| context))
                .unwrap_or(alloc.context);
            let name = reuse_name(stream);
            match vmm::in_context(context, || runtime.defer(alloc, stream, name, context)) {
                Ok(()) => Status::SUCCESS,
                Err(why) => why,
            }
        }
    }
}

pub unsafe fn cuMemFreeAsync(real: sig::cuMemFreeAsync, dptr: u64, hStream: *mut c_void) -> Status {
    // SAFETY: the application's own call.
    free_async(dptr, hStream as usize, || unsafe { real(dptr, hStream) })
}

pub unsafe fn cuMemFreeAsync_ptsz(
    real: sig::cuMemFreeAsync_ptsz,
    dptr: u64,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    free_async(dptr, per_thread(hStream), || unsafe { real(dptr, hStream) })
}

/// A call that makes something else than a plain allocation, known by a key.
fn other_charged(bytes: u64, make: impl FnOnce() -> (Status, u64)) -> Status {
    let Some(runtime) = limited() else {
        return make().0;
    };
    let Ok((context, device)) = runtime.current() else {
        return make().0;
    };
    let mut key = 0;
    let charged = runtime.charged(device, bytes, || {
        let (status, made) = make();
        key = made;
        status
    });
    match charged {
        Ok(()) => {
            lock(&runtime.handles).add_other(key, (device, bytes), context);
            Status::SUCCESS
        }
        Err(why) => why,
    }
}

pub unsafe fn cuMemAllocManaged(
    real: sig::cuMemAllocManaged,
    dptr: *mut u64,
    bytesize: usize,
    flags: u32,
) -> Status {
    if dptr.is_null() {
        // SAFETY: the application's own call.
        return unsafe { real(dptr, bytesize, flags) };
    }
    other_charged(bytesize as u64, || {
        // SAFETY: the application's own call; written by the driver if it says success.
        unsafe {
            let status = real(dptr, bytesize, flags);
            (status, made(status, dptr))
        }
    })
}

/// Bytes of one element, by `CUarray_format`; formats of later versions count as four bytes.
fn format_bytes(format: u32) -> u64 {
    match format {
        0x01 | 0x08 => 1,
        0x02 | 0x09 | 0x10 => 2,
        _ => 4,
    }
}

fn array_bytes(width: u64, height: u64, depth: u64, format: u32, channels: u32) -> u64 {
    let elements = width
        .max(1)
        .saturating_mul(height.max(1))
        .saturating_mul(depth.max(1));
    elements
        .saturating_mul(format_bytes(format))
        .saturating_mul(u64::from(channels.max(1)))
}

/// `CUDA_ARRAY_DESCRIPTOR` and `CUDA_ARRAY3D_DESCRIPTOR`, with sizes of type `N`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Array2D<N> {
    width: N,
    height: N,
    format: u32,
    channels: u32,
}
#[repr(C)]
#[derive(Clone, Copy)]
struct Array3D<N> {
    width: N,
    height: N,
    depth: N,
    format: u32,
    channels: u32,
}

macro_rules! arrays {
    ($($name:ident $layout:ident $number:ty, $($depth:ident)?;)*) => {$(
        pub unsafe fn $name(
            real: sig::$name,
            pHandle: *mut *mut c_void,
            pAllocateArray: *const c_void,
        ) -> Status {
            if pHandle.is_null() || pAllocateArray.is_null() {
                // SAFETY: the application's own call.
                return unsafe { real(pHandle, pAllocateArray) };
            }
            // SAFETY: the application's descriptor, of this entry point's layout.
            let array = unsafe { pAllocateArray.cast::<$layout<$number>>().read_unaligned() };
            #[allow(unused_mut, unused_assignments, reason = "flat arrays have no depth")]
            let mut depth = 1;
            $(depth = array.$depth as u64;)?
            let bytes = array_bytes(
                array.width as u64, array.height as u64, depth, array.format, array.channels,
            );
            other_charged(bytes, || {
                // SAFETY: the application's own call; written by the driver if it says success.
                unsafe {
                    let status = real(pHandle, pAllocateArray);
                    (status, made(status, pHandle) as u64)
                }
            })
        }
    )*};
}
arrays! {
    cuArrayCreate Array2D u32,;
    cuArrayCreate_v2 Array2D usize,;
    cuArray3DCreate Array3D u32, depth;
    cuArray3DCreate_v2 Array3D usize, depth;
}

pub unsafe fn cuMipmappedArrayCreate(
    real: sig::cuMipmappedArrayCreate,
    pHandle: *mut *mut c_void,
    pMipmappedArrayDesc: *const c_void,
    numMipmapLevels: u32,
) -> Status {
    if pHandle.is_null() || pMipmappedArrayDesc.is_null() {
        // SAFETY: the application's own call.
        return unsafe { real(pHandle, pMipmappedArrayDesc, numMipmapLevels) };
    }
    // SAFETY: the application's descriptor.
    let array = unsafe {
        pMipmappedArrayDesc
            .cast::<Array3D<usize>>()
            .read_unaligned()
    };
    let base = array_bytes(
        array.width as u64,
        array.height as u64,
        array.depth as u64,
        array.format,
        array.channels,
    );
    // Each level has at most half the edge: all of them together less than twice the first.
    let bytes = if numMipmapLevels > 1 {
        base.saturating_mul(2)
    } else {
        base
    };
    other_charged(bytes, || {
        // SAFETY: the application's own call; written by the driver if it says success.
        unsafe {
            let status = real(pHandle, pMipmappedArrayDesc, numMipmapLevels);
            (status, made(status, pHandle) as u64)
        }
    })
}

pub unsafe fn cuArrayDestroy(real: sig::cuArrayDestroy, hArray: *mut c_void) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(hArray) };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        uncharge_other(runtime, hArray as u64);
    }
    status
}

pub unsafe fn cuMipmappedArrayDestroy(
    real: sig::cuMipmappedArrayDestroy,
    hMipmappedArray: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(hMipmappedArray) };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        uncharge_other(runtime, hMipmappedArray as u64);
    }
    status
}

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

pub unsafe fn cuIpcGetMemHandle(
    real: sig::cuIpcGetMemHandle,
    pHandle: *mut c_void,
    dptr: u64,
) -> Status {
    if let Some(runtime) = limited()
        && super::report::ours(runtime, dptr).is_some()
    {
        crate::say::warning!(
            "cuIpcGetMemHandle: memory that can be swapped cannot be shared between processes; \
             set SPILLWAY_SWAP=never for this program"
        );
        return Status::NOT_SUPPORTED;
    }
    // SAFETY: the application's own call.
    unsafe { real(pHandle, dptr) }
}

/// The pool that a stream-ordered allocation of ours pretends to come from.
pub(super) fn pool_of(ordinal: i32) -> *mut c_void {
    let mut pool = core::ptr::null_mut();
    // SAFETY: the driver fills one handle.
    let status = unsafe { call::cuDeviceGetMemPool(&raw mut pool, ordinal) };
    if status.is_success() {
        pool
    } else {
        core::ptr::null_mut()
    }
}
