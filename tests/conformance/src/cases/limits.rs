//! Sizes that a context sets aside, and when it takes the memory.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("limits":
    stacks_take_memory_for_every_thread,
    too_much_stack_is_refused_and_changes_nothing,
    a_kernel_makes_the_stack_grow,
    the_heap_is_taken_with_the_module,
    the_heap_keeps_its_size,
    limits_go_with_their_context,
    the_depth_of_synchronisation_is_gone,
    what_can_only_be_asked_is_not_set,
);

const STACK: i32 = 0;
const HEAP: i32 = 2;
const SYNC_DEPTH: i32 = 3;
const HEAP_PTX: &str = concat!(include_str!("../../../../simulator/kernels/heap.ptx"), "\0");
const STACK_PTX: &str = concat!(include_str!("../../../../simulator/kernels/stack.ptx"), "\0");

/// Threads that the device holds at once: multiprocessors, times what each of them holds.
fn resident(gpu: &Gpu) -> Result<usize, Stop> {
    let product = i64::from(gpu.attribute(16)?) * i64::from(gpu.attribute(39)?);
    usize::try_from(product).map_err(|_| Stop::Fail(format!("{product} threads")))
}

fn run(module: Handle, name: &str, arguments: &[Arg]) -> Outcome {
    ok!(launch(function(module, name)?, 1, 1, 0, arguments));
    ok!(cuCtxSynchronize());
    Ok(())
}

/// The stack is set aside for every thread that the device holds, at once, and given back when it shrinks.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxSetLimit ("will take effect immediately"); the
/// amount: NVlabs/cuda-oxide #699, SourceryTools/nvptx-tools #8; giving back: risc0/risc0 #3706.
fn stacks_take_memory_for_every_thread() -> Outcome {
    let gpu = Gpu::start()?;
    let mut normal = 0;
    ok!(cuCtxGetLimit(&mut normal, STACK));
    let before = quiet()?;
    ok!(cuCtxSetLimit(STACK, normal + 1024));
    let taken = before.saturating_sub(free_bytes()?);
    let wanted = resident(&gpu)? * 1024;
    observe!("1 KiB more stack takes {taken} bytes, {wanted} by the number of threads");
    check!(taken * 10 >= wanted * 9, "{taken} of {wanted} bytes");
    ok!(cuCtxSetLimit(STACK, normal));
    let after = wait_free(before, Duration::from_secs(3))?;
    check!(after + 2 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// A stack that does not fit is refused, and the limit stays what it was.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxSetLimit (CUDA_ERROR_OUT_OF_MEMORY).
fn too_much_stack_is_refused_and_changes_nothing() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut normal, mut now) = (0, 0);
    ok!(cuCtxGetLimit(&mut normal, STACK));
    let before = quiet()?;
    let much = (before / resident(&gpu)? + 16) * 5 / 4;
    if much > 500 << 10 {
        skip!("the device has room for {much} bytes of stack per thread");
    }
    let code = cuCtxSetLimit(STACK, much);
    check!(!code.is_ok(), "{much} bytes of stack fit into {before}");
    observe!("a stack that does not fit: {code:?}");
    ok!(cuCtxGetLimit(&mut now, STACK));
    check!(now == normal, "the limit is {now}, was {normal}");
    let after = wait_free(before, Duration::from_secs(3))?;
    check!(after + 2 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// A kernel with more local memory than the stack has makes it grow when it is launched; it does not shrink again.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxSetLimit.
fn a_kernel_makes_the_stack_grow() -> Outcome {
    let gpu = Gpu::start()?;
    let result = alloc(4)?;
    let (mut module, before) = (0, quiet()?);
    ok!(cuModuleLoadData(&mut module, STACK_PTX.as_ptr().cast()));
    run(module, "stack_u32", &[Arg::U64(result), Arg::U32(77)])?;
    check!(read(result, 4)? == 77u32.to_ne_bytes(), "the kernel has another result");
    let taken = before.saturating_sub(free_bytes()?);
    let more = resident(&gpu)? * (4096 - 1024);
    observe!("4 KiB of local memory per thread take {taken} bytes, {more} by the number of threads");
    check!(taken >= more / 2, "{taken} bytes");
    ok!(cuModuleUnload(module));
    let left = before.saturating_sub(free_bytes()?);
    check!(left >= more / 2, "{left} bytes are left of {taken}");
    Ok(())
}

/// The heap of malloc is taken when a module that uses it is loaded, not when its size is set.
/// Source: CUDA C++ Programming Guide, Heap Memory Allocation.
fn the_heap_is_taken_with_the_module() -> Outcome {
    let _gpu = Gpu::start()?;
    let result = alloc(4)?;
    let (mut module, before) = (0, quiet()?);
    ok!(cuCtxSetLimit(HEAP, 256 * MIB));
    observe!("setting the heap's size takes {} bytes", before.saturating_sub(free_bytes()?));
    ok!(cuModuleLoadData(&mut module, HEAP_PTX.as_ptr().cast()));
    run(module, "heap_u32", &[Arg::U64(1024), Arg::U64(result)])?;
    check!(read(result, 4)? == 1u32.to_ne_bytes(), "malloc gave nothing");
    let taken = before.saturating_sub(free_bytes()?);
    check!(taken >= 256 * MIB, "{taken} bytes with a heap of 256 MiB");
    Ok(())
}

/// Once kernels that use it were launched, the heap's size cannot be changed.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxSetLimit (CUDA_ERROR_INVALID_VALUE).
fn the_heap_keeps_its_size() -> Outcome {
    let _gpu = Gpu::start()?;
    let result = alloc(4)?;
    let mut module = 0;
    ok!(cuModuleLoadData(&mut module, HEAP_PTX.as_ptr().cast()));
    run(module, "heap_u32", &[Arg::U64(16), Arg::U64(result)])?;
    is!(cuCtxSetLimit(HEAP, 128 * MIB), INVALID_VALUE);
    Ok(())
}

/// What limits took is given back with the context.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxDestroy.
fn limits_go_with_their_context() -> Outcome {
    let gpu = Gpu::start()?;
    let before = quiet()?;
    let (mut context, mut module) = (0, 0);
    ok!(cuCtxCreate_v2(&mut context, 0, gpu.device));
    ok!(cuCtxSetLimit(STACK, 1536));
    ok!(cuCtxSetLimit(HEAP, 64 * MIB));
    let result = alloc(4)?;
    ok!(cuModuleLoadData(&mut module, HEAP_PTX.as_ptr().cast()));
    run(module, "heap_u32", &[Arg::U64(16), Arg::U64(result)])?;
    ok!(cuCtxDestroy_v2(context));
    ok!(cuCtxSetCurrent(gpu.context));
    let after = wait_free(before, Duration::from_secs(3))?;
    check!(after + 16 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// The depth of synchronisation cannot be set on devices of compute capability 9.0 and later.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxSetLimit.
fn the_depth_of_synchronisation_is_gone() -> Outcome {
    let gpu = Gpu::start()?;
    if gpu.attribute(75)? < 9 {
        skip!("a device before compute capability 9.0");
    }
    is!(cuCtxSetLimit(SYNC_DEPTH, 3), UNSUPPORTED_LIMIT);
    Ok(())
}

/// CU_LIMIT_SHMEM_SIZE and CU_LIMIT_CIG_ENABLED can be asked for, where the release has them, and not be set.
/// Source: NVIDIA CUDA Driver API, Data types, CUlimit.
fn what_can_only_be_asked_is_not_set() -> Outcome {
    let _gpu = Gpu::start()?;
    for limit in [7, 8] {
        let mut value = 0;
        let asked = cuCtxGetLimit(&mut value, limit);
        observe!("limit {limit}: {asked:?}, {value}");
        fails!(cuCtxSetLimit(limit, 1 << 20));
    }
    Ok(())
}
