//! Memory of graphs: allocation and free nodes, when they take memory and when it comes back.

use std::time::Duration;

use super::capture::{end, instantiate};
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("graph_memory":
    nodes_take_addresses_and_no_memory,
    a_launch_takes_memory_and_a_trim_gives_it_back,
    an_upload_takes_the_memory_ahead,
    what_is_freed_in_the_graph_is_cached,
    graphs_in_one_stream_share_memory,
    an_unfreed_allocation_lives_on,
    relaunching_with_an_unfreed_allocation_is_refused,
    auto_free_allows_to_launch_again,
    another_graph_may_free_it,
    a_launch_that_cannot_have_memory_is_out_of_memory,
    memory_nodes_tell_what_they_are,
    a_free_node_takes_graph_memory_once,
    graphs_with_memory_nodes_are_single,
    a_captured_free_takes_graph_memory_only,
    watermarks_are_reset_to_the_present,
    child_graphs_are_copies_that_can_be_asked,
);

const USED: i32 = 0;
const USED_HIGH: i32 = 1;
const RESERVED: i32 = 2;
const RESERVED_HIGH: i32 = 3;
const AUTO_FREE: u64 = 1;
const RELAXED: i32 = 2;
const BYTES: usize = 64 * MIB;

fn start() -> Result<(Gpu, Handle), Stop> {
    let gpu = Gpu::start()?;
    gpu.needs(115, "memory pools")?;
    let stream = stream(NON_BLOCKING)?;
    Ok((gpu, stream))
}

fn figure(gpu: &Gpu, attribute: i32) -> Result<u64, Stop> {
    let mut value = u64::MAX;
    ok!(cuDeviceGetGraphMemAttribute(gpu.device, attribute, &mut value));
    Ok(value)
}

fn graph() -> Result<Handle, Stop> {
    let mut graph = 0;
    ok!(cuGraphCreate(&mut graph, 0));
    Ok(graph)
}

fn alloc_params(gpu: &Gpu, bytes: usize) -> AllocNodeParams {
    let pool = PoolProps { kind: 1, location: gpu.location(), ..Default::default() };
    AllocNodeParams { pool, bytes, ..Default::default() }
}

/// An allocation node behind others: its handle and its address.
fn add_alloc(gpu: &Gpu, graph: Handle, after: &[Handle], bytes: usize) -> Result<(Handle, Dptr), Stop> {
    let (mut node, mut params) = (0, alloc_params(gpu, bytes));
    ok!(cuGraphAddMemAllocNode(&mut node, graph, after.as_ptr(), after.len(), &mut params));
    check!(params.address != 0, "an allocation node with a null address");
    Ok((node, params.address))
}

fn add_fill(gpu: &Gpu, graph: Handle, after: &[Handle], address: Dptr, bytes: usize, value: u8) -> Result<Handle, Stop> {
    let mut node = 0;
    let value = u32::from(value);
    let params = MemsetNodeParams { address, pitch: 0, value, element: 1, width: bytes, height: 1 };
    ok!(cuGraphAddMemsetNode(&mut node, graph, after.as_ptr(), after.len(), &params, gpu.context));
    Ok(node)
}

fn add_free(graph: Handle, after: &[Handle], address: Dptr) -> Result<Handle, Stop> {
    let mut node = 0;
    ok!(cuGraphAddMemFreeNode(&mut node, graph, after.as_ptr(), after.len(), address));
    Ok(node)
}

/// Allocate, fill, free.
fn cycle(gpu: &Gpu, bytes: usize, value: u8) -> Result<Handle, Stop> {
    let graph = graph()?;
    let (node, address) = add_alloc(gpu, graph, &[], bytes)?;
    let filled = add_fill(gpu, graph, &[node], address, bytes, value)?;
    add_free(graph, &[filled], address)?;
    Ok(graph)
}

/// Allocate and fill: the allocation outlives the launch.
fn keeps(gpu: &Gpu, bytes: usize, value: u8) -> Result<(Handle, Dptr), Stop> {
    let graph = graph()?;
    let (node, address) = add_alloc(gpu, graph, &[], bytes)?;
    add_fill(gpu, graph, &[node], address, bytes, value)?;
    Ok((graph, address))
}

fn launch(exec: Handle, stream: Handle) -> Outcome {
    ok!(cuGraphLaunch(exec, stream));
    ok!(cuStreamSynchronize(stream));
    Ok(())
}

/// What the graph pool holds is back on the device after a trim.
fn trimmed(gpu: &Gpu, before: usize) -> Outcome {
    ok!(cuDeviceGraphMemTrim(gpu.device));
    check!(figure(gpu, RESERVED)? == 0, "reserved {} after the trim", figure(gpu, RESERVED)?);
    let after = wait_free(before - 8 * MIB, Duration::from_secs(2))?;
    check!(after + 8 * MIB >= before, "free was {before}, is {after} after the trim");
    Ok(())
}

/// A node gets its address when it is made; neither it nor instantiating takes memory.
/// Source: CUDA C++ Programming Guide, Graph Memory Nodes (fixed addresses; mapping at launch or upload).
fn nodes_take_addresses_and_no_memory() -> Outcome {
    let (gpu, _stream) = start()?;
    let before = quiet()?;
    let graph = cycle(&gpu, BYTES, 1)?;
    check!(free_bytes()? + 8 * MIB >= before, "the nodes took {}", before - free_bytes()?);
    check!(figure(&gpu, RESERVED)? == 0, "reserved {} by nodes", figure(&gpu, RESERVED)?);
    let exec = instantiate(graph)?;
    let taken = before.saturating_sub(free_bytes()?);
    observe!("instantiating took {taken} bytes, reserved {}", figure(&gpu, RESERVED)?);
    ok!(cuGraphExecDestroy(exec));
    ok!(cuGraphDestroy(graph));
    Ok(())
}

/// The launch takes physical memory; it stays reserved until it is trimmed, also when graph and exec are gone.
/// Source: CUDA C++ Programming Guide, Graph Memory Nodes, Physical Memory Footprint.
fn a_launch_takes_memory_and_a_trim_gives_it_back() -> Outcome {
    let (gpu, stream) = start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let before = quiet()?;
    let graph = cycle(&gpu, BYTES, 2)?;
    let exec = instantiate(graph)?;
    launch(exec, stream)?;
    let during = free_bytes()?;
    check!(during + BYTES <= before, "a launch with {BYTES} bytes took {}", before - during);
    let (used, reserved) = (figure(&gpu, USED)?, figure(&gpu, RESERVED)?);
    check!(reserved >= BYTES as u64 && used <= reserved, "used {used}, reserved {reserved}");
    ok!(cuGraphExecDestroy(exec));
    ok!(cuGraphDestroy(graph));
    check!(figure(&gpu, RESERVED)? >= BYTES as u64, "destroying gave the memory back at once");
    check!(free_bytes()? + BYTES <= before, "destroying gave the memory back at once");
    trimmed(&gpu, before)
}

/// cuGraphUpload does what the first launch would have to do.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphUpload.
fn an_upload_takes_the_memory_ahead() -> Outcome {
    let (gpu, stream) = start()?;
    let before = quiet()?;
    let graph = cycle(&gpu, BYTES, 3)?;
    let exec = instantiate(graph)?;
    ok!(cuGraphUpload(exec, stream));
    ok!(cuStreamSynchronize(stream));
    check!(free_bytes()? + BYTES <= before, "an upload took {}", before.saturating_sub(free_bytes()?));
    let reserved = figure(&gpu, RESERVED)?;
    launch(exec, stream)?;
    check!(figure(&gpu, RESERVED)? == reserved, "the launch took more: {}", figure(&gpu, RESERVED)?);
    ok!(cuGraphExecDestroy(exec));
    ok!(cuGraphDestroy(graph));
    trimmed(&gpu, before)
}

/// Launching again takes nothing more; trimming between launches is allowed.
/// Source: CUDA C++ Programming Guide, Graph Memory Nodes, Physical Memory Footprint.
fn what_is_freed_in_the_graph_is_cached() -> Outcome {
    let (gpu, stream) = start()?;
    let before = quiet()?;
    let graph = cycle(&gpu, BYTES, 4)?;
    let exec = instantiate(graph)?;
    launch(exec, stream)?;
    let reserved = figure(&gpu, RESERVED)?;
    for _ in 0..5 {
        launch(exec, stream)?;
    }
    check!(figure(&gpu, RESERVED)? == reserved, "the pool grew from {reserved} to {}", figure(&gpu, RESERVED)?);
    trimmed(&gpu, before)?;
    launch(exec, stream)?;
    check!(figure(&gpu, RESERVED)? >= BYTES as u64, "a launch after the trim took nothing");
    ok!(cuGraphExecDestroy(exec));
    ok!(cuGraphDestroy(graph));
    trimmed(&gpu, before)
}

/// Graphs that are launched into one stream use the same physical memory.
/// Source: CUDA C++ Programming Guide, Graph Memory Nodes, sharing of physical memory between graphs.
fn graphs_in_one_stream_share_memory() -> Outcome {
    let (gpu, stream) = start()?;
    let before = quiet()?;
    let graphs = [cycle(&gpu, BYTES, 5)?, cycle(&gpu, BYTES, 6)?, cycle(&gpu, BYTES, 7)?];
    let mut execs = Vec::new();
    for graph in graphs {
        execs.push(instantiate(graph)?);
    }
    for _ in 0..3 {
        for exec in &execs {
            ok!(cuGraphLaunch(*exec, stream));
        }
    }
    ok!(cuStreamSynchronize(stream));
    let reserved = figure(&gpu, RESERVED)?;
    observe!("three graphs of {BYTES} bytes in one stream reserve {reserved}");
    check!(reserved < 3 * BYTES as u64, "nothing is shared: {reserved}");
    for (exec, graph) in execs.into_iter().zip(graphs) {
        ok!(cuGraphExecDestroy(exec));
        ok!(cuGraphDestroy(graph));
    }
    trimmed(&gpu, before)
}

/// An allocation that the graph does not free can be used after the launch, outlives graph and exec, and is
/// freed by cuMemFree or cuMemFreeAsync, once.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphAddMemAllocNode; CUDA C++ Programming Guide, Graph
/// Memory Nodes (destroying does not free live allocations).
fn an_unfreed_allocation_lives_on() -> Outcome {
    let (gpu, stream) = start()?;
    let before = quiet()?;
    for asynchronous in [false, true] {
        let (graph, address) = keeps(&gpu, BYTES, 8)?;
        let exec = instantiate(graph)?;
        launch(exec, stream)?;
        ok!(cuGraphExecDestroy(exec));
        ok!(cuGraphDestroy(graph));
        ok!(cuDeviceGraphMemTrim(gpu.device));
        check!(free_bytes()? + BYTES <= before, "a live allocation was trimmed");
        check!(read(address, BYTES)?.iter().all(|b| *b == 8), "contents differ");
        ok!(cuMemsetD8_v2(address, 9, BYTES));
        ok!(cuCtxSynchronize());
        if asynchronous {
            ok!(cuMemFreeAsync(address, stream));
            fails!(cuMemFreeAsync(address, stream));
            ok!(cuStreamSynchronize(stream));
        } else {
            ok!(cuMemFree_v2(address));
            fails!(cuMemFree_v2(address));
        }
        trimmed(&gpu, before)?;
    }
    Ok(())
}

/// A graph cannot be launched again while an allocation of its last launch is not freed.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphLaunch and cuGraphAddMemAllocNode.
fn relaunching_with_an_unfreed_allocation_is_refused() -> Outcome {
    let (gpu, stream) = start()?;
    let (graph, address) = keeps(&gpu, 4 * MIB, 10)?;
    let exec = instantiate(graph)?;
    launch(exec, stream)?;
    is!(cuGraphLaunch(exec, stream), INVALID_VALUE);
    ok!(cuMemFreeAsync(address, stream));
    launch(exec, stream)?;
    check!(read(address, 4096)?.iter().all(|b| *b == 10), "contents differ");
    ok!(cuMemFree_v2(address));
    launch(exec, stream)?;
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// With AUTO_FREE_ON_LAUNCH a launch frees what the last one left, and takes no more memory for it.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphInstantiate.
fn auto_free_allows_to_launch_again() -> Outcome {
    let (gpu, stream) = start()?;
    let (graph, address) = keeps(&gpu, BYTES, 11)?;
    let mut exec = 0;
    ok!(cuGraphInstantiateWithFlags(&mut exec, graph, AUTO_FREE));
    launch(exec, stream)?;
    let reserved = figure(&gpu, RESERVED)?;
    for _ in 0..5 {
        launch(exec, stream)?;
    }
    check!(figure(&gpu, RESERVED)? <= reserved + 2 * MIB as u64, "relaunching grew the pool from {reserved}");
    check!(read(address, 4096)?.iter().all(|b| *b == 11), "contents differ");
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// An allocation that its own graph does not free may be freed by a node of another one.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphAddMemAllocNode.
fn another_graph_may_free_it() -> Outcome {
    let (gpu, stream) = start()?;
    let before = quiet()?;
    let (first, address) = keeps(&gpu, BYTES, 12)?;
    let second = graph()?;
    let filled = add_fill(&gpu, second, &[], address, BYTES, 13)?;
    add_free(second, &[filled], address)?;
    let (makes, frees) = (instantiate(first)?, instantiate(second)?);
    for _ in 0..3 {
        ok!(cuGraphLaunch(makes, stream));
        ok!(cuGraphLaunch(frees, stream));
    }
    ok!(cuStreamSynchronize(stream));
    fails!(cuMemFree_v2(address));
    for exec in [makes, frees] {
        ok!(cuGraphExecDestroy(exec));
    }
    for graph in [first, second] {
        ok!(cuGraphDestroy(graph));
    }
    trimmed(&gpu, before)
}

/// More than there is fails at the launch (or before), as out of memory, and what was there is still there.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphLaunch (returned codes).
fn a_launch_that_cannot_have_memory_is_out_of_memory() -> Outcome {
    let (gpu, stream) = start()?;
    let (free, total) = (quiet()?, memory_info()?.1);
    let graph = graph()?;
    let (mut node, mut params) = (0, alloc_params(&gpu, total + GIB));
    match cuGraphAddMemAllocNode(&mut node, graph, std::ptr::null(), 0, &mut params) {
        Code::OUT_OF_MEMORY => observe!("the node is refused already"),
        code => {
            ok!(code);
            add_free(graph, &[node], params.address)?;
            let mut exec = 0;
            match cuGraphInstantiateWithFlags(&mut exec, graph, 0) {
                Code::OUT_OF_MEMORY => observe!("instantiating is refused already"),
                code => {
                    ok!(code);
                    for _ in 0..3 {
                        is!(cuGraphLaunch(exec, stream), OUT_OF_MEMORY);
                    }
                }
            }
        }
    }
    // Driver 580 keeps all that it could get before it failed, even when it is told to trim.
    observe!("kept after the failures: {} bytes", free.saturating_sub(free_bytes()?));
    ok!(cuDeviceGraphMemTrim(gpu.device));
    observe!("kept after a trim: {} bytes", free.saturating_sub(free_bytes()?));
    if !gpu.is_simulated()? {
        return Ok(());
    }
    check!(free_bytes()? + 8 * MIB >= free, "free was {free}, is {}", free_bytes()?);
    let small = instantiate(cycle(&gpu, MIB, 14)?)?;
    launch(small, stream)
}

/// Nodes of a capture and of a graph built by hand tell their kind, and give back their parameters.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphMemAllocNodeGetParams, cuGraphMemFreeNodeGetParams.
fn memory_nodes_tell_what_they_are() -> Outcome {
    let (_gpu, stream) = start()?;
    let mut address = 0;
    ok!(cuStreamBeginCapture_v2(stream, RELAXED));
    ok!(cuMemAllocAsync(&mut address, 3 * MIB, stream));
    ok!(cuMemFreeAsync(address, stream));
    let graph = end(stream)?;
    let (mut nodes, mut n) = ([0; 8], 8);
    ok!(cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut n));
    check!(n == 2, "{n} nodes");
    let (mut allocs, mut frees) = (0, 0);
    for node in &nodes[..n] {
        let (mut kind, mut params, mut freed) = (0, AllocNodeParams::default(), 0);
        ok!(cuGraphNodeGetType(*node, &mut kind));
        match kind {
            10 => {
                ok!(cuGraphMemAllocNodeGetParams(*node, &mut params));
                check!(params.address == address, "address {:x}, was {address:x}", params.address);
                check!(params.bytes >= 3 * MIB, "{} bytes", params.bytes);
                fails!(cuGraphMemFreeNodeGetParams(*node, &mut freed));
                allocs += 1;
            }
            11 => {
                ok!(cuGraphMemFreeNodeGetParams(*node, &mut freed));
                check!(freed == address, "freed {freed:x}, was {address:x}");
                fails!(cuGraphMemAllocNodeGetParams(*node, &mut params));
                frees += 1;
            }
            other => check!(false, "a node of kind {other}"),
        }
    }
    check!(allocs == 1 && frees == 1, "{allocs} allocation nodes, {frees} free nodes");
    Ok(())
}

/// A free node takes an address of an allocation node, once in a graph.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphAddMemFreeNode.
fn a_free_node_takes_graph_memory_once() -> Outcome {
    let (gpu, _stream) = start()?;
    let (graph, mut node) = (graph()?, 0);
    let none = std::ptr::null();
    is!(cuGraphAddMemFreeNode(&mut node, graph, none, 0, alloc(MIB)?), INVALID_VALUE);
    is!(cuGraphAddMemFreeNode(&mut node, graph, none, 0, 0x1000), INVALID_VALUE);
    let (made, address) = add_alloc(&gpu, graph, &[], MIB)?;
    let freed = add_free(graph, &[made], address)?;
    is!(cuGraphAddMemFreeNode(&mut node, graph, &raw const freed, 1, address), INVALID_VALUE);
    let mut params = alloc_params(&gpu, 0);
    is!(cuGraphAddMemAllocNode(&mut node, graph, none, 0, &mut params), INVALID_VALUE);
    // Never launched: nothing to free.
    fails!(cuMemFree_v2(address));
    Ok(())
}

/// A graph with memory nodes cannot be cloned, embedded as a copy, or instantiated twice at a time.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphAddMemAllocNode (restrictions).
fn graphs_with_memory_nodes_are_single() -> Outcome {
    let (gpu, stream) = start()?;
    let own = cycle(&gpu, MIB, 15)?;
    let (mut clone, mut node) = (0, 0);
    fails!(cuGraphClone(&mut clone, own));
    fails!(cuGraphAddChildGraphNode(&mut node, graph()?, std::ptr::null(), 0, own));
    let (first, mut second) = (instantiate(own)?, 0);
    fails!(cuGraphInstantiateWithFlags(&mut second, own, 0));
    launch(first, stream)?;
    ok!(cuGraphExecDestroy(first));
    let again = instantiate(own)?;
    launch(again, stream)
}

/// In a capture cuMemFreeAsync takes memory of graphs only.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemFreeAsync.
fn a_captured_free_takes_graph_memory_only() -> Outcome {
    let (_gpu, stream) = start()?;
    let mut address = 0;
    ok!(cuMemAllocAsync(&mut address, MIB, stream));
    ok!(cuStreamSynchronize(stream));
    ok!(cuStreamBeginCapture_v2(stream, RELAXED));
    fails!(cuMemFreeAsync(address, stream));
    let mut graph = 0;
    observe!("ending the capture after it: {:?}", cuStreamEndCapture(stream, &mut graph));
    ok!(cuMemsetD8_v2(address, 1, MIB));
    ok!(cuCtxSynchronize());
    ok!(cuMemFreeAsync(address, stream));
    ok!(cuStreamSynchronize(stream));
    Ok(())
}

/// The high figures follow the present ones, and can be set back to them by setting 0.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuDeviceSetGraphMemAttribute.
fn watermarks_are_reset_to_the_present() -> Outcome {
    let (gpu, stream) = start()?;
    let graph = cycle(&gpu, BYTES, 16)?;
    let exec = instantiate(graph)?;
    launch(exec, stream)?;
    ok!(cuGraphExecDestroy(exec));
    ok!(cuGraphDestroy(graph));
    ok!(cuDeviceGraphMemTrim(gpu.device));
    for (high, now) in [(USED_HIGH, USED), (RESERVED_HIGH, RESERVED)] {
        check!(figure(&gpu, high)? >= BYTES as u64, "high {}", figure(&gpu, high)?);
        ok!(cuDeviceSetGraphMemAttribute(gpu.device, high, &0));
        check!(figure(&gpu, high)? == figure(&gpu, now)?, "high {} after the reset", figure(&gpu, high)?);
        fails!(cuDeviceSetGraphMemAttribute(gpu.device, now, &0));
    }
    Ok(())
}

/// A child graph is a copy; the copy can be had, and its nodes run.
/// Source: NVIDIA CUDA Driver API, Graph Management, cuGraphAddChildGraphNode, cuGraphChildGraphNodeGetGraph.
fn child_graphs_are_copies_that_can_be_asked() -> Outcome {
    let (gpu, stream) = start()?;
    let buffer = alloc(MIB)?;
    let (parent, child) = (graph()?, graph()?);
    add_fill(&gpu, child, &[], buffer, MIB, 17)?;
    let (mut node, mut inner, mut n) = (0, 0, 0);
    ok!(cuGraphAddChildGraphNode(&mut node, parent, std::ptr::null(), 0, child));
    ok!(cuGraphDestroy(child));
    ok!(cuGraphChildGraphNodeGetGraph(node, &mut inner));
    check!(inner != 0 && inner != child, "the child is not a copy");
    ok!(cuGraphGetNodes(inner, std::ptr::null_mut(), &mut n));
    check!(n == 1, "{n} nodes in the child");
    let exec = instantiate(parent)?;
    launch(exec, stream)?;
    check!(read(buffer, MIB)?.iter().all(|b| *b == 17), "the child did not run");
    Ok(())
}
