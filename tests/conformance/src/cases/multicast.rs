//! Multicast objects: who may be in a team, what may be bound, and what a binding keeps.

use std::time::Duration;

use super::peer;
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("multicast":
    a_team_is_complete_before_memory_is_bound,
    a_binding_keeps_its_memory,
    bindings_are_of_members_and_apart,
    mapped_memory_is_bound_by_its_address,
    one_device_has_no_team,
);

const SIZE: usize = 64 * MIB;

fn prop() -> MulticastProp {
    MulticastProp { devices: 2, bytes: SIZE, handle_types: 1, flags: 0 }
}

/// Two devices that can be a team, the first one current.
fn start() -> Result<Gpu, Stop> {
    let _contexts = peer::reaching()?;
    for device in [0, 1] {
        let mut supported = 0;
        if !cuDeviceGetAttribute(&mut supported, 132, device).is_ok() || supported == 0 {
            skip!("device {device} has no multicast");
        }
    }
    Gpu::start()
}

fn team() -> Result<MemHandle, Stop> {
    let (mut recommended, mut object) = (0, 0);
    ok!(cuMulticastGetGranularity(&mut recommended, &prop(), 1));
    check!(recommended >= 2 * MIB && SIZE.is_multiple_of(recommended), "the granularity is {recommended}");
    ok!(cuMulticastCreate(&mut object, &prop()));
    ok!(cuMulticastAddDevice(object, 0));
    ok!(cuMulticastAddDevice(object, 1));
    Ok(object)
}

fn memory(device: i32) -> Result<MemHandle, Stop> {
    let (mut handle, location) = (0, Location { kind: 1, id: device });
    let prop = AllocationProp { kind: 1, location, handle_types: 1, ..Default::default() };
    ok!(cuMemCreate(&mut handle, SIZE, &prop, 0));
    Ok(handle)
}

/// Nothing is bound before every device was added; one device is added once.
/// Source: NVIDIA CUDA Driver API, Multicast Object Management, cuMulticastAddDevice, cuMulticastBindMem.
fn a_team_is_complete_before_memory_is_bound() -> Outcome {
    let _gpu = start()?;
    let (mut object, handle) = (0, memory(0)?);
    ok!(cuMulticastCreate(&mut object, &prop()));
    ok!(cuMulticastAddDevice(object, 0));
    fails!(cuMulticastBindMem(object, 0, handle, 0, SIZE, 0));
    fails!(cuMulticastAddDevice(object, 99));
    ok!(cuMulticastAddDevice(object, 1));
    ok!(cuMulticastBindMem(object, 0, handle, 0, SIZE, 0));
    ok!(cuMulticastUnbind(object, 0, 0, SIZE));
    ok!(cuMemRelease(object));
    ok!(cuMemRelease(handle));
    Ok(())
}

/// Bound memory stays until it is unbound, or the object goes, though its handle was released.
/// Source: NVIDIA CUDA Driver API, Multicast Object Management, cuMulticastBindMem.
fn a_binding_keeps_its_memory() -> Outcome {
    let _gpu = start()?;
    let object = team()?;
    ok!(cuMemRelease(memory(0)?));
    let before = quiet()?;
    let limit = Duration::from_secs(3);
    for unbind in [true, false] {
        let handle = memory(0)?;
        ok!(cuMulticastBindMem(object, 0, handle, 0, SIZE, 0));
        ok!(cuMemRelease(handle));
        std::thread::sleep(Duration::from_millis(50));
        check!(free_bytes()? + SIZE <= before + 4 * MIB, "bound memory is gone");
        if unbind {
            ok!(cuMulticastUnbind(object, 0, 0, SIZE));
        } else {
            ok!(cuMemRelease(object));
        }
        let free = wait_free(before - 4 * MIB, limit)?;
        check!(free + 4 * MIB >= before, "unbind {unbind}: free was {before}, is {free}");
    }
    Ok(())
}

/// A place of the object is bound once by each member; ranges lie inside.
/// Source: NVIDIA CUDA Driver API, Multicast Object Management, cuMulticastBindMem (returned codes).
fn bindings_are_of_members_and_apart() -> Outcome {
    let _gpu = start()?;
    let object = team()?;
    let (first, second, other) = (memory(0)?, memory(1)?, memory(0)?);
    ok!(cuMulticastBindMem(object, 0, first, 0, SIZE, 0));
    ok!(cuMulticastBindMem(object, 0, second, 0, SIZE, 0));
    fails!(cuMulticastBindMem(object, 0, other, 0, SIZE, 0));
    ok!(cuMulticastUnbind(object, 0, 0, SIZE));
    fails!(cuMulticastBindMem(object, 0, other, 0, 2 * SIZE, 0));
    fails!(cuMulticastBindMem(object, 4096, other, 0, 2 * MIB, 0));
    fails!(cuMulticastBindMem(object, 0, other, 0, SIZE, 1));
    ok!(cuMulticastBindMem(object, 0, other, 0, SIZE, 0));
    fails!(cuMulticastBindMem(first, 0, other, 0, SIZE, 0));
    Ok(())
}

/// Memory that is mapped is bound by its address, and stays when it is unmapped.
/// Source: NVIDIA CUDA Driver API, Multicast Object Management, cuMulticastBindAddr.
fn mapped_memory_is_bound_by_its_address() -> Outcome {
    let gpu = start()?;
    let object = team()?;
    let (handle, mut address) = (memory(0)?, 0);
    ok!(cuMemAddressReserve(&mut address, SIZE, 0, 0, 0));
    ok!(cuMemMap(address, SIZE, 0, handle, 0));
    ok!(cuMemSetAccess(address, SIZE, &gpu.read_write(), 1));
    ok!(cuMulticastBindAddr(object, 0, address, SIZE, 0));
    let during = quiet()?;
    ok!(cuMemUnmap(address, SIZE));
    ok!(cuMemRelease(handle));
    std::thread::sleep(Duration::from_millis(50));
    check!(free_bytes()? <= during + 4 * MIB, "bound memory is gone");
    ok!(cuMulticastUnbind(object, 0, 0, SIZE));
    let wanted = during + SIZE - 4 * MIB;
    check!(wait_free(wanted, Duration::from_secs(3))? >= wanted, "unbound memory is still held");
    let classic = alloc(SIZE)?;
    observe!("binding cuMemAlloc memory: {:?}", cuMulticastBindAddr(object, 0, classic, SIZE, 0));
    Ok(())
}

/// Where a device says that it has no multicast, there are no objects.
/// Source: NVIDIA CUDA Driver API, Multicast Object Management, cuMulticastCreate (CUDA_ERROR_NOT_SUPPORTED).
fn one_device_has_no_team() -> Outcome {
    let gpu = Gpu::start()?;
    let mut supported = 0;
    if cuDeviceGetAttribute(&mut supported, 132, gpu.device).is_ok() && supported != 0 {
        skip!("the device has multicast");
    }
    let mut object = 0;
    fails!(cuMulticastCreate(&mut object, &prop()));
    Ok(())
}
