//! Events: state, timing, order across streams.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("events":
    a_new_event_is_complete,
    query_and_synchronize_follow_the_record,
    elapsed_time_measures_the_device,
    elapsed_time_needs_two_finished_timed_events,
    a_stream_waits_for_an_event_of_another,
    a_wait_is_for_the_record_before_it,
    waiting_for_an_unrecorded_event_does_nothing,
    destroying_a_pending_event_is_allowed,
    flags_are_checked,
    an_event_can_be_recorded_again,
);

const NO_TIMING: u32 = 2;
const LONG: Duration = Duration::from_millis(200);

/// An event that was never recorded is complete.
/// Source: NVIDIA CUDA Driver API, Event Management, cuEventQuery.
fn a_new_event_is_complete() -> Outcome {
    let _gpu = Gpu::start()?;
    let event = event(0)?;
    ok!(cuEventQuery(event));
    ok!(cuEventSynchronize(event));
    ok!(cuEventDestroy_v2(event));
    Ok(())
}

/// An event is complete when the work ahead of its record is.
/// Source: NVIDIA CUDA Driver API, Event Management, cuEventRecord, cuEventQuery.
fn query_and_synchronize_follow_the_record() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (stream, event) = (stream(NON_BLOCKING)?, event(NO_TIMING)?);
    ok!(kernels.spin(stream, LONG));
    ok!(cuEventRecord(event, stream));
    ok!(kernels.spin(stream, LONG));
    is!(cuEventQuery(event), NOT_READY);
    ok!(cuEventSynchronize(event));
    is!(cuStreamQuery(stream), NOT_READY);
    ok!(cuEventQuery(event));
    ok!(cuStreamSynchronize(stream));
    Ok(())
}

/// The time between two events is the device's time for the work between.
/// Source: NVIDIA CUDA Driver API, Event Management, cuEventElapsedTime.
fn elapsed_time_measures_the_device() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (stream, start, end) = (stream(NON_BLOCKING)?, event(0)?, event(0)?);
    ok!(cuEventRecord(start, stream));
    ok!(kernels.spin(stream, Duration::from_millis(50)));
    ok!(cuEventRecord(end, stream));
    ok!(cuEventSynchronize(end));
    let (mut there, mut back) = (0.0, 0.0);
    ok!(cuEventElapsedTime(&mut there, start, end));
    ok!(cuEventElapsedTime(&mut back, end, start));
    // Wide above: a busy machine may be late, a device is never early.
    check!((49.0..500.0).contains(&there), "50 ms of work took {there} ms");
    check!(back <= 0.0, "backwards {back} ms");
    Ok(())
}

/// Elapsed time is refused for events without timing, never recorded, or not yet complete.
/// Source: NVIDIA CUDA Driver API, Event Management, cuEventElapsedTime.
fn elapsed_time_needs_two_finished_timed_events() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let (timed, untimed, fresh, pending) = (event(0)?, event(NO_TIMING)?, event(0)?, event(0)?);
    let mut ms = 0.0;
    ok!(cuEventRecord(timed, stream));
    ok!(cuEventRecord(untimed, stream));
    ok!(cuStreamSynchronize(stream));
    is!(cuEventElapsedTime(&mut ms, timed, untimed), INVALID_HANDLE);
    is!(cuEventElapsedTime(&mut ms, timed, fresh), INVALID_HANDLE);
    ok!(kernels.spin(stream, LONG));
    ok!(cuEventRecord(pending, stream));
    is!(cuEventElapsedTime(&mut ms, timed, pending), NOT_READY);
    ok!(cuStreamSynchronize(stream));
    ok!(cuEventElapsedTime(&mut ms, timed, pending));
    Ok(())
}

/// cuStreamWaitEvent orders streams without the host.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamWaitEvent.
fn a_stream_waits_for_an_event_of_another() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (a, b, event) = (stream(NON_BLOCKING)?, stream(NON_BLOCKING)?, event(NO_TIMING)?);
    let (buffer, pinned) = (alloc(4 * MIB)?, Pinned::new(4 * MIB)?);
    for value in [0x11_u8, 0x22] {
        ok!(kernels.spin(a, LONG / 4));
        ok!(kernels.fill(a, buffer, MIB as u64, u32::from_le_bytes([value; 4])));
        ok!(cuEventRecord(event, a));
        let (code, time) = timed(|| cuStreamWaitEvent(b, event, 0));
        ok!(code);
        check!(time < LONG / 8, "cuStreamWaitEvent held the host for {time:?}");
        ok!(cuMemcpyDtoHAsync_v2(pinned.pointer(), buffer, 4 * MIB, b));
        ok!(cuStreamSynchronize(b));
        check!(pinned.all(value), "the copy did not wait for the kernel");
    }
    Ok(())
}

/// A wait is for the latest record at the time of the call; later records do not change it.
/// Source: NVIDIA CUDA Driver API, Event Management, cuEventRecord; Stream Management, cuStreamWaitEvent.
fn a_wait_is_for_the_record_before_it() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (a, b, event) = (stream(NON_BLOCKING)?, stream(NON_BLOCKING)?, event(NO_TIMING)?);
    let (buffer, pinned) = (alloc(4096)?, Pinned::new(4096)?);
    pinned.fill(8);
    ok!(cuEventRecord(event, a));
    ok!(cuStreamWaitEvent(b, event, 0));
    ok!(kernels.spin(a, LONG));
    ok!(cuEventRecord(event, a));
    ok!(cuMemcpyHtoDAsync_v2(buffer, pinned.pointer(), 4096, b));
    ok!(cuStreamSynchronize(b));
    is!(cuEventQuery(event), NOT_READY);
    ok!(cuStreamSynchronize(a));
    Ok(())
}

/// Waiting for an event that was never recorded does nothing.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamWaitEvent.
fn waiting_for_an_unrecorded_event_does_nothing() -> Outcome {
    let _gpu = Gpu::start()?;
    let (stream, event) = (stream(NON_BLOCKING)?, event(0)?);
    ok!(cuStreamWaitEvent(stream, event, 0));
    is!(poll(|| cuStreamQuery(stream), Duration::from_secs(5)), SUCCESS);
    Ok(())
}

/// An event may be destroyed before it is complete; who waits for it goes on waiting.
/// Source: NVIDIA CUDA Driver API, Event Management, cuEventDestroy.
fn destroying_a_pending_event_is_allowed() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (a, b, event) = (stream(NON_BLOCKING)?, stream(NON_BLOCKING)?, event(NO_TIMING)?);
    let (buffer, pinned) = (alloc(4096)?, Pinned::new(4096)?);
    pinned.fill(6);
    ok!(kernels.spin(a, LONG));
    ok!(kernels.fill(a, buffer, 1024, 1));
    ok!(cuEventRecord(event, a));
    ok!(cuStreamWaitEvent(b, event, 0));
    let (code, time) = timed(|| cuEventDestroy_v2(event));
    ok!(code);
    check!(time < LONG / 2, "destroying took {time:?}");
    ok!(cuMemcpyHtoDAsync_v2(buffer, pinned.pointer(), 4096, b));
    ok!(cuCtxSynchronize());
    check!(read_u32(buffer)? == 0x0606_0606, "the copy did not wait for the destroyed event");
    Ok(())
}

/// Unknown flags are refused; an event for other processes must be without timing.
/// Source: NVIDIA CUDA Driver API, Event Management, cuEventCreate.
fn flags_are_checked() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut event = 0;
    is!(cuEventCreate(&mut event, 0x100), INVALID_VALUE);
    fails!(cuEventCreate(&mut event, 4));
    ok!(cuEventCreate(&mut event, 1));
    Ok(())
}

/// Recording an event again replaces what it stood for.
/// Source: NVIDIA CUDA Driver API, Event Management, cuEventRecord.
fn an_event_can_be_recorded_again() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (stream, event) = (stream(NON_BLOCKING)?, event(NO_TIMING)?);
    for _ in 0..3 {
        ok!(kernels.spin(stream, LONG / 4));
        ok!(cuEventRecord(event, stream));
        is!(cuEventQuery(event), NOT_READY);
        ok!(cuEventSynchronize(event));
    }
    ok!(cuEventQuery(event));
    Ok(())
}
