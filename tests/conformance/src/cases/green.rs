//! Green contexts: parts of a device, used through its primary context.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("green":
    resources_are_multiprocessors,
    splits_are_even_and_keep_the_minimum,
    parts_of_a_split_need_a_context_to_be_split_again,
    a_description_is_of_one_split,
    the_default_stream_is_required,
    it_keeps_the_primary_context,
    it_is_current_by_its_context_only,
    memory_is_the_primary_contexts,
    memory_goes_with_the_last_use_of_the_primary_context,
    its_own_memory_comes_back,
    streams_know_where_they_are_from,
    streams_are_over_with_it,
    events_order_it_with_others,
    synchronizing_the_primary_waits_for_it,
);

const SM: u32 = 1;
const DEFAULT_STREAM: u32 = 1;
const NON_BLOCKING: u32 = 1;

fn whole(gpu: &Gpu) -> Result<DevResource, Stop> {
    let mut all = DevResource::default();
    let code = cuDeviceGetDevResource(gpu.device, &mut all, SM);
    if code == Code::ABSENT || code == Code::NOT_SUPPORTED {
        skip!("the driver has no green contexts");
    }
    ok!(code);
    Ok(all)
}

/// A green context of the whole device, and what `cuCtxFromGreenCtx` makes of it.
fn make(gpu: &Gpu) -> Result<(Handle, Handle), Stop> {
    let all = whole(gpu)?;
    let (mut description, mut green, mut context) = (0, 0, 0);
    ok!(cuDevResourceGenerateDesc(&mut description, &all, 1));
    ok!(cuGreenCtxCreate(&mut green, description, gpu.device, DEFAULT_STREAM));
    ok!(cuCtxFromGreenCtx(&mut context, green));
    Ok((green, context))
}

/// A device has multiprocessors to give away, and nothing of another type that does not exist.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuDeviceGetDevResource.
fn resources_are_multiprocessors() -> Outcome {
    let gpu = Gpu::start()?;
    let all = whole(&gpu)?;
    let count = gpu.attribute(16)?;
    check!(all.kind == SM && i64::from(all.count) == i64::from(count), "{} of {count}", all.count);
    let mut other = DevResource::default();
    is!(cuDeviceGetDevResource(gpu.device, &mut other, 77), INVALID_RESOURCE_TYPE);
    ok!(cuCtxGetDevResource(gpu.context, &mut other, SM));
    check!(other.count == all.count, "the primary context has {} of {}", other.count, all.count);
    Ok(())
}

/// A split makes groups of one size, at least the one asked for, and puts what is left into the remainder.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuDevSmResourceSplitByCount.
fn splits_are_even_and_keep_the_minimum() -> Outcome {
    let gpu = Gpu::start()?;
    let all = whole(&gpu)?;
    let (mut count, none) = (0, std::ptr::null_mut());
    ok!(cuDevSmResourceSplitByCount(none, &mut count, &all, none, 0, 9));
    check!(count >= 1 && count * 9 <= all.count, "{count} groups of 9 in {}", all.count);
    let mut groups = vec![DevResource::default(); count as usize];
    let mut rest = DevResource::default();
    ok!(cuDevSmResourceSplitByCount(groups.as_mut_ptr(), &mut count, &all, &mut rest, 0, 9));
    let size = groups[0].count;
    check!(size >= 9 && groups.iter().all(|group| group.count == size && group.kind == SM), "groups of {size}");
    check!(size * count + rest.count == all.count, "{count} of {size} and {} are not {}", rest.count, all.count);
    let too_many = cuDevSmResourceSplitByCount(none, &mut count, &all, none, 0, all.count + 1);
    check!(!too_many.is_ok(), "a group of more than there are: {too_many:?}");
    Ok(())
}

/// What a split made cannot be split again; what the green context made of it has, can.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuDevSmResourceSplitByCount.
fn parts_of_a_split_need_a_context_to_be_split_again() -> Outcome {
    let gpu = Gpu::start()?;
    let all = whole(&gpu)?;
    let (mut count, mut group, none) = (1, DevResource::default(), std::ptr::null_mut());
    ok!(cuDevSmResourceSplitByCount(&mut group, &mut count, &all, none, 0, 32));
    let code = cuDevSmResourceSplitByCount(none, &mut count, &group, none, 0, 8);
    check!(!code.is_ok(), "a group was split: {code:?}");
    let (mut description, mut green, mut own) = (0, 0, DevResource::default());
    ok!(cuDevResourceGenerateDesc(&mut description, &group, 1));
    ok!(cuGreenCtxCreate(&mut green, description, gpu.device, DEFAULT_STREAM));
    ok!(cuGreenCtxGetDevResource(green, &mut own, SM));
    check!(own.count == group.count, "{} of {}", own.count, group.count);
    ok!(cuDevSmResourceSplitByCount(none, &mut count, &own, none, 0, 8));
    check!(count >= 1, "no group of 8 in {}", own.count);
    ok!(cuGreenCtxDestroy(green));
    Ok(())
}

/// Several resources make a description only if they come from the same split.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuDevResourceGenerateDesc.
fn a_description_is_of_one_split() -> Outcome {
    let gpu = Gpu::start()?;
    let all = whole(&gpu)?;
    let mut description = 0;
    let mut groups = [DevResource::default(); 2];
    let (mut count, none) = (2, std::ptr::null_mut());
    ok!(cuDevSmResourceSplitByCount(groups.as_mut_ptr(), &mut count, &all, none, 0, 16));
    ok!(cuDevResourceGenerateDesc(&mut description, groups.as_ptr(), 2));
    // Driver 580 takes them all the same.
    observe!("of two splits: {:?}", cuDevResourceGenerateDesc(&mut description, [groups[0], all].as_ptr(), 2));
    Ok(())
}

/// The flag CU_GREEN_CTX_DEFAULT_STREAM is required.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuGreenCtxCreate.
fn the_default_stream_is_required() -> Outcome {
    let gpu = Gpu::start()?;
    let all = whole(&gpu)?;
    let (mut description, mut green) = (0, 0);
    ok!(cuDevResourceGenerateDesc(&mut description, &all, 1));
    is!(cuGreenCtxCreate(&mut green, description, gpu.device, 0), INVALID_VALUE);
    Ok(())
}

/// A green context retains the primary context, and releases it when it is destroyed.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuGreenCtxCreate.
fn it_keeps_the_primary_context() -> Outcome {
    let gpu = Gpu::start()?;
    let (green, _) = make(&gpu)?;
    let active = || {
        let (mut flags, mut active) = (0, 0);
        cuDevicePrimaryCtxGetState(gpu.device, &mut flags, &mut active);
        active != 0
    };
    ok!(cuDevicePrimaryCtxRelease_v2(gpu.device));
    check!(active(), "not active with a green context left");
    ok!(cuGreenCtxDestroy(green));
    check!(!active(), "active after the last use");
    fails!(cuGreenCtxDestroy(green));
    Ok(())
}

/// It is made current by the context that cuCtxFromGreenCtx gives; as a context it cannot be destroyed.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuGreenCtxCreate, cuCtxFromGreenCtx.
fn it_is_current_by_its_context_only() -> Outcome {
    let gpu = Gpu::start()?;
    let (green, context) = make(&gpu)?;
    let (mut current, mut popped, mut device) = (0, 0, -1);
    ok!(cuCtxGetCurrent(&mut current));
    check!(current == gpu.context, "creating made it current");
    ok!(cuCtxPushCurrent_v2(context));
    ok!(cuCtxGetCurrent(&mut current));
    check!(current == context && context != gpu.context, "{current:x} is current, not {context:x}");
    ok!(cuCtxGetDevice(&mut device));
    check!(device == gpu.device, "device {device}");
    ok!(cuCtxPopCurrent_v2(Some(&mut popped)));
    check!(popped == context, "popped {popped:x}");
    let destroyed = cuCtxDestroy_v2(context);
    check!(!destroyed.is_ok(), "destroyed as a context: {destroyed:?}");
    // What is done with its context afterwards is undefined: driver 580 aborts the process.
    ok!(cuGreenCtxDestroy(green));
    Ok(())
}

/// The context is the primary one with other resources: what is allocated while it is current outlives it.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuCtxFromGreenCtx.
fn memory_is_the_primary_contexts() -> Outcome {
    let gpu = Gpu::start()?;
    let (green, context) = make(&gpu)?;
    ok!(cuCtxSetCurrent(context));
    let address = alloc(4 * MIB)?;
    let data = pattern(4 * MIB, 5);
    ok!(cuMemcpyHtoD_v2(address, data.as_ptr().cast(), data.len()));
    ok!(cuCtxSetCurrent(gpu.context));
    ok!(cuGreenCtxDestroy(green));
    check!(read(address, data.len())? == data, "other bytes after the green context ended");
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// With the primary context, which a green context may be the last to use, goes what was allocated.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuGreenCtxDestroy; Primary Context Management.
fn memory_goes_with_the_last_use_of_the_primary_context() -> Outcome {
    let gpu = Gpu::start()?;
    let before = quiet()?;
    let (green, context) = make(&gpu)?;
    ok!(cuCtxSetCurrent(context));
    let _lost = alloc(256 * MIB)?;
    ok!(cuDevicePrimaryCtxRelease_v2(gpu.device));
    check!(free_bytes()? + 256 * MIB <= before + 2 * MIB, "the allocation is not seen in the free figure");
    ok!(cuGreenCtxDestroy(green));
    let _gpu = Gpu::start()?;
    let after = wait_free(before - 64 * MIB, Duration::from_secs(3))?;
    check!(after + 64 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// What green contexts take themselves is given back when they are destroyed; driver 580 keeps it, 4 to 6 MiB for each.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuGreenCtxDestroy.
fn its_own_memory_comes_back() -> Outcome {
    let gpu = Gpu::start()?;
    // What the first one takes once may stay.
    ok!(cuGreenCtxDestroy(make(&gpu)?.0));
    let mut before = quiet()?;
    for _ in 0..3 {
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(make(&gpu)?.0);
        }
        observe!("four green contexts take {} bytes", before.saturating_sub(free_bytes()?));
        for green in held {
            ok!(cuGreenCtxDestroy(green));
        }
        let after = free_bytes()?;
        observe!("and keep {} when destroyed", before.saturating_sub(after));
        check!(!gpu.is_simulated()? || after + 2 * MIB >= before, "free was {before}, is {after}");
        before = after;
    }
    Ok(())
}

/// A stream made by cuGreenCtxStreamCreate, whatever is current, or while the green context is current is of
/// it; NON_BLOCKING is required of the first.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuStreamGetGreenCtx, cuGreenCtxStreamCreate; cuStreamGetCtx_v2.
fn streams_know_where_they_are_from() -> Outcome {
    let gpu = Gpu::start()?;
    let (green, context) = make(&gpu)?;
    let of = |stream: Handle| -> Result<Handle, Stop> {
        let mut found = 1;
        ok!(cuStreamGetGreenCtx(stream, &mut found));
        Ok(found)
    };
    let (mut plain, mut within, mut explicit) = (0, 0, 0);
    ok!(cuStreamCreate(Some(&mut plain), NON_BLOCKING));
    check!(of(plain)? == 0 && of(0)? == 0, "a plain stream is of a green context");
    ok!(cuCtxSetCurrent(context));
    ok!(cuStreamCreate(Some(&mut within), NON_BLOCKING));
    check!(of(within)? == green && of(0)? == green, "streams made in a green context are not of it");
    ok!(cuCtxSetCurrent(gpu.context));
    check!(of(plain)? == 0 && of(0)? == 0, "a plain stream changed sides");
    let code = cuGreenCtxStreamCreate(&mut explicit, green, NON_BLOCKING, 0);
    if code.is_ok() {
        check!(of(explicit)? == green, "made for a green context and not of it");
        let (mut regular, mut found) = (0, 0);
        ok!(cuStreamGetCtx(explicit, &mut regular));
        check!(regular == context, "cuStreamGetCtx gives {regular:x}");
        ok!(cuStreamGetCtx_v2(explicit, &mut regular, &mut found));
        check!(regular == gpu.context && found == green, "cuStreamGetCtx_v2 gives {regular:x}, {found:x}");
        let mut blocking = 0;
        is!(cuGreenCtxStreamCreate(&mut blocking, green, 0, 0), INVALID_VALUE);
        ok!(cuStreamDestroy_v2(explicit));
    } else {
        observe!("cuGreenCtxStreamCreate: {code:?}");
    }
    for stream in [plain, within] {
        ok!(cuStreamDestroy_v2(stream));
    }
    ok!(cuGreenCtxDestroy(green));
    Ok(())
}

/// Streams of a green context that was destroyed answer CONTEXT_IS_DESTROYED, also to cuStreamDestroy.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuGreenCtxDestroy.
fn streams_are_over_with_it() -> Outcome {
    let gpu = Gpu::start()?;
    let (green, context) = make(&gpu)?;
    let mut stream = 0;
    ok!(cuCtxSetCurrent(context));
    ok!(cuStreamCreate(Some(&mut stream), NON_BLOCKING));
    ok!(cuCtxSetCurrent(gpu.context));
    ok!(cuGreenCtxDestroy(green));
    is!(cuStreamSynchronize(stream), CONTEXT_IS_DESTROYED);
    is!(cuStreamDestroy_v2(stream), CONTEXT_IS_DESTROYED);
    Ok(())
}

/// An event recorded on a green context stands for all its work, and another green context can wait for it.
/// Source: NVIDIA CUDA Driver API, Green Contexts, cuGreenCtxRecordEvent, cuGreenCtxWaitEvent.
fn events_order_it_with_others() -> Outcome {
    let gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (green, context) = make(&gpu)?;
    let (other, other_context) = make(&gpu)?;
    let (mut stream, mut after, mut event, mut last) = (0, 0, 0, 0);
    ok!(cuEventCreate(&mut event, 2));
    ok!(cuEventCreate(&mut last, 2));
    ok!(cuCtxSetCurrent(other_context));
    ok!(cuStreamCreate(Some(&mut after), NON_BLOCKING));
    ok!(cuCtxSetCurrent(context));
    ok!(cuStreamCreate(Some(&mut stream), NON_BLOCKING));
    ok!(kernels.spin(stream, Duration::from_millis(300)));
    ok!(cuGreenCtxRecordEvent(green, event));
    is!(cuEventQuery(event), NOT_READY);
    ok!(cuGreenCtxWaitEvent(other, event));
    ok!(cuEventRecord(last, after));
    is!(cuEventQuery(last), NOT_READY);
    ok!(cuEventSynchronize(last));
    ok!(cuEventQuery(event));
    for stream in [stream, after] {
        ok!(cuStreamDestroy_v2(stream));
    }
    ok!(cuCtxSetCurrent(gpu.context));
    ok!(cuGreenCtxDestroy(green));
    ok!(cuGreenCtxDestroy(other));
    Ok(())
}

/// Synchronising a primary context waits for its green contexts; one of those waits for its own work only.
/// Source: NVIDIA CUDA Driver API, Context Management, cuCtxSynchronize.
fn synchronizing_the_primary_waits_for_it() -> Outcome {
    let gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (green, context) = make(&gpu)?;
    let (mut own, mut plain) = (0, 0);
    ok!(cuStreamCreate(Some(&mut plain), NON_BLOCKING));
    ok!(cuCtxSetCurrent(context));
    ok!(cuStreamCreate(Some(&mut own), NON_BLOCKING));
    ok!(kernels.spin(own, Duration::from_millis(200)));
    ok!(cuCtxSetCurrent(gpu.context));
    ok!(cuCtxSynchronize());
    ok!(cuStreamQuery(own));
    ok!(kernels.spin(plain, Duration::from_millis(400)));
    ok!(cuCtxSetCurrent(context));
    ok!(cuCtxSynchronize());
    is!(cuStreamQuery(plain), NOT_READY);
    ok!(cuStreamSynchronize(plain));
    for stream in [own, plain] {
        ok!(cuStreamDestroy_v2(stream));
    }
    ok!(cuCtxSetCurrent(gpu.context));
    ok!(cuGreenCtxDestroy(green));
    Ok(())
}
