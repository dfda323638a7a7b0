//! Books that are to go wrong: frees of what is not there, twice, of the wrong kind, in the wrong context; pieces freed
//! and taken again at once; what the program is told meanwhile.

use crate::driver::{
    Address, Code, cuArrayDestroy, cuCtxSetCurrent, cuCtxSynchronize, cuDevicePrimaryCtxReset_v2,
    cuDevicePrimaryCtxRetain, cuDeviceTotalMem_v2, cuMemAlloc_v2, cuMemAllocAsync, cuMemFree_v2,
    cuMemFreeAsync, cuMemFreeHost, cuMemHostAlloc, cuMemPoolDestroy, cuMemRelease, cuMemUnmap,
    cuMipmappedArrayDestroy,
};
use crate::family::classic::Classic;
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info, need};
use crate::way::{exactly, greedily};

/// What is not there is refused with the driver's own code, and frees nothing.
fn foreign(case: &mut Case<'_>) -> Done {
    const NOWHERE: u64 = 0x7777_0000_0000;
    let mut own = 0;
    need(cuMemAlloc_v2(&mut own, 64 << 20), "cuMemAlloc")?;
    let before = info();
    for round in 0..20u64 {
        let at = NOWHERE + round * GRANULE;
        let answers = [
            ("cuMemFree", cuMemFree_v2(at)),
            ("cuMemFree of an inner address", cuMemFree_v2(own + 4096)),
            ("cuMemFreeAsync", cuMemFreeAsync(at, 0)),
            ("cuMemRelease", cuMemRelease(at)),
            ("cuMemUnmap", cuMemUnmap(at, 2 << 20)),
            ("cuMemUnmap of an allocation", cuMemUnmap(own, 2 << 20)),
        ];
        for (what, code) in answers {
            if code.is_ok() || code == Code::OUT_OF_MEMORY {
                case.wrong(format!("{what} of what is not there: {}", code.0));
            }
        }
    }
    if info() != before {
        case.wrong(format!(
            "{:?} after frees of nothing, {before:?} before",
            info()
        ));
    }
    cuMemFree_v2(own);
    greedily(case, &mut Classic, "cuMemAlloc after frees of nothing")
}

/// Freed twice.
fn twice(case: &mut Case<'_>) -> Done {
    for round in 0..20 {
        let mut at = 0;
        need(cuMemAlloc_v2(&mut at, 32 << 20), "cuMemAlloc")?;
        need(cuMemFree_v2(at), "cuMemFree")?;
        if cuMemFree_v2(at).is_ok() {
            case.wrong("cuMemFree of what was freed");
        }
        need(cuMemAllocAsync(&mut at, 32 << 20, 0), "cuMemAllocAsync")?;
        need(cuMemFreeAsync(at, 0), "cuMemFreeAsync")?;
        if round % 2 == 0 {
            cuCtxSynchronize();
        }
        if cuMemFreeAsync(at, 0).is_ok() {
            case.wrong("cuMemFreeAsync of what was freed");
        }
    }
    cuCtxSynchronize();
    case.released("after frees that were too many");
    greedily(case, &mut Classic, "cuMemAlloc after frees too many")
}

/// Host memory is no device memory, whatever frees it.
fn host(case: &mut Case<'_>) -> Done {
    let before = info();
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut at = std::ptr::null_mut();
        need(cuMemHostAlloc(&mut at, 96 << 20, 0), "cuMemHostAlloc")?;
        held.push(at);
    }
    case.top();
    if info() != before {
        case.wrong("pinned host memory is counted as the device's");
    }
    for at in held {
        if cuMemFree_v2(at as Address).is_ok() {
            case.wrong("cuMemFree of host memory");
        }
        cuMemFreeHost(at);
    }
    exactly(case, &mut Classic, "cuMemAlloc after host memory")
}

/// Out of memory, one piece freed, the same asked for again at once: as every caching allocator does.
fn again(case: &mut Case<'_>) -> Done {
    let (free, _) = info();
    let sizes = [2 * MIB, 20 * MIB, 6 * MIB];
    let mut held: Vec<(Address, u64)> = Vec::new();
    let (mut sum, mut refusals) = (0, 0);
    for round in 0..400usize {
        let bytes = sizes[round % 3];
        let mut at = 0;
        let mut code = cuMemAlloc_v2(&mut at, bytes as usize);
        while !code.is_ok() {
            refusals += 1;
            case.refusal(code, "cuMemAlloc");
            if held.is_empty() {
                return Err(Stop::Broken("nothing is held and nothing given".to_owned()));
            }
            if sum + bytes <= free {
                case.refused(format!("{bytes} refused with {sum} of {free} taken"));
            }
            let (old, gone) = held.remove(round % held.len().min(7));
            need(cuMemFree_v2(old), "cuMemFree")?;
            sum -= gone;
            code = cuMemAlloc_v2(&mut at, bytes as usize);
        }
        sum += bytes;
        held.push((at, bytes));
        if sum > free {
            case.wrong(format!("{sum} given, {free} were free"));
        }
    }
    case.took(sum);
    case.top();
    if refusals == 0 {
        case.wrong("never refused");
    }
    for (at, _) in held {
        need(cuMemFree_v2(at), "cuMemFree")?;
    }
    Ok(())
}

/// `cuMemGetInfo` and `cuDeviceTotalMem` say the same, and go down by what is taken.
fn told(case: &mut Case<'_>) -> Done {
    let (free, total) = info();
    let mut said = 0;
    need(cuDeviceTotalMem_v2(&mut said, 0), "cuDeviceTotalMem")?;
    if said as u64 != total {
        case.wrong(format!("cuDeviceTotalMem {said}, cuMemGetInfo {total}"));
    }
    let mut held = Vec::new();
    for number in 1..=4u64 {
        let mut at = 0;
        need(cuMemAlloc_v2(&mut at, 16 << 20), "cuMemAlloc")?;
        held.push(at);
        let now = info();
        if now != (free - number * 16 * MIB, total) {
            case.wrong(format!(
                "{now:?} with {number} times 16 MiB, {:?} before",
                (free, total)
            ));
        }
    }
    case.top();
    for at in held {
        cuMemFree_v2(at);
    }
    Ok(())
}

/// The primary context is reset under everything: all is free again, and no more.
fn reset(case: &mut Case<'_>) -> Done {
    for _ in 0..3 {
        let mut at = 0;
        need(cuMemAlloc_v2(&mut at, 64 << 20), "cuMemAlloc")?;
        let mut other = 0;
        need(cuMemAllocAsync(&mut other, 32 << 20, 0), "cuMemAllocAsync")?;
        case.top();
        need(cuDevicePrimaryCtxReset_v2(0), "cuDevicePrimaryCtxReset")?;
        // It is made anew when it is retained next; the stage's own reference went with it.
        let mut context = 0;
        let code = cuDevicePrimaryCtxRetain(&mut context, 0);
        need(code, "cuDevicePrimaryCtxRetain")?;
        need(cuCtxSetCurrent(context), "cuCtxSetCurrent")?;
        if cuMemFree_v2(at).is_ok() {
            case.wrong("cuMemFree of what a reset had freed");
        }
        // A pool is the device's: what came out of it may outlive the context, and is freed as ever.
        if cuMemFreeAsync(other, 0).is_ok() {
            cuCtxSynchronize();
        }
        case.released("after a reset");
    }
    greedily(case, &mut Classic, "cuMemAlloc after resets")
}

/// Objects that are not there.
fn nothing(case: &mut Case<'_>) -> Done {
    for (what, code) in [
        ("cuArrayDestroy", cuArrayDestroy(0)),
        ("cuMipmappedArrayDestroy", cuMipmappedArrayDestroy(0)),
        ("cuMemPoolDestroy", cuMemPoolDestroy(0)),
        ("cuMemRelease", cuMemRelease(0)),
    ] {
        if code.is_ok() || code == Code::OUT_OF_MEMORY {
            case.wrong(format!("{what} of null: {}", code.0));
        }
    }
    Ok(())
}

/// See the module.
pub fn run(stage: &Stage) {
    stage.case("frees of what is not there", foreign);
    stage.case("frees of nothing", nothing);
    stage.case("freed twice", twice);
    stage.case("host memory", host);
    stage.case("freed and taken again", again);
    stage.case("what is told", told);
    stage.case("context reset", reset);
}
