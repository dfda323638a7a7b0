//! Graphs: nodes, their order, what they become when instantiated and launched.

use crate::code::{INVALID_VALUE, NOT_SUPPORTED, R};
use crate::driver::Driver;
use crate::exec::Op;
use crate::graph_memory::Small;
use crate::graph_pool::{ExecMemory, Hold};
use crate::space::fresh_id;
use crate::stream::Stream;
use crate::sync::lock;
use std::sync::{Arc, Mutex, Weak};

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

/// A graph.
pub struct Graph {
    pub id: u64,
    pub nodes: Mutex<Vec<Node>>,
    /// Where the small allocations of its nodes lie.
    pub small: Mutex<Small>,
    /// The exec that it was instantiated as last.
    exec: Mutex<Weak<Exec>>,
}

/// What an instantiated graph does, in order.
pub struct Plan {
    pub ops: Vec<Op>,
    pub memory: Option<Arc<ExecMemory>>,
}

/// One launch.
pub struct Launch {
    pub plan: Arc<Plan>,
    pub hold: Hold,
}

/// An instantiated graph.
pub struct Exec {
    pub id: u64,
    pub flags: u64,
    pub plan: Arc<Plan>,
    /// The nodes as they were instantiated.
    nodes: Vec<Node>,
    /// Where and as what it was launched last: launches of one exec run one after the other.
    last: Mutex<Option<(Arc<Stream>, u64)>>,
}

/// `CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH`.
pub const AUTO_FREE_ON_LAUNCH: u64 = 1;

impl Graph {
    #[must_use]
    pub fn new(driver: &'static Driver) -> Arc<Self> {
        let graph = Arc::new(Self {
            id: fresh_id(),
            nodes: Mutex::default(),
            small: Mutex::default(),
            exec: Mutex::default(),
        });
        driver.graphs.insert(graph.id, Arc::clone(&graph));
        graph
    }

    /// Adds a node behind others; `op` makes its work, knowing the nodes there are and the indices
    /// of those that it follows. Returns the node's handle.
    ///
    /// # Errors
    /// `INVALID_VALUE` if a dependency is not a node of this graph; those of `op`.
    pub fn add(
        &self,
        kind: u32,
        after: &[u64],
        op: impl FnOnce(&[Node], &[usize]) -> R<Op>,
    ) -> R<u64> {
        let mut nodes = lock(&self.nodes);
        let after: Vec<usize> = after
            .iter()
            .map(|id| nodes.iter().position(|n| n.id == *id))
            .collect::<Option<_>>()
            .ok_or(INVALID_VALUE)?;
        let op = op(&nodes, &after)?;
        let id = fresh_id();
        nodes.push(Node {
            id,
            kind,
            op,
            after,
        });
        Ok(id)
    }

    /// Whether there are allocation or free nodes in it.
    #[must_use]
    pub fn has_memory(&self) -> bool {
        lock(&self.nodes).iter().any(|node| match &node.op {
            Op::GraphAlloc(_) | Op::GraphFree { .. } => true,
            Op::Child(child) => child.has_memory(),
            _ => false,
        })
    }

    /// A copy with handles of its own.
    ///
    /// # Errors
    /// `NOT_SUPPORTED` if there are memory nodes in it.
    pub fn copy(&self, driver: &'static Driver) -> R<Arc<Self>> {
        if self.has_memory() {
            return Err(NOT_SUPPORTED);
        }
        let nodes = lock(&self.nodes).clone();
        Self::of(driver, nodes)
    }

    fn of(driver: &'static Driver, mut nodes: Vec<Node>) -> R<Arc<Self>> {
        for node in &mut nodes {
            node.id = fresh_id();
            if let Op::Child(child) = &node.op {
                node.op = Op::Child(child.copy(driver)?);
            }
        }
        let copy = Self::new(driver);
        *lock(&copy.nodes) = nodes;
        Ok(copy)
    }

    /// Takes the handle away, and those of its child graphs.
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is no such handle.
    pub fn forget(driver: &Driver, id: u64) -> R {
        let graph = driver.graphs.remove(id).ok_or(INVALID_VALUE)?;
        let children: Vec<u64> = lock(&graph.nodes)
            .iter()
            .filter_map(|node| match &node.op {
                Op::Child(child) => Some(child.id),
                _ => None,
            })
            .collect();
        for child in children {
            let _ = Self::forget(driver, child);
        }
        Ok(())
    }

    fn flatten(&self, ops: &mut Vec<Op>) -> R {
        let nodes = lock(&self.nodes);
        for index in order(&nodes).ok_or(INVALID_VALUE)? {
            match &nodes[index].op {
                Op::Child(child) => child.flatten(ops)?,
                op => ops.push(op.clone()),
            }
        }
        Ok(())
    }

    /// Makes something that can be launched.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the nodes follow each other in a ring, or if the graph has memory nodes and
    /// is instantiated already.
    pub fn instantiate(&self, driver: &'static Driver, flags: u64) -> R<Arc<Exec>> {
        let mut ops = Vec::new();
        self.flatten(&mut ops)?;
        let memory = ExecMemory::of(driver, &ops);
        let mut present = lock(&self.exec);
        if memory.is_some() && present.strong_count() > 0 {
            return Err(INVALID_VALUE);
        }
        let exec = Arc::new(Exec {
            id: fresh_id(),
            flags,
            plan: Arc::new(Plan { ops, memory }),
            nodes: lock(&self.nodes).clone(),
            last: Mutex::new(None),
        });
        *present = Arc::downgrade(&exec);
        driver.execs.insert(exec.id, Arc::clone(&exec));
        Ok(exec)
    }
}

impl Exec {
    /// The graph that it was, to be a child.
    ///
    /// # Errors
    /// `NOT_SUPPORTED` if there are memory nodes in it.
    pub fn graph(&self, driver: &'static Driver) -> R<Arc<Graph>> {
        if self.plan.memory.is_some() {
            return Err(NOT_SUPPORTED);
        }
        Graph::of(driver, self.nodes.clone())
    }

    /// Queues a launch in `stream`, or only gets the memory for one.
    ///
    /// # Errors
    /// Those of [`ExecMemory::acquire`] and of the stream.
    pub fn launch(&self, driver: &'static Driver, stream: &Arc<Stream>, upload: bool) -> R {
        let mut last = lock(&self.last);
        let auto_free = self.flags & AUTO_FREE_ON_LAUNCH != 0;
        let memory = self.plan.memory.as_ref();
        let mut hold = match memory {
            Some(memory) => memory.acquire(stream, upload, auto_free)?,
            None => Hold::default(),
        };
        hold.after.extend(last.take().filter(|(before, sequence)| {
            !Arc::ptr_eq(before, stream) && !before.reached(*sequence)
        }));
        let op = if upload {
            Op::Empty
        } else {
            let plan = Arc::clone(&self.plan);
            Op::Graph(Arc::new(Launch { plan, hold }))
        };
        let sequence = stream.submit(driver, op);
        if let Some(memory) = memory {
            memory.submitted(stream, sequence.unwrap_or(0));
        }
        let sequence = sequence?;
        *last = Some((Arc::clone(stream), sequence));
        Ok(())
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
