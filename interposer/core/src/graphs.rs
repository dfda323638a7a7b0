//! Instantiated graphs that have memory nodes, and what they need. Pure bookkeeping.
//!
//! The driver takes the physical memory of such nodes when the graph is launched or uploaded, from a
//! store that it keeps per device; see [`crate::stores`]. Graphs without memory nodes are not listed, and
//! a program that never makes such a node pays one plain load per launch.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

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
