//! Graphs with memory nodes. Their physical memory is charged when it is taken: at launch or upload,
//! before the driver is asked.
//!
//! Source for the rules: CUDA C++ Programming Guide, "Graph Memory Nodes": addresses are fixed when a
//! node is made, physical memory is mapped at launch or upload, and what a graph has freed stays in the
//! device's store until it is trimmed.

use core::ffi::{c_char, c_void};
use std::sync::atomic::Ordering::SeqCst;

use cudarc::driver::sys;
use spillway_protocol::granules_up;

use crate::driver::{Status, call};
use crate::gate;
use crate::graphs::{self, Needs};
use crate::lock;
use crate::runtime::Runtime;
use crate::stores::{Growth, Unmade, graph_memory};
use crate::table::sig;
use crate::vmm;

use super::limited;

/// `CUgraphNodeType`, raw.
const NODE_CHILD: u32 = 4;
const NODE_ALLOC: u32 = 10;
/// `CU_MEM_LOCATION_TYPE_DEVICE`
const LOCATION_DEVICE: u32 = 1;
/// Graphs within graphs within graphs: the driver allows few.
const DEPTH: u32 = 16;

/// `CUDA_MEM_ALLOC_NODE_PARAMS` with raw fields.
#[repr(C)]
#[derive(Clone, Copy)]
struct AllocNode {
    kind: u32,
    handle_types: u32,
    location_type: u32,
    location_id: i32,
    rest_of_pool: [u64; 9],
    access: *const c_void,
    accesses: usize,
    bytes: usize,
    ptr: u64,
}
const _: () = {
    type Theirs = sys::CUDA_MEM_ALLOC_NODE_PARAMS_v1;
    assert!(size_of::<AllocNode>() == size_of::<Theirs>());
    assert!(core::mem::offset_of!(AllocNode, bytes) == core::mem::offset_of!(Theirs, bytesize));
};

/// The nodes of a graph.
fn nodes(graph: *mut c_void) -> Vec<*mut c_void> {
    let mut count = 0;
    // SAFETY: without room for nodes the driver fills the count.
    let asked = unsafe { call::cuGraphGetNodes(graph, core::ptr::null_mut(), &raw mut count) };
    if !asked.is_success() || count == 0 {
        return Vec::new();
    }
    let mut nodes = vec![core::ptr::null_mut(); count];
    // SAFETY: room for as many nodes as we say.
    let asked = unsafe { call::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &raw mut count) };
    if !asked.is_success() {
        return Vec::new();
    }
    nodes.truncate(count);
    nodes
}

/// What the memory nodes of a graph and of the graphs in it allocate, as [`graphs::needs_of`] takes it.
fn add_nodes(
    runtime: &Runtime,
    graph: *mut c_void,
    depth: u32,
    found: &mut Vec<(usize, u64, u64)>,
) {
    for node in nodes(graph) {
        let mut kind = u32::MAX;
        // SAFETY: a node that the driver has just named; it fills one integer.
        if !unsafe { call::cuGraphNodeGetType(node, &raw mut kind) }.is_success() {
            continue;
        }
        if kind == NODE_CHILD && depth < DEPTH {
            let mut child = core::ptr::null_mut();
            // SAFETY: a child node; the driver fills one handle.
            let got = unsafe { call::cuGraphChildGraphNodeGetGraph(node, &raw mut child) };
            if got.is_success() {
                add_nodes(runtime, child, depth + 1, found);
            }
        } else if kind == NODE_ALLOC {
            let mut params = core::mem::MaybeUninit::<AllocNode>::zeroed();
            // SAFETY: an allocation node; the driver fills one structure of this layout.
            let got =
                unsafe { call::cuGraphMemAllocNodeGetParams(node, params.as_mut_ptr().cast()) };
            if !got.is_success() {
                continue;
            }
            // SAFETY: zeroed, then filled by the driver; every field is plain.
            let params = unsafe { params.assume_init() };
            if params.location_type == LOCATION_DEVICE
                && let Some(device) = runtime.device_index(params.location_id)
            {
                found.push((device, params.ptr, params.bytes as u64));
            }
        }
    }
}

/// What a graph's memory nodes need.
fn needs_of(runtime: &Runtime, graph: *mut c_void) -> Needs {
    let mut found = Vec::new();
    add_nodes(runtime, graph, 0, &mut found);
    graphs::needs_of(found)
}

/// Instantiates inside the gate, and notes what the graph's memory nodes will need; takes it at once, if the
/// graph is uploaded with it.
unsafe fn instantiate(
    out: *mut *mut c_void,
    graph: *mut c_void,
    uploads: bool,
    mut make: impl FnMut() -> Status,
) -> Status {
    let taking = limited().filter(|_| uploads && graphs::any_node());
    let taking = taking.map(|runtime| (runtime, needs_of(runtime, graph)));
    let status = match taking.filter(|(_, needs)| !needs.is_empty()) {
        Some((runtime, needs)) => {
            runtime.has_stores.store(true, SeqCst);
            submit_with_memory(runtime, &needs, make)
        }
        None => {
            let _inside = gate::enter();
            make()
        }
    };
    if status.is_success()
        && graphs::any_node()
        && !out.is_null()
        && let Some(runtime) = limited()
    {
        let needs = needs_of(runtime, graph);
        // SAFETY: checked against null, written by the driver.
        let exec = unsafe { *out } as usize;
        let mut known = lock(&runtime.graphs);
        if needs.is_empty() {
            // The handle may have stood for another one.
            known.remove(exec);
        } else {
            known.add(exec, needs);
            runtime.has_stores.store(true, SeqCst);
        }
    }
    status
}

/// Whether a graph is uploaded as it is instantiated.
///
/// # Safety
/// `params` is null or the application's `CUDA_GRAPH_INSTANTIATE_PARAMS`, which begins with the flags.
unsafe fn uploads(params: *mut c_void) -> bool {
    /// `CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD`
    const UPLOAD: u64 = 2;
    // SAFETY: the caller's promise.
    !params.is_null() && unsafe { params.cast::<u64>().read_unaligned() } & UPLOAD != 0
}

macro_rules! instantiations {
    ($($name:ident ($($argument:ident: $type:ty),*) $uploads:expr;)*) => {$(
        pub unsafe fn $name(
            real: sig::$name,
            phGraphExec: *mut *mut c_void,
            hGraph: *mut c_void,
            $($argument: $type),*
        ) -> Status {
            // SAFETY: the application's own call and arguments.
            unsafe {
                let uploads = $uploads;
                instantiate(phGraphExec, hGraph, uploads, || real(phGraphExec, hGraph, $($argument),*))
            }
        }
    )*};
}
instantiations! {
    cuGraphInstantiate (phErrorNode: *mut *mut c_void, logBuffer: *mut c_char, bufferSize: usize) false;
    cuGraphInstantiate_v2 (phErrorNode: *mut *mut c_void, logBuffer: *mut c_char, bufferSize: usize) false;
    cuGraphInstantiateWithFlags (flags: u64) false;
    cuGraphInstantiateWithParams (instantiateParams: *mut c_void) uploads(instantiateParams);
    cuGraphInstantiateWithParams_ptsz (instantiateParams: *mut c_void) uploads(instantiateParams);
}

pub unsafe fn cuGraphExecDestroy(real: sig::cuGraphExecDestroy, hGraphExec: *mut c_void) -> Status {
    // Forgotten before it is destroyed: another thread may get the same handle for a new one.
    let known = limited()
        .filter(|_| graphs::any_node())
        .and_then(|runtime| {
            let mut graphs = lock(&runtime.graphs);
            let needs = graphs.needs(hGraphExec as usize)?;
            graphs.remove(hGraphExec as usize);
            Some((runtime, needs))
        });
    // SAFETY: the application's own call.
    let status = unsafe { real(hGraphExec) };
    if let (false, Some((runtime, needs))) = (status.is_success(), known) {
        lock(&runtime.graphs).add(hGraphExec as usize, needs);
    }
    status
}

/// Launches or uploads an instantiated graph with memory nodes.
fn submit_with_memory(
    runtime: &Runtime,
    needs: &Needs,
    mut submit: impl FnMut() -> Status,
) -> Status {
    let mut waited = false;
    loop {
        let growths: Vec<Growth> = needs
            .iter()
            .map(|&(device, bytes)| {
                let ordinal = runtime.devices[device].ordinal;
                let meter = &runtime.graph_meters[device];
                // What the store has unused serves first; by how much it has to grow at most.
                let claim = runtime.claim_room(meter, bytes, true, || graph_memory(ordinal));
                Growth {
                    meter,
                    device,
                    most: granules_up(bytes - claim),
                    claim,
                    reserved: Box::new(move || graph_memory(ordinal).map(|(reserved, _)| reserved)),
                }
            })
            .collect();
        match runtime.metered(&growths, &mut submit) {
            // What it took beyond its own nodes' bytes cannot be undone; it blocks the next allocation.
            Ok(()) | Err(Unmade::Over) => return Status::SUCCESS,
            Err(Unmade::Failed(why)) => return why,
            // An earlier launch may be about to give back what this one needs.
            // Not while a stream captures, which that would spoil.
            Err(Unmade::Refused) if !waited && !runtime.glance.capturing() => {
                waited = true;
                match runtime.synchronized() {
                    Some(Ok(())) => {}
                    Some(Err(why)) => return why,
                    None => return Status::OUT_OF_MEMORY,
                }
            }
            Err(Unmade::Refused) => return Status::OUT_OF_MEMORY,
        }
    }
}

fn submit(exec: *mut c_void, stream: usize, mut submit: impl FnMut() -> Status) -> Status {
    if graphs::any_node()
        && let Some(runtime) = limited()
    {
        let needs = lock(&runtime.graphs).needs(exec as usize);
        if let Some(needs) = needs {
            if vmm::is_capturing(stream) {
                // It becomes a node of another graph, which is charged when that is launched.
                return submit();
            }
            return submit_with_memory(runtime, &needs, submit);
        }
    }
    let _inside = gate::enter();
    submit()
}

/// `CU_STREAM_PER_THREAD`
const PER_THREAD: usize = 2;

macro_rules! submissions {
    ($($name:ident $zero:expr;)*) => {$(
        pub unsafe fn $name(real: sig::$name, exec: *mut c_void, hStream: *mut c_void) -> Status {
            let stream = if hStream.is_null() { $zero } else { hStream as usize };
            // SAFETY: the application's own call.
            submit(exec, stream, || unsafe { real(exec, hStream) })
        }
    )*};
}
submissions! {
    cuGraphLaunch 0;
    cuGraphLaunch_ptsz PER_THREAD;
    cuGraphUpload 0;
    cuGraphUpload_ptsz PER_THREAD;
}

pub unsafe fn cuDeviceGraphMemTrim(real: sig::cuDeviceGraphMemTrim, device: i32) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(device) };
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && let Some(device) = runtime.device_index(device)
    {
        runtime.look_at_graphs(device);
    }
    status
}

pub unsafe fn cuGraphAddMemAllocNode(
    real: sig::cuGraphAddMemAllocNode,
    phGraphNode: *mut *mut c_void,
    hGraph: *mut c_void,
    dependencies: *const *mut c_void,
    numDependencies: usize,
    nodeParams: *mut c_void,
) -> Status {
    graphs::node_made();
    let _inside = gate::enter();
    // SAFETY: the application's own call.
    unsafe {
        real(
            phGraphNode,
            hGraph,
            dependencies,
            numDependencies,
            nodeParams,
        )
    }
}

/// Notes a node of any kind that is about to be added.
///
/// # Safety
/// `params` is null or the application's `CUgraphNodeParams`, which begins with the kind.
unsafe fn note_kind(params: *mut c_void) {
    // SAFETY: the caller's promise.
    if !params.is_null() && unsafe { params.cast::<u32>().read_unaligned() } == NODE_ALLOC {
        graphs::node_made();
    }
}

pub unsafe fn cuGraphAddNode(
    real: sig::cuGraphAddNode,
    phGraphNode: *mut *mut c_void,
    hGraph: *mut c_void,
    dependencies: *const *mut c_void,
    numDependencies: usize,
    nodeParams: *mut c_void,
) -> Status {
    // SAFETY: the application's own arguments.
    unsafe { note_kind(nodeParams) };
    let _inside = gate::enter();
    // SAFETY: the application's own call.
    unsafe {
        real(
            phGraphNode,
            hGraph,
            dependencies,
            numDependencies,
            nodeParams,
        )
    }
}

macro_rules! nodes_with_edges {
    ($($name:ident)*) => {$(
        pub unsafe fn $name(
            real: sig::$name,
            phGraphNode: *mut *mut c_void,
            hGraph: *mut c_void,
            dependencies: *const *mut c_void,
            dependencyData: *const c_void,
            numDependencies: usize,
            nodeParams: *mut c_void,
        ) -> Status {
            // SAFETY: the application's own arguments.
            unsafe { note_kind(nodeParams) };
            let _inside = gate::enter();
            // SAFETY: the application's own call.
            unsafe {
                real(phGraphNode, hGraph, dependencies, dependencyData, numDependencies, nodeParams)
            }
        }
    )*};
}
nodes_with_edges! { cuGraphAddNode_v2 cuGraphAddNode_v3 }
