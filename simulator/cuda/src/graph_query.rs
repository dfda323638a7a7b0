//! What is in a graph.

use crate::abi::{In, Out, exports};
use crate::graph::graph_of;
use crate::layout::{AccessDescriptor, AllocNode, LOCATION_DEVICE, Location, PoolProperties};
use spillway_simulator_core::code::{INVALID_VALUE, R};
use spillway_simulator_core::driver;
use spillway_simulator_core::exec::Op;
use spillway_simulator_core::graph::Node;
use spillway_simulator_core::graph_memory::GraphAlloc;
use spillway_simulator_core::sync::lock;
use std::sync::Arc;

/// Answers a list query: the count, and as many elements as the caller has room for.
fn list(out: Out<u64>, count: Out<usize>, ids: &[u64]) -> R {
    count.needed()?;
    if !out.is_null() {
        let room = In::<usize>::of(count.raw() as u64).get()?;
        for index in 0..room {
            out.set_at(index, ids.get(index).copied().unwrap_or(0))?;
        }
        return count.set(ids.len().min(room));
    }
    count.set(ids.len())
}

/// The node of a handle, whichever graph it is in.
fn with_node<T>(handle: u64, f: impl Fn(&[Node], usize) -> T) -> R<T> {
    for graph in driver::get()?.graphs.all() {
        let nodes = lock(&graph.nodes);
        if let Some(index) = nodes.iter().position(|n| n.id == handle) {
            return Ok(f(&nodes, index));
        }
    }
    Err(INVALID_VALUE)
}

/// The allocation of a memory node; `None` if the node is none.
fn alloc_of(node: u64) -> R<Option<Arc<GraphAlloc>>> {
    with_node(node, |nodes, index| match &nodes[index].op {
        Op::GraphAlloc(alloc) => Some(Arc::clone(alloc)),
        _ => None,
    })
}

std::thread_local! {
    /// Access lists are handed out by address: the last one of each thread stays readable.
    static ACCESS: std::cell::RefCell<Vec<AccessDescriptor>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn edges(graph: u64, from: Out<u64>, to: Out<u64>, count: Out<usize>) -> R {
    let graph = graph_of(driver::get()?, graph)?;
    let nodes = lock(&graph.nodes);
    let all: Vec<(u64, u64)> = nodes
        .iter()
        .flat_map(|n| {
            n.after
                .iter()
                .map(|a| (nodes[*a].id, n.id))
                .collect::<Vec<_>>()
        })
        .collect();
    drop(nodes);
    count.needed()?;
    if from.is_null() != to.is_null() {
        return Err(INVALID_VALUE);
    }
    if from.is_null() {
        return count.set(all.len());
    }
    let room = In::<usize>::of(count.raw() as u64).get()?;
    for (index, (source, target)) in all.iter().take(room).enumerate() {
        from.set_at(index, *source)?;
        to.set_at(index, *target)?;
    }
    count.set(all.len().min(room))
}

exports! {
    fn cuGraphGetNodes(graph: u64, out: Out<u64>, count: Out<usize>) {
        let graph = graph_of(driver::get()?, graph)?;
        let ids: Vec<u64> = lock(&graph.nodes).iter().map(|n| n.id).collect();
        list(out, count, &ids)
    }

    fn cuGraphGetRootNodes(graph: u64, out: Out<u64>, count: Out<usize>) {
        let graph = graph_of(driver::get()?, graph)?;
        let ids: Vec<u64> = lock(&graph.nodes).iter().filter(|n| n.after.is_empty()).map(|n| n.id).collect();
        list(out, count, &ids)
    }

    fn cuGraphGetEdges(graph: u64, from: Out<u64>, to: Out<u64>, count: Out<usize>) {
        edges(graph, from, to, count)
    }

    fn cuGraphNodeGetType(node: u64, out: Out<u32>) {
        out.set(with_node(node, |nodes, index| nodes[index].kind)?)
    }

    fn cuGraphNodeGetDependencies(node: u64, out: Out<u64>, count: Out<usize>) {
        let ids = with_node(node, |nodes, index| nodes[index].after.iter().map(|a| nodes[*a].id).collect::<Vec<_>>())?;
        list(out, count, &ids)
    }

    fn cuGraphNodeGetDependentNodes(node: u64, out: Out<u64>, count: Out<usize>) {
        let ids = with_node(node, |nodes, index| {
            nodes.iter().filter(|n| n.after.contains(&index)).map(|n| n.id).collect::<Vec<_>>()
        })?;
        list(out, count, &ids)
    }

    fn cuGraphMemAllocNodeGetParams(node: u64, out: Out<AllocNode>) {
        out.needed()?;
        let alloc = alloc_of(node)?.ok_or(INVALID_VALUE)?;
        let device = |gpu: u32| Location { kind: LOCATION_DEVICE, id: gpu as i32 };
        let list = alloc.access.iter().map(|(gpu, flags)| AccessDescriptor {
            location: device(*gpu),
            flags: u32::from(*flags),
        });
        let access = ACCESS.with(|last| {
            *last.borrow_mut() = list.collect();
            last.borrow().as_ptr() as u64
        });
        out.set(AllocNode {
            pool: PoolProperties {
                kind: 1,
                handle_types: 0,
                location: device(alloc.unit.gpu),
                windows: 0,
                max_bytes: 0,
                rest: [0; 56],
            },
            access: if alloc.access.is_empty() { 0 } else { access },
            access_count: alloc.access.len(),
            bytes: alloc.bytes as usize,
            address: alloc.start,
        })
    }

    fn cuGraphMemFreeNodeGetParams(node: u64, out: Out<u64>) {
        out.needed()?;
        let start = with_node(node, |nodes, index| match nodes[index].op {
            Op::GraphFree { start, .. } => Some(start),
            _ => None,
        })?;
        out.set(start.ok_or(INVALID_VALUE)?)
    }

    fn cuGraphChildGraphNodeGetGraph(node: u64, out: Out<u64>) {
        out.needed()?;
        let child = with_node(node, |nodes, index| match &nodes[index].op {
            Op::Child(child) => Some(child.id),
            _ => None,
        })?;
        out.set(child.ok_or(INVALID_VALUE)?)
    }
}
