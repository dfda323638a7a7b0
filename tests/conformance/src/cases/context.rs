//! Primary contexts, created contexts, the stack of each thread.

use std::sync::mpsc;
use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("context":
    none_is_current_at_first,
    primary_is_counted,
    primary_is_one_per_device,
    retaining_does_not_make_current,
    primary_flags_can_be_set,
    last_release_frees_memory,
    reset_frees_memory_and_deactivates,
    create_pushes_and_pop_restores,
    destroying_the_current_pops_it,
    destroying_frees_memory,
    a_destroyed_context_says_so_in_other_threads,
    current_is_per_thread,
    setting_null_clears,
    synchronize_waits_for_every_stream,
    limits_and_priorities_are_known,
    free_works_from_another_context,
    free_needs_a_current_context,
);

/// A thread starts with no context; work there fails with INVALID_CONTEXT.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxGetCurrent; Memory Management, cuMemAlloc.
fn none_is_current_at_first() -> Outcome {
    ok!(cuInit(0));
    let (mut context, mut address) = (1, 0);
    ok!(cuCtxGetCurrent(&mut context));
    check!(context == 0, "a context is current");
    is!(cuMemAlloc_v2(Some(&mut address), 4096), INVALID_CONTEXT);
    is!(cuCtxSynchronize(), INVALID_CONTEXT);
    let (mut device, mut free, mut total) = (0, 0, 0);
    is!(cuCtxGetDevice(&mut device), INVALID_CONTEXT);
    is!(cuMemGetInfo_v2(&mut free, &mut total), INVALID_CONTEXT);
    let mut stream = 0;
    is!(cuStreamCreate(Some(&mut stream), 0), INVALID_CONTEXT);
    Ok(())
}

fn active() -> Result<bool, Stop> {
    let (mut flags, mut active) = (0, 0);
    ok!(cuDevicePrimaryCtxGetState(0, &mut flags, &mut active));
    Ok(active != 0)
}

/// The primary context lives from the first retain to the last release; one release more is INVALID_CONTEXT.
/// Source: NVIDIA CUDA Driver API, Primary Context Management.
fn primary_is_counted() -> Outcome {
    ok!(cuInit(0));
    check!(!active()?, "active before it was retained");
    let mut context = 0;
    ok!(cuDevicePrimaryCtxRetain(&mut context, 0));
    check!(active()?, "not active after retain");
    ok!(cuDevicePrimaryCtxRetain(&mut context, 0));
    ok!(cuDevicePrimaryCtxRelease_v2(0));
    check!(active()?, "not active with one retain left");
    ok!(cuDevicePrimaryCtxRelease_v2(0));
    check!(!active()?, "active after the last release");
    is!(cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
    Ok(())
}

/// Retaining twice gives the same context.
/// Source: NVIDIA CUDA Driver API, Primary Context Management ("unique per device").
fn primary_is_one_per_device() -> Outcome {
    ok!(cuInit(0));
    let (mut a, mut b) = (0, 0);
    ok!(cuDevicePrimaryCtxRetain(&mut a, 0));
    ok!(cuDevicePrimaryCtxRetain(&mut b, 0));
    check!(a == b && a != 0, "{a:x} and {b:x}");
    Ok(())
}

/// cuDevicePrimaryCtxRetain does not make the context current.
/// Source: NVIDIA CUDA Driver API, Primary Context Management, cuDevicePrimaryCtxRetain.
fn retaining_does_not_make_current() -> Outcome {
    ok!(cuInit(0));
    let (mut primary, mut current) = (0, 1);
    ok!(cuDevicePrimaryCtxRetain(&mut primary, 0));
    ok!(cuCtxGetCurrent(&mut current));
    check!(current == 0, "current after retain");
    Ok(())
}

/// Flags of the primary context can be set before it is active, and are reported.
/// Source: NVIDIA CUDA Driver API, Primary Context Management, cuDevicePrimaryCtxSetFlags.
fn primary_flags_can_be_set() -> Outcome {
    ok!(cuInit(0));
    ok!(cuDevicePrimaryCtxSetFlags_v2(0, 4));
    let (mut flags, mut active) = (0, 0);
    ok!(cuDevicePrimaryCtxGetState(0, &mut flags, &mut active));
    check!(flags & 4 == 4, "CU_CTX_SCHED_BLOCKING_SYNC was set, flags are {flags:#x}");
    let _gpu = Gpu::start()?;
    ok!(cuCtxGetFlags(&mut flags));
    check!(flags & 4 == 4, "the context's flags are {flags:#x}");
    Ok(())
}

/// The last release destroys the context and with it all memory that was allocated in it.
/// Source: NVIDIA CUDA Driver API, Primary Context Management, cuDevicePrimaryCtxRelease.
fn last_release_frees_memory() -> Outcome {
    let gpu = Gpu::start()?;
    let before = quiet()?;
    let _lost = alloc(256 * MIB)?;
    check!(free_bytes()? + 256 * MIB <= before + 2 * MIB, "the allocation is not seen in the free figure");
    ok!(cuDevicePrimaryCtxRelease_v2(gpu.device));
    check!(!active()?, "still active");
    let _gpu = Gpu::start()?;
    let after = wait_free(before - 64 * MIB, Duration::from_secs(3))?;
    check!(after + 64 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// cuDevicePrimaryCtxReset destroys everything in the context, which is then not active.
/// Source: NVIDIA CUDA Driver API, Primary Context Management, cuDevicePrimaryCtxReset.
fn reset_frees_memory_and_deactivates() -> Outcome {
    let gpu = Gpu::start()?;
    let before = quiet()?;
    let address = alloc(256 * MIB)?;
    ok!(cuDevicePrimaryCtxReset_v2(gpu.device));
    check!(!active()?, "active after reset");
    observe!("current but reset context: cuCtxSynchronize says {:?}", cuCtxSynchronize());
    let again = Gpu::start()?;
    observe!("the primary context after a reset has the same handle: {}", again.context == gpu.context);
    let after = wait_free(before - 64 * MIB, Duration::from_secs(3))?;
    check!(after + 64 * MIB >= before, "free was {before}, is {after}");
    check!(!cuMemFree_v2(address).is_ok(), "memory of before the reset could be freed");
    let fresh = alloc(MIB)?;
    ok!(cuMemsetD8_v2(fresh, 1, MIB));
    Ok(())
}

fn create() -> Result<Handle, Stop> {
    let mut context = 0;
    ok!(cuCtxCreate_v2(&mut context, 0, 0));
    Ok(context)
}

fn current() -> Result<Handle, Stop> {
    let mut context = 0;
    ok!(cuCtxGetCurrent(&mut context));
    Ok(context)
}

/// cuCtxCreate makes the new context current on top of the stack; popping uncovers the one below.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxCreate, cuCtxPopCurrent, cuCtxPushCurrent.
fn create_pushes_and_pop_restores() -> Outcome {
    let gpu = Gpu::start()?;
    let a = create()?;
    check!(current()? == a && a != gpu.context, "the new context is not current");
    let b = create()?;
    check!(current()? == b && a != b, "the second is not current");
    let mut popped = 0;
    ok!(cuCtxPopCurrent_v2(Some(&mut popped)));
    check!(popped == b && current()? == a, "popping did not uncover the first");
    ok!(cuCtxPushCurrent_v2(b));
    check!(current()? == b, "pushing does not make current");
    ok!(cuCtxPopCurrent_v2(None));
    ok!(cuCtxPopCurrent_v2(None));
    check!(current()? == gpu.context, "the primary context is not current again");
    let mut device = -1;
    ok!(cuCtxGetDevice(&mut device));
    check!(device == gpu.device, "device {device}");
    let (mut one, mut other) = (0, 0);
    ok!(cuCtxGetId(a, &mut one));
    ok!(cuCtxGetId(b, &mut other));
    check!(one != other, "two contexts have one id");
    ok!(cuCtxDestroy_v2(b));
    ok!(cuCtxDestroy_v2(a));
    Ok(())
}

/// Destroying the context that is current to the caller pops it.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxDestroy.
fn destroying_the_current_pops_it() -> Outcome {
    ok!(cuInit(0));
    let context = create()?;
    ok!(cuCtxDestroy_v2(context));
    check!(current()? == 0, "still current");
    is!(cuCtxSynchronize(), INVALID_CONTEXT);
    Ok(())
}

/// Destroying a context frees all that was allocated in it.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxDestroy.
fn destroying_frees_memory() -> Outcome {
    let _gpu = Gpu::start()?;
    let before = quiet()?;
    let context = create()?;
    let _lost = alloc(256 * MIB)?;
    let mut stream = 0;
    ok!(cuStreamCreate(Some(&mut stream), 0));
    ok!(cuCtxDestroy_v2(context));
    let after = wait_free(before - 64 * MIB, Duration::from_secs(3))?;
    check!(after + 64 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// A destroyed context stays current to other threads, where every use is CONTEXT_IS_DESTROYED.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxDestroy.
fn a_destroyed_context_says_so_in_other_threads() -> Outcome {
    ok!(cuInit(0));
    let context = create()?;
    let (to_thread, at_thread) = mpsc::channel::<()>();
    let (to_main, at_main) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            ok!(cuCtxSetCurrent(context));
            let _ = to_main.send(());
            let _ = at_thread.recv();
            let mut address = 0;
            is!(cuMemAlloc_v2(Some(&mut address), 4096), CONTEXT_IS_DESTROYED);
            is!(cuCtxSynchronize(), CONTEXT_IS_DESTROYED);
            Ok(())
        });
        let _ = at_main.recv();
        ok!(cuCtxDestroy_v2(context));
        let _ = to_thread.send(());
        thread.join().unwrap_or_else(|_| Err(Stop::Fail("the thread panicked".into())))
    })
}

/// Which context is current is each thread's own affair, and one context may be current to many.
/// Source: NVIDIA CUDA Driver API, Context Management.
fn current_is_per_thread() -> Outcome {
    let gpu = Gpu::start()?;
    on_thread(0, || {
        check!(current()? == 0, "a new thread has a context");
        Ok(())
    })?;
    let address = alloc(MIB)?;
    on_thread(gpu.context, || {
        ok!(cuMemsetD8_v2(address, 7, MIB));
        Ok(())
    })?;
    check!(read(address, MIB)?.iter().all(|b| *b == 7), "the other thread's memset is not seen");
    Ok(())
}

/// cuCtxSetCurrent(NULL) pops what is current.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxSetCurrent.
fn setting_null_clears() -> Outcome {
    let gpu = Gpu::start()?;
    ok!(cuCtxSetCurrent(0));
    check!(current()? == 0, "still current");
    ok!(cuCtxSetCurrent(gpu.context));
    check!(current()? == gpu.context, "not current");
    Ok(())
}

/// cuCtxSynchronize waits for every stream of the context, non-blocking ones too.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxSynchronize.
fn synchronize_waits_for_every_stream() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (blocking, free) = (stream(BLOCKING)?, stream(NON_BLOCKING)?);
    ok!(kernels.spin(free, Duration::from_millis(100)));
    is!(cuStreamQuery(free), NOT_READY);
    ok!(cuCtxSynchronize());
    ok!(cuStreamQuery(free));
    ok!(kernels.spin(blocking, Duration::from_millis(50)));
    ok!(cuCtxSynchronize());
    ok!(cuStreamQuery(blocking));
    Ok(())
}

/// Limits can be read, unknown ones are refused, and the greatest priority is the least number.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxGetLimit, cuCtxGetStreamPriorityRange.
fn limits_and_priorities_are_known() -> Outcome {
    let gpu = Gpu::start()?;
    let mut value = 0;
    ok!(cuCtxGetLimit(&mut value, 0));
    check!(value >= 512, "stack of {value} bytes");
    ok!(cuCtxGetLimit(&mut value, 2));
    check!(value >= MIB, "device heap of {value} bytes");
    fails!(cuCtxGetLimit(&mut value, 4711));
    let (mut least, mut greatest) = (-100, 100);
    ok!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest));
    check!(least >= greatest && least == 0, "priorities {least} to {greatest}");
    let mut version = 0;
    ok!(cuCtxGetApiVersion(gpu.context, &mut version));
    observe!("API version of the primary context {version}");
    Ok(())
}

/// Without a current context nothing is freed: INVALID_CONTEXT.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree, return values.
fn free_needs_a_current_context() -> Outcome {
    let gpu = Gpu::start()?;
    let (small, large) = (alloc(4096)?, alloc(4 * MIB)?);
    ok!(cuCtxSetCurrent(0));
    is!(cuMemFree_v2(small), INVALID_CONTEXT);
    is!(cuMemFree_v2(large), INVALID_CONTEXT);
    ok!(cuCtxSetCurrent(gpu.context));
    ok!(cuMemFree_v2(small));
    ok!(cuMemFree_v2(large));
    Ok(())
}

/// Memory of one context can be used from another of the same device, by unified addressing.
/// Source: CUDA C++ Programming Guide, Unified Virtual Address Space.
fn free_works_from_another_context() -> Outcome {
    let gpu = Gpu::start()?;
    let address = alloc(2 * MIB)?;
    let other = create()?;
    let code = cuMemFree_v2(address);
    observe!("cuMemFree of memory of the primary context, another current: {code:?}");
    if !code.is_ok() {
        ok!(cuCtxSetCurrent(gpu.context));
        ok!(cuMemFree_v2(address));
    }
    ok!(cuCtxDestroy_v2(other));
    Ok(())
}
