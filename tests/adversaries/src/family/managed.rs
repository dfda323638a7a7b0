//! Managed memory: what counts is what is on the device. Touched there, prefetched there, advised to stay
//! there, from one allocation larger than the limit and from many small ones.

use crate::driver::{
    Address, Code, cuCtxSynchronize, cuMemAdvise, cuMemAdvise_v2, cuMemAllocManaged, cuMemFree_v2,
    cuMemPrefetchAsync, cuMemPrefetchAsync_v2, cuMemsetD8_v2, cuModuleLoadData, cuModuleUnload,
};
use crate::family::overhead::{PTX, launch};
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info};
use crate::types::{DEVICE, HOST, Location};
use crate::way::{Way, attempt};

/// `CU_DEVICE_CPU`.
const CPU: i32 = -1;
/// `CU_MEM_ADVISE_SET_PREFERRED_LOCATION`, `_SET_ACCESSED_BY`.
const PREFER: u32 = 3;
const ACCESSED_BY: u32 = 5;

/// How it gets to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bring {
    Nothing,
    Touch,
    Prefetch,
    PrefetchNew,
    Advise,
    AdviseNew,
}

pub struct Managed(pub Bring);

/// Brings what is held to the device.
fn bring(how: Bring, at: Address, bytes: u64) -> Code {
    let size = bytes as usize;
    let here = Location {
        kind: DEVICE,
        id: 0,
    };
    let code = match how {
        Bring::Nothing => return Code::SUCCESS,
        Bring::Touch => cuMemsetD8_v2(at, 1, size),
        Bring::Prefetch => cuMemPrefetchAsync(at, size, 0, 0),
        Bring::PrefetchNew => cuMemPrefetchAsync_v2(at, size, here, 0, 0),
        Bring::Advise => cuMemAdvise(at, size, PREFER, 0),
        Bring::AdviseNew => cuMemAdvise_v2(at, size, ACCESSED_BY, here),
    };
    if !code.is_ok() {
        return code;
    }
    if matches!(how, Bring::Advise | Bring::AdviseNew) {
        let touched = cuMemsetD8_v2(at, 1, size);
        if !touched.is_ok() {
            return touched;
        }
    }
    cuCtxSynchronize()
}

impl Way for Managed {
    type Held = Address;

    fn take(&mut self, bytes: u64) -> Result<Address, Code> {
        let mut at = 0;
        let code = cuMemAllocManaged(&mut at, bytes as usize, 1);
        if !code.is_ok() {
            return Err(code);
        }
        let brought = bring(self.0, at, bytes);
        if !brought.is_ok() {
            cuMemFree_v2(at);
        }
        brought.then(at)
    }

    fn give(&mut self, held: Address) -> Code {
        cuMemFree_v2(held)
    }

    fn elsewhere(&self) -> bool {
        true
    }
}

/// Much more than the limit in one piece or several, if the driver gives it, and all of it brought: the
/// device holds no more than the limit, whatever is refused.
fn larger(case: &mut Case<'_>, how: Bring, piece: u64) -> Done {
    let (_, total) = info();
    let mut held = Vec::new();
    let mut sum = 0;
    while sum <= total {
        let mut at = 0;
        let code = cuMemAllocManaged(&mut at, piece as usize, 1);
        if held.is_empty() && code.is_missing() {
            return Err(Stop::Skip(format!(
                "cuMemAllocManaged: the driver answers {}",
                code.0
            )));
        }
        if !code.is_ok() {
            case.refusal(code, "cuMemAllocManaged");
            break;
        }
        held.push(at);
        sum += piece;
        let brought = bring(how, at, piece);
        if brought.is_ok() {
            case.took(piece);
        } else {
            case.refusal(brought, &format!("{how:?} of managed memory"));
        }
        case.top();
    }
    // Back to the host, and again.
    for &at in &held {
        cuMemPrefetchAsync(at, piece as usize, CPU, 0);
        cuMemPrefetchAsync_v2(at, piece as usize, Location { kind: HOST, id: 0 }, 0, 0);
    }
    cuCtxSynchronize();
    for &at in &held {
        bring(how, at, piece);
    }
    case.top();
    for at in held {
        cuMemFree_v2(at);
    }
    Ok(())
}

/// Code beside managed memory, which the driver shows as no process's: neither hides the other.
fn code_beside(case: &mut Case<'_>) -> Done {
    const LEFT: u64 = 32 * MIB;
    const MANY: usize = 400;
    let bytes = info().0.saturating_sub(LEFT) / GRANULE * GRANULE;
    let at = match Managed(Bring::Touch).take(bytes) {
        Ok(at) => at,
        Err(code) if code.is_missing() => {
            return Err(Stop::Skip(format!(
                "cuMemAllocManaged: the driver answers {}",
                code.0
            )));
        }
        Err(code) => {
            case.fits(code, bytes, "cuMemAllocManaged");
            return Ok(());
        }
    };
    case.took(bytes);
    case.top();
    let mut modules = Vec::new();
    while modules.len() < MANY {
        let mut module = 0;
        let mut code = cuModuleLoadData(&mut module, PTX.as_ptr().cast());
        if code.is_ok() {
            modules.push(module);
            code = launch(module);
        }
        if !code.is_ok() {
            case.refusal(code, "a module and a launch");
            break;
        }
        case.top();
    }
    for module in modules {
        cuModuleUnload(module);
    }
    cuMemFree_v2(at);
    Ok(())
}

/// See the module.
pub fn run(stage: &Stage) {
    for how in [
        Bring::Nothing,
        Bring::Touch,
        Bring::Prefetch,
        Bring::PrefetchNew,
        Bring::Advise,
        Bring::AdviseNew,
    ] {
        attempt(stage, &format!("managed, {how:?}"), Managed(how));
        stage.case(&format!("managed, {how:?}, 48 MiB each"), |case| {
            larger(case, how, 48 * MIB)
        });
        stage.case(&format!("managed, {how:?}, 288 MiB"), |case| {
            larger(case, how, 288 * MIB)
        });
    }
    // What code takes is measured by the coordinator.
    if !stage.alone {
        stage.case("managed, with code beside it", code_beside);
    }
}
