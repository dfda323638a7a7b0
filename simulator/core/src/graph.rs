//! Graphs: nodes, their order, and the memory that they own.

use crate::classic;
use crate::code::{INVALID_VALUE, R};
use crate::driver::Driver;
use crate::exec::Op;
use crate::space::fresh_id;
use crate::sync::lock;
use std::sync::{Arc, Mutex};

/// `CUgraphNodeType` values.
pub const KERNEL: u32 = 0;
pub const MEMCPY: u32 = 1;
pub const MEMSET: u32 = 2;
pub const HOST: u32 = 3;
pub const CHILD: u32 = 4;
pub const EMPTY: u32 = 5;
pub const WAIT_EVENT: u32 = 6;
pub const RECORD_EVENT: u32 = 7;
pub const MEM_ALLOC: u32 = 10;
pub const MEM_FREE: u32 = 11;
pub const BATCH_MEM_OP: u32 = 12;

/// One node.
#[derive(Clone)]
pub struct Node {
    pub id: u64,
    pub kind: u32,
    pub op: Op,
    /// Indices of the nodes that it follows.
    pub after: Vec<usize>,
}

/// Memory that a graph's own allocation nodes hold; freed with its last user.
pub struct GraphMemory {
    driver: &'static Driver,
    pub(crate) starts: Mutex<Vec<u64>>,
}

impl Drop for GraphMemory {
    fn drop(&mut self) {
        for start in lock(&self.starts).drain(..) {
            if let Ok(allocation) = classic::find(self.driver, start) {
                let _ = crate::pool::free_now(self.driver, &allocation);
            }
        }
        // Graphs have no pool to keep it in.
        self.driver.trim_pools_to_threshold();
    }
}

/// A graph.
pub struct Graph {
    pub id: u64,
    pub nodes: Mutex<Vec<Node>>,
    pub memory: Arc<GraphMemory>,
}

/// What an instantiated graph does, in order.
pub struct Plan {
    pub ops: Vec<Op>,
    _memory: Arc<GraphMemory>,
}

/// An instantiated graph.
pub struct Exec {
    pub id: u64,
    pub flags: u64,
    pub plan: Mutex<Arc<Plan>>,
}

impl Graph {
    #[must_use]
    pub fn new(driver: &'static Driver) -> Arc<Self> {
        let memory = Arc::new(GraphMemory {
            driver,
            starts: Mutex::default(),
        });
        let graph = Arc::new(Self {
            id: fresh_id(),
            nodes: Mutex::default(),
            memory,
        });
        driver.graphs.insert(graph.id, Arc::clone(&graph));
        graph
    }

    /// Adds a node behind others; returns its handle.
    ///
    /// # Errors
    /// `INVALID_VALUE` if a dependency is not a node of this graph.
    pub fn add(&self, kind: u32, op: Op, after: &[u64]) -> R<u64> {
        let mut nodes = lock(&self.nodes);
        let after = after
            .iter()
            .map(|id| nodes.iter().position(|n| n.id == *id))
            .collect::<Option<_>>()
            .ok_or(INVALID_VALUE)?;
        let id = fresh_id();
        nodes.push(Node {
            id,
            kind,
            op,
            after,
        });
        Ok(id)
    }

    /// The order in which to run the nodes.
    ///
    /// # Errors
    /// `INVALID_VALUE` if they follow each other in a ring.
    pub fn plan(&self) -> R<Arc<Plan>> {
        let nodes = lock(&self.nodes);
        let order = order(&nodes).ok_or(INVALID_VALUE)?;
        let ops = order.into_iter().map(|i| nodes[i].op.clone()).collect();
        Ok(Arc::new(Plan {
            ops,
            _memory: Arc::clone(&self.memory),
        }))
    }
}

fn order(nodes: &[Node]) -> Option<Vec<usize>> {
    let mut done = vec![false; nodes.len()];
    let mut order = Vec::with_capacity(nodes.len());
    while order.len() < nodes.len() {
        let before = order.len();
        for (index, node) in nodes.iter().enumerate() {
            if !done[index] && node.after.iter().all(|a| done[*a]) {
                done[index] = true;
                order.push(index);
            }
        }
        if order.len() == before {
            return None;
        }
    }
    Some(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(after: &[usize]) -> Node {
        Node {
            id: 0,
            kind: EMPTY,
            op: Op::Empty,
            after: after.to_vec(),
        }
    }

    #[test]
    fn nodes_run_behind_what_they_follow() {
        assert_eq!(
            order(&[node(&[1]), node(&[2]), node(&[])]),
            Some(vec![2, 1, 0])
        );
        assert_eq!(order(&[node(&[1]), node(&[0])]), None);
        assert_eq!(order(&[]), Some(vec![]));
    }
}
