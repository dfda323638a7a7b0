//! Device memory that the driver keeps to itself: managed memory, arrays, mipmapped arrays. Charged as
//! pinned.

use core::ffi::c_void;

use crate::driver::Status;
use crate::lock;
use crate::table::sig;

use super::limited;
use super::memory::{made, uncharge_other};

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
