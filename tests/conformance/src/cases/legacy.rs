//! The entry points of before CUDA 3.2, with 32-bit addresses and sizes.

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("legacy":
    contexts_have_an_interface,
    old_calls_fail_in_new_contexts,
    new_calls_fail_in_old_contexts,
    old_memory_has_short_addresses,
    old_copies_and_fills_do_what_they_say,
    old_arrays_take_memory_and_give_it_back,
);

fn old_context(gpu: &Gpu) -> Result<Handle, Stop> {
    let mut context = 0;
    let code = cuCtxCreate(&mut context, 0, gpu.device);
    if !code.is_ok() {
        skip!("the driver makes no context of the old interface: {code:?}");
    }
    Ok(context)
}

/// A context is of the interface of the call that made it: 3010 or 3020.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxGetApiVersion.
fn contexts_have_an_interface() -> Outcome {
    let gpu = Gpu::start()?;
    let mut version = 0;
    ok!(cuCtxGetApiVersion(gpu.context, &mut version));
    check!(version >= 3020, "the primary context is of {version}");
    let old = old_context(&gpu)?;
    ok!(cuCtxGetApiVersion(old, &mut version));
    observe!("what cuCtxCreate of 2.0 makes is of {version}");
    check!(version < 3020, "an old context is of {version}");
    ok!(cuCtxDestroy_v2(old));
    Ok(())
}

/// Calls with 32-bit addresses in a context of today are INVALID_CONTEXT, and take nothing.
/// Source: NVIDIA CUDA Driver API, Data types, CUDA_ERROR_INVALID_CONTEXT; pmodels/mpich #7091, iree-org/iree
/// #14056, cupy/cupy #7994.
fn old_calls_fail_in_new_contexts() -> Outcome {
    let _gpu = Gpu::start()?;
    let before = quiet()?;
    let (mut at, mut pitch, mut free, mut total, mut array) = (0, 0, 0, 0, 0);
    is!(cuMemAlloc(&mut at, 1 << 20), INVALID_CONTEXT);
    is!(cuMemAllocPitch(&mut at, &mut pitch, 1000, 100, 4), INVALID_CONTEXT);
    is!(cuMemGetInfo(&mut free, &mut total), INVALID_CONTEXT);
    is!(cuMemFree(4096), INVALID_CONTEXT);
    let shape = OldArray { width: 64, height: 64, format: 0x20, channels: 1 };
    is!(cuArrayCreate(&mut array, &shape), INVALID_CONTEXT);
    check!(quiet()? == before, "memory was taken");
    Ok(())
}

/// Their successors in a context of the old interface are INVALID_CONTEXT.
/// Source: NVIDIA CUDA Driver API, Data types, CUDA_ERROR_INVALID_CONTEXT ("3010 context with 3020 API calls").
fn new_calls_fail_in_old_contexts() -> Outcome {
    let gpu = Gpu::start()?;
    let old = old_context(&gpu)?;
    let (mut at, mut free, mut total) = (0, 0, 0);
    is!(cuMemAlloc_v2(Some(&mut at), 1 << 20), INVALID_CONTEXT);
    is!(cuMemGetInfo_v2(&mut free, &mut total), INVALID_CONTEXT);
    ok!(cuCtxSynchronize());
    ok!(cuCtxDestroy_v2(old));
    Ok(())
}

/// What the old calls allocate lies below 4 GiB, counts, and comes back.
/// Source: NVIDIA CUDA Driver API, cuda.h, CUdeviceptr_v1.
fn old_memory_has_short_addresses() -> Outcome {
    let gpu = Gpu::start()?;
    let old = old_context(&gpu)?;
    ok!(cuCtxSetCurrent(gpu.context));
    let before = quiet()?;
    ok!(cuCtxSetCurrent(old));
    let (mut small, mut large, mut pitched, mut pitch) = (0, 0, 0, 0);
    ok!(cuMemAlloc(&mut small, 100));
    ok!(cuMemAlloc(&mut large, 64 << 20));
    ok!(cuMemAllocPitch(&mut pitched, &mut pitch, 1000, 1000, 4));
    check!(small != 0 && large != 0 && pitched != 0 && pitch >= 1000, "{small:x} {large:x} {pitched:x} {pitch}");
    let (mut base, mut size) = (0, 0);
    ok!(cuMemGetAddressRange(&mut base, &mut size, large + 4096));
    check!(base == large && size == 64 << 20, "{size} bytes at {base:x}");
    ok!(cuCtxSetCurrent(gpu.context));
    let taken = before.saturating_sub(free_bytes()?);
    check!(taken >= 64 * MIB, "{taken} bytes are seen");
    ok!(cuCtxSetCurrent(old));
    for at in [small, large, pitched] {
        ok!(cuMemFree(at));
    }
    fails!(cuMemFree(large));
    ok!(cuCtxSetCurrent(gpu.context));
    check!(quiet()? + 2 * MIB >= before, "not all came back");
    ok!(cuCtxDestroy_v2(old));
    Ok(())
}

/// Copies and fills with short addresses move the same bytes as those of today.
/// Source: NVIDIA CUDA Driver API, Memory Management.
fn old_copies_and_fills_do_what_they_say() -> Outcome {
    let gpu = Gpu::start()?;
    let old = old_context(&gpu)?;
    let (mut at, mut other) = (0, 0);
    ok!(cuMemAlloc(&mut at, 1 << 20));
    ok!(cuMemAlloc(&mut other, 1 << 20));
    let data = pattern(1 << 20, 9);
    let mut back = vec![0u8; 1 << 20];
    ok!(cuMemcpyHtoD(at, data.as_ptr().cast(), 1 << 20));
    ok!(cuMemcpyDtoD(other, at, 1 << 20));
    ok!(cuMemsetD8(other, 7, 4096));
    ok!(cuMemcpyDtoH(back.as_mut_ptr().cast(), other, 1 << 20));
    check!(back[..4096].iter().all(|byte| *byte == 7) && back[4096..] == data[4096..], "other bytes came back");
    ok!(cuMemFree(at));
    ok!(cuMemFree(other));
    ok!(cuCtxDestroy_v2(old));
    Ok(())
}

/// Arrays of the old calls take memory and give it back.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuArrayCreate.
fn old_arrays_take_memory_and_give_it_back() -> Outcome {
    let gpu = Gpu::start()?;
    // What other processes held has come back.
    quiet()?;
    let old = old_context(&gpu)?;
    let mut array = 0;
    let (mut free, mut total, mut now) = (0, 0, 0);
    ok!(cuMemGetInfo(&mut free, &mut total));
    if free == u32::MAX {
        skip!("32 bits do not tell how much is free");
    }
    let shape = OldArray { width: 4096, height: 4096, format: 0x20, channels: 1 };
    ok!(cuArrayCreate(&mut array, &shape));
    ok!(cuMemGetInfo(&mut now, &mut total));
    check!(now + (64 << 20) <= free + (2 << 20), "{now} free, {free} before");
    ok!(cuArrayDestroy(array));
    ok!(cuMemGetInfo(&mut now, &mut total));
    check!(now + (2 << 20) >= free, "{now} free, {free} before");
    ok!(cuCtxDestroy_v2(old));
    Ok(())
}
