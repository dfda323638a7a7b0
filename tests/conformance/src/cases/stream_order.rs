//! Streams among each other: the legacy stream, per-thread streams, non-blocking streams.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("stream_order":
    legacy_waits_for_blocking_streams,
    blocking_streams_wait_for_legacy,
    non_blocking_streams_are_apart_from_legacy,
    synchronous_copies_wait_for_blocking_streams,
    the_legacy_handle_is_the_null_stream,
    per_thread_streams_are_each_threads_own,
    per_thread_stream_synchronizes_with_legacy,
    ptsz_names_mean_the_per_thread_stream,
);

const LEGACY: Handle = 1;
const PER_THREAD: Handle = 2;
const LONG: Duration = Duration::from_millis(200);

struct Setup {
    context: Handle,
    kernels: Kernels,
    buffer: Dptr,
    pinned: Pinned,
}

fn setup() -> Result<Setup, Stop> {
    let gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (buffer, pinned) = (alloc(4 * MIB)?, Pinned::new(4 * MIB)?);
    pinned.fill(9);
    ok!(cuMemsetD8_v2(buffer, 0, 4 * MIB));
    ok!(cuCtxSynchronize());
    Ok(Setup { context: gpu.context, kernels, buffer, pinned })
}

/// Work in the legacy stream starts after all earlier work in blocking streams.
/// Source: NVIDIA CUDA Driver API, Stream synchronization behavior, Legacy default stream.
fn legacy_waits_for_blocking_streams() -> Outcome {
    let s = setup()?;
    let stream = stream(BLOCKING)?;
    ok!(s.kernels.spin(stream, LONG));
    ok!(s.kernels.fill(stream, s.buffer, 1024, 1));
    ok!(cuMemsetD32Async(s.buffer, 2, 1024, 0));
    is!(cuStreamQuery(0), NOT_READY);
    ok!(cuStreamSynchronize(0));
    ok!(cuStreamQuery(stream));
    check!(read_u32(s.buffer)? == 2, "the legacy stream's memset ran before the other stream's kernel");
    Ok(())
}

/// Work in a blocking stream starts after all earlier work in the legacy stream.
/// Source: NVIDIA CUDA Driver API, Stream synchronization behavior, Legacy default stream.
fn blocking_streams_wait_for_legacy() -> Outcome {
    let s = setup()?;
    let stream = stream(BLOCKING)?;
    ok!(s.kernels.spin(0, LONG));
    ok!(s.kernels.fill(0, s.buffer, 1024, 1));
    ok!(cuMemcpyHtoDAsync_v2(s.buffer, s.pinned.pointer(), 4096, stream));
    is!(cuStreamQuery(stream), NOT_READY);
    ok!(cuStreamSynchronize(stream));
    check!(read_u32(s.buffer)? == 0x0909_0909, "the stream's copy ran before the legacy stream's kernel");
    Ok(())
}

/// Non-blocking streams neither wait for the legacy stream nor hold it up.
/// Source: NVIDIA CUDA Driver API, Stream Management, CU_STREAM_NON_BLOCKING.
fn non_blocking_streams_are_apart_from_legacy() -> Outcome {
    let s = setup()?;
    let stream = stream(NON_BLOCKING)?;
    ok!(s.kernels.spin(stream, LONG));
    ok!(cuMemcpyHtoDAsync_v2(s.buffer, s.pinned.pointer(), 4096, 0));
    ok!(cuStreamSynchronize(0));
    is!(cuStreamQuery(stream), NOT_READY);
    ok!(cuStreamSynchronize(stream));
    ok!(s.kernels.spin(0, LONG));
    ok!(cuMemcpyHtoDAsync_v2(s.buffer, s.pinned.pointer(), 4096, stream));
    ok!(cuStreamSynchronize(stream));
    is!(cuStreamQuery(0), NOT_READY);
    ok!(cuStreamSynchronize(0));
    Ok(())
}

/// A synchronous copy is in the legacy stream: it waits for blocking streams, and not for others.
/// Source: NVIDIA CUDA Driver API, API synchronization and Stream synchronization behavior.
fn synchronous_copies_wait_for_blocking_streams() -> Outcome {
    let s = setup()?;
    let (blocking, apart) = (stream(BLOCKING)?, stream(NON_BLOCKING)?);
    ok!(s.kernels.spin(blocking, LONG / 2));
    ok!(s.kernels.fill(blocking, s.buffer, 1024, 7));
    check!(read_u32(s.buffer)? == 7, "a synchronous copy overtook a blocking stream");
    ok!(s.kernels.spin(apart, LONG));
    let _ = read_u32(s.buffer)?;
    is!(cuStreamQuery(apart), NOT_READY);
    ok!(cuCtxSynchronize());
    Ok(())
}

/// CU_STREAM_LEGACY names the same stream as null.
/// Source: NVIDIA CUDA Driver API, CU_STREAM_LEGACY.
fn the_legacy_handle_is_the_null_stream() -> Outcome {
    let s = setup()?;
    ok!(s.kernels.spin(LEGACY, LONG));
    is!(cuStreamQuery(0), NOT_READY);
    is!(cuStreamQuery(LEGACY), NOT_READY);
    ok!(cuStreamSynchronize(LEGACY));
    ok!(cuStreamQuery(0));
    Ok(())
}

/// CU_STREAM_PER_THREAD names another stream in each thread.
/// Source: NVIDIA CUDA Driver API, Stream synchronization behavior, Per-thread default stream.
fn per_thread_streams_are_each_threads_own() -> Outcome {
    let s = setup()?;
    ok!(s.kernels.spin(PER_THREAD, LONG));
    is!(cuStreamQuery(PER_THREAD), NOT_READY);
    let (buffer, pinned) = (s.buffer, s.pinned.address);
    on_thread(s.context, move || {
        ok!(cuStreamQuery(PER_THREAD));
        ok!(cuMemcpyHtoDAsync_v2(buffer, pinned as *const u8, 4096, PER_THREAD));
        ok!(cuStreamSynchronize(PER_THREAD));
        Ok(())
    })?;
    is!(cuStreamQuery(PER_THREAD), NOT_READY);
    ok!(cuStreamSynchronize(PER_THREAD));
    ok!(cuStreamQuery(PER_THREAD));
    Ok(())
}

/// The per-thread stream is a blocking one: it and the legacy stream wait for each other.
/// Source: NVIDIA CUDA Driver API, Stream synchronization behavior ("is not a non-blocking stream").
fn per_thread_stream_synchronizes_with_legacy() -> Outcome {
    let s = setup()?;
    ok!(s.kernels.spin(PER_THREAD, LONG / 2));
    ok!(s.kernels.fill(PER_THREAD, s.buffer, 1024, 3));
    ok!(cuMemcpyHtoDAsync_v2(s.buffer, s.pinned.pointer(), 4096, 0));
    is!(cuStreamQuery(0), NOT_READY);
    ok!(cuStreamSynchronize(0));
    ok!(cuStreamQuery(PER_THREAD));
    check!(read_u32(s.buffer)? == 0x0909_0909, "the legacy stream overtook the per-thread stream");
    Ok(())
}

/// In functions whose names end in _ptsz the null stream is the per-thread one.
/// Source: cuda.h, CUDA_API_PER_THREAD_DEFAULT_STREAM.
fn ptsz_names_mean_the_per_thread_stream() -> Outcome {
    let s = setup()?;
    let apart = stream(NON_BLOCKING)?;
    let ns = u64::try_from(LONG.as_nanos()).unwrap_or(0);
    let mut args = Args::new(&[Arg::U64(ns)]);
    ok!(cuLaunchKernel_ptsz(s.kernels.spin, 1, 1, 1, 1, 1, 1, 0, 0, args.pointer(), std::ptr::null_mut()));
    is!(cuStreamQuery_ptsz(0), NOT_READY);
    is!(cuStreamQuery(PER_THREAD), NOT_READY);
    on_thread(s.context, || {
        ok!(cuStreamQuery_ptsz(0));
        Ok(())
    })?;
    ok!(cuStreamQuery(apart));
    ok!(cuStreamSynchronize_ptsz(0));
    ok!(cuStreamQuery(PER_THREAD));
    ok!(cuMemsetD32Async_ptsz(s.buffer, 5, 16, 0));
    ok!(cuStreamSynchronize_ptsz(0));
    check!(read_u32(s.buffer)? == 5, "the memset is missing");
    Ok(())
}
