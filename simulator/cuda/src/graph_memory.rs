//! Memory of graphs: allocation and free nodes, and the pools that launches take from.

use crate::abi::{In, Out, exports};
use crate::device::device;
use crate::graph::graph_of;
use crate::layout::{AccessDescriptor, AllocNode, LOCATION_DEVICE};
use spillway_simulator_core::capture::Capture;
use spillway_simulator_core::code::{INVALID_VALUE, NOT_SUPPORTED, R};
use spillway_simulator_core::driver;
use spillway_simulator_core::exec::Op;
use spillway_simulator_core::graph::{MEM_ALLOC, MEM_FREE};
use spillway_simulator_core::graph_memory::{self as nodes, GraphAlloc};
use spillway_simulator_core::graph_pool;
use spillway_simulator_core::stream::Stream;
use spillway_simulator_core::sync::lock;
use std::sync::Arc;

/// The GPU and the peers that a node's memory is to be for.
fn wanted(node: &AllocNode) -> R<(u32, Vec<(u32, u8)>)> {
    if node.pool.kind != 1 || node.bytes == 0 {
        return Err(INVALID_VALUE);
    }
    // The memory of a graph cannot be shared with other processes.
    if node.pool.handle_types != 0 {
        return Err(INVALID_VALUE);
    }
    if node.pool.location.kind != LOCATION_DEVICE {
        return Err(NOT_SUPPORTED);
    }
    let (_, gpu) = device(node.pool.location.id)?;
    let mut peers = Vec::new();
    for access in In::<AccessDescriptor>::of(node.access).list(node.access_count)? {
        if access.location.kind != LOCATION_DEVICE || !matches!(access.flags, 1 | 3) {
            return Err(INVALID_VALUE);
        }
        peers.push((device(access.location.id)?.1, access.flags as u8));
    }
    Ok((gpu, peers))
}

/// Adds an allocation node; the caller's structure gets the address.
///
/// # Errors
/// `INVALID_VALUE`, `OUT_OF_MEMORY` without addresses.
pub fn add_alloc(
    out: Out<u64>,
    graph: u64,
    after: In<u64>,
    count: usize,
    params: Out<AllocNode>,
) -> R {
    out.needed()?;
    params.needed()?;
    let driver = driver::get()?;
    let graph = graph_of(driver, graph)?;
    let mut node = In::<AllocNode>::of(params.raw() as u64).get()?;
    let (gpu, peers) = wanted(&node)?;
    let mut made: Option<Arc<GraphAlloc>> = None;
    let id = graph.add(MEM_ALLOC, &after.list(count)?, |nodes, after| {
        let small = &mut lock(&graph.small);
        let alloc = nodes::reserve(driver, nodes, after, small, gpu, node.bytes as u64, peers)?;
        made = Some(Arc::clone(&alloc));
        Ok(Op::GraphAlloc(alloc))
    })?;
    node.address = made.map_or(0, |alloc| alloc.start);
    params.set(node)?;
    out.set(id)
}

/// Adds a free node.
///
/// # Errors
/// `INVALID_VALUE` for what no allocation node gave, or a second free in the graph.
pub fn add_free(out: Out<u64>, graph: u64, after: In<u64>, count: usize, address: u64) -> R {
    out.needed()?;
    let driver = driver::get()?;
    let graph = graph_of(driver, graph)?;
    let after = after.list(count)?;
    let op = |nodes: &[_], _: &[usize]| nodes::free_op(driver, nodes, address);
    out.set(graph.add(MEM_FREE, &after, op)?)
}

/// A stream-ordered allocation in a capture: its address.
///
/// # Errors
/// `INVALID_VALUE` for no bytes, those of the capture.
pub fn capture_alloc(capture: &Capture, stream: &Stream, gpu: u32, bytes: u64) -> R<u64> {
    let driver = driver::get()?;
    let mut start = 0;
    capture.record_with(stream, MEM_ALLOC, |nodes, after| {
        let small = &mut lock(&capture.graph.small);
        let alloc = nodes::reserve(driver, nodes, after, small, gpu, bytes, Vec::new())?;
        start = alloc.start;
        Ok(Op::GraphAlloc(alloc))
    })?;
    Ok(start)
}

/// A stream-ordered free in a capture, which takes memory of graphs only.
///
/// # Errors
/// `INVALID_VALUE` for other memory, those of the capture.
pub fn capture_free(capture: &Capture, stream: &Stream, address: u64) -> R {
    let driver = driver::get()?;
    let op = |nodes: &[_], _: &[usize]| nodes::free_op(driver, nodes, address);
    capture.record_with(stream, MEM_FREE, op).map(|_| ())
}

exports! {
    fn cuGraphAddMemAllocNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, params: Out<AllocNode>) {
        add_alloc(out, graph, after, count, params)
    }

    fn cuGraphAddMemFreeNode(out: Out<u64>, graph: u64, after: In<u64>, count: usize, address: u64) {
        add_free(out, graph, after, count, address)
    }

    fn cuDeviceGetGraphMemAttribute(ordinal: i32, attribute: u32, value: Out<u64>) {
        value.needed()?;
        let (driver, gpu) = device(ordinal)?;
        value.set(graph_pool::attribute(driver, gpu, attribute)?)
    }

    fn cuDeviceSetGraphMemAttribute(ordinal: i32, attribute: u32, value: In<u64>) {
        let (driver, gpu) = device(ordinal)?;
        graph_pool::reset(driver, gpu, attribute, value.get()?)
    }

    fn cuDeviceGraphMemTrim(ordinal: i32) {
        let (driver, gpu) = device(ordinal)?;
        graph_pool::trim(driver, gpu);
        Ok(())
    }
}
