//! One stream by itself: creation, order, queries, callbacks, memory operations, destruction.

use std::ffi::c_void;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("streams":
    creation_takes_known_flags,
    creation_needs_a_place_for_the_answer,
    flags_priority_and_context_are_told,
    work_runs_in_order,
    a_query_tells_whether_work_is_left,
    launches_return_before_the_work_is_done,
    synchronize_waits_for_its_stream,
    destroying_lets_the_work_finish,
    host_functions_run_in_order,
    host_functions_may_not_call_cuda,
    callbacks_get_the_status,
    a_waiting_stream_goes_on_when_the_value_is_written,
    wait_conditions,
    values_of_64_bits,
    a_full_queue_loses_nothing,
);

/// Flags are DEFAULT or NON_BLOCKING.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamCreate.
fn creation_takes_known_flags() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut stream = 0;
    for flags in [0, 1] {
        ok!(cuStreamCreate(Some(&mut stream), flags));
        ok!(cuStreamDestroy_v2(stream));
    }
    is!(cuStreamCreate(Some(&mut stream), 0xff), INVALID_VALUE);
    Ok(())
}

/// A null place for the stream is INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamCreate (returned codes).
fn creation_needs_a_place_for_the_answer() -> Outcome {
    let _gpu = Gpu::start()?;
    is!(cuStreamCreate(None, 0), INVALID_VALUE);
    Ok(())
}

/// A stream tells its flags, its priority clamped to the range, its context, and an id of its own.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamGetFlags, GetPriority, GetCtx, GetId.
fn flags_priority_and_context_are_told() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut least, mut greatest) = (0, 0);
    ok!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest));
    let (mut a, mut b) = (0, 0);
    ok!(cuStreamCreateWithPriority(&mut a, NON_BLOCKING, greatest));
    ok!(cuStreamCreateWithPriority(&mut b, BLOCKING, greatest - 100));
    let (mut flags, mut priority, mut context, mut id, mut other) = (9, 9, 0, 0, 0);
    ok!(cuStreamGetFlags(a, &mut flags));
    ok!(cuStreamGetPriority(a, &mut priority));
    ok!(cuStreamGetCtx(a, &mut context));
    check!(flags == 1 && priority == greatest && context == gpu.context, "{flags} {priority} {context:#x}");
    ok!(cuStreamGetPriority(b, &mut priority));
    check!(priority == greatest, "priority {priority} is not clamped to {greatest}");
    ok!(cuStreamGetFlags(b, &mut flags));
    check!(flags == 0, "flags {flags}");
    ok!(cuStreamGetId(a, &mut id));
    ok!(cuStreamGetId(b, &mut other));
    check!(id != other, "two streams have id {id}");
    ok!(cuStreamGetCtx(0, &mut context));
    check!(context == gpu.context, "the legacy stream's context is {context:#x}");
    Ok(())
}

/// Within a stream each piece of work starts when the one before has ended.
/// Source: NVIDIA CUDA Driver API, Stream synchronization behavior.
fn work_runs_in_order() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let (stream, words) = (stream(NON_BLOCKING)?, MIB as u64);
    let (a, b) = (alloc(4 * MIB)?, alloc(4 * MIB)?);
    let pinned = Pinned::new(4 * MIB)?;
    for round in 1..=20_u32 {
        ok!(kernels.fill(stream, a, words, 0x0101_0101 * (round % 7)));
        ok!(kernels.fill(stream, a, words, 0x0101_0101 * (round % 200)));
        ok!(cuMemcpyDtoDAsync_v2(b, a, 4 * MIB, stream));
        ok!(cuMemsetD8Async(a, 0xff, 4 * MIB, stream));
        ok!(cuMemcpyDtoHAsync_v2(pinned.pointer(), b, 4 * MIB, stream));
        ok!(cuStreamSynchronize(stream));
        check!(pinned.all(u8::try_from(round % 200).unwrap_or(0)), "round {round}: work overtook other work");
    }
    Ok(())
}

/// cuStreamQuery answers NOT_READY while work is left, then success.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamQuery.
fn a_query_tells_whether_work_is_left() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    ok!(cuStreamQuery(stream));
    ok!(kernels.spin(stream, Duration::from_millis(100)));
    is!(cuStreamQuery(stream), NOT_READY);
    is!(poll(|| cuStreamQuery(stream), Duration::from_secs(5)), SUCCESS);
    Ok(())
}

/// Launching is asynchronous.
/// Source: CUDA C++ Programming Guide, Asynchronous Concurrent Execution.
fn launches_return_before_the_work_is_done() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let (code, time) = timed(|| kernels.spin(stream, Duration::from_millis(300)));
    ok!(code);
    check!(time < Duration::from_millis(150), "launching 300 ms of work took {time:?}");
    let (code, time) = timed(|| cuStreamSynchronize(stream));
    ok!(code);
    check!(time > Duration::from_millis(150), "300 ms of work were done after {time:?}");
    Ok(())
}

/// cuStreamSynchronize waits for its own stream and no other.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamSynchronize.
fn synchronize_waits_for_its_stream() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (busy, other) = (stream(NON_BLOCKING)?, stream(NON_BLOCKING)?);
    let (pinned, device) = (Pinned::new(MIB)?, alloc(MIB)?);
    pinned.fill(1);
    ok!(kernels.spin(busy, Duration::from_millis(300)));
    ok!(cuMemcpyHtoDAsync_v2(device, pinned.pointer(), MIB, other));
    ok!(cuStreamSynchronize(other));
    is!(cuStreamQuery(busy), NOT_READY);
    ok!(cuStreamSynchronize(busy));
    ok!(cuStreamQuery(busy));
    Ok(())
}

/// Destroying a stream with work left returns at once, and the work is done.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamDestroy.
fn destroying_lets_the_work_finish() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let address = alloc(MIB)?;
    ok!(cuMemsetD8_v2(address, 0, MIB));
    ok!(cuCtxSynchronize());
    ok!(kernels.spin(stream, Duration::from_millis(300)));
    ok!(kernels.fill(stream, address, (MIB / 4) as u64, 0x3333_3333));
    let (code, time) = timed(|| cuStreamDestroy_v2(stream));
    ok!(code);
    check!(time < Duration::from_millis(150), "destroying beside 300 ms of work took {time:?}");
    ok!(cuCtxSynchronize());
    check!(read(address, MIB)?.iter().all(|b| *b == 0x33), "the work was dropped");
    Ok(())
}

static SEEN: AtomicU32 = AtomicU32::new(u32::MAX);
static INSIDE: AtomicI32 = AtomicI32::new(i32::MIN);

extern "C" fn look(user: *mut c_void) {
    // SAFETY: the case passes the address of pinned memory that lives as long as the process.
    let value = unsafe { std::ptr::read_volatile(user.cast::<u32>()) };
    SEEN.store(value, SeqCst);
}

extern "C" fn call_cuda(_user: *mut c_void) {
    let (mut free, mut total) = (0, 0);
    INSIDE.store(cuMemGetInfo_v2(&mut free, &mut total).0, SeqCst);
}

extern "C" fn callback(_stream: Handle, status: i32, _user: *mut c_void) {
    INSIDE.store(status, SeqCst);
}

/// A host function runs after the work before it and before the work after it.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchHostFunc.
fn host_functions_run_in_order() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let pinned = Pinned::new(4096)?;
    pinned.fill(0);
    let at = pinned.address as u64;
    ok!(kernels.spin(stream, Duration::from_millis(50)));
    ok!(kernels.fill(stream, at, 4, 41));
    ok!(cuLaunchHostFunc(stream, look, pinned.address as *mut c_void));
    ok!(kernels.fill(stream, at, 4, 42));
    check!(SEEN.load(SeqCst) == u32::MAX, "the host function ran before the work ahead of it");
    ok!(cuStreamSynchronize(stream));
    check!(SEEN.load(SeqCst) == 41, "the host function saw {}", SEEN.load(SeqCst));
    Ok(())
}

/// A host function must not call CUDA; a driver may refuse it with NOT_PERMITTED.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchHostFunc ("this is not required").
fn host_functions_may_not_call_cuda() -> Outcome {
    let _gpu = Gpu::start()?;
    let stream = stream(NON_BLOCKING)?;
    ok!(cuLaunchHostFunc(stream, call_cuda, std::ptr::null_mut()));
    ok!(cuStreamSynchronize(stream));
    let inside = Code(INSIDE.load(SeqCst));
    observe!("cuMemGetInfo inside a host function: {inside:?}");
    check!(inside.0 != i32::MIN, "the host function did not run");
    ok!(cuCtxSynchronize());
    Ok(())
}

/// A stream callback gets the stream's status when the work before it is done; flags must be 0.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamAddCallback.
fn callbacks_get_the_status() -> Outcome {
    let _gpu = Gpu::start()?;
    let stream = stream(NON_BLOCKING)?;
    is!(cuStreamAddCallback(stream, callback, std::ptr::null_mut(), 1), INVALID_VALUE);
    ok!(cuStreamAddCallback(stream, callback, std::ptr::null_mut(), 0));
    ok!(cuStreamSynchronize(stream));
    check!(INSIDE.load(SeqCst) == 0, "the callback got {}", INSIDE.load(SeqCst));
    Ok(())
}

/// cuStreamWaitValue32 holds a stream until the value is there; cuStreamWriteValue32 puts it there.
/// Source: NVIDIA CUDA Driver API, Stream Memory Operations.
fn a_waiting_stream_goes_on_when_the_value_is_written() -> Outcome {
    let _gpu = Gpu::start()?;
    let (waits, writes) = (stream(NON_BLOCKING)?, stream(NON_BLOCKING)?);
    let flag = alloc(4096)?;
    ok!(cuMemsetD8_v2(flag, 0, 4096));
    ok!(cuCtxSynchronize());
    ok!(cuStreamWaitValue32_v2(waits, flag, 1, 1));
    ok!(cuMemsetD8Async(flag + 1024, 0x44, 16, waits));
    std::thread::sleep(Duration::from_millis(50));
    is!(cuStreamQuery(waits), NOT_READY);
    ok!(cuStreamWriteValue32_v2(writes, flag, 1, 0));
    is!(poll(|| cuStreamQuery(waits), Duration::from_secs(5)), SUCCESS);
    check!(read(flag + 1024, 16)? == [0x44; 16], "the work after the wait is missing");
    Ok(())
}

/// GEQ, EQ and AND compare as documented; the host's write to pinned memory is seen too.
/// Source: NVIDIA CUDA Driver API, Stream Memory Operations, CUstreamWaitValue_flags.
fn wait_conditions() -> Outcome {
    let _gpu = Gpu::start()?;
    let stream = stream(NON_BLOCKING)?;
    let pinned = Pinned::new(4096)?;
    pinned.fill(0);
    let word = pinned.address as *mut u32;
    for (flags, value, before, after) in [(0, 5, 4, 6), (1, 5, 6, 5), (2, 0b100, 0b011, 0b110)] {
        // SAFETY: pinned memory of the driver, 4096 bytes; the device only reads this word.
        unsafe { std::ptr::write_volatile(word, before) };
        ok!(cuStreamWaitValue32_v2(stream, pinned.address as u64, value, flags));
        std::thread::sleep(Duration::from_millis(20));
        is!(cuStreamQuery(stream), NOT_READY);
        // SAFETY: as above.
        unsafe { std::ptr::write_volatile(word, after) };
        is!(poll(|| cuStreamQuery(stream), Duration::from_secs(5)), SUCCESS);
    }
    Ok(())
}

/// The same with 64 bits, where the device can.
/// Source: NVIDIA CUDA Driver API, Stream Memory Operations, cuStreamWaitValue64.
fn values_of_64_bits() -> Outcome {
    let gpu = Gpu::start()?;
    gpu.needs(93, "64-bit stream memory operations")?;
    let (waits, writes) = (stream(NON_BLOCKING)?, stream(NON_BLOCKING)?);
    let flag = alloc(4096)?;
    ok!(cuMemsetD8_v2(flag, 0, 4096));
    ok!(cuCtxSynchronize());
    let value = 0x1_0000_0002_u64;
    ok!(cuStreamWaitValue64_v2(waits, flag, value, 1));
    ok!(cuStreamWriteValue64_v2(writes, flag, 2, 0));
    ok!(cuStreamSynchronize(writes));
    is!(cuStreamQuery(waits), NOT_READY);
    ok!(cuStreamWriteValue64_v2(writes, flag, value, 0));
    is!(poll(|| cuStreamQuery(waits), Duration::from_secs(5)), SUCCESS);
    Ok(())
}

/// More launches than the queue is deep block the caller and lose none.
/// Source: reports (a pending launch queue of about 1024); each launch must run once.
fn a_full_queue_loses_nothing() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let (data, sum) = (alloc(4096)?, alloc(4096)?);
    ok!(cuMemsetD8_v2(data, 0, 4096));
    ok!(cuMemsetD8_v2(sum, 0, 4096));
    ok!(cuMemsetD32_v2(data, 1, 1));
    ok!(cuCtxSynchronize());
    ok!(kernels.spin(stream, Duration::from_millis(100)));
    let n = 3000_u64;
    for _ in 0..n {
        let args = [Arg::U64(data), Arg::U64(1), Arg::U64(sum)];
        ok!(launch(kernels.checksum, 1, 32, stream, &args));
    }
    ok!(cuStreamSynchronize(stream));
    let got = u64::from(read_u32(sum)?) | u64::from(read_u32(sum + 4)?) << 32;
    check!(got == n, "{n} launches added up to {got}");
    Ok(())
}
