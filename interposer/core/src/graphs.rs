//! Instantiated graphs that have memory nodes, and what they need. Pure bookkeeping.
//!
//! The driver takes the physical memory of such nodes when the graph is launched or uploaded, from a
//! store that it keeps per device; see [`crate::stores`]. Graphs without memory nodes are not listed, and
//! a program that never makes such a node pays one plain load per launch.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use spillway_protocol::{granules_down, granules_up};

/// A memory node has been made or captured in this process.
static ANY: AtomicBool = AtomicBool::new(false);

/// Notes that there is a memory node.
pub fn node_made() {
    ANY.store(true, SeqCst);
}

/// Whether some graph of this process may have memory nodes.
#[inline]
#[must_use]
pub fn any_node() -> bool {
    ANY.load(std::sync::atomic::Ordering::Relaxed)
}

/// Bytes that a graph's nodes allocate, by device index.
pub type Needs = Vec<(usize, u64)>;

/// What nodes need that have these addresses, as (device index, start, bytes). Addresses are backed once:
/// a node whose lifetime ends before another's begins may have given it its own.
#[must_use]
pub fn needs_of(mut nodes: Vec<(usize, u64, u64)>) -> Needs {
    nodes.sort_unstable();
    let mut needs = Needs::new();
    let mut covered = (usize::MAX, 0);
    for (device, start, bytes) in nodes {
        let end = granules_up(start.saturating_add(bytes));
        let from = match covered {
            (same, to) if same == device => granules_down(start).max(to),
            _ => granules_down(start),
        };
        covered = (device, end.max(from));
        let more = end.saturating_sub(from);
        match needs.last_mut() {
            Some((known, sum)) if *known == device => *sum = sum.saturating_add(more),
            _ => needs.push((device, more)),
        }
    }
    needs
}

/// Instantiated graphs with memory nodes.
#[derive(Debug, Default)]
pub struct Graphs {
    execs: HashMap<usize, Needs>,
    ever: bool,
}

impl Graphs {
    /// A graph with memory nodes was instantiated.
    pub fn add(&mut self, exec: usize, needs: Needs) {
        self.ever = true;
        self.execs.insert(exec, needs);
    }

    /// What an instantiated graph allocates, if it does.
    #[must_use]
    pub fn needs(&self, exec: usize) -> Option<Needs> {
        self.execs.get(&exec).cloned()
    }

    /// It is destroyed. Its memory stays in the driver's store.
    pub fn remove(&mut self, exec: usize) {
        self.execs.remove(&exec);
    }

    /// There has been one, so the driver's store may hold memory.
    #[must_use]
    pub fn any(&self) -> bool {
        self.ever
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_nodes_share_are_needed_once() {
        const MIB: u64 = 1 << 20;
        let node =
            |device: usize, start: u64, bytes: u64| (device, (64 + start) * MIB, bytes * MIB);
        assert_eq!(needs_of(Vec::new()), Needs::new());
        // One after the other at one address, and once beside it.
        let nodes = vec![node(0, 0, 8), node(0, 0, 8), node(0, 8, 4), node(0, 2, 2)];
        assert_eq!(needs_of(nodes), vec![(0, 12 * MIB)]);
        // Small ones share a granule; devices have addresses of their own.
        let small = vec![(1, 64 * MIB + 512, 512), (1, 64 * MIB, 512), node(0, 0, 3)];
        assert_eq!(needs_of(small), vec![(0, 4 * MIB), (1, 2 * MIB)]);
    }

    #[test]
    fn the_store_outlives_the_graph() {
        let mut graphs = Graphs::default();
        assert!(!graphs.any());
        graphs.add(7, vec![(0, 100)]);
        assert_eq!(graphs.needs(7), Some(vec![(0, 100)]));
        graphs.remove(7);
        assert_eq!(graphs.needs(7), None);
        assert!(graphs.any());
    }
}
