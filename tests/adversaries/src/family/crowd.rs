//! Many at once: threads of one process, and processes of one workload, at the limit; and memory taken
//! while the workload is swapped out.

use std::sync::{Arc, Barrier};

use crate::child::Child;
use crate::driver::{
    Address, Code, Handle, cuCtxSetCurrent, cuCtxSynchronize, cuMemAlloc_v2, cuMemAllocAsync,
    cuMemCreate, cuMemFree_v2, cuMemFreeAsync, cuMemRelease,
};
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info};
use crate::types::AllocationProperties;

const THREADS: usize = 8;

/// What a thread takes, and how it gives it back.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Classic,
    Ordered,
    Handle,
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
        }
    }

    fn give(self, held: u64) -> Code {
        match self {
            Self::Classic => cuMemFree_v2(held),
            Self::Ordered => cuMemFreeAsync(held, 0),
            Self::Handle => cuMemRelease(held),
        }
    }
}

/// One thread: takes until it is refused, gives half back, takes again.
fn thread(context: Handle, kind: Kind, piece: u64) -> (Vec<u64>, Vec<Code>) {
    let (mut held, mut refusals) = (Vec::new(), Vec::new());
    cuCtxSetCurrent(context);
    for _ in 0..3 {
        loop {
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
    while let Ok(one) = kind.take(piece) {
        held.push(one);
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
    stage.case("taken while swapped out", |case| {
        let free = info().0 / GRANULE * GRANULE;
        let mut half = 0;
        let code = cuMemAlloc_v2(&mut half, (free / 2) as usize);
        if !case.fits(code, free / 2, "cuMemAlloc") {
            return Ok(());
        }
        case.evict()?;
        let mut rest = 0;
        let left = info().0 / GRANULE * GRANULE;
        let code = cuMemAlloc_v2(&mut rest, left as usize);
        case.fits(code, left, "cuMemAlloc after an eviction");
        case.evict()?;
        let mut more = 0;
        let code = cuMemAlloc_v2(&mut more, GRANULE as usize);
        if code.is_ok() {
            case.too_much(code, GRANULE, "cuMemAlloc while swapped out");
            cuMemFree_v2(more);
        } else {
            case.refusal(code, "cuMemAlloc while swapped out");
        }
        case.top();
        for at in [half, rest] {
            cuMemFree_v2(at);
        }
        Ok(())
    });
}
