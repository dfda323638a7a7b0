//! Stream-ordered allocation: the default pool, pools of the program's own, thresholds and trimming.

use crate::driver::{
    Address, Code, Handle, cuCtxSynchronize, cuDeviceGetDefaultMemPool, cuDeviceSetMemPool,
    cuMemAllocAsync, cuMemAllocAsync_ptsz, cuMemAllocFromPoolAsync, cuMemAllocFromPoolAsync_ptsz,
    cuMemFree_v2, cuMemFreeAsync, cuMemFreeAsync_ptsz, cuMemPoolCreate, cuMemPoolDestroy,
    cuMemPoolGetAttribute, cuMemPoolSetAttribute, cuMemPoolTrimTo, cuStreamCreate,
    cuStreamDestroy_v2, cuStreamSynchronize,
};
use crate::family::classic::Classic;
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info, need};
use crate::types::{POOL_RELEASE_THRESHOLD, POOL_RESERVED, PoolProperties};
use crate::way::{Way, attempt, exactly, greedily, holes};

/// Which entry points.
#[derive(Clone, Copy)]
pub enum By {
    Plain,
    PerThread,
}

/// Allocation in stream order.
pub struct Ordered {
    pool: Option<Handle>,
    stream: Handle,
    by: By,
    /// Freed by `cuMemFree`.
    classic_free: bool,
    /// Trimmed after frees.
    trim: Handle,
}

impl Ordered {
    pub fn new(pool: Option<Handle>, stream: Handle, by: By) -> Self {
        let mut default = 0;
        cuDeviceGetDefaultMemPool(&mut default, 0);
        Self {
            pool,
            stream,
            by,
            classic_free: false,
            trim: pool.unwrap_or(default),
        }
    }
}

impl Way for Ordered {
    type Held = Address;

    fn take(&mut self, bytes: u64) -> Result<Address, Code> {
        let mut at = 0;
        let bytes = bytes as usize;
        let code = match (self.pool, self.by) {
            (None, By::Plain) => cuMemAllocAsync(&mut at, bytes, self.stream),
            (None, By::PerThread) => cuMemAllocAsync_ptsz(&mut at, bytes, self.stream),
            (Some(pool), By::Plain) => cuMemAllocFromPoolAsync(&mut at, bytes, pool, self.stream),
            (Some(pool), By::PerThread) => {
                cuMemAllocFromPoolAsync_ptsz(&mut at, bytes, pool, self.stream)
            }
        };
        code.then(at)
    }

    fn give(&mut self, held: Address) -> Code {
        match (self.classic_free, self.by) {
            (true, _) => cuMemFree_v2(held),
            (_, By::Plain) => cuMemFreeAsync(held, self.stream),
            (_, By::PerThread) => cuMemFreeAsync_ptsz(held, self.stream),
        }
    }

    fn settle(&mut self) {
        cuCtxSynchronize();
        cuMemPoolTrimTo(self.trim, 0);
    }
}

fn pool() -> Result<Handle, Stop> {
    let mut pool = 0;
    need(
        cuMemPoolCreate(&mut pool, &PoolProperties::device(0, 0)),
        "cuMemPoolCreate",
    )?;
    Ok(pool)
}

fn keep_all(pool: Handle) -> Done {
    need(
        cuMemPoolSetAttribute(pool, POOL_RELEASE_THRESHOLD, &u64::MAX),
        "cuMemPoolSetAttribute",
    )
}

/// A pool of the program's own for one case.
fn with_pool(stage: &Stage, name: &str, attempt: impl FnOnce(&mut Case<'_>, Handle) -> Done) {
    stage.case(name, |case| {
        let own = pool()?;
        let done = attempt(case, own);
        let destroyed = cuMemPoolDestroy(own);
        if done.is_ok() && !destroyed.is_ok() {
            case.wrong(format!("cuMemPoolDestroy: {}", destroyed.0));
        }
        done
    });
}

/// Freed into a pool that keeps everything, then taken by another way: what the pool keeps is still on
/// the device, so both together stay within the limit; trimmed, it is free again.
fn kept(case: &mut Case<'_>, pool: Handle, from_pool: bool) -> Done {
    keep_all(pool)?;
    let mut way = Ordered::new(from_pool.then_some(pool), 0, By::Plain);
    let (free, _) = info();
    let half = free / 2 / GRANULE * GRANULE;
    let at = way
        .take(half)
        .or_else(|code| need(code, "cuMemAllocAsync").map(|()| 0))?;
    case.took(half);
    let code = way.give(at);
    cuCtxSynchronize();
    if !code.is_ok() {
        case.wrong(format!("cuMemFreeAsync: {}", code.0));
    }
    case.gave(half);
    // All that is said to be free can be had elsewhere, and no more.
    let (said, _) = info();
    let said = said / GRANULE * GRANULE;
    match Classic.take(said) {
        Ok(all) => {
            case.took(said);
            case.top();
            case.gave(said);
            cuMemFree_v2(all);
        }
        Err(code) => {
            case.fits(code, said, "cuMemAlloc beside a pool that keeps");
        }
    }
    greedily_classic(case);
    // And again, the pool's own reuse among it.
    let again = way.take(half);
    match again {
        Ok(at) => {
            case.top();
            way.give(at);
        }
        Err(code) => {
            case.fits(code, half, "cuMemAllocAsync again");
        }
    }
    cuCtxSynchronize();
    let mut reserved = 0;
    cuMemPoolGetAttribute(pool, POOL_RESERVED, &mut reserved);
    need(cuMemPoolTrimTo(pool, 0), "cuMemPoolTrimTo")?;
    case.released("after trimming");
    cuMemPoolSetAttribute(pool, POOL_RELEASE_THRESHOLD, &0);
    Ok(())
}

fn greedily_classic(case: &mut Case<'_>) {
    let mut held = Vec::new();
    let most = 4 * case.before().1;
    let mut sum = 0;
    while sum < most {
        match Classic.take(8 * MIB) {
            Ok(at) => {
                held.push(at);
                sum += 8 * MIB;
                case.took(8 * MIB);
            }
            Err(code) => {
                case.refusal(code, "cuMemAlloc");
                break;
            }
        }
    }
    case.top();
    for at in held {
        cuMemFree_v2(at);
        case.gave(8 * MIB);
    }
}

/// The pool is made current: `cuMemAllocAsync` takes from it.
fn current(case: &mut Case<'_>, own: Handle) -> Done {
    need(cuDeviceSetMemPool(0, own), "cuDeviceSetMemPool")?;
    let mut way = Ordered::new(None, 0, By::Plain);
    way.trim = own;
    let name = "cuMemAllocAsync, own pool current";
    let done = exactly(case, &mut way, name).and_then(|()| greedily(case, &mut way, name));
    let mut default = 0;
    cuDeviceGetDefaultMemPool(&mut default, 0);
    cuDeviceSetMemPool(0, default);
    done
}

/// Ten pools, each of which keeps what was freed into it.
fn many(case: &mut Case<'_>) -> Done {
    let mut pools = Vec::new();
    let (free, _) = info();
    let piece = free / 4 / GRANULE * GRANULE;
    for _ in 0..10 {
        let own = pool()?;
        keep_all(own)?;
        pools.push(own);
        let mut way = Ordered::new(Some(own), 0, By::Plain);
        match way.take(piece) {
            Ok(at) => {
                case.took(piece);
                way.give(at);
            }
            Err(code) => case.refusal(code, "cuMemAllocFromPoolAsync"),
        }
        cuCtxSynchronize();
    }
    case.top();
    for own in pools {
        need(cuMemPoolDestroy(own), "cuMemPoolDestroy")?;
    }
    Ok(())
}

/// The pool is destroyed while memory from it is held: that memory stays until it is freed.
fn destroyed(case: &mut Case<'_>) -> Done {
    let (free, _) = info();
    let piece = free / 3 / GRANULE * GRANULE;
    let mut held = Vec::new();
    for _ in 0..6 {
        let own = pool()?;
        match Ordered::new(Some(own), 0, By::Plain).take(piece) {
            Ok(at) => {
                case.took(piece);
                held.push(at);
            }
            Err(code) => case.refusal(code, "cuMemAllocFromPoolAsync"),
        }
        need(cuMemPoolDestroy(own), "cuMemPoolDestroy")?;
    }
    case.top();
    if held.len() < 3 {
        case.refused(format!("{} of 3 thirds", held.len()));
    }
    for at in held {
        need(cuMemFreeAsync(at, 0), "cuMemFreeAsync")?;
    }
    cuCtxSynchronize();
    Ok(())
}

/// Freed on one stream and allocated on another without waiting, from small sizes up.
fn streams(case: &mut Case<'_>) -> Done {
    let (mut one, mut other) = (0, 0);
    need(cuStreamCreate(&mut one, 1), "cuStreamCreate")?;
    need(cuStreamCreate(&mut other, 1), "cuStreamCreate")?;
    let begin = info();
    let mut held = Vec::new();
    for round in 0..200u64 {
        let bytes = (round % 17 + 1) * 3 * MIB / 2;
        let stream = if round % 2 == 0 { one } else { other };
        match Ordered::new(None, stream, By::Plain).take(bytes) {
            Ok(at) => {
                case.took(bytes);
                held.push((at, bytes));
            }
            Err(code) => {
                case.refusal(code, "cuMemAllocAsync");
                for (at, bytes) in held.drain(..) {
                    need(cuMemFreeAsync(at, stream), "cuMemFreeAsync")?;
                    case.gave(bytes);
                }
            }
        }
        if round % 50 == 49 {
            case.top();
        }
    }
    for (at, _) in held {
        need(cuMemFreeAsync(at, one), "cuMemFreeAsync")?;
    }
    need(cuStreamSynchronize(one), "cuStreamSynchronize")?;
    need(cuStreamSynchronize(other), "cuStreamSynchronize")?;
    if info() != begin {
        case.leak(format!(
            "{:?} after frees on two streams, before {begin:?}",
            info()
        ));
    }
    cuStreamDestroy_v2(one);
    cuStreamDestroy_v2(other);
    Ok(())
}

/// See the module.
pub fn run(stage: &Stage) {
    attempt(stage, "cuMemAllocAsync", Ordered::new(None, 0, By::Plain));
    attempt(
        stage,
        "cuMemAllocAsync_ptsz",
        Ordered::new(None, 0, By::PerThread),
    );
    attempt(
        stage,
        "cuMemAllocAsync, per-thread stream",
        Ordered::new(None, 2, By::Plain),
    );
    let freed = Ordered {
        classic_free: true,
        ..Ordered::new(None, 0, By::Plain)
    };
    attempt(stage, "cuMemAllocAsync, cuMemFree", freed);
    for (name, by) in [
        ("cuMemAllocFromPoolAsync", By::Plain),
        ("cuMemAllocFromPoolAsync_ptsz", By::PerThread),
    ] {
        with_pool(stage, name, |case, own| {
            let mut way = Ordered::new(Some(own), 0, by);
            exactly(case, &mut way, name)?;
            greedily(case, &mut way, name)?;
            holes(case, &mut way, name)
        });
    }
    with_pool(stage, "own pool made current", current);
    with_pool(stage, "own pool that keeps what is freed", |case, own| {
        kept(case, own, true)
    });
    stage.case("default pool that keeps what is freed", |case| {
        let mut default = 0;
        need(
            cuDeviceGetDefaultMemPool(&mut default, 0),
            "cuDeviceGetDefaultMemPool",
        )?;
        kept(case, default, false)
    });
    stage.case("ten pools that keep what is freed", many);
    stage.case("pools destroyed while in use", destroyed);
    stage.case("two streams without waiting", streams);
}
