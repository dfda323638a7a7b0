//! Virtual memory management: how long memory lives, and what else the driver says of it.

use std::time::Duration;

use super::vmm::mapped;
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("vmm_lifetime":
    a_released_handle_keeps_its_memory_while_mapped,
    unmapped_memory_stays_while_its_handle_lives,
    memory_comes_back_with_the_last_of_both,
    memory_survives_its_context,
    ipc_handles_are_refused,
    ranges_are_per_handle,
    a_handle_can_be_retained_from_an_address,
    classic_memory_has_no_handle_to_retain,
    properties_can_be_asked,
    export_needs_the_property,
    exported_memory_can_be_imported,
    unmap_beside_running_work,
    fresh_memory_is_observed,
    create_right_after_release_is_observed,
);

/// Releasing the handle after mapping keeps the memory until it is unmapped.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemRelease.
fn a_released_handle_keeps_its_memory_while_mapped() -> Outcome {
    let gpu = Gpu::start()?;
    let before = quiet()?;
    let (address, handles) = mapped(&gpu, &[64 * MIB])?;
    ok!(cuMemRelease(handles[0]));
    let bytes = pattern(64 * MIB, 21);
    write(address, &bytes)?;
    check!(read(address, 64 * MIB)? == bytes, "contents differ");
    check!(free_bytes()? + 64 * MIB <= before, "the memory is counted as free while mapped");
    ok!(cuMemUnmap(address, 64 * MIB));
    let after = wait_free(before - 2 * MIB, Duration::from_secs(2))?;
    check!(after + 2 * MIB >= before, "unmapped and released, but free was {before} and is {after}");
    Ok(())
}

/// Unmapping keeps memory and contents while the handle lives; mapped elsewhere it shows the same bytes.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemUnmap.
fn unmapped_memory_stays_while_its_handle_lives() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, handles) = mapped(&gpu, &[32 * MIB])?;
    let bytes = pattern(32 * MIB, 22);
    write(address, &bytes)?;
    let during = quiet()?;
    ok!(cuMemUnmap(address, 32 * MIB));
    check!(free_bytes()? <= during + MIB, "memory was freed though its handle lives");
    let mut other = 0;
    ok!(cuMemAddressReserve(&mut other, 32 * MIB, 0, 0, 0));
    ok!(cuMemMap(other, 32 * MIB, 0, handles[0], 0));
    ok!(cuMemSetAccess(other, 32 * MIB, &gpu.read_write(), 1));
    check!(read(other, 32 * MIB)? == bytes, "contents differ at the new address");
    Ok(())
}

/// Memory is freed when every mapping and every handle is gone, in whatever order.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemRelease, cuMemUnmap.
fn memory_comes_back_with_the_last_of_both() -> Outcome {
    let gpu = Gpu::start()?;
    let before = quiet()?;
    for handle_first in [true, false] {
        let (address, handles) = mapped(&gpu, &[64 * MIB, 64 * MIB])?;
        for (i, handle) in handles.iter().enumerate() {
            let at = address + (i * 64 * MIB) as u64;
            if handle_first {
                ok!(cuMemRelease(*handle));
                ok!(cuMemUnmap(at, 64 * MIB));
            } else {
                ok!(cuMemUnmap(at, 64 * MIB));
                ok!(cuMemRelease(*handle));
            }
        }
        ok!(cuMemAddressFree(address, 128 * MIB));
        let after = wait_free(before - 2 * MIB, Duration::from_secs(2))?;
        check!(after + 2 * MIB >= before, "handle first {handle_first}: free was {before}, is {after}");
    }
    Ok(())
}

/// cuMemMap memory belongs to the process, not to a context: it survives the one that was current.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management (no function of it takes a context).
fn memory_survives_its_context() -> Outcome {
    let gpu = Gpu::start()?;
    let mut context = 0;
    ok!(cuCtxCreate_v2(&mut context, 0, gpu.device));
    let (address, _) = mapped(&gpu, &[8 * MIB])?;
    let bytes = pattern(8 * MIB, 23);
    write(address, &bytes)?;
    ok!(cuCtxDestroy_v2(context));
    ok!(cuCtxSetCurrent(gpu.context));
    check!(read(address, 8 * MIB)? == bytes, "contents differ after the context is gone");
    ok!(cuMemUnmap(address, 8 * MIB));
    Ok(())
}

/// cuIpcGetMemHandle refuses cuMemMap memory.
/// Source: NVIDIA CUDA Driver API, Device Management, cuIpcGetMemHandle (base pointers of cuMemAlloc).
fn ipc_handles_are_refused() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, _) = mapped(&gpu, &[4 * MIB])?;
    let mut handle = IpcHandle([0; 64]);
    fails!(cuIpcGetMemHandle(&mut handle, address));
    Ok(())
}

/// cuMemGetAddressRange answers per handle, not per reservation.
/// Source: NVIDIA CUDA Driver API, cuMemGetAddressRange on cuMemMap memory, as UCX and NCCL found it.
fn ranges_are_per_handle() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, _) = mapped(&gpu, &[4 * MIB, 8 * MIB])?;
    let (mut base, mut bytes) = (0, 0);
    ok!(cuMemGetAddressRange_v2(Some(&mut base), Some(&mut bytes), address + 5));
    check!(base == address && bytes == 4 * MIB, "first handle: {bytes} at {base:#x}");
    let second = address + 4 * MIB as u64;
    ok!(cuMemGetAddressRange_v2(Some(&mut base), Some(&mut bytes), second + 7 * MIB as u64));
    check!(base == second && bytes == 8 * MIB, "second handle: {bytes} at {base:#x}, mapped at {second:#x}");
    Ok(())
}

/// cuMemRetainAllocationHandle gives the handle of mapped memory and counts one more.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemRetainAllocationHandle.
fn a_handle_can_be_retained_from_an_address() -> Outcome {
    let gpu = Gpu::start()?;
    let before = quiet()?;
    let (address, handles) = mapped(&gpu, &[32 * MIB, 32 * MIB])?;
    let mut again = 0;
    ok!(cuMemRetainAllocationHandle(&mut again, address + 40 * MIB as u64));
    check!(again == handles[1], "another handle than the mapped one");
    ok!(cuMemRelease(handles[1]));
    ok!(cuMemUnmap(address + 32 * MIB as u64, 32 * MIB));
    check!(free_bytes()? + 60 * MIB <= before, "memory is gone though a retained handle lives");
    ok!(cuMemRelease(again));
    let after = wait_free(before - 34 * MIB, Duration::from_secs(2))?;
    check!(after + 34 * MIB >= before, "memory is held though the last handle was released");
    Ok(())
}

/// cuMemRetainAllocationHandle fails on cuMemAlloc memory.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemRetainAllocationHandle; NCCL tells classic
/// memory by this.
fn classic_memory_has_no_handle_to_retain() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    let mut handle = 0;
    fails!(cuMemRetainAllocationHandle(&mut handle, address));
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// A handle's properties are those it was made with.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemGetAllocationPropertiesFromHandle.
fn properties_can_be_asked() -> Outcome {
    let gpu = Gpu::start()?;
    let mut handle = 0;
    ok!(cuMemCreate(&mut handle, 2 * MIB, &gpu.prop(), 0));
    let mut prop = AllocationProp::default();
    ok!(cuMemGetAllocationPropertiesFromHandle(&mut prop, handle));
    check!(prop.kind == 1 && prop.location == gpu.location(), "{prop:?}");
    check!(prop.handle_types == 0, "{prop:?}");
    Ok(())
}

/// A handle can be exported only if it was created for that.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemExportToShareableHandle.
fn export_needs_the_property() -> Outcome {
    let gpu = Gpu::start()?;
    gpu.needs(103, "handles as file descriptors")?;
    let (mut handle, mut fd) = (0, -1_i32);
    ok!(cuMemCreate(&mut handle, 2 * MIB, &gpu.prop(), 0));
    fails!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, 1, 0));
    Ok(())
}

/// A file descriptor of an exported handle imports as the same memory.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemImportFromShareableHandle.
fn exported_memory_can_be_imported() -> Outcome {
    let gpu = Gpu::start()?;
    gpu.needs(103, "handles as file descriptors")?;
    let prop = AllocationProp { handle_types: 1, ..gpu.prop() };
    let (mut handle, mut address, mut fd, mut imported, mut alias) = (0, 0, -1_i32, 0, 0);
    ok!(cuMemCreate(&mut handle, 4 * MIB, &prop, 0));
    ok!(cuMemAddressReserve(&mut address, 4 * MIB, 0, 0, 0));
    ok!(cuMemMap(address, 4 * MIB, 0, handle, 0));
    ok!(cuMemSetAccess(address, 4 * MIB, &gpu.read_write(), 1));
    let bytes = pattern(4 * MIB, 24);
    write(address, &bytes)?;
    ok!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, 1, 0));
    check!(fd >= 0, "descriptor {fd}");
    ok!(cuMemImportFromShareableHandle(&mut imported, usize::try_from(fd).unwrap_or(0), 1));
    ok!(cuMemAddressReserve(&mut alias, 4 * MIB, 0, 0, 0));
    ok!(cuMemMap(alias, 4 * MIB, 0, imported, 0));
    ok!(cuMemSetAccess(alias, 4 * MIB, &gpu.read_write(), 1));
    check!(read(alias, 4 * MIB)? == bytes, "the imported memory holds other bytes");
    Ok(())
}

/// How long cuMemUnmap takes beside running work that does not touch the range.
/// Source: comment in PyTorch's caching allocator (unmap and release do not wait); reported, not judged.
fn unmap_beside_running_work() -> Outcome {
    let gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (address, handles) = mapped(&gpu, &[64 * MIB])?;
    let stream = stream(NON_BLOCKING)?;
    ok!(kernels.spin(stream, Duration::from_millis(300)));
    let (code, unmap) = timed(|| cuMemUnmap(address, 64 * MIB));
    ok!(code);
    let (code, release) = timed(|| cuMemRelease(handles[0]));
    ok!(code);
    let still = cuStreamQuery(stream);
    observe!("beside 300 ms of work: unmap {unmap:?}, release {release:?}, the work then is {still:?}");
    ok!(cuCtxSynchronize());
    Ok(())
}

/// What new memory holds.
/// Source: open in the documentation; reported, not judged.
fn fresh_memory_is_observed() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, handles) = mapped(&gpu, &[64 * MIB])?;
    ok!(cuMemsetD8_v2(address, 0xc3, 64 * MIB));
    ok!(cuCtxSynchronize());
    ok!(cuMemUnmap(address, 64 * MIB));
    ok!(cuMemRelease(handles[0]));
    let (again, _) = mapped(&gpu, &[64 * MIB])?;
    let bytes = read(again, 64 * MIB)?;
    let zero = bytes.iter().filter(|b| **b == 0).count();
    let old = bytes.iter().filter(|b| **b == 0xc3).count();
    observe!("of 64 MiB of new memory {zero} bytes are zero, {old} are those of the memory just released");
    Ok(())
}

/// Whether memory that was just released can be created again at once.
/// Source: reports of out of memory for some milliseconds after a release; reported, not judged, but it comes.
fn create_right_after_release_is_observed() -> Outcome {
    let gpu = Gpu::start()?;
    let size = quiet()? / 4 / (2 * MIB) * 2 * MIB * 3;
    let mut handle = 0;
    ok!(cuMemCreate(&mut handle, size, &gpu.prop(), 0));
    ok!(cuMemRelease(handle));
    let (mut refused, start) = (0, std::time::Instant::now());
    loop {
        match cuMemCreate(&mut handle, size, &gpu.prop(), 0) {
            Code::SUCCESS => break,
            Code::OUT_OF_MEMORY => refused += 1,
            code => check!(false, "{code:?}"),
        }
        check!(start.elapsed() < Duration::from_secs(5), "still out of memory 5 s after the release");
        std::thread::sleep(Duration::from_millis(1));
    }
    observe!("{refused} refusals, {:?} after the release of three quarters of the device", start.elapsed());
    ok!(cuMemRelease(handle));
    rest_after_a_release();
    Ok(())
}
