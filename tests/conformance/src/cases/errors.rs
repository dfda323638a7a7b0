//! Faults of running work: what they are called, that they stick, whom they hit.

use std::time::Duration;

use super::vmm::mapped;
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;
use crate::helpers::Helper;

cases!("errors":
    a_kernel_at_an_unmapped_address_faults,
    a_kernel_without_access_faults,
    a_fault_sticks,
    a_fault_is_one_processs_own,
    an_unmap_under_a_kernel_faults_or_is_harmless,
    null_handles_are_refused,
);

fn unmapped() -> Result<Dptr, Stop> {
    let mut address = 0;
    ok!(cuMemAddressReserve(&mut address, 4 * MIB, 0, 0, 0));
    Ok(address)
}

/// The launch succeeds; what waits for it gets ILLEGAL_ADDRESS.
/// Source: NVIDIA CUDA Driver API, data types, CUDA_ERROR_ILLEGAL_ADDRESS.
fn a_kernel_at_an_unmapped_address_faults() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    ok!(kernels.fill(0, unmapped()?, 1024, 1));
    is!(cuCtxSynchronize(), ILLEGAL_ADDRESS);
    Ok(())
}

/// Mapped memory without access is as good as unmapped.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemSetAccess.
fn a_kernel_without_access_faults() -> Outcome {
    let gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (address, mut handle) = (unmapped()?, 0);
    ok!(cuMemCreate(&mut handle, 4 * MIB, &gpu.prop(), 0));
    ok!(cuMemMap(address, 4 * MIB, 0, handle, 0));
    ok!(kernels.fill(0, address, 1024, 1));
    is!(cuCtxSynchronize(), ILLEGAL_ADDRESS);
    Ok(())
}

/// After a fault every call that needs the context returns it; the process must be restarted.
/// Source: NVIDIA CUDA Driver API, data types, CUDA_ERROR_ILLEGAL_ADDRESS ("inconsistent state").
fn a_fault_sticks() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let (address, pinned) = (alloc(MIB)?, Pinned::new(4096)?);
    ok!(kernels.fill(stream, unmapped()?, 1024, 1));
    is!(cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
    let mut other = 0;
    is!(cuCtxSynchronize(), ILLEGAL_ADDRESS);
    is!(cuMemAlloc_v2(Some(&mut other), MIB), ILLEGAL_ADDRESS);
    is!(cuMemcpyHtoDAsync_v2(address, pinned.pointer(), 4096, 0), ILLEGAL_ADDRESS);
    is!(kernels.fill(0, address, 4, 1), ILLEGAL_ADDRESS);
    is!(cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
    observe!("cuMemFree after a fault: {:?}", cuMemFree_v2(address));
    observe!("cuMemGetInfo after a fault: {:?}", memory_info().map_err(|_| "an error"));
    Ok(())
}

/// Another process on the same device does not notice.
/// Source: CUDA C++ Programming Guide (contexts of different processes are isolated; not so under MPS).
fn a_fault_is_one_processs_own() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let neighbour = Helper::start(&["hold", "4194304"])?;
    ok!(kernels.fill(0, unmapped()?, 1024, 1));
    is!(cuCtxSynchronize(), ILLEGAL_ADDRESS);
    let another = Helper::start(&["hold", "4194304"])?;
    drop((neighbour, another));
    Ok(())
}

/// Unmapping does not wait for work: a kernel that starts after it, and was launched before, finds no memory.
/// Source: comment in PyTorch's caching allocator; the outcome is reported, not judged.
fn an_unmap_under_a_kernel_faults_or_is_harmless() -> Outcome {
    let gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let (address, handles) = mapped(&gpu, &[4 * MIB])?;
    ok!(kernels.spin(stream, Duration::from_millis(150)));
    ok!(kernels.fill(stream, address, MIB as u64, 1));
    let (code, time) = timed(|| cuMemUnmap(address, 4 * MIB));
    let release = cuMemRelease(handles[0]);
    let work = cuStreamSynchronize(stream);
    observe!("unmap ahead of a queued kernel: {code:?} after {time:?}, release {release:?}, the work {work:?}");
    check!(code.is_ok() || work.is_ok(), "neither the unmap nor the work succeeded");
    Ok(())
}

/// Null contexts, events and modules are refused, not followed.
/// Source: NVIDIA CUDA Driver API (returned codes of each function).
fn null_handles_are_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    fails!(cuCtxDestroy_v2(0));
    fails!(cuEventDestroy_v2(0));
    fails!(cuEventRecord(0, 0));
    fails!(cuEventQuery(0));
    fails!(cuStreamDestroy_v2(0));
    fails!(cuGraphLaunch(0, 0));
    fails!(cuGraphDestroy(0));
    Ok(())
}
