//! Arrays: memory with a shape, here linear underneath. Textures and surfaces on them are not
//! simulated.

use crate::abi::{In, Out, exports};
use crate::layout::{Array3dDescriptor, ArrayDescriptor};
use crate::memory::allocate;
use crate::submit::here;
use spillway_simulator_core::classic;
use spillway_simulator_core::code::{INVALID_HANDLE, INVALID_VALUE, R};
use spillway_simulator_core::driver::{self, Registry};
use spillway_simulator_core::space::fresh_id;
use std::sync::{Arc, LazyLock};

struct Array {
    address: u64,
    pitch: u64,
    shape: Array3dDescriptor,
}

static ARRAYS: LazyLock<Registry<Array>> = LazyLock::new(Registry::default);

/// Address, row and slice pitch of an array.
///
/// # Errors
/// `INVALID_HANDLE`.
pub fn storage(handle: u64) -> R<(u64, u64, u64)> {
    let array = ARRAYS.get(handle).ok_or(INVALID_HANDLE)?;
    Ok((
        array.address,
        array.pitch,
        array.pitch * array.shape.height.max(1) as u64,
    ))
}

fn element_bytes(format: u32, channels: u32) -> R<u64> {
    let one = match format {
        0x01 | 0x08 => 1,
        0x02 | 0x09 | 0x10 => 2,
        0x03 | 0x0a | 0x20 => 4,
        _ => return Err(INVALID_VALUE),
    };
    if matches!(channels, 1 | 2 | 4) {
        Ok(one * u64::from(channels))
    } else {
        Err(INVALID_VALUE)
    }
}

fn create(out: Out<u64>, shape: Array3dDescriptor) -> R {
    out.needed()?;
    here()?;
    if shape.width == 0 || shape.depth != 0 && shape.height == 0 {
        return Err(INVALID_VALUE);
    }
    let pitch = shape.width as u64 * element_bytes(shape.format, shape.channels)?;
    let bytes = pitch
        .checked_mul(shape.height.max(1) as u64)
        .and_then(|b| b.checked_mul(shape.depth.max(1) as u64))
        .ok_or(INVALID_VALUE)?;
    let address = allocate(bytes)?;
    let handle = fresh_id();
    ARRAYS.insert(
        handle,
        Arc::new(Array {
            address,
            pitch,
            shape,
        }),
    );
    out.set(handle)
}

exports! {
    fn cuArrayCreate_v2(out: Out<u64>, descriptor: In<ArrayDescriptor>) {
        let d = descriptor.get()?;
        create(out, Array3dDescriptor { width: d.width, height: d.height, depth: 0, format: d.format, channels: d.channels, flags: 0 })
    }

    fn cuArray3DCreate_v2(out: Out<u64>, descriptor: In<Array3dDescriptor>) {
        create(out, descriptor.get()?)
    }

    fn cuArrayGetDescriptor_v2(out: Out<ArrayDescriptor>, handle: u64) {
        let shape = ARRAYS.get(handle).ok_or(INVALID_HANDLE)?.shape;
        out.set(ArrayDescriptor { width: shape.width, height: shape.height, format: shape.format, channels: shape.channels })
    }

    fn cuArray3DGetDescriptor_v2(out: Out<Array3dDescriptor>, handle: u64) {
        out.set(ARRAYS.get(handle).ok_or(INVALID_HANDLE)?.shape)
    }

    fn cuArrayDestroy(handle: u64) {
        let driver = driver::get()?;
        let array = ARRAYS.remove(handle).ok_or(INVALID_HANDLE)?;
        classic::free_and_wait(driver, array.address)
    }
}
