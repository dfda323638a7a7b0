//! cuMemCreate on the host: memory that takes nothing of the device, and that both can reach.

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("vmm_host":
    host_memory_takes_no_device_memory,
    the_cpu_reaches_it_with_access,
    host_places_are_told_apart,
    device_memory_needs_no_context,
    handles_of_a_fabric_need_one,
);

const SIZE: usize = 64 * MIB;

/// The NUMA node that the device says is its own.
fn node(gpu: &Gpu) -> Result<AllocationProp, Stop> {
    gpu.needs(141, "host memory for cuMemCreate (or the driver does not know)")?;
    let id = gpu.attribute(134)?;
    check!(id >= 0, "the device's NUMA node is {id}");
    Ok(AllocationProp { location: Location { kind: 3, id }, ..gpu.prop() })
}

/// Attribute 141 is of 12.8; earlier drivers refuse to be asked.
fn start() -> Result<(Gpu, AllocationProp), Stop> {
    let gpu = Gpu::start()?;
    let mut value = 0;
    if !cuDeviceGetAttribute(&mut value, 141, gpu.device).is_ok() {
        skip!("the driver does not say whether it has host memory for cuMemCreate");
    }
    let prop = node(&gpu)?;
    Ok((gpu, prop))
}

fn mapped(gpu: &Gpu, prop: &AllocationProp) -> Result<(Dptr, MemHandle), Stop> {
    let (mut handle, mut address) = (0, 0);
    ok!(cuMemCreate(&mut handle, SIZE, prop, 0));
    ok!(cuMemAddressReserve(&mut address, SIZE, 0, 0, 0));
    ok!(cuMemMap(address, SIZE, 0, handle, 0));
    ok!(cuMemSetAccess(address, SIZE, &gpu.read_write(), 1));
    Ok((address, handle))
}

/// Kernels and copies use it; the device has as much free as before.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemCreate (HOST_NUMA).
fn host_memory_takes_no_device_memory() -> Outcome {
    let (gpu, prop) = start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let before = quiet()?;
    let (address, handle) = mapped(&gpu, &prop)?;
    ok!(kernels.fill(0, address, (SIZE / 4) as u64, 0x4141_4141));
    ok!(cuCtxSynchronize());
    check!(read(address, SIZE)?.iter().all(|b| *b == 0x41), "contents differ");
    let free = free_bytes()?;
    check!(free + 8 * MIB >= before, "free was {before}, is {free}");
    let mut told = AllocationProp::default();
    ok!(cuMemGetAllocationPropertiesFromHandle(&mut told, handle));
    check!(told.location == prop.location, "{told:?}");
    let mut kind = 0_u32;
    ok!(cuPointerGetAttribute((&raw mut kind).cast(), 2, address));
    observe!("its pointer is of memory type {kind}");
    ok!(cuMemUnmap(address, SIZE));
    ok!(cuMemRelease(handle));
    ok!(cuMemAddressFree(address, SIZE));
    Ok(())
}

/// With access for the host's location the CPU uses the address, and sees what kernels wrote.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemSetAccess.
fn the_cpu_reaches_it_with_access() -> Outcome {
    let (gpu, prop) = start()?;
    let kernels = Kernels::load()?;
    let (address, handle) = mapped(&gpu, &prop)?;
    let cpu = AccessDesc { location: prop.location, flags: 3 };
    ok!(cuMemSetAccess(address, SIZE, &cpu, 1));
    ok!(kernels.fill(0, address, (SIZE / 4) as u64, 0x4242_4242));
    ok!(cuCtxSynchronize());
    // SAFETY: mapped with access for the CPU; nothing of the device runs.
    let bytes = unsafe { std::slice::from_raw_parts_mut(address as *mut u8, SIZE) };
    check!(bytes.iter().all(|b| *b == 0x42), "the CPU sees other bytes");
    bytes[..4].fill(0x43);
    check!(read_u32(address)? == 0x4343_4343, "the device sees other bytes");
    ok!(cuMemUnmap(address, SIZE));
    ok!(cuMemRelease(handle));
    ok!(cuMemAddressFree(address, SIZE));
    // Memory of a device is not for the CPU, unless the two are one.
    if gpu.attribute(100)? == 0 {
        let (device, _handle) = mapped(&gpu, &gpu.prop())?;
        fails!(cuMemSetAccess(device, SIZE, &cpu, 1));
    }
    Ok(())
}

/// Other ways to name the host; what drivers make of them differs.
/// Source: NVIDIA CUDA Driver API, CUmemLocationType (HOST, HOST_NUMA_CURRENT); reported, not judged.
fn host_places_are_told_apart() -> Outcome {
    let (gpu, _) = start()?;
    let before = quiet()?;
    for kind in [2, 4] {
        let (mut handle, mut told) = (0, AllocationProp::default());
        let prop = AllocationProp { location: Location { kind, id: 0 }, ..gpu.prop() };
        let code = cuMemCreate(&mut handle, SIZE, &prop, 0);
        observe!("cuMemCreate at a location of kind {kind}: {code:?}");
        if code.is_ok() {
            ok!(cuMemGetAllocationPropertiesFromHandle(&mut told, handle));
            observe!("its location is then of kind {}", told.location.kind);
            check!(free_bytes()? + 8 * MIB >= before, "it takes device memory");
            ok!(cuMemRelease(handle));
        }
    }
    let mut handle = 0;
    let nowhere = AllocationProp { location: Location { kind: 3, id: 9999 }, ..gpu.prop() };
    fails!(cuMemCreate(&mut handle, SIZE, &nowhere, 0));
    Ok(())
}

/// Creating, mapping and giving access need no current context.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management (no function of it takes a context).
fn device_memory_needs_no_context() -> Outcome {
    let (mut device, mut current) = (0, 1);
    ok!(cuInit(0));
    ok!(cuDeviceGet(&mut device, 0));
    ok!(cuCtxGetCurrent(&mut current));
    check!(current == 0, "a context is current from the start");
    let gpu = Gpu { device, context: 0 };
    let (address, handle) = mapped(&gpu, &gpu.prop())?;
    let gpu = Gpu::start()?;
    ok!(cuMemsetD8_v2(address, 5, SIZE));
    ok!(cuCtxSynchronize());
    let before = free_bytes()?;
    ok!(cuCtxSetCurrent(0));
    ok!(cuMemUnmap(address, SIZE));
    ok!(cuMemRelease(handle));
    ok!(cuMemAddressFree(address, SIZE));
    ok!(cuCtxSetCurrent(gpu.context));
    let wanted = before + SIZE - 4 * MIB;
    let free = wait_free(wanted, std::time::Duration::from_secs(2))?;
    check!(free >= wanted, "free was {before}, is {free}");
    Ok(())
}

/// Memory for a fabric is refused where the device has none.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemCreate (CU_MEM_HANDLE_TYPE_FABRIC).
fn handles_of_a_fabric_need_one() -> Outcome {
    let gpu = Gpu::start()?;
    let mut supported = 0;
    if cuDeviceGetAttribute(&mut supported, 128, gpu.device).is_ok() && supported != 0 {
        skip!("the device may be on a fabric");
    }
    let mut handle = 0;
    fails!(cuMemCreate(&mut handle, 2 * MIB, &AllocationProp { handle_types: 8, ..gpu.prop() }, 0));
    Ok(())
}
