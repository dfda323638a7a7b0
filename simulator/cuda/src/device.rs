//! Devices and their primary contexts.

use crate::abi::{In, Out, exports, put_bytes, text};
use crate::attributes;
use spillway_simulator_core::code::{
    INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NOT_SUPPORTED, PRIMARY_CONTEXT_ACTIVE, R,
};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::identity;
use spillway_simulator_core::sync::lock;
use std::ffi::c_char;
use std::sync::atomic::Ordering;

/// A device ordinal that exists.
///
/// # Errors
/// `NOT_INITIALIZED`, `INVALID_DEVICE`.
pub fn device(ordinal: i32) -> R<(&'static Driver, u32)> {
    let driver = driver::get()?;
    let gpus = driver.shared.config().gpus;
    u32::try_from(ordinal)
        .ok()
        .filter(|gpu| *gpu < gpus)
        .map(|gpu| (driver, gpu))
        .ok_or(INVALID_DEVICE)
}

fn string(to: Out<c_char>, capacity: i32, value: &str) -> R {
    to.needed()?;
    let capacity = usize::try_from(capacity)
        .ok()
        .filter(|c| *c > 0)
        .ok_or(INVALID_VALUE)?;
    let mut bytes = value.as_bytes()[..value.len().min(capacity - 1)].to_vec();
    bytes.push(0);
    put_bytes(to.raw(), &bytes);
    Ok(())
}

/// Flags of a context: scheduling in the low bits, MAP_HOST, LMEM_RESIZE_TO_MAX, coredump and sync bits.
pub const CONTEXT_FLAGS: u32 = 0xff;

/// Whether these are possible flags of a context.
pub fn flags_valid(flags: u32) -> bool {
    flags & !CONTEXT_FLAGS == 0 && matches!(flags & 7, 0 | 1 | 2 | 4)
}

fn reset(ordinal: i32) -> R {
    let (driver, gpu) = device(ordinal)?;
    lock(&driver.primaries[gpu as usize]).deactivate(driver);
    Ok(())
}

fn release(ordinal: i32) -> R {
    let (driver, gpu) = device(ordinal)?;
    let mut primary = lock(&driver.primaries[gpu as usize]);
    if primary.references == 0 {
        return Err(INVALID_CONTEXT);
    }
    primary.release(driver);
    Ok(())
}

fn set_flags(ordinal: i32, flags: u32, refuse_active: bool) -> R {
    let (driver, gpu) = device(ordinal)?;
    if !flags_valid(flags) {
        return Err(INVALID_VALUE);
    }
    let mut primary = lock(&driver.primaries[gpu as usize]);
    if refuse_active && primary.context.is_some() {
        return Err(PRIMARY_CONTEXT_ACTIVE);
    }
    primary.flags = flags;
    if let Some(context) = &primary.context {
        context.flags.store(flags, Ordering::Relaxed);
    }
    Ok(())
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct DeviceProperties {
    numbers: [i32; 14],
}

exports! {
    fn cuDeviceGet(device_out: Out<i32>, ordinal: i32) {
        device_out.needed()?;
        device(ordinal)?;
        device_out.set(ordinal)
    }

    fn cuDeviceGetCount(count: Out<i32>) {
        count.set(driver::get()?.shared.config().gpus as i32)
    }

    fn cuDeviceGetName(name: Out<c_char>, capacity: i32, ordinal: i32) {
        device(ordinal)?;
        string(name, capacity, identity::NAME)
    }

    fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, ordinal: i32) {
        let (driver, gpu) = device(ordinal)?;
        uuid.set(identity::uuid(driver.shared, gpu))
    }

    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, ordinal: i32) {
        let (driver, gpu) = device(ordinal)?;
        uuid.set(identity::uuid(driver.shared, gpu))
    }

    fn cuDeviceGetLuid(luid: Out<c_char>, mask: Out<u32>, ordinal: i32) {
        let _ = (luid, mask);
        device(ordinal)?;
        Err(NOT_SUPPORTED)
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, ordinal: i32) {
        let (driver, _) = device(ordinal)?;
        bytes.set(driver.shared.config().memory as usize)
    }

    fn cuDeviceGetAttribute(value: Out<i32>, attribute: i32, ordinal: i32) {
        value.needed()?;
        let (driver, gpu) = device(ordinal)?;
        value.set(attributes::of(attribute, driver.shared, gpu).ok_or(INVALID_VALUE)?)
    }

    fn cuDeviceComputeCapability(major: Out<i32>, minor: Out<i32>, ordinal: i32) {
        device(ordinal)?;
        major.set(attributes::CAPABILITY.0)?;
        minor.set(attributes::CAPABILITY.1)
    }

    fn cuDeviceGetProperties(properties: Out<DeviceProperties>, ordinal: i32) {
        let (driver, gpu) = device(ordinal)?;
        let mut numbers = [0; 14];
        // Threads per block, block and grid dimensions, shared memory ... as attributes 1 to 14.
        for (number, attribute) in numbers.iter_mut().zip(1..) {
            *number = attributes::of(attribute, driver.shared, gpu).unwrap_or(0);
        }
        properties.set(DeviceProperties { numbers })
    }

    fn cuDeviceGetPCIBusId(name: Out<c_char>, capacity: i32, ordinal: i32) {
        let (driver, gpu) = device(ordinal)?;
        string(name, capacity, &identity::bus_id(driver.shared, gpu))
    }

    fn cuDeviceGetByPCIBusId(device_out: Out<i32>, name: In<c_char>) {
        let driver = driver::get()?;
        let name = text(name)?;
        let gpu = (0..driver.shared.config().gpus).find(|gpu| identity::is_bus_id(driver.shared, *gpu, &name));
        device_out.set(gpu.ok_or(INVALID_DEVICE)? as i32)
    }

    fn cuDeviceCanAccessPeer(can: Out<i32>, from: i32, to: i32) {
        device(from)?;
        device(to)?;
        can.set(i32::from(from != to))
    }

    fn cuDeviceGetP2PAttribute(value: Out<i32>, attribute: i32, from: i32, to: i32) {
        device(from)?;
        device(to)?;
        if from == to {
            return Err(INVALID_DEVICE);
        }
        value.set(match attribute {
            1 => 0,
            2 => 1,
            3 | 4 => 0,
            _ => return Err(INVALID_VALUE),
        })
    }

    fn cuDeviceGetExecAffinitySupport(supported: Out<i32>, kind: i32, ordinal: i32) {
        let _ = kind;
        device(ordinal)?;
        supported.set(0)
    }

    fn cuDevicePrimaryCtxRetain(context: Out<u64>, ordinal: i32) {
        context.needed()?;
        let (driver, gpu) = device(ordinal)?;
        let mut primary = lock(&driver.primaries[gpu as usize]);
        let active = primary.activate(driver, gpu)?;
        primary.references += 1;
        context.set(active.id)
    }

    fn cuDevicePrimaryCtxRelease(ordinal: i32) {
        release(ordinal)
    }

    fn cuDevicePrimaryCtxRelease_v2(ordinal: i32) {
        release(ordinal)
    }

    fn cuDevicePrimaryCtxReset(ordinal: i32) {
        reset(ordinal)
    }

    fn cuDevicePrimaryCtxReset_v2(ordinal: i32) {
        reset(ordinal)
    }

    fn cuDevicePrimaryCtxSetFlags(ordinal: i32, flags: u32) {
        set_flags(ordinal, flags, true)
    }

    fn cuDevicePrimaryCtxSetFlags_v2(ordinal: i32, flags: u32) {
        set_flags(ordinal, flags, false)
    }

    fn cuDevicePrimaryCtxGetState(ordinal: i32, flags: Out<u32>, active: Out<i32>) {
        let (driver, gpu) = device(ordinal)?;
        let primary = lock(&driver.primaries[gpu as usize]);
        flags.set(primary.flags)?;
        active.set(i32::from(primary.context.is_some()))
    }

    fn cuFlushGPUDirectRDMAWrites(target: i32, scope: i32) {
        let _ = (target, scope);
        driver::get().map(|_| ())
    }

    fn cuDeviceGetTexture1DLinearMaxWidth(width: Out<usize>, format: i32, channels: u32, ordinal: i32) {
        let _ = (format, channels);
        device(ordinal)?;
        width.set(1 << 28)
    }
}
