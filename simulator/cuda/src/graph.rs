//! Graphs: building, instantiating, launching, and the state of captures.

use crate::abi::{In, Out, exports};
use crate::copy;
use crate::fill;
use crate::graph_memory;
use crate::launch::{self, Shape};
use crate::layout::{Copy3d, HostNode, KernelNode, KernelNode2, MemsetNode, NodeParams};
use crate::submit::stream;
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{
    INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED, R, STREAM_CAPTURE_UNSUPPORTED,
};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::event::State;
use spillway_simulator_core::exec::{Callback, Fill, Op};
use spillway_simulator_core::graph::{self, Exec, Graph};
use spillway_simulator_core::stream::Stream;
use spillway_simulator_core::sync::lock;
use std::ffi::c_char;
use std::sync::Arc;

/// The graph of a handle.
///
/// # Errors
/// `INVALID_VALUE`.
pub fn graph_of(driver: &Driver, handle: u64) -> R<Arc<Graph>> {
    driver.graphs.get(handle).ok_or(INVALID_VALUE)
}

/// `CUstreamCaptureStatus` of a stream: none, active or invalidated.
pub fn status(stream: &Stream) -> u32 {
    match capture::current(stream) {
        None => 0,
        Some(capture) if capture.invalid() => 2,
        Some(_) => 1,
    }
}

/// Swaps the thread's capture mode with what the caller points at.
///
/// # Errors
/// `INVALID_VALUE`.
pub fn exchange(mode: Out<u32>) -> R {
    mode.needed()?;
    let wanted = In::<u32>::of(mode.raw() as u64).get()?;
    mode.set(capture::exchange_mode(wanted)?)
}

fn add(
    out: Out<u64>,
    graph: u64,
    after: In<u64>,
    count: usize,
    kind: u32,
    op: impl FnOnce(&'static Driver) -> R<Op>,
) -> R {
    out.needed()?;
    let driver = driver::get()?;
    let graph = graph_of(driver, graph)?;
    let after = after.list(count)?;
    let op = op(driver)?;
    out.set(graph.add(kind, &after, |_, _| Ok(op))?)
}

/// The work of a node that embeds another graph: a copy of it, or itself if it shall belong to its parent.
///
/// # Errors
/// `NOT_SUPPORTED` for a copy of a graph with memory nodes.
fn child_op(driver: &'static Driver, child: u64, moves: bool) -> R<Op> {
    let child = graph_of(driver, child)?;
    Ok(Op::Child(if moves { child } else { child.copy(driver)? }))
}

fn record_event_op(driver: &Driver, event: u64) -> R<Op> {
    driver
        .events
        .get(event)
        .ok_or(INVALID_HANDLE)
        .map(Op::RecordEvent)
}

fn wait_event_op(driver: &Driver, event: u64) -> R<Op> {
    let event = driver.events.get(event).ok_or(INVALID_HANDLE)?;
    Ok(match event.state() {
        State::Recorded(marker) => Op::Wait(marker),
        _ => Op::Empty,
    })
}

fn host_op(node: &HostNode) -> R<Op> {
    let function = node.function.ok_or(INVALID_VALUE)?;
    Ok(Op::Callback(Callback::Host(function, node.data as usize)))
}

/// `cuGraphAddNode`: the kind says which of the structures follows.
fn add_any(out: Out<u64>, graph: u64, after: In<u64>, count: usize, params: Out<NodeParams>) -> R {
    const OWNERSHIP_MOVE: u32 = 1;
    params.needed()?;
    let given = In::<NodeParams>::of(params.raw() as u64).get()?;
    let at = params.raw() as u64 + std::mem::offset_of!(NodeParams, rest) as u64;
    match given.kind {
        graph::KERNEL => add(out, graph, after, count, given.kind, |_| {
            let node = In::<KernelNode2>::of(at).get()?;
            kernel_op(&node.first, node.kernel)
        }),
        graph::MEMCPY => add(out, graph, after, count, given.kind, |_| {
            // Flags and a context come first.
            let copy = In::<Copy3d>::of(at + 16).get()?;
            Ok(Op::Copy(copy::shaped(&copy)?.0))
        }),
        graph::MEMSET => add(out, graph, after, count, given.kind, |_| {
            fill_op(&In::<MemsetNode>::of(at).get()?)
        }),
        graph::HOST => add(out, graph, after, count, given.kind, |_| {
            host_op(&In::<HostNode>::of(at).get()?)
        }),
        graph::CHILD => add(out, graph, after, count, given.kind, |driver| {
            let moves = In::<u32>::of(at + 8).get()? == OWNERSHIP_MOVE;
            child_op(driver, In::<u64>::of(at).get()?, moves)
        }),
        graph::EMPTY => add(out, graph, after, count, given.kind, |_| Ok(Op::Empty)),
        graph::WAIT_EVENT => add(out, graph, after, count, given.kind, |driver| {
            wait_event_op(driver, In::<u64>::of(at).get()?)
        }),
        graph::RECORD_EVENT => add(out, graph, after, count, given.kind, |driver| {
            record_event_op(driver, In::<u64>::of(at).get()?)
        }),
        graph::MEM_ALLOC => graph_memory::add_alloc(out, graph, after, count, Out::of(at as usize)),
        graph::MEM_FREE => {
            graph_memory::add_free(out, graph, after, count, In::<u64>::of(at).get()?)
        }
        _ => Err(NOT_SUPPORTED),
    }
}

/// The work of a kernel node.
///
/// # Errors
/// As for a launch.
pub fn kernel_op(node: &KernelNode, kernel: u64) -> R<Op> {
    let function = if node.function != 0 {
        node.function
    } else {
        kernel
    };
    let shape = Shape {
        grid: node.grid,
        block: node.block,
        shared_bytes: node.shared_bytes,
    };
    let launch = launch::prepare(function, &shape, In::of(node.params), In::of(node.extra))?;
    Ok(Op::Kernel(Arc::new(launch)))
}

/// The work of a memset node.
///
/// # Errors
/// `INVALID_VALUE`.
pub fn fill_op(node: &MemsetNode) -> R<Op> {
    if !matches!(node.element, 1 | 2 | 4) {
        return Err(INVALID_VALUE);
    }
    let fill = Fill {
        target: node.target,
        pitch: node.pitch as u64,
        value: node.value,
        element: node.element,
        width: node.width as u64,
        height: node.height as u64,
    };
    fill::check(&fill)?;
    Ok(Op::Fill(fill))
}

const UPLOAD: u64 = 2;

fn instantiate(out: Out<u64>, graph: u64, flags: u64) -> R<Arc<Exec>> {
    out.needed()?;
    let driver = driver::get()?;
    // USE_NODE_PRIORITY changes nothing here; DEVICE_LAUNCH would.
    if flags & !0xf != 0 {
        return Err(INVALID_VALUE);
    }
    if flags & 4 != 0 {
        return Err(NOT_SUPPORTED);
    }
    let exec = graph_of(driver, graph)?.instantiate(driver, flags)?;
    out.set(exec.id)?;
    Ok(exec)
}

/// Launches, or makes a child node if the stream captures.
fn launch(exec: u64, on: u64, per_thread: bool, upload: bool) -> R {
    let driver = driver::get()?;
    let stream = stream(on, per_thread)?;
    let exec = driver.execs.get(exec).ok_or(INVALID_VALUE)?;
    stream.context.check()?;
    crate::submit::refuse_implicit(&stream)?;
    match capture::current(&stream) {
        Some(_) if upload => Err(STREAM_CAPTURE_UNSUPPORTED),
        Some(capture) => {
            let child = exec.graph(driver)?;
            capture
                .record(&stream, graph::CHILD, Op::Child(child))
                .map(|_| ())
        }
        None => exec.launch(driver, &stream, upload),
    }
}

fn capture_info(
    handle: u64,
    per_thread: bool,
    state: Out<u32>,
    id: Out<u64>,
    graph: Out<u64>,
    nodes: Out<u64>,
    count: Out<usize>,
) -> R {
    state.needed()?;
    let stream = stream(handle, per_thread)?;
    crate::submit::refuse_implicit(&stream)?;
    state.set(status(&stream))?;
    if let Some(capture) = capture::current(&stream) {
        id.offer(capture.id);
        if capture.invalid() {
            return Ok(());
        }
        graph.offer(capture.graph.id);
        let frontier = lock(&stream.frontier);
        let ids: Vec<u64> = {
            let all = lock(&capture.graph.nodes);
            frontier
                .iter()
                .filter_map(|i| all.get(*i))
                .map(|n| n.id)
                .collect()
        };
        count.offer(ids.len());
        nodes.offer(kept(ids));
    }
    Ok(())
}

/// Node lists handed out by address: the last one of each thread stays readable.
fn kept(ids: Vec<u64>) -> u64 {
    std::thread_local! {
        static LAST: std::cell::RefCell<Vec<u64>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    LAST.with(|last| {
        *last.borrow_mut() = ids;
        last.borrow().as_ptr() as u64
    })
}

fn update_dependencies(
    handle: u64,
    per_thread: bool,
    nodes: In<u64>,
    count: usize,
    flags: u32,
) -> R {
    if flags > 1 {
        return Err(INVALID_VALUE);
    }
    let stream = stream(handle, per_thread)?;
    let capture = capture::current(&stream).ok_or(spillway_simulator_core::code::ILLEGAL_STATE)?;
    let ids = nodes.list(count)?;
    let mut frontier = lock(&stream.frontier);
    let all = lock(&capture.graph.nodes);
    let indices = ids
        .iter()
        .map(|id| all.iter().position(|n| n.id == *id))
        .collect::<Option<Vec<_>>>()
        .ok_or(INVALID_VALUE)?;
    // 0 adds, 1 replaces.
    if flags == 1 {
        frontier.clear();
    }
    frontier.extend(indices);
    Ok(())
}

exports! {
    fn cuGraphCreate(out: Out<u64>, flags: u32) {
        out.needed()?;
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        out.set(Graph::new(driver::get()?).id)
    }

    fn cuGraphDestroy(handle: u64) {
        Graph::forget(driver::get()?, handle)
    }

    fn cuGraphClone(out: Out<u64>, handle: u64) {
        out.needed()?;
        let driver = driver::get()?;
        let clone = graph_of(driver, handle)?.copy(driver)?;
        out.set(clone.id)
    }

    fn cuGraphAddEmptyNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize) {
        add(out, graph, after, count, graph::EMPTY, |_| Ok(Op::Empty))
    }

    fn cuGraphAddKernelNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, node: In<KernelNode>) {
        add(out, graph, after, count, graph::KERNEL, |_| kernel_op(&node.get()?, 0))
    }

    fn cuGraphAddKernelNode_v2(out: Out<u64>, graph: u64, after: In<u64>, count: usize, node: In<KernelNode2>) {
        add(out, graph, after, count, graph::KERNEL, |_| {
            let node = node.get()?;
            kernel_op(&node.first, node.kernel)
        })
    }

    fn cuGraphAddMemcpyNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, node: In<Copy3d>, context: u64) {
        let _ = context;
        add(out, graph, after, count, graph::MEMCPY, |_| Ok(Op::Copy(copy::shaped(&node.get()?)?.0)))
    }

    fn cuGraphAddMemsetNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, node: In<MemsetNode>, context: u64) {
        let _ = context;
        add(out, graph, after, count, graph::MEMSET, |_| fill_op(&node.get()?))
    }

    fn cuGraphAddHostNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, node: In<HostNode>) {
        add(out, graph, after, count, graph::HOST, |_| host_op(&node.get()?))
    }

    fn cuGraphAddChildGraphNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, child: u64) {
        add(out, graph, after, count, graph::CHILD, |driver| child_op(driver, child, false))
    }

    fn cuGraphAddEventRecordNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, event: u64) {
        add(out, graph, after, count, graph::RECORD_EVENT, |driver| record_event_op(driver, event))
    }

    fn cuGraphAddEventWaitNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, event: u64) {
        add(out, graph, after, count, graph::WAIT_EVENT, |driver| wait_event_op(driver, event))
    }

    fn cuGraphAddNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, params: Out<NodeParams>) {
        add_any(out, graph, after, count, params)
    }

    fn cuGraphAddNode_v2(out: Out<u64>, graph: u64, after: In<u64>, edges: In<u64>, count: usize, params: Out<NodeParams>) {
        let _ = edges;
        add_any(out, graph, after, count, params)
    }

    fn cuGraphAddDependencies(graph: u64, from: In<u64>, to: In<u64>, count: usize) {
        let graph = graph_of(driver::get()?, graph)?;
        let (from, to) = (from.list(count)?, to.list(count)?);
        let mut nodes = lock(&graph.nodes);
        for (from, to) in from.iter().zip(&to) {
            let source = nodes.iter().position(|n| n.id == *from).ok_or(INVALID_VALUE)?;
            let target = nodes.iter_mut().find(|n| n.id == *to).ok_or(INVALID_VALUE)?;
            if !target.after.contains(&source) {
                target.after.push(source);
            }
        }
        Ok(())
    }

    fn cuGraphInstantiate(out: Out<u64>, graph: u64, node: Out<u64>, log: In<c_char>, bytes: usize) {
        let _ = (log, bytes);
        node.offer(0);
        instantiate(out, graph, 0).map(|_| ())
    }

    fn cuGraphInstantiate_v2(out: Out<u64>, graph: u64, node: Out<u64>, log: In<c_char>, bytes: usize) {
        let _ = (log, bytes);
        node.offer(0);
        instantiate(out, graph, 0).map(|_| ())
    }

    fn cuGraphInstantiateWithFlags(out: Out<u64>, graph: u64, flags: u64) {
        instantiate(out, graph, flags).map(|_| ())
    }

    fn cuGraphInstantiateWithParams / cuGraphInstantiateWithParams_ptsz [per_thread] (out: Out<u64>, graph: u64, params: Out<[u64; 4]>) {
        params.needed()?;
        let mut given = In::<[u64; 4]>::of(params.raw() as u64).get()?;
        let exec = instantiate(out, graph, given[0])?;
        if given[0] & UPLOAD != 0
            && let Err(code) = launch(exec.id, given[1], per_thread, true)
        {
            driver::get()?.execs.remove(exec.id);
            return Err(code);
        }
        // No failed node; result 0 is success.
        given[2] = 0;
        given[3] = 0;
        params.set(given)
    }

    fn cuGraphExecGetFlags(exec: u64, flags: Out<u64>) {
        flags.set(driver::get()?.execs.get(exec).ok_or(INVALID_VALUE)?.flags)
    }

    fn cuGraphExecDestroy(exec: u64) {
        driver::get()?.execs.remove(exec).map(|_| ()).ok_or(INVALID_VALUE)
    }

    fn cuGraphLaunch / cuGraphLaunch_ptsz [per_thread] (exec: u64, on: u64) {
        launch(exec, on, per_thread, false)
    }

    fn cuGraphUpload / cuGraphUpload_ptsz [per_thread] (exec: u64, on: u64) {
        launch(exec, on, per_thread, true)
    }

    fn cuStreamBeginCaptureToGraph / cuStreamBeginCaptureToGraph_ptsz [per_thread] (
        handle: u64, graph: u64, after: In<u64>, edges: In<u64>, count: usize, mode: u32,
    ) {
        let _ = edges;
        let driver = driver::get()?;
        let graph = graph_of(driver, graph)?;
        let after = after.list(count)?;
        let frontier = {
            let nodes = lock(&graph.nodes);
            after.iter().map(|id| nodes.iter().position(|n| n.id == *id)).collect::<Option<Vec<_>>>().ok_or(INVALID_VALUE)?
        };
        capture::begin(driver, &stream(handle, per_thread)?, mode, Some(graph), frontier)
    }

    fn cuStreamGetCaptureInfo / cuStreamGetCaptureInfo_ptsz [per_thread] (handle: u64, state: Out<u32>, id: Out<u64>) {
        capture_info(handle, per_thread, state, id, Out::none(), Out::none(), Out::none())
    }

    fn cuStreamGetCaptureInfo_v2 / cuStreamGetCaptureInfo_v2_ptsz [per_thread] (
        handle: u64, state: Out<u32>, id: Out<u64>, graph: Out<u64>, nodes: Out<u64>, count: Out<usize>,
    ) {
        capture_info(handle, per_thread, state, id, graph, nodes, count)
    }

    fn cuStreamGetCaptureInfo_v3 / cuStreamGetCaptureInfo_v3_ptsz [per_thread] (
        handle: u64, state: Out<u32>, id: Out<u64>, graph: Out<u64>, nodes: Out<u64>, edges: Out<u64>, count: Out<usize>,
    ) {
        // Edges carry no data.
        edges.offer(0);
        capture_info(handle, per_thread, state, id, graph, nodes, count)
    }

    fn cuStreamUpdateCaptureDependencies / cuStreamUpdateCaptureDependencies_ptsz [per_thread] (
        handle: u64, nodes: In<u64>, count: usize, flags: u32,
    ) {
        update_dependencies(handle, per_thread, nodes, count, flags)
    }

    fn cuStreamUpdateCaptureDependencies_v2 / cuStreamUpdateCaptureDependencies_v2_ptsz [per_thread] (
        handle: u64, nodes: In<u64>, edges: In<u64>, count: usize, flags: u32,
    ) {
        let _ = edges;
        update_dependencies(handle, per_thread, nodes, count, flags)
    }
}
