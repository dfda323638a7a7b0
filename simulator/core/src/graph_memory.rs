//! Memory of graphs: allocation nodes and the addresses that they reserve.
//!
//! A node's addresses are fixed from the moment it is made, over all launches. Nothing lies behind
//! them: launches take the memory (`graph_pool.rs`).

use crate::classic::SMALL_MAX;
use crate::code::{INVALID_VALUE, OUT_OF_MEMORY, R};
use crate::config::{FRAME, GPUS_MAX};
use crate::driver::Driver;
use crate::exec::Op;
use crate::graph::Node;
use crate::ranges::Ranges;
use crate::space::{Allocation, READ_WRITE, fresh_id};
use crate::sync::write;
use std::collections::HashSet;
use std::sync::Arc;

/// Stands where a pool would: memory of a graph.
pub const GRAPH: u64 = 2;

/// Addresses of one allocation node, or of small ones that share a frame; given back when nobody
/// can name them any more.
pub struct Unit {
    driver: &'static Driver,
    pub gpu: u32,
    pub start: u64,
    pub length: u64,
    pub(crate) access: [u8; GPUS_MAX],
}

impl Drop for Unit {
    fn drop(&mut self) {
        let end = self.start + self.length;
        let mut space = write(&self.driver.space);
        let regions: Vec<u64> = space.regions.range(self.start..end).map(|r| *r.0).collect();
        let gone: Vec<_> = regions
            .iter()
            .filter_map(|r| space.regions.remove(r))
            .collect();
        space
            .allocations
            .retain(|start, _| !(self.start..end).contains(start));
        space.give_addresses(self.start, self.length);
        drop(space);
        drop(gone);
    }
}

/// What an allocation node allocates.
pub struct GraphAlloc {
    /// Tells it from others that have had the same address.
    pub key: u64,
    pub unit: Arc<Unit>,
    pub start: u64,
    pub bytes: u64,
    /// Other GPUs that may access it, and how.
    pub access: Vec<(u32, u8)>,
}

/// Frames of a graph's addresses that small allocations share.
#[derive(Default)]
pub struct Small(Vec<(Arc<Unit>, Ranges)>);

fn ancestors(nodes: &[Node], after: &[usize]) -> HashSet<usize> {
    let mut seen = HashSet::new();
    let mut todo = after.to_vec();
    while let Some(index) = todo.pop() {
        if seen.insert(index) {
            todo.extend(&nodes[index].after);
        }
    }
    seen
}

/// An allocation of the same size that is freed, in the graph, before a node behind `after` runs.
fn reusable(
    nodes: &[Node],
    after: &[usize],
    like: impl Fn(&GraphAlloc) -> bool,
) -> Option<Arc<GraphAlloc>> {
    let freed: Vec<(usize, u64)> = nodes
        .iter()
        .enumerate()
        .filter_map(|(index, node)| match node.op {
            Op::GraphFree { own: Some(key), .. } => Some((index, key)),
            _ => None,
        })
        .collect();
    if freed.is_empty() {
        return None;
    }
    let before = ancestors(nodes, after);
    let allocs = || {
        nodes.iter().filter_map(|node| match &node.op {
            Op::GraphAlloc(alloc) => Some(alloc),
            _ => None,
        })
    };
    allocs()
        .find(|alloc| {
            like(alloc)
                && freed
                    .iter()
                    .any(|(index, key)| *key == alloc.key && before.contains(index))
                // The last one at the address: an earlier one was reused already.
                && allocs()
                    .rfind(|other| other.start == alloc.start)
                    .is_some_and(|last| last.key == alloc.key)
        })
        .cloned()
}

fn new_unit(driver: &'static Driver, gpu: u32, length: u64, access: &[(u32, u8)]) -> R<Arc<Unit>> {
    let mut rights = [0; GPUS_MAX];
    rights[gpu as usize] = READ_WRITE;
    for (peer, flags) in access {
        rights[*peer as usize] |= flags;
    }
    let start = write(&driver.space)
        .take_addresses(length, FRAME, 0)
        .ok_or(OUT_OF_MEMORY)?;
    Ok(Arc::new(Unit {
        driver,
        gpu,
        start,
        length,
        access: rights,
    }))
}

/// Addresses for an allocation node that follows `after` in a graph of `nodes`.
///
/// # Errors
/// `INVALID_VALUE` for no bytes, `OUT_OF_MEMORY` without addresses.
pub fn reserve(
    driver: &'static Driver,
    nodes: &[Node],
    after: &[usize],
    small: &mut Small,
    gpu: u32,
    bytes: u64,
    access: Vec<(u32, u8)>,
) -> R<Arc<GraphAlloc>> {
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    if bytes > 1 << 40 {
        return Err(OUT_OF_MEMORY);
    }
    let length = crate::classic::rounded(bytes);
    let like = |alloc: &GraphAlloc| {
        alloc.unit.gpu == gpu
            && crate::classic::rounded(alloc.bytes) == length
            && alloc.access == access
    };
    let (unit, start) = if let Some(alloc) = reusable(nodes, after, like) {
        (Arc::clone(&alloc.unit), alloc.start)
    } else if length <= SMALL_MAX && access.is_empty() {
        let shared = small.0.iter_mut().filter(|(unit, _)| unit.gpu == gpu);
        let taken = shared
            .map(|(unit, free)| (Arc::clone(unit), free.take(length, 512)))
            .find_map(|(unit, start)| start.map(|start| (unit, start)));
        if let Some(taken) = taken {
            taken
        } else {
            let unit = new_unit(driver, gpu, FRAME, &[])?;
            let mut free = Ranges::new(unit.start, FRAME);
            let start = free.take(length, 512).ok_or(OUT_OF_MEMORY)?;
            small.0.push((Arc::clone(&unit), free));
            (unit, start)
        }
    } else {
        let unit = new_unit(driver, gpu, length.next_multiple_of(FRAME), &access)?;
        let start = unit.start;
        (unit, start)
    };
    let allocation = Allocation {
        start,
        length: bytes,
        gpu,
        context: 0,
        pool: GRAPH,
        id: fresh_id(),
    };
    write(&driver.space).allocations.insert(start, allocation);
    Ok(Arc::new(GraphAlloc {
        key: fresh_id(),
        unit,
        start,
        bytes,
        access,
    }))
}

/// The work of a free node in a graph of `nodes`.
///
/// # Errors
/// `INVALID_VALUE` if no allocation node of any graph gave the address, or this graph frees it already.
pub fn free_op(driver: &Driver, nodes: &[Node], start: u64) -> R<Op> {
    let own = nodes.iter().rev().find_map(|node| match &node.op {
        Op::GraphAlloc(alloc) if alloc.start == start => Some(alloc.key),
        _ => None,
    });
    let twice = nodes.iter().any(|node| match node.op {
        Op::GraphFree { own: Some(key), .. } => Some(key) == own,
        Op::GraphFree {
            start: freed,
            own: None,
        } => own.is_none() && freed == start,
        _ => false,
    });
    let known = crate::classic::find(driver, start).is_ok_and(|a| a.pool == GRAPH);
    if twice || !known {
        return Err(INVALID_VALUE);
    }
    Ok(Op::GraphFree { start, own })
}
