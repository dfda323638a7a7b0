//! Memory nodes of graphs: added by hand or captured; launched, uploaded, freed by the graph or not, trimmed.
//!
//! The driver may say that there is no memory when a graph is made, instantiated, uploaded or launched: any
//! of them is right, as long as it is out of memory and nothing is over the limit.

use crate::driver::{
    Address, Code, Handle, cuCtxSynchronize, cuDeviceGraphMemTrim, cuGraphAddMemAllocNode,
    cuGraphAddMemFreeNode, cuGraphCreate, cuGraphDestroy, cuGraphExecDestroy,
    cuGraphInstantiateWithFlags, cuGraphLaunch, cuGraphUpload, cuMemAllocAsync, cuMemFree_v2,
    cuMemFreeAsync, cuStreamBeginCapture_v2, cuStreamCreate, cuStreamDestroy_v2,
    cuStreamEndCapture, cuStreamSynchronize,
};
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info, need};
use crate::types::{AccessDescriptor, MemAllocNode, PoolProperties};
use crate::way::{Way, attempt};

/// `CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH`.
const AUTO_FREE: u64 = 1;

/// A graph, where its memory is, and its executable.
#[derive(Default)]
pub struct Graph {
    graph: Handle,
    exec: Handle,
    pub at: Address,
}

impl Graph {
    /// By a node, freed by another one if `free`.
    fn by_node(bytes: u64, free: bool) -> Result<Self, Code> {
        let mut made = Self::default();
        let access = AccessDescriptor::device(0);
        let mut params = MemAllocNode {
            pool: PoolProperties::device(0, 0),
            access: &raw const access,
            access_count: 1,
            bytes: bytes as usize,
            at: 0,
        };
        let (mut first, mut last) = (0, 0);
        let nothing = std::ptr::null();
        let mut code = cuGraphCreate(&mut made.graph, 0);
        if code.is_ok() {
            code = cuGraphAddMemAllocNode(&mut first, made.graph, nothing, 0, &mut params);
        }
        made.at = params.at;
        if code.is_ok() && free {
            code = cuGraphAddMemFreeNode(&mut last, made.graph, &raw const first, 1, made.at);
        }
        code.then(()).map_err(|code| made.destroy_all(code))?;
        Ok(made)
    }

    /// By a capture.
    fn by_capture(bytes: u64, free: bool, stream: Handle, mode: u32) -> Result<Self, Code> {
        let mut made = Self::default();
        let begun = cuStreamBeginCapture_v2(stream, mode);
        if !begun.is_ok() {
            return Err(begun);
        }
        let mut code = cuMemAllocAsync(&mut made.at, bytes as usize, stream);
        if code.is_ok() && free {
            code = cuMemFreeAsync(made.at, stream);
        }
        let ended = cuStreamEndCapture(stream, &mut made.graph);
        if code.is_ok() {
            code = ended;
        }
        code.then(()).map_err(|code| made.destroy_all(code))?;
        Ok(made)
    }

    fn destroy_all(&self, code: Code) -> Code {
        if self.exec != 0 {
            cuGraphExecDestroy(self.exec);
        }
        if self.graph != 0 {
            cuGraphDestroy(self.graph);
        }
        code
    }

    /// Instantiates, uploads if wanted, launches and waits.
    fn go(&mut self, stream: Handle, flags: u64, upload: bool) -> Code {
        let mut code = cuGraphInstantiateWithFlags(&mut self.exec, self.graph, flags);
        if code.is_ok() && upload {
            code = cuGraphUpload(self.exec, stream);
        }
        if code.is_ok() {
            code = cuGraphLaunch(self.exec, stream);
        }
        let waited = cuStreamSynchronize(stream);
        if code.is_ok() { waited } else { code }
    }
}

/// How a graph comes about, and what is left of it.
#[derive(Clone, Copy)]
pub struct Held {
    capture: bool,
    upload: bool,
    /// The executable graph goes before its memory does.
    destroy_first: bool,
    stream: Handle,
}

impl Held {
    /// Captured, launched, and the graph kept.
    pub fn captured(stream: Handle) -> Self {
        Self {
            capture: true,
            upload: false,
            destroy_first: false,
            stream,
        }
    }

    /// By a node; the graph goes before its memory.
    pub fn freed_later(stream: Handle) -> Self {
        Self {
            capture: false,
            upload: false,
            destroy_first: true,
            stream,
        }
    }
}

/// Memory that a graph allocated and did not free: it is the program's, until it frees it.
impl Way for Held {
    type Held = Graph;

    fn take(&mut self, bytes: u64) -> Result<Graph, Code> {
        let mut graph = if self.capture {
            Graph::by_capture(bytes, false, self.stream, 2)?
        } else {
            Graph::by_node(bytes, false)?
        };
        let code = graph.go(self.stream, 0, self.upload);
        if !code.is_ok() {
            return Err(graph.destroy_all(code));
        }
        if self.destroy_first {
            graph.destroy_all(code);
            (graph.graph, graph.exec) = (0, 0);
        }
        Ok(graph)
    }

    fn give(&mut self, held: Graph) -> Code {
        let code = cuMemFreeAsync(held.at, self.stream);
        cuStreamSynchronize(self.stream);
        held.destroy_all(code)
    }

    fn settle(&mut self) {
        cuCtxSynchronize();
        cuDeviceGraphMemTrim(0);
    }
}

/// A stream for one case.
fn with_stream(case: &mut Case<'_>, run: impl FnOnce(&mut Case<'_>, Handle) -> Done) -> Done {
    let mut stream = 0;
    need(cuStreamCreate(&mut stream, 1), "cuStreamCreate")?;
    let done = run(case, stream);
    cuStreamDestroy_v2(stream);
    done
}

/// Graphs that free what they allocate, all of them kept: each takes all that is free, one after the other.
fn freed_by_the_graph(case: &mut Case<'_>, capture: bool) -> Done {
    with_stream(case, |case, stream| {
        let free = info().0 / GRANULE * GRANULE;
        let make = |bytes| {
            if capture {
                Graph::by_capture(bytes, true, stream, 1)
            } else {
                Graph::by_node(bytes, true)
            }
        };
        let mut kept = Vec::new();
        for round in 0..3 {
            let mut graph = make(free).map_err(|code| stop(code, "making the graph"))?;
            let code = graph.go(stream, 0, false);
            if code.is_missing() {
                return Err(stop(graph.destroy_all(code), "the graph"));
            }
            case.took(free);
            case.fits(code, free, &format!("launch number {round}"));
            case.top();
            case.gave(free);
            kept.push(graph);
        }
        // What they keep for their next launch is on the device: it counts.
        if let Ok(mut graph) = make(free + GRANULE) {
            case.too_much(graph.go(stream, 0, false), GRANULE, "a graph's memory");
            case.top();
            graph.destroy_all(Code::SUCCESS);
        }
        for graph in &kept {
            let code = cuGraphLaunch(graph.exec, stream);
            case.fits(code, free, "another launch");
        }
        cuStreamSynchronize(stream);
        case.top();
        for graph in kept {
            graph.destroy_all(Code::SUCCESS);
        }
        cuCtxSynchronize();
        need(cuDeviceGraphMemTrim(0), "cuDeviceGraphMemTrim")
    })
}

fn stop(code: Code, what: &str) -> Stop {
    match need(code, what) {
        Err(stop) => stop,
        Ok(()) => Stop::Broken(what.to_owned()),
    }
}

/// Two graphs, each with more than half of what is free, at once on two streams.
fn at_once(case: &mut Case<'_>) -> Done {
    let mut streams = [0; 4];
    for stream in &mut streams {
        need(cuStreamCreate(stream, 1), "cuStreamCreate")?;
    }
    let part = info().0 * 2 / 3 / GRANULE * GRANULE;
    let mut graphs = Vec::new();
    for _ in streams {
        let mut graph = Graph::by_node(part, true).map_err(|code| stop(code, "making a graph"))?;
        let code = cuGraphInstantiateWithFlags(&mut graph.exec, graph.graph, 0);
        if code.is_ok() {
            graphs.push(graph);
        } else if code.is_missing() {
            return Err(stop(graph.destroy_all(code), "instantiating"));
        } else {
            case.refusal(code, "instantiating");
            graph.destroy_all(code);
        }
    }
    let mut launched = 0;
    for _ in 0..20 {
        for (graph, stream) in graphs.iter().zip(streams) {
            let code = cuGraphLaunch(graph.exec, stream);
            if code.is_ok() {
                launched += 1;
            } else {
                case.refusal(code, "launching at once");
            }
        }
    }
    case.top();
    for stream in streams {
        cuStreamSynchronize(stream);
    }
    case.top();
    if launched == 0 {
        case.refused("none of the graphs was launched, each of which fits");
    }
    for graph in graphs {
        graph.destroy_all(Code::SUCCESS);
    }
    for stream in streams {
        cuStreamDestroy_v2(stream);
    }
    cuCtxSynchronize();
    need(cuDeviceGraphMemTrim(0), "cuDeviceGraphMemTrim")
}

/// Launched again and again without anybody freeing: freed by the launch, by the program's wish.
fn freed_at_launch(case: &mut Case<'_>) -> Done {
    with_stream(case, |case, stream| {
        let piece = info().0 / 2 / GRANULE * GRANULE;
        let mut graph =
            Graph::by_node(piece, false).map_err(|code| stop(code, "making a graph"))?;
        let code = graph.go(stream, AUTO_FREE, false);
        if code.is_missing() {
            return Err(stop(graph.destroy_all(code), "AUTO_FREE_ON_LAUNCH"));
        }
        case.fits(code, piece, "the first launch");
        for _ in 0..5 {
            case.fits(cuGraphLaunch(graph.exec, stream), piece, "another launch");
        }
        cuStreamSynchronize(stream);
        case.took(piece);
        case.top();
        graph.destroy_all(code);
        let freed = cuMemFree_v2(graph.at);
        if !freed.is_ok() {
            // Some drivers free it with the executable graph.
            cuCtxSynchronize();
        }
        need(cuDeviceGraphMemTrim(0), "cuDeviceGraphMemTrim")
    })
}

/// Trimmed between launches: what comes back can be had elsewhere; the next launch takes it again, or is out
/// of memory.
fn trimmed(case: &mut Case<'_>) -> Done {
    with_stream(case, |case, stream| {
        let free = info().0 / GRANULE * GRANULE;
        let mut graph = Graph::by_node(free, true).map_err(|code| stop(code, "making a graph"))?;
        let code = graph.go(stream, 0, false);
        if code.is_missing() {
            return Err(stop(graph.destroy_all(code), "the graph"));
        }
        case.fits(code, free, "the first launch");
        need(cuDeviceGraphMemTrim(0), "cuDeviceGraphMemTrim")?;
        let back = info().0 / GRANULE * GRANULE;
        let mut classic = super::classic::Classic;
        match classic.take(back) {
            Ok(at) => {
                case.took(back);
                case.top();
                let again = cuGraphLaunch(graph.exec, stream);
                if !again.is_ok() {
                    case.refusal(again, "a launch while all else is taken");
                }
                cuStreamSynchronize(stream);
                case.top();
                classic.give(at);
            }
            Err(code) => {
                case.fits(code, back, "cuMemAlloc after trimming");
            }
        }
        let again = cuGraphLaunch(graph.exec, stream);
        case.fits(again, free, "a launch when all is free again");
        cuStreamSynchronize(stream);
        graph.destroy_all(Code::SUCCESS);
        need(cuDeviceGraphMemTrim(0), "cuDeviceGraphMemTrim")
    })
}

/// One graph, instantiated as often as the driver lets us.
fn instances(case: &mut Case<'_>) -> Done {
    with_stream(case, |case, stream| {
        let piece = 32 * MIB;
        let graph = Graph::by_node(piece, true).map_err(|code| stop(code, "making a graph"))?;
        let mut execs = Vec::new();
        for _ in 0..20 {
            let mut exec = 0;
            let code = cuGraphInstantiateWithFlags(&mut exec, graph.graph, 0);
            if code.is_ok() {
                execs.push(exec);
                let launched = cuGraphLaunch(exec, stream);
                if !launched.is_ok() {
                    case.refusal(launched, "a launch");
                }
            } else if code == Code(1) {
                // A graph with memory nodes has one instance at a time.
                break;
            } else if !code.is_missing() {
                case.refusal(code, "instantiating");
            }
        }
        cuStreamSynchronize(stream);
        case.top();
        for exec in execs {
            cuGraphExecDestroy(exec);
        }
        graph.destroy_all(Code::SUCCESS);
        need(cuDeviceGraphMemTrim(0), "cuDeviceGraphMemTrim")
    })
}

/// See the module.
pub fn run(stage: &Stage) {
    let mut stream = 0;
    cuStreamCreate(&mut stream, 1);
    let plain = Held {
        capture: false,
        upload: false,
        destroy_first: false,
        stream,
    };
    attempt(stage, "node, launched", plain);
    attempt(
        stage,
        "node, uploaded, launched",
        Held {
            upload: true,
            ..plain
        },
    );
    attempt(
        stage,
        "node, graph destroyed first",
        Held {
            destroy_first: true,
            ..plain
        },
    );
    attempt(
        stage,
        "captured, launched",
        Held {
            capture: true,
            ..plain
        },
    );
    attempt(
        stage,
        "captured, graph destroyed first",
        Held {
            capture: true,
            destroy_first: true,
            ..plain
        },
    );
    stage.case("freed by the graph", |case| freed_by_the_graph(case, false));
    stage.case("captured, freed by the graph", |case| {
        freed_by_the_graph(case, true)
    });
    stage.case("four graphs at once", at_once);
    stage.case("freed at launch", freed_at_launch);
    stage.case("trimmed between launches", trimmed);
    stage.case("many instances", instances);
}
