//! Stream capture and graphs: what is recorded, and that it runs.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("capture":
    captured_work_does_not_run,
    a_graph_runs_as_often_as_it_is_launched,
    copies_are_captured_by_reference,
    kernel_arguments_are_captured_by_value,
    events_spread_a_capture,
    graph_launches_are_in_stream_order,
    allocations_in_a_capture_belong_to_the_graph,
    a_graph_built_by_hand,
    an_empty_capture_gives_an_empty_graph,
    a_graph_may_go_once_instantiated,
);

pub(super) const GLOBAL: i32 = 0;
pub(super) const THREAD_LOCAL: i32 = 1;
pub(super) const RELAXED: i32 = 2;

pub(super) struct Setup {
    pub context: Handle,
    pub kernels: Kernels,
    pub stream: Handle,
    pub buffer: Dptr,
}

pub(super) fn setup() -> Result<Setup, Stop> {
    let gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (stream, buffer) = (stream(NON_BLOCKING)?, alloc(MIB)?);
    ok!(cuMemsetD8_v2(buffer, 0, MIB));
    ok!(cuCtxSynchronize());
    Ok(Setup { context: gpu.context, kernels, stream, buffer })
}

pub(super) fn status(stream: Handle) -> Result<i32, Stop> {
    let mut status = -1;
    ok!(cuStreamIsCapturing(stream, &mut status));
    Ok(status)
}

pub(super) fn end(stream: Handle) -> Result<Handle, Stop> {
    let mut graph = 0;
    ok!(cuStreamEndCapture(stream, &mut graph));
    check!(graph != 0, "the capture ended with a null graph");
    Ok(graph)
}

pub(super) fn instantiate(graph: Handle) -> Result<Handle, Stop> {
    let mut exec = 0;
    ok!(cuGraphInstantiateWithFlags(&mut exec, graph, 0));
    Ok(exec)
}

fn nodes(graph: Handle) -> Result<usize, Stop> {
    let mut n = 0;
    ok!(cuGraphGetNodes(graph, std::ptr::null_mut(), &mut n));
    Ok(n)
}

/// Work put into a capturing stream is recorded and not run; IsCapturing tells.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamBeginCapture, cuStreamIsCapturing.
fn captured_work_does_not_run() -> Outcome {
    let s = setup()?;
    check!(status(s.stream)? == 0, "capturing before it began");
    ok!(cuStreamBeginCapture_v2(s.stream, THREAD_LOCAL));
    check!(status(s.stream)? == 1, "status {}", status(s.stream)?);
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 5));
    ok!(cuMemsetD32Async(s.buffer + 1024, 6, 16, s.stream));
    let (mut state, mut id) = (0, 0);
    ok!(cuStreamGetCaptureInfo_v2(s.stream, &mut state, &mut id, 0, 0, 0));
    check!(state == 1 && id != 0, "capture info: status {state}, id {id}");
    let graph = end(s.stream)?;
    check!(status(s.stream)? == 0, "capturing after it ended");
    check!(nodes(graph)? == 2, "{} nodes", nodes(graph)?);
    ok!(cuStreamSynchronize(s.stream));
    check!(read_u32(s.buffer)? == 0 && read_u32(s.buffer + 1024)? == 0, "captured work ran");
    Ok(())
}

/// An instantiated graph runs its work at each launch.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphLaunch.
fn a_graph_runs_as_often_as_it_is_launched() -> Outcome {
    let s = setup()?;
    let sum = s.buffer + 4096;
    ok!(cuMemsetD32_v2(s.buffer, 1, 1));
    ok!(cuCtxSynchronize());
    ok!(cuStreamBeginCapture_v2(s.stream, THREAD_LOCAL));
    ok!(launch(s.kernels.checksum, 1, 32, s.stream, &[Arg::U64(s.buffer), Arg::U64(1), Arg::U64(sum)]));
    ok!(launch(s.kernels.checksum, 1, 32, s.stream, &[Arg::U64(s.buffer), Arg::U64(1), Arg::U64(sum)]));
    let exec = instantiate(end(s.stream)?)?;
    for launches in 1..=25 {
        ok!(cuGraphLaunch(exec, s.stream));
        if launches % 5 == 0 {
            ok!(cuStreamSynchronize(s.stream));
            check!(read_u32(sum)? == 2 * launches, "{launches} launches added up to {}", read_u32(sum)?);
        }
    }
    Ok(())
}

/// A captured copy reads its page-locked source when the graph runs.
/// Source: CUDA C++ Programming Guide, CUDA Graphs (memcpy nodes hold addresses).
fn copies_are_captured_by_reference() -> Outcome {
    let s = setup()?;
    let pinned = Pinned::new(4096)?;
    pinned.fill(1);
    ok!(cuStreamBeginCapture_v2(s.stream, THREAD_LOCAL));
    ok!(cuMemcpyHtoDAsync_v2(s.buffer, pinned.pointer(), 4096, s.stream));
    let exec = instantiate(end(s.stream)?)?;
    for value in [2_u8, 3] {
        pinned.fill(value);
        ok!(cuGraphLaunch(exec, s.stream));
        ok!(cuStreamSynchronize(s.stream));
        check!(read(s.buffer, 4096)?.iter().all(|b| *b == value), "the graph copied older bytes than {value}");
    }
    Ok(())
}

/// A captured launch keeps the arguments that it was given.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphAddKernelNode (parameters are copied).
fn kernel_arguments_are_captured_by_value() -> Outcome {
    let s = setup()?;
    let mut value = 11_u32;
    let (mut at, mut n) = (s.buffer, 4_u64);
    let mut params = [(&raw mut at).cast(), (&raw mut n).cast(), (&raw mut value).cast()];
    ok!(cuStreamBeginCapture_v2(s.stream, THREAD_LOCAL));
    ok!(cuLaunchKernel(s.kernels.fill, 1, 1, 1, 32, 1, 1, 0, s.stream, params.as_mut_ptr(), std::ptr::null_mut()));
    value = 12;
    at = 0;
    let exec = instantiate(end(s.stream)?)?;
    ok!(cuGraphLaunch(exec, s.stream));
    ok!(cuStreamSynchronize(s.stream));
    check!(read_u32(s.buffer)? == 11, "got {} (now {value} at {at})", read_u32(s.buffer)?);
    Ok(())
}

/// A stream that waits for an event of a capture joins it, until it is joined back.
/// Source: CUDA C++ Programming Guide, CUDA Graphs, Cross-stream Dependencies and Events.
fn events_spread_a_capture() -> Outcome {
    let s = setup()?;
    let (other, fork, join) = (stream(NON_BLOCKING)?, event(2)?, event(2)?);
    ok!(cuStreamBeginCapture_v2(s.stream, THREAD_LOCAL));
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 1));
    ok!(cuEventRecord(fork, s.stream));
    ok!(cuStreamWaitEvent(other, fork, 0));
    check!(status(other)? == 1, "the waiting stream does not capture");
    ok!(s.kernels.fill(other, s.buffer, 8, 2));
    ok!(cuEventRecord(join, other));
    ok!(cuStreamWaitEvent(s.stream, join, 0));
    ok!(s.kernels.fill(s.stream, s.buffer, 4, 3));
    let graph = end(s.stream)?;
    check!(status(other)? == 0, "the other stream still captures");
    check!(nodes(graph)? == 3, "{} nodes", nodes(graph)?);
    let exec = instantiate(graph)?;
    ok!(cuGraphLaunch(exec, s.stream));
    ok!(cuStreamSynchronize(s.stream));
    let got = [read_u32(s.buffer)?, read_u32(s.buffer + 16)?, read_u32(s.buffer + 32)?];
    check!(got == [3, 2, 1], "words {got:?}");
    Ok(())
}

/// A graph launch takes its turn in the stream.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphLaunch.
fn graph_launches_are_in_stream_order() -> Outcome {
    let s = setup()?;
    ok!(cuStreamBeginCapture_v2(s.stream, THREAD_LOCAL));
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 4));
    let exec = instantiate(end(s.stream)?)?;
    ok!(s.kernels.spin(s.stream, Duration::from_millis(100)));
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 3));
    let (code, time) = timed(|| cuGraphLaunch(exec, s.stream));
    ok!(code);
    check!(time < Duration::from_millis(75), "launching the graph took {time:?}");
    ok!(s.kernels.fill(s.stream, s.buffer, 8, 5));
    is!(cuStreamQuery(s.stream), NOT_READY);
    ok!(cuStreamSynchronize(s.stream));
    check!(read_u32(s.buffer)? == 5 && read_u32(s.buffer + 32)? == 4, "the graph ran out of order");
    ok!(cuGraphExecDestroy(exec));
    Ok(())
}

/// cuMemAllocAsync in a capture makes memory of the graph, at the same address at every launch.
/// Source: CUDA C++ Programming Guide, Graph Memory Nodes.
fn allocations_in_a_capture_belong_to_the_graph() -> Outcome {
    let s = setup()?;
    let before = quiet()?;
    let mut address = 0;
    ok!(cuStreamBeginCapture_v2(s.stream, THREAD_LOCAL));
    ok!(cuMemAllocAsync(&mut address, 32 * MIB, s.stream));
    check!(address != 0, "null address");
    ok!(s.kernels.fill(s.stream, address, 8 * MIB as u64, 21));
    ok!(cuMemcpyDtoDAsync_v2(s.buffer, address, 4096, s.stream));
    ok!(cuMemFreeAsync(address, s.stream));
    let graph = end(s.stream)?;
    check!(nodes(graph)? == 4, "{} nodes", nodes(graph)?);
    let exec = instantiate(graph)?;
    for _ in 0..3 {
        ok!(cuMemsetD8_v2(s.buffer, 0, 4096));
        ok!(cuCtxSynchronize());
        ok!(cuGraphLaunch(exec, s.stream));
        ok!(cuStreamSynchronize(s.stream));
        check!(read_u32(s.buffer)? == 21, "got {}", read_u32(s.buffer)?);
    }
    ok!(cuGraphExecDestroy(exec));
    ok!(cuGraphDestroy(graph));
    ok!(cuDeviceGraphMemTrim(0));
    let after = wait_free(before - 8 * MIB, Duration::from_secs(2))?;
    check!(after + 8 * MIB >= before, "free was {before}, is {after} after graph and trim");
    Ok(())
}

/// A graph made of nodes runs in the order of its edges.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphAddKernelNode.
fn a_graph_built_by_hand() -> Outcome {
    let s = setup()?;
    let (mut graph, mut root, mut first, mut second) = (0, 0, 0, 0);
    ok!(cuGraphCreate(&mut graph, 0));
    ok!(cuGraphAddEmptyNode(&mut root, graph, std::ptr::null(), 0));
    let mut a = Args::new(&[Arg::U64(s.buffer), Arg::U64(16), Arg::U32(1)]);
    let mut b = Args::new(&[Arg::U64(s.buffer), Arg::U64(8), Arg::U32(2)]);
    let node = |args: &mut Args| KernelNodeParams {
        function: s.kernels.fill,
        grid: [1, 1, 1],
        block: [32, 1, 1],
        shared_bytes: 0,
        params: args.pointer(),
        extra: std::ptr::null_mut(),
        kernel: 0,
        context: 0,
    };
    ok!(cuGraphAddKernelNode_v2(&mut first, graph, &raw const root, 1, &node(&mut a)));
    ok!(cuGraphAddKernelNode_v2(&mut second, graph, &raw const first, 1, &node(&mut b)));
    check!(nodes(graph)? == 3, "{} nodes", nodes(graph)?);
    let exec = instantiate(graph)?;
    ok!(cuGraphLaunch(exec, s.stream));
    ok!(cuStreamSynchronize(s.stream));
    let got = [read_u32(s.buffer)?, read_u32(s.buffer + 32)?];
    check!(got == [2, 1], "words {got:?}");
    ok!(cuGraphExecDestroy(exec));
    ok!(cuGraphDestroy(graph));
    Ok(())
}

/// Capturing nothing gives a graph of no nodes that can be launched.
/// Source: NVIDIA CUDA Driver API, Stream Management, cuStreamEndCapture.
fn an_empty_capture_gives_an_empty_graph() -> Outcome {
    let s = setup()?;
    ok!(cuStreamBeginCapture_v2(s.stream, RELAXED));
    let graph = end(s.stream)?;
    check!(nodes(graph)? == 0, "{} nodes", nodes(graph)?);
    let exec = instantiate(graph)?;
    ok!(cuGraphLaunch(exec, s.stream));
    ok!(cuStreamSynchronize(s.stream));
    Ok(())
}

/// The graph may be destroyed once it is instantiated.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphDestroy, cuGraphInstantiate.
fn a_graph_may_go_once_instantiated() -> Outcome {
    let s = setup()?;
    ok!(cuStreamBeginCapture_v2(s.stream, GLOBAL));
    ok!(s.kernels.fill(s.stream, s.buffer, 16, 8));
    let graph = end(s.stream)?;
    let exec = instantiate(graph)?;
    ok!(cuGraphDestroy(graph));
    ok!(cuGraphLaunch(exec, s.stream));
    ok!(cuStreamSynchronize(s.stream));
    check!(read_u32(s.buffer)? == 8, "got {}", read_u32(s.buffer)?);
    Ok(())
}
