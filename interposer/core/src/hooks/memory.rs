//! Allocations and frees: `cuMemAlloc` and its kin, and what the other allocating hooks share.

use core::ffi::c_void;

use crate::driver::{Status, call};
use crate::heap::Place;
use crate::lock;
use crate::runtime::Runtime;
use crate::table::sig;

use super::limited;

/// The pitch of `cuMemAllocPitch`: what suits every device so far.
const PITCH: u64 = 512;

/// Writes an address to where the application wants it.
///
/// # Safety
/// `out` is the application's pointer, checked against null by the caller.
pub(super) unsafe fn answer(out: *mut u64, made: Result<u64, Status>) -> Status {
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
        Some(runtime) if !dptr.is_null() && runtime.old_interface() => {
            pass_charged(runtime, bytesize as u64, || {
                // SAFETY: the application's own call; the driver has written the address if it says success.
                unsafe {
                    let status = real(dptr, bytesize);
                    (status, made(status, dptr))
                }
            })
        }
        // SAFETY: checked against null; otherwise the application's own call.
        Some(runtime) if !dptr.is_null() => unsafe {
            answer(dptr, runtime.allocate(bytesize as u64, 0))
        },
        // SAFETY: the application's own call.
        _ => unsafe { real(dptr, bytesize) },
    }
}

/// What the driver wrote, if it says success.
///
/// # Safety
/// `out` was given to the driver for its answer, and is not null.
pub(super) unsafe fn made<T: Copy + Made>(status: Status, out: *const T) -> T {
    if status.is_success() {
        // SAFETY: the caller's promise.
        unsafe { *out }
    } else {
        T::NOTHING
    }
}

/// What a driver writes as the name of something that it made.
pub(super) trait Made {
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
fn pass_charged(runtime: &Runtime, bytes: u64, make: impl FnOnce() -> (Status, u64)) -> Status {
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
            lock(&runtime.heap).add_driver((ptr, bytes), device, context, 0, Place::Driver);
            Status::SUCCESS
        }
        Err(why) => why,
    }
}

pub unsafe fn cuMemAlloc(real: sig::cuMemAlloc, dptr: *mut u32, bytesize: u32) -> Status {
    match limited() {
        Some(runtime) if !dptr.is_null() => {
            pass_charged(runtime, u64::from(bytesize), || {
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
        (Some(runtime), Some((_, bytes))) if !dptr.is_null() && runtime.old_interface() => {
            pass_charged(runtime, bytes, || {
                // SAFETY: as in `cuMemAlloc_v2`.
                unsafe {
                    let status = real(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
                    (status, made(status, dptr))
                }
            })
        }
        (Some(runtime), Some((pitch, bytes)))
            if bytes > 0
                && !dptr.is_null()
                && !pPitch.is_null()
                && matches!(ElementSizeBytes, 4 | 8 | 16) =>
        {
            let made = runtime.allocate(bytes, 0);
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
        Some(runtime) if !dptr.is_null() => pass_charged(runtime, bytes, || {
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

/// Destroys something that is on record by a key, and uncharges it. Off the record first: another thread
/// may get the same key for something new as soon as the driver is done.
pub(super) fn destroy_other(
    runtime: &Runtime,
    key: u64,
    destroy: impl FnOnce() -> Status,
) -> Status {
    let _changing = runtime.changing();
    let (other, external) = {
        let mut handles = lock(&runtime.handles);
        (handles.take_other(key), handles.external_destroying(key))
    };
    let status = destroy();
    if let Some(id) = external {
        let ended = lock(&runtime.handles).external_destroyed(key, id, status.is_success());
        runtime.external_ended(ended);
    }
    let Some((other, context)) = other else {
        return status;
    };
    if !status.is_success() {
        lock(&runtime.handles).add_other(key, other, context);
        return status;
    }
    runtime.other_gone(other);
    status
}

pub unsafe fn cuMemFree_v2(real: sig::cuMemFree_v2, dptr: u64) -> Status {
    let Some(runtime) = limited() else {
        // SAFETY: the application's own call.
        return unsafe { real(dptr) };
    };
    let mut context = std::ptr::null_mut();
    // SAFETY: the driver fills one handle.
    let current = unsafe { call::cuCtxGetCurrent(&raw mut context) };
    if current.is_success() && context.is_null() {
        // The driver frees nothing then, whatever is ours.
        return Status::INVALID_CONTEXT;
    }
    if let Some(status) = runtime.free(dptr) {
        return status;
    }
    let on_host = lock(&runtime.managed).take(dptr);
    // SAFETY: the application's own call.
    let status = destroy_other(runtime, dptr, || unsafe { real(dptr) });
    if let (false, Some(on_host)) = (status.is_success(), on_host) {
        lock(&runtime.managed).put_back(dptr, on_host);
    }
    status
}

pub unsafe fn cuMemFree(real: sig::cuMemFree, dptr: u32) -> Status {
    let Some(runtime) = limited() else {
        // SAFETY: the application's own call.
        return unsafe { real(dptr) };
    };
    // Off the record first: another thread may get the same address as soon as the driver is done.
    let taken = lock(&runtime.heap).take_drivers(u64::from(dptr));
    let held = taken.map_or_else(Vec::new, |alloc| runtime.unhold(alloc.ptr));
    // SAFETY: the application's own call.
    let status = unsafe { real(dptr) };
    match taken {
        Some(alloc) if status.is_success() => runtime.drivers_freed(&alloc),
        Some(alloc) => {
            lock(&runtime.heap).put_back(alloc);
            runtime.hold_again(alloc.ptr, held);
        }
        None => {}
    }
    status
}
