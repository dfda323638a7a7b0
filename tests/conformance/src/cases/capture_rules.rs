//! Stream capture: what is forbidden meanwhile, to whom, and what it does to the capture.

use std::time::Duration;

use super::capture::{GLOBAL, RELAXED, Setup, THREAD_LOCAL, end, setup, status};
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("capture_rules":
    the_legacy_stream_cannot_be_captured,
    synchronizing_a_capturing_stream_breaks_the_capture,
    querying_a_capturing_stream_is_refused,
    synchronizing_the_context_breaks_the_capture,
    the_legacy_stream_breaks_a_blocking_capture,
    non_blocking_captures_and_the_legacy_stream,
    unsafe_calls_fail_in_the_capturing_thread,
    a_global_capture_binds_other_threads,
    a_thread_local_capture_leaves_other_threads_alone,
    a_relaxed_capture_forbids_nothing_unsafe,
    a_relaxed_thread_is_not_bound,
    the_mode_is_exchanged,
    ending_is_for_the_thread_that_began,
    a_relaxed_capture_may_end_elsewhere,
    ending_without_a_capture_is_refused,
    forks_must_be_joined,
    only_the_origin_ends_a_capture,
    captured_events_cannot_be_asked,
    events_from_outside_do_not_reach_in,
    an_abandoned_capture_leaves_the_process_usable,
);

fn begin(s: &Setup, mode: i32) -> Outcome {
    ok!(cuStreamBeginCapture_v2(s.stream, mode));
    Ok(())
}

/// Ends a capture that something broke: it says INVALIDATED and gives no graph.
fn ends_broken(stream: Handle) -> Outcome {
    check!(status(stream)? == 2, "status {} after the capture was broken", status(stream)?);
    let mut graph = 1;
    is!(cuStreamEndCapture(stream, &mut graph), STREAM_CAPTURE_INVALIDATED);
    check!(graph == 0, "a broken capture gave a graph");
    check!(status(stream)? == 0, "still capturing after the end");
    Ok(())
}

fn try_alloc() -> Code {
    let mut address = 0;
    let code = cuMemAlloc_v2(Some(&mut address), MIB);
    if code.is_ok() {
        let _ = cuMemFree_v2(address);
    }
    code
}

/// The legacy stream cannot be captured.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamBeginCapture.
fn the_legacy_stream_cannot_be_captured() -> Outcome {
    let s = setup()?;
    is!(cuStreamBeginCapture_v2(0, RELAXED), STREAM_CAPTURE_UNSUPPORTED);
    is!(cuStreamBeginCapture_v2(1, RELAXED), STREAM_CAPTURE_UNSUPPORTED);
    ok!(cuStreamSynchronize(s.stream));
    Ok(())
}

/// Synchronising a capturing stream fails and breaks the capture.
/// Source: CUDA C++ Programming Guide, CUDA Graphs, Prohibited and Unhandled Operations.
fn synchronizing_a_capturing_stream_breaks_the_capture() -> Outcome {
    let s = setup()?;
    begin(&s, RELAXED)?;
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    is!(cuStreamSynchronize(s.stream), STREAM_CAPTURE_UNSUPPORTED);
    ends_broken(s.stream)
}

/// Querying a capturing stream fails.
/// Source: CUDA C++ Programming Guide, CUDA Graphs, Prohibited and Unhandled Operations.
fn querying_a_capturing_stream_is_refused() -> Outcome {
    let s = setup()?;
    begin(&s, RELAXED)?;
    is!(cuStreamQuery(s.stream), STREAM_CAPTURE_UNSUPPORTED);
    observe!("status after the query: {}", status(s.stream)?);
    let mut graph = 0;
    let _ = cuStreamEndCapture(s.stream, &mut graph);
    ok!(cuStreamQuery(s.stream));
    Ok(())
}

/// Synchronising a context with a capturing stream fails and breaks the capture.
/// Source: CUDA C++ Programming Guide, CUDA Graphs, Prohibited and Unhandled Operations (broader handles).
fn synchronizing_the_context_breaks_the_capture() -> Outcome {
    let s = setup()?;
    begin(&s, RELAXED)?;
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    fails!(cuCtxSynchronize());
    ends_broken(s.stream)?;
    ok!(cuCtxSynchronize());
    Ok(())
}

/// While a blocking stream captures, using the legacy stream is an implicit dependency, and breaks it.
/// Source: CUDA C++ Programming Guide, CUDA Graphs, Prohibited and Unhandled Operations (legacy stream).
fn the_legacy_stream_breaks_a_blocking_capture() -> Outcome {
    let mut s = setup()?;
    s.stream = stream(BLOCKING)?;
    begin(&s, RELAXED)?;
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    is!(s.kernels.fill(0, s.buffer, 16, 2), STREAM_CAPTURE_IMPLICIT);
    ends_broken(s.stream)?;
    ok!(s.kernels.fill(0, s.buffer, 16, 2));
    ok!(cuCtxSynchronize());
    Ok(())
}

/// A non-blocking stream's capture has no implicit dependency on the legacy stream.
/// Source: CUDA C++ Programming Guide, CUDA Graphs, Prohibited and Unhandled Operations; reported, then that the
/// capture ends well.
fn non_blocking_captures_and_the_legacy_stream() -> Outcome {
    let s = setup()?;
    begin(&s, RELAXED)?;
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    ok!(s.kernels.fill(0, s.buffer + 1024, 16, 2));
    check!(status(s.stream)? == 1, "status {}", status(s.stream)?);
    let _graph = end(s.stream)?;
    ok!(cuCtxSynchronize());
    check!(read_u32(s.buffer + 1024)? == 2, "the legacy stream's kernel did not run");
    Ok(())
}

/// cuMemAlloc is potentially unsafe: it fails in a thread that captures in GLOBAL or THREAD_LOCAL mode.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamBeginCapture, cuThreadExchangeStreamCaptureMode.
fn unsafe_calls_fail_in_the_capturing_thread() -> Outcome {
    for mode in [GLOBAL, THREAD_LOCAL] {
        let s = setup()?;
        begin(&s, mode)?;
        ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
        is!(try_alloc(), STREAM_CAPTURE_UNSUPPORTED);
        observe!("mode {mode}: status after the refused allocation: {}", status(s.stream)?);
        let mut graph = 0;
        let _ = cuStreamEndCapture(s.stream, &mut graph);
        ok!(try_alloc());
    }
    Ok(())
}

/// A GLOBAL capture forbids unsafe calls to every thread whose mode is GLOBAL, as it is at first.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuThreadExchangeStreamCaptureMode.
fn a_global_capture_binds_other_threads() -> Outcome {
    let s = setup()?;
    begin(&s, GLOBAL)?;
    on_thread(s.context, || {
        is!(try_alloc(), STREAM_CAPTURE_UNSUPPORTED);
        Ok(())
    })?;
    let mut graph = 0;
    let _ = cuStreamEndCapture(s.stream, &mut graph);
    on_thread(s.context, || {
        ok!(try_alloc());
        Ok(())
    })
}

/// A THREAD_LOCAL capture binds its own thread only.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuThreadExchangeStreamCaptureMode.
fn a_thread_local_capture_leaves_other_threads_alone() -> Outcome {
    let s = setup()?;
    begin(&s, THREAD_LOCAL)?;
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    on_thread(s.context, || {
        ok!(try_alloc());
        Ok(())
    })?;
    let _graph = end(s.stream)?;
    Ok(())
}

/// A RELAXED capture forbids no unsafe call, not even in its own thread.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamBeginCapture.
fn a_relaxed_capture_forbids_nothing_unsafe() -> Outcome {
    let s = setup()?;
    begin(&s, RELAXED)?;
    let mut address = 0;
    ok!(cuMemAlloc_v2(Some(&mut address), MIB));
    check!(status(s.stream)? == 1, "status {}", status(s.stream)?);
    let _graph = end(s.stream)?;
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// A thread in RELAXED mode may call unsafe functions while another captures in GLOBAL mode.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuThreadExchangeStreamCaptureMode.
fn a_relaxed_thread_is_not_bound() -> Outcome {
    let s = setup()?;
    begin(&s, GLOBAL)?;
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    on_thread(s.context, || {
        let mut mode = RELAXED;
        ok!(cuThreadExchangeStreamCaptureMode(&mut mode));
        let mut address = 0;
        ok!(cuMemAlloc_v2(Some(&mut address), MIB));
        Ok(())
    })?;
    let mut mode = RELAXED;
    ok!(cuThreadExchangeStreamCaptureMode(&mut mode));
    let mut address = 0;
    ok!(cuMemAlloc_v2(Some(&mut address), MIB));
    ok!(cuThreadExchangeStreamCaptureMode(&mut mode));
    check!(status(s.stream)? == 1, "the capture is broken");
    let _graph = end(s.stream)?;
    Ok(())
}

/// cuThreadExchangeStreamCaptureMode gives the mode before, GLOBAL at first, of each thread.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuThreadExchangeStreamCaptureMode.
fn the_mode_is_exchanged() -> Outcome {
    let s = setup()?;
    let exchange = |new: i32| {
        let mut mode = new;
        match cuThreadExchangeStreamCaptureMode(&mut mode) {
            Code::SUCCESS => mode,
            code => -code.0,
        }
    };
    check!(exchange(RELAXED) == GLOBAL, "not GLOBAL at first");
    check!(exchange(THREAD_LOCAL) == RELAXED, "not what was set");
    on_thread(s.context, || {
        let mut mode = RELAXED;
        ok!(cuThreadExchangeStreamCaptureMode(&mut mode));
        check!(mode == GLOBAL, "a new thread's mode is {mode}");
        Ok(())
    })?;
    check!(exchange(GLOBAL) == THREAD_LOCAL, "another thread changed this one's");
    let mut mode = 17;
    observe!("a mode that there is not: {:?}", cuThreadExchangeStreamCaptureMode(&mut mode));
    Ok(())
}

/// Unless relaxed, a capture ends in the thread where it began.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamEndCapture.
fn ending_is_for_the_thread_that_began() -> Outcome {
    for mode in [GLOBAL, THREAD_LOCAL] {
        let s = setup()?;
        begin(&s, mode)?;
        on_thread(s.context, || {
            let mut graph = 0;
            is!(cuStreamEndCapture(s.stream, &mut graph), STREAM_CAPTURE_WRONG_THREAD);
            Ok(())
        })?;
        let mut graph = 0;
        observe!("mode {mode}: ending it at home then: {:?}", cuStreamEndCapture(s.stream, &mut graph));
    }
    Ok(())
}

/// A relaxed capture may end in any thread.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamEndCapture.
fn a_relaxed_capture_may_end_elsewhere() -> Outcome {
    let s = setup()?;
    begin(&s, RELAXED)?;
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    on_thread(s.context, || {
        let _graph = end(s.stream)?;
        Ok(())
    })
}

/// Ending what did not begin, and beginning twice, is refused.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamBeginCapture, cuStreamEndCapture.
fn ending_without_a_capture_is_refused() -> Outcome {
    let s = setup()?;
    let mut graph = 0;
    fails!(cuStreamEndCapture(s.stream, &mut graph));
    begin(&s, RELAXED)?;
    fails!(cuStreamBeginCapture_v2(s.stream, RELAXED));
    Ok(())
}

/// A stream that joined a capture must be joined back before the end.
/// Source: CUDA C++ Programming Guide, CUDA Graphs (CUDA_ERROR_STREAM_CAPTURE_UNJOINED).
fn forks_must_be_joined() -> Outcome {
    let s = setup()?;
    let (other, fork) = (stream(NON_BLOCKING)?, event(2)?);
    begin(&s, THREAD_LOCAL)?;
    ok!(cuEventRecord(fork, s.stream));
    ok!(cuStreamWaitEvent(other, fork, 0));
    ok!(s.kernels.fill(other, s.buffer, 8, 2));
    let mut graph = 1;
    is!(cuStreamEndCapture(s.stream, &mut graph), STREAM_CAPTURE_UNJOINED);
    check!(graph == 0, "an unjoined capture gave a graph");
    check!(status(s.stream)? == 0, "status {}", status(s.stream)?);
    Ok(())
}

/// A capture ends in the stream where it began.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamEndCapture (CUDA_ERROR_STREAM_CAPTURE_UNMATCHED).
fn only_the_origin_ends_a_capture() -> Outcome {
    let s = setup()?;
    let (other, fork) = (stream(NON_BLOCKING)?, event(2)?);
    begin(&s, THREAD_LOCAL)?;
    ok!(cuEventRecord(fork, s.stream));
    ok!(cuStreamWaitEvent(other, fork, 0));
    let mut graph = 1;
    is!(cuStreamEndCapture(other, &mut graph), STREAM_CAPTURE_UNMATCHED);
    Ok(())
}

/// An event recorded in a capture stands for no work: it cannot be queried or synchronised.
/// Source: NVIDIA CUDA Driver API, data types, CUDA_ERROR_CAPTURED_EVENT.
fn captured_events_cannot_be_asked() -> Outcome {
    let s = setup()?;
    let event = event(2)?;
    begin(&s, RELAXED)?;
    ok!(cuEventRecord(event, s.stream));
    is!(cuEventQuery(event), CAPTURED_EVENT);
    // INVALID_VALUE on driver 580.
    fails!(cuEventSynchronize(event));
    observe!("status after asking: {}", status(s.stream)?);
    Ok(())
}

/// A capturing stream cannot wait for an event that was recorded outside.
/// Source: NVIDIA CUDA Driver API, data types, CUDA_ERROR_STREAM_CAPTURE_ISOLATION.
fn events_from_outside_do_not_reach_in() -> Outcome {
    let s = setup()?;
    let (other, event) = (stream(NON_BLOCKING)?, event(2)?);
    ok!(s.kernels.spin(other, Duration::from_millis(100)));
    ok!(cuEventRecord(event, other));
    begin(&s, RELAXED)?;
    is!(cuStreamWaitEvent(s.stream, event, 0), STREAM_CAPTURE_ISOLATION);
    observe!("status after the wait: {}", status(s.stream)?);
    ok!(cuStreamSynchronize(other));
    Ok(())
}

/// Destroying a capturing stream abandons the capture; the process goes on.
/// Source: general practice (a captured stream's owner is destroyed on an exception); the codes are reported.
fn an_abandoned_capture_leaves_the_process_usable() -> Outcome {
    let s = setup()?;
    begin(&s, GLOBAL)?;
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    observe!("destroying a capturing stream: {:?}", cuStreamDestroy_v2(s.stream));
    observe!("an allocation after that: {:?}", try_alloc());
    observe!("synchronising the context after that: {:?}", cuCtxSynchronize());
    let other = stream(NON_BLOCKING)?;
    ok!(s.kernels.fill(other, s.buffer, 16, 2));
    ok!(cuStreamSynchronize(other));
    Ok(())
}
