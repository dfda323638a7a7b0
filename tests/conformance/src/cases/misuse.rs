//! Memory calls with pointers that they should not get, and in contexts where they should not be made.

use super::vmm::mapped;
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;
use crate::helpers::{Helper, hex};

cases!("misuse":
    memory_is_freed_once,
    an_interior_pointer_is_not_freed,
    a_foreign_pointer_is_not_freed,
    each_kind_has_its_own_free,
    a_queued_free_is_the_only_one,
    host_memory_is_freed_once_and_by_its_start,
    without_a_context_there_is_no_memory,
    another_context_may_free,
    a_destroyed_context_takes_its_memory_along,
    freed_memory_is_not_copied,
    an_opened_handle_is_closed_and_not_freed,
    released_handles_are_gone,
);

/// A second cuMemFree of an address is INVALID_VALUE; null is nothing to free.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree (returned codes).
fn memory_is_freed_once() -> Outcome {
    let _gpu = Gpu::start()?;
    for bytes in [1, 4096, MIB, 16 * MIB] {
        // Another one keeps the block that small allocations share.
        let (keep, address) = (alloc(bytes)?, alloc(bytes)?);
        ok!(cuMemFree_v2(address));
        is!(cuMemFree_v2(address), INVALID_VALUE);
        ok!(cuMemFree_v2(keep));
    }
    observe!("cuMemFree of null: {:?}", cuMemFree_v2(0));
    Ok(())
}

/// cuMemFree takes the start of an allocation, nothing inside it; the allocation stays.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree (must have been returned by an allocation call).
fn an_interior_pointer_is_not_freed() -> Outcome {
    let _gpu = Gpu::start()?;
    for bytes in [4096, 8 * MIB] {
        let address = alloc(bytes)?;
        write(address, &pattern(bytes, 1))?;
        for inside in [1, 256, bytes as u64 / 2] {
            is!(cuMemFree_v2(address + inside), INVALID_VALUE);
        }
        check!(read(address, bytes)? == pattern(bytes, 1), "contents differ");
        ok!(cuMemFree_v2(address));
    }
    Ok(())
}

/// Addresses of no allocation are INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree (returned codes).
fn a_foreign_pointer_is_not_freed() -> Outcome {
    let _gpu = Gpu::start()?;
    let pages = Pages::new(4096)?;
    for address in [4096, 0xdead_beef_0000, pages.address as u64, u64::MAX] {
        is!(cuMemFree_v2(address), INVALID_VALUE);
        fails!(cuMemFreeAsync(address, 0));
    }
    let address = alloc(MIB)?;
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// What one call made, another family's does not free.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree; Virtual Memory Management, cuMemUnmap.
fn each_kind_has_its_own_free() -> Outcome {
    let gpu = Gpu::start()?;
    let (mapping, _) = mapped(&gpu, &[2 * MIB])?;
    is!(cuMemFree_v2(mapping), INVALID_VALUE);
    fails!(cuMemFreeAsync(mapping, 0));
    let pinned = Pinned::new(MIB)?;
    fails!(cuMemFree_v2(pinned.address as u64));
    let classic = alloc(2 * MIB)?;
    fails!(cuMemFreeHost(usize::try_from(classic).unwrap_or(0)));
    fails!(cuMemUnmap(classic, 2 * MIB));
    fails!(cuMemAddressFree(classic, 2 * MIB));
    fails!(cuMemHostUnregister(pinned.address));
    ok!(cuMemsetD8_v2(mapping, 1, 2 * MIB));
    ok!(cuMemsetD8_v2(classic, 1, 2 * MIB));
    ok!(cuCtxSynchronize());
    pinned.fill(1);
    ok!(cuMemFree_v2(classic));
    ok!(cuMemUnmap(mapping, 2 * MIB));
    ok!(cuMemFreeHost(pinned.address));
    Ok(())
}

/// Once a free is queued, no other free takes the address, interior ones never.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemFreeAsync (returned codes).
fn a_queued_free_is_the_only_one() -> Outcome {
    let gpu = Gpu::start()?;
    gpu.needs(115, "memory pools")?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (stream, mut address) = (stream(NON_BLOCKING)?, 0);
    ok!(cuMemAllocAsync(&mut address, 8 * MIB, stream));
    ok!(cuStreamSynchronize(stream));
    fails!(cuMemFreeAsync(address + 4096, stream));
    fails!(cuMemFree_v2(address + 4096));
    ok!(kernels.spin(stream, std::time::Duration::from_millis(50)));
    ok!(cuMemFreeAsync(address, stream));
    fails!(cuMemFreeAsync(address, stream));
    fails!(cuMemFree_v2(address));
    ok!(cuStreamSynchronize(stream));
    fails!(cuMemFree_v2(address));
    Ok(())
}

/// cuMemFreeHost takes the start of its allocation, once.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFreeHost (returned codes).
fn host_memory_is_freed_once_and_by_its_start() -> Outcome {
    let _gpu = Gpu::start()?;
    let (pinned, pages) = (Pinned::new(MIB)?, Pages::new(4096)?);
    fails!(cuMemFreeHost(pinned.address + 4096));
    fails!(cuMemFreeHost(pages.address));
    ok!(cuMemFreeHost(pinned.address));
    fails!(cuMemFreeHost(pinned.address));
    Ok(())
}

/// Without a current context memory is neither allocated nor asked about.
/// Source: NVIDIA CUDA Driver API, data types, CUDA_ERROR_INVALID_CONTEXT.
fn without_a_context_there_is_no_memory() -> Outcome {
    let gpu = Gpu::start()?;
    let address = alloc(MIB)?;
    ok!(cuCtxSetCurrent(0));
    let (mut other, mut host, mut free, mut total) = (0, 0, 0, 0);
    is!(cuMemAlloc_v2(Some(&mut other), MIB), INVALID_CONTEXT);
    is!(cuMemAllocManaged(&mut other, MIB, 1), INVALID_CONTEXT);
    is!(cuMemHostAlloc(&mut host, MIB, 0), INVALID_CONTEXT);
    is!(cuMemGetInfo_v2(&mut free, &mut total), INVALID_CONTEXT);
    is!(cuMemAllocAsync(&mut other, MIB, 0), INVALID_CONTEXT);
    let freed = cuMemFree_v2(address);
    observe!("cuMemFree without a context: {freed:?}");
    ok!(cuCtxSetCurrent(gpu.context));
    if !freed.is_ok() {
        ok!(cuMemFree_v2(address));
    }
    Ok(())
}

/// With unified addressing another context of the process may free.
/// Source: NVIDIA CUDA Driver API, Unified Addressing; cuMemFree.
fn another_context_may_free() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, mut context) = (alloc(4 * MIB)?, 0);
    ok!(cuCtxCreate_v2(&mut context, 0, gpu.device));
    ok!(cuMemFree_v2(address));
    is!(cuMemFree_v2(address), INVALID_VALUE);
    ok!(cuCtxDestroy_v2(context));
    Ok(())
}

/// Memory of a context that is destroyed is gone; freeing it then is an error.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxDestroy.
fn a_destroyed_context_takes_its_memory_along() -> Outcome {
    let gpu = Gpu::start()?;
    let (before, mut context) = (quiet()?, 0);
    ok!(cuCtxCreate_v2(&mut context, 0, gpu.device));
    let address = alloc(64 * MIB)?;
    ok!(cuCtxDestroy_v2(context));
    ok!(cuCtxSetCurrent(gpu.context));
    fails!(cuMemFree_v2(address));
    let free = wait_free(before.saturating_sub(4 * MIB), std::time::Duration::from_secs(2))?;
    check!(free + 4 * MIB >= before, "free was {before}, is {free}");
    Ok(())
}

/// A copy from or to freed memory is an error, not other bytes.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpyDtoH (returned codes).
fn freed_memory_is_not_copied() -> Outcome {
    let _gpu = Gpu::start()?;
    let (address, mut bytes) = (alloc(16 * MIB)?, vec![0_u8; 4096]);
    ok!(cuMemFree_v2(address));
    fails!(cuMemcpyDtoH_v2(bytes.as_mut_ptr(), address, 4096));
    observe!("the context then says {:?}", cuCtxSynchronize());
    Ok(())
}

/// Memory of another process is closed by cuIpcCloseMemHandle, which takes nothing else.
/// Source: NVIDIA CUDA Driver API, Device Management, cuIpcOpenMemHandle, cuIpcCloseMemHandle.
fn an_opened_handle_is_closed_and_not_freed() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    write(address, &pattern(4 * MIB, 77))?;
    fails!(cuIpcCloseMemHandle(address));
    let mut handle = IpcHandle([0; 64]);
    match cuIpcGetMemHandle(&mut handle, address) {
        Code::NOT_SUPPORTED => skip!("this driver has no IPC"),
        code => ok!(code),
    }
    // No process opens its own.
    let mut own = 0;
    fails!(cuIpcOpenMemHandle_v2(&mut own, handle, 1));
    drop(Helper::start(&["ipc-free", &hex(&handle.0)])?);
    check!(read(address, 4096)? == pattern(4 * MIB, 77)[..4096], "contents differ");
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// A handle of cuMemCreate is gone with its last reference.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemRelease (returned codes).
fn released_handles_are_gone() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, handles) = mapped(&gpu, &[2 * MIB])?;
    let mut again = 0;
    ok!(cuMemRetainAllocationHandle(&mut again, address));
    ok!(cuMemRelease(again));
    ok!(cuMemRelease(handles[0]));
    fails!(cuMemRelease(handles[0]));
    let mut prop = AllocationProp::default();
    // While it is mapped, driver 580 still knows it.
    observe!("properties of it: {:?}", cuMemGetAllocationPropertiesFromHandle(&mut prop, handles[0]));
    ok!(cuMemsetD8_v2(address, 1, 2 * MIB));
    ok!(cuCtxSynchronize());
    ok!(cuMemUnmap(address, 2 * MIB));
    Ok(())
}
