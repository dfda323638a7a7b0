//! Arrays and mipmapped arrays: device memory whose layout the driver keeps to itself. Charged as pinned,
//! by what its texels take; what the layout takes beyond that is measured as overhead.

use core::ffi::c_void;

use crate::driver::Status;
use crate::handles::{Kind, Other};
use crate::lock;
use crate::table::sig;

use super::limited;
use super::memory::{destroy_other, made};

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
            lock(&runtime.handles).add_other(
                key,
                Other {
                    charge: (device, bytes),
                    kind: Kind::Held,
                },
                context,
            );
            Status::SUCCESS
        }
        Err(why) => why,
    }
}

/// Half bytes of one texel, over all its channels, by `CUarray_format`. Source: cuda.h. Formats of later
/// versions count as four bytes for each channel.
fn texel_half_bytes(format: u32, channels: u32) -> u64 {
    let each = |bytes: u64| 2 * bytes * u64::from(channels.max(1));
    match format {
        // INT8, INT16, HALF, INT32, FLOAT.
        0x01 | 0x08 => each(1),
        0x02 | 0x09 | 0x10 => each(2),
        0x03 | 0x0a | 0x20 => each(4),
        // BC1 and BC4: blocks of 4 x 4 texels in 8 bytes; the other BC formats in 16.
        0x91 | 0x92 | 0x97 | 0x98 => 1,
        0x93..=0x96 | 0x99..=0x9e => 2,
        // NV12; P010 and P016; NV16 and YUY2.
        0xb0 => 3,
        0x9f | 0xa1 => 6,
        0xa2 | 0xa5 => 4,
        // P210, P216, Y210, Y216, AYUV, Y410; Y416.
        0xa3 | 0xa4 | 0xa6..=0xa9 => 8,
        0xb1 => 16,
        // Three planes, or two, of 8 and of 16 bits.
        0xb2 | 0xb4 => 6,
        0xb3 | 0xb5 => 12,
        // UNORM and SNORM, 8 and 16 bits: the number of channels is in the name.
        0xc0 | 0xc6 => 2,
        0xc1 | 0xc3 | 0xc7 | 0xc9 => 4,
        0xc2 | 0xc4 | 0xc8 | 0xca => 8,
        0xc5 | 0xcb => 16,
        // Ten bits three times, and two.
        0x50 => 8,
        _ => each(4),
    }
}

/// `CUDA_ARRAY3D_SPARSE` and `CUDA_ARRAY3D_DEFERRED_MAPPING`: memory is mapped into it by hand.
const MAPPED_BY_HAND: u32 = 0x40 | 0x80;

fn array_bytes(width: u64, height: u64, depth: u64, format: u32, channels: u32) -> u64 {
    let texels = width
        .max(1)
        .saturating_mul(height.max(1))
        .saturating_mul(depth.max(1));
    texels
        .saturating_mul(texel_half_bytes(format, channels))
        .div_ceil(2)
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
    flags: u32,
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
            let (mut depth, mut flags) = (1, 0);
            $(
                depth = array.$depth as u64;
                flags = array.flags;
            )?
            if flags & MAPPED_BY_HAND != 0 {
                // SAFETY: the application's own call.
                return unsafe { real(pHandle, pAllocateArray) };
            }
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

/// All levels: each has half the edges of the one before. Layers (flag 1) stay as many.
fn mipmapped_bytes(array: &Array3D<usize>, levels: u32) -> u64 {
    /// `CUDA_ARRAY3D_LAYERED`, `CUDA_ARRAY3D_CUBEMAP`
    const LAYERS: u32 = 1 | 4;
    let half = |edge: usize, level: u32| (edge as u64).checked_shr(level).unwrap_or(0).max(1);
    (0..levels.clamp(1, 32))
        .map(|level| {
            let depth = if array.flags & LAYERS != 0 {
                array.depth as u64
            } else {
                half(array.depth, level)
            };
            let (width, height) = (half(array.width, level), half(array.height, level));
            array_bytes(width, height, depth, array.format, array.channels)
        })
        .fold(0, u64::saturating_add)
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
    if array.flags & MAPPED_BY_HAND != 0 {
        // SAFETY: the application's own call.
        return unsafe { real(pHandle, pMipmappedArrayDesc, numMipmapLevels) };
    }
    let bytes = mipmapped_bytes(&array, numMipmapLevels);
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
    let destroy = || unsafe { real(hArray) };
    match limited() {
        Some(runtime) => destroy_other(runtime, hArray as u64, destroy),
        None => destroy(),
    }
}

pub unsafe fn cuMipmappedArrayDestroy(
    real: sig::cuMipmappedArrayDestroy,
    hMipmappedArray: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let destroy = || unsafe { real(hMipmappedArray) };
    match limited() {
        Some(runtime) => destroy_other(runtime, hMipmappedArray as u64, destroy),
        None => destroy(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_charged_by_their_texels() {
        assert_eq!(array_bytes(100, 0, 0, 0x20, 4), 1600);
        assert_eq!(array_bytes(4, 4, 0, 0x91, 4), 8, "BC1");
        assert_eq!(array_bytes(4, 4, 0, 0x93, 4), 16, "BC2");
        assert_eq!(
            array_bytes(10, 10, 0, 0xc2, 4),
            400,
            "the format has the channels"
        );
        assert_eq!(array_bytes(10, 10, 0, 0xb0, 3), 150, "NV12");
        assert_eq!(
            array_bytes(usize::MAX as u64, 9, 9, 0x20, 4),
            u64::MAX / 2 + 1
        );
    }

    #[test]
    fn mipmaps_are_charged_level_by_level() {
        let array = |depth, flags| Array3D {
            width: 8usize,
            height: 4,
            depth,
            format: 0x01,
            channels: 1,
            flags,
        };
        assert_eq!(mipmapped_bytes(&array(0, 0), 4), 32 + 8 + 2 + 1);
        assert_eq!(mipmapped_bytes(&array(3, 1), 2), 3 * (32 + 8));
        assert_eq!(mipmapped_bytes(&array(2, 0), 2), 64 + 8);
    }
}
