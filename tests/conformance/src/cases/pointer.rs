//! What the driver tells of a pointer.

use std::ffi::c_void;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("pointer":
    device_memory_is_described,
    buffer_ids_are_unique,
    pinned_host_memory_is_described,
    plain_memory_is_unknown_to_the_single_query,
    plain_memory_is_null_to_the_plural_query,
    plural_query_describes_device_memory,
    sync_memops_can_be_set,
    mapped_memory_is_described,
);

const CONTEXT: i32 = 1;
const MEMORY_TYPE: i32 = 2;
const DEVICE_POINTER: i32 = 3;
const HOST_POINTER: i32 = 4;
const SYNC_MEMOPS: i32 = 6;
const BUFFER_ID: i32 = 7;
const IS_MANAGED: i32 = 8;
const DEVICE_ORDINAL: i32 = 9;
const LEGACY_IPC_CAPABLE: i32 = 10;
const RANGE_START: i32 = 11;
const RANGE_SIZE: i32 = 12;
const MAPPED: i32 = 13;

fn query(attribute: i32, address: Dptr) -> Result<u64, Code> {
    // Wide enough for every attribute asked here, and zero where the driver writes fewer bytes.
    let mut value = 0_u64;
    match cuPointerGetAttribute((&raw mut value).cast(), attribute, address) {
        Code::SUCCESS => Ok(value),
        code => Err(code),
    }
}

/// Address, type, context, device and range of cuMemAlloc memory, for any address inside.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuPointerGetAttribute.
fn device_memory_is_described() -> Outcome {
    let gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    for inside in [0, 1, 4 * MIB as u64 - 1] {
        let at = address + inside;
        check!(query(CONTEXT, at) == Ok(gpu.context as u64), "CONTEXT {:?}", query(CONTEXT, at));
        check!(query(MEMORY_TYPE, at) == Ok(2), "MEMORY_TYPE {:?}", query(MEMORY_TYPE, at));
        check!(query(DEVICE_POINTER, at) == Ok(at), "DEVICE_POINTER {:x?}", query(DEVICE_POINTER, at));
        check!(query(IS_MANAGED, at) == Ok(0), "IS_MANAGED {:?}", query(IS_MANAGED, at));
        check!(query(DEVICE_ORDINAL, at) == Ok(0), "DEVICE_ORDINAL {:?}", query(DEVICE_ORDINAL, at));
        check!(query(RANGE_START, at) == Ok(address), "RANGE_START_ADDR {:x?}", query(RANGE_START, at));
        check!(query(RANGE_SIZE, at) == Ok(4 * MIB as u64), "RANGE_SIZE {:?}", query(RANGE_SIZE, at));
        check!(query(MAPPED, at) == Ok(1), "MAPPED {:?}", query(MAPPED, at));
        check!(query(HOST_POINTER, at).is_err(), "device memory has a host pointer");
    }
    observe!("cuMemAlloc memory is legacy-IPC capable: {:?}", query(LEGACY_IPC_CAPABLE, address));
    Ok(())
}

/// A buffer's id is never used again in a process, even when its address is.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, CU_POINTER_ATTRIBUTE_BUFFER_ID.
fn buffer_ids_are_unique() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut ids = Vec::new();
    for _ in 0..10 {
        let address = alloc(4 * MIB)?;
        let id = query(BUFFER_ID, address);
        check!(id.is_ok() && id == query(BUFFER_ID, address + 100), "ids {id:?} and {:?}", query(BUFFER_ID, address + 100));
        check!(!ids.contains(&id), "id {id:?} came twice");
        ids.push(id);
        ok!(cuMemFree_v2(address));
    }
    Ok(())
}

/// Page-locked host memory has a host pointer, a device pointer of the same value, and type host.
/// Source: NVIDIA CUDA Driver API, Unified Addressing.
fn pinned_host_memory_is_described() -> Outcome {
    let gpu = Gpu::start()?;
    let pinned = Pinned::new(MIB)?;
    let at = pinned.address as u64 + 100;
    check!(query(MEMORY_TYPE, at) == Ok(1), "MEMORY_TYPE {:?}", query(MEMORY_TYPE, at));
    check!(query(HOST_POINTER, at) == Ok(at), "HOST_POINTER {:x?}", query(HOST_POINTER, at));
    check!(query(DEVICE_POINTER, at) == Ok(at), "DEVICE_POINTER {:x?}", query(DEVICE_POINTER, at));
    check!(query(CONTEXT, at) == Ok(gpu.context as u64), "CONTEXT {:?}", query(CONTEXT, at));
    check!(query(RANGE_START, at) == Ok(pinned.address as u64), "RANGE_START_ADDR {:x?}", query(RANGE_START, at));
    Ok(())
}

/// cuPointerGetAttribute on memory that CUDA does not know is INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuPointerGetAttribute.
fn plain_memory_is_unknown_to_the_single_query() -> Outcome {
    let _gpu = Gpu::start()?;
    let pages = Pages::new(MIB)?;
    for attribute in [CONTEXT, MEMORY_TYPE, DEVICE_POINTER, BUFFER_ID] {
        let got = query(attribute, pages.address as u64);
        check!(got == Err(Code::INVALID_VALUE), "attribute {attribute}: {got:?}");
    }
    let freed = alloc(4 * MIB)?;
    ok!(cuMemFree_v2(freed));
    check!(query(MEMORY_TYPE, freed) == Err(Code::INVALID_VALUE), "freed memory: {:?}", query(MEMORY_TYPE, freed));
    Ok(())
}

fn plural(address: Dptr) -> (Code, u64, u32, u64) {
    let (mut context, mut kind, mut device) = (7_u64, 7_u32, 7_u64);
    let mut attributes = [CONTEXT, MEMORY_TYPE, DEVICE_POINTER];
    let mut values: [*mut c_void; 3] =
        [(&raw mut context).cast(), (&raw mut kind).cast(), (&raw mut device).cast()];
    let code = cuPointerGetAttributes(3, attributes.as_mut_ptr(), values.as_mut_ptr(), address);
    (code, context, kind, device)
}

/// cuPointerGetAttributes succeeds on memory that CUDA does not know, and answers null for each.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuPointerGetAttributes.
fn plain_memory_is_null_to_the_plural_query() -> Outcome {
    let _gpu = Gpu::start()?;
    let pages = Pages::new(MIB)?;
    let (code, context, kind, device) = plural(pages.address as u64);
    ok!(code);
    check!(context == 0 && kind == 0, "context {context:#x}, type {kind}");
    observe!("device pointer of plain memory {device:#x}");
    Ok(())
}

/// cuPointerGetAttributes answers as the single query does.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuPointerGetAttributes.
fn plural_query_describes_device_memory() -> Outcome {
    let gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    let (code, context, kind, device) = plural(address + 8);
    ok!(code);
    check!(context == gpu.context as u64, "context {context:#x}");
    check!(kind == 2 && device == address + 8, "type {kind}, device pointer {device:#x}");
    Ok(())
}

/// CU_POINTER_ATTRIBUTE_SYNC_MEMOPS can be set on device memory; what reading it says is reported.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuPointerSetAttribute.
fn sync_memops_can_be_set() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    let on = 1_u32;
    ok!(cuPointerSetAttribute((&raw const on).cast(), SYNC_MEMOPS, address));
    observe!("SYNC_MEMOPS read after it was set: {:?}", query(SYNC_MEMOPS, address));
    Ok(())
}

/// cuMemMap memory is device memory without legacy IPC; its range is the reservation.
/// Source: NVIDIA CUDA Driver API, Unified Addressing (RANGE_START_ADDR) and Virtual Memory Management.
fn mapped_memory_is_described() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut address, mut handle) = (0, 0);
    ok!(cuMemAddressReserve(&mut address, 8 * MIB, 0, 0, 0));
    ok!(cuMemCreate(&mut handle, 4 * MIB, &gpu.prop(), 0));
    ok!(cuMemMap(address + 4 * MIB as u64, 4 * MIB, 0, handle, 0));
    ok!(cuMemSetAccess(address + 4 * MIB as u64, 4 * MIB, &gpu.read_write(), 1));
    let at = address + 5 * MIB as u64;
    check!(query(MEMORY_TYPE, at) == Ok(2), "MEMORY_TYPE {:?}", query(MEMORY_TYPE, at));
    check!(query(DEVICE_POINTER, at) == Ok(at), "DEVICE_POINTER {:x?}", query(DEVICE_POINTER, at));
    check!(query(DEVICE_ORDINAL, at) == Ok(0), "DEVICE_ORDINAL {:?}", query(DEVICE_ORDINAL, at));
    check!(query(LEGACY_IPC_CAPABLE, at) == Ok(0), "LEGACY_IPC_CAPABLE {:?}", query(LEGACY_IPC_CAPABLE, at));
    check!(query(RANGE_START, at) == Ok(address), "RANGE_START_ADDR {:x?}, reserved {address:x}", query(RANGE_START, at));
    check!(query(RANGE_SIZE, at) == Ok(8 * MIB as u64), "RANGE_SIZE {:?}", query(RANGE_SIZE, at));
    observe!("context of mapped memory {:x?}", query(CONTEXT, at));
    observe!("MAPPED of reserved but unmapped memory {:?}", query(MAPPED, address));
    Ok(())
}
