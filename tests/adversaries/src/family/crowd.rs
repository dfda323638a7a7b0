//! Many at once: threads of one process, and processes of one workload, at the limit; and memory taken
//! while the workload is swapped out.

use std::sync::{Arc, Barrier};

use crate::child::Child;
use crate::driver::{
    Address, Code, Handle, cuArrayDestroy, cuCtxSetCurrent, cuCtxSynchronize, cuDeviceGraphMemTrim,
    cuMemAlloc_v2, cuMemAllocAsync, cuMemCreate, cuMemFree_v2, cuMemFreeAsync, cuMemPoolCreate,
    cuMemPoolDestroy, cuMemRelease, cuStreamCreate, cuStreamDestroy_v2,
};
use crate::family::classic::{self, Classic};
use crate::family::{arrays, graphs, legacy, managed, ordered, physical};
use crate::stage::{Case, Done, MIB, Stage, Stop, info};
use crate::types::{AllocationProperties, PoolProperties};
use crate::way::{Way, swapped};

const THREADS: usize = 8;
/// More pieces than fit under the limit.
const MOST: usize = 140;

/// What a thread takes, and how it gives it back.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Classic,
    Ordered,
    Handle,
    Array,
    Managed,
    Graph,
}

impl Kind {
    fn take(self, bytes: u64) -> Result<u64, Code> {
        let mut at: Address = 0;
        match self {
            Self::Classic => cuMemAlloc_v2(&mut at, bytes as usize).then(at),
            Self::Ordered => cuMemAllocAsync(&mut at, bytes as usize, 0).then(at),
            Self::Handle => {
                let properties = AllocationProperties::device(0, 0);
                cuMemCreate(&mut at, bytes as usize, &properties, 0).then(at)
            }
            Self::Array => arrays::Arrays(arrays::Shape::Flat)
                .take(bytes)
                .map(|array| array as u64),
            Self::Managed => managed::Managed(managed::Bring::Touch).take(bytes),
            Self::Graph => {
                // A stream of its own, gone when the graph has run; what it allocated stays.
                let mut stream = 0;
                let code = cuStreamCreate(&mut stream, 1);
                if !code.is_ok() {
                    return Err(code);
                }
                let graph = graphs::Held::freed_later(stream).take(bytes);
                cuStreamDestroy_v2(stream);
                graph.map(|graph| graph.at)
            }
        }
    }

    fn give(self, held: u64) -> Code {
        match self {
            Self::Classic => cuMemFree_v2(held),
            Self::Ordered => cuMemFreeAsync(held, 0),
            Self::Handle => cuMemRelease(held),
            Self::Array => cuArrayDestroy(held as Handle),
            Self::Managed | Self::Graph => cuMemFree_v2(held),
        }
    }
}

/// One thread: takes until it is refused, gives half back, takes again.
fn thread(context: Handle, kind: Kind, piece: u64) -> (Vec<u64>, Vec<Code>) {
    let (mut held, mut refusals) = (Vec::new(), Vec::new());
    cuCtxSetCurrent(context);
    for _ in 0..3 {
        // Managed memory that does not fit is given elsewhere: it has no end.
        for _ in 0..MOST {
            match kind.take(piece) {
                Ok(one) => held.push(one),
                Err(code) => {
                    refusals.push(code);
                    break;
                }
            }
        }
        for one in held.split_off(held.len() / 2) {
            kind.give(one);
        }
        cuCtxSynchronize();
    }
    for _ in 0..MOST {
        match kind.take(piece) {
            Ok(one) => held.push(one),
            Err(_) => break,
        }
    }
    (held, refusals)
}

fn race(case: &mut Case<'_>, kinds: &[Kind], piece: u64) -> Done {
    let context = case.stage().context;
    let barrier = Arc::new(Barrier::new(THREADS));
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            let (kind, barrier) = (kinds[number % kinds.len()], Arc::clone(&barrier));
            std::thread::spawn(move || {
                barrier.wait();
                (kind, thread(context, kind, piece))
            })
        })
        .collect();
    let mut all = Vec::new();
    for thread in threads {
        let (kind, (held, refusals)) = thread
            .join()
            .map_err(|_| Stop::Broken("a thread panicked".to_owned()))?;
        for code in refusals {
            case.refusal(code, &format!("{kind:?}"));
        }
        all.extend(held.into_iter().map(|one| (kind, one)));
    }
    // A thread may have been refused what another gave back a moment later; now all is quiet.
    while let Ok(one) = Kind::Classic.take(piece) {
        all.push((Kind::Classic, one));
    }
    case.took(all.len() as u64 * piece);
    case.top();
    let left = info().0;
    if left >= piece {
        case.refused(format!("{left} bytes are free and {piece} were refused"));
    }
    for (kind, one) in all {
        let code = kind.give(one);
        if !code.is_ok() {
            case.wrong(format!("{kind:?}: giving back: {}", code.0));
        }
    }
    cuCtxSynchronize();
    cuDeviceGraphMemTrim(0);
    Ok(())
}

/// Threads of one process.
pub fn threads(stage: &Stage) {
    for kind in [Kind::Classic, Kind::Ordered, Kind::Handle] {
        stage.case(&format!("8 threads, {kind:?}"), |case| {
            race(case, &[kind], 2 * MIB)
        });
    }
    let mixed = [Kind::Classic, Kind::Ordered, Kind::Handle];
    stage.case("8 threads, mixed, 6 MiB", |case| {
        race(case, &mixed, 6 * MIB)
    });
    let all = [
        Kind::Classic,
        Kind::Ordered,
        Kind::Handle,
        Kind::Array,
        Kind::Managed,
        Kind::Graph,
    ];
    stage.case("8 threads, everything, 4 MiB", |case| {
        race(case, &all, 4 * MIB)
    });
}

/// Processes of one workload: together they have one limit.
pub fn siblings(stage: &Stage) {
    stage.case("4 processes of one workload", |case| {
        let mut children = Vec::new();
        for _ in 0..3 {
            children.push(Child::start(&["greedy"], &[])?);
        }
        for child in &mut children {
            child.tell("take");
        }
        let (own, refusals) = thread(case.stage().context, Kind::Classic, 2 * MIB);
        for code in refusals {
            case.refusal(code, "a sibling");
        }
        for child in &mut children {
            let answer = child.hear()?;
            if let Some(code) = answer.strip_prefix("refused ")
                && code != "2"
            {
                case.wrong(format!("a sibling: refused by {code} instead of 2"));
            }
        }
        case.top();
        for child in &mut children {
            child.tell("more");
        }
        for child in &mut children {
            child.hear()?;
        }
        case.top();
        for one in own {
            cuMemFree_v2(one);
        }
        drop(children);
        Ok(())
    });
}

/// Memory taken while the workload is swapped out is no memory beyond the limit.
pub fn evicted(stage: &Stage) {
    let pool = ordered::Ordered::new(None, 0, ordered::By::Plain);
    swapped(stage, "cuMemAlloc", Classic);
    swapped(stage, "cuMemAllocPitch", classic::Pitch);
    swapped(stage, "cuMemAllocAsync", pool);
    swapped(stage, "cuMemCreate", physical::Handles);
    swapped(stage, "create, map, release", physical::MappedOnly);
    swapped(stage, "export, release", physical::Exported);
    swapped(stage, "arrays", arrays::Arrays(arrays::Shape::Flat));
    swapped(
        stage,
        "managed memory",
        managed::Managed(managed::Bring::Touch),
    );
    let mut stream = 0;
    cuStreamCreate(&mut stream, 1);
    swapped(stage, "graph memory", graphs::Held::captured(stream));
    let mut own = 0;
    if cuMemPoolCreate(&mut own, &PoolProperties::device(0, 0)).is_ok() {
        let way = ordered::Ordered::new(Some(own), 0, ordered::By::Plain);
        swapped(stage, "cuMemAllocFromPoolAsync", way);
        cuMemPoolDestroy(own);
    }
    if let Some(way) = legacy::ordered_within(stage) {
        swapped(stage, "cuMemAllocAsync in an old context", way);
    }
}
