//! Sizes that a context sets aside: stacks, the printf buffer, the heap of `malloc`, pending launches. They are
//! taken when they are set, when code is loaded, or when a kernel is launched.

use std::ffi::CString;

use crate::driver::{
    Code, Handle, cuCtxCreate_v2, cuCtxDestroy_v2, cuCtxGetLimit, cuCtxPopCurrent_v2,
    cuCtxSetCurrent, cuCtxSetLimit, cuMemFree_v2, cuModuleLoadData, cuModuleUnload,
};
use crate::family::classic::Classic;
use crate::family::overhead::{PTX, function, launch, start};
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info, need};
use crate::way::Way;

const HEAP_PTX: &str = concat!(include_str!("../../../../simulator/kernels/heap.ptx"), "\0");
const STACK_PTX: &str = concat!(
    include_str!("../../../../simulator/kernels/stack.ptx"),
    "\0"
);

const STACK: u32 = 0;
const PRINTF: u32 = 1;
const HEAP: u32 = 2;
const PENDING: u32 = 4;

/// The kernel with so many bytes of local memory for each thread, a multiple of 256.
fn stack_ptx(bytes: usize) -> String {
    STACK_PTX
        .replace("4096", &bytes.to_string())
        .replace("1024", &(bytes / 4).to_string())
        .replace("1023", "63")
}

/// A context of the case's own, current; with it goes what its limits took.
struct Own {
    context: Handle,
    stage: Handle,
}

impl Own {
    fn new(stage: &Stage) -> Result<Self, Stop> {
        let (mut context, mut popped) = (0, 0);
        need(cuCtxCreate_v2(&mut context, 0, stage.device), "cuCtxCreate")?;
        cuCtxPopCurrent_v2(&mut popped);
        cuCtxSetCurrent(context);
        Ok(Self {
            context,
            stage: stage.context,
        })
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        cuCtxSetCurrent(self.stage);
        cuCtxDestroy_v2(self.context);
    }
}

/// Where a kernel writes to; it goes with the context.
fn result() -> Result<u64, Stop> {
    let taken = Classic.take(64 << 10);
    taken.map_err(|code| Stop::Broken(format!("cuMemAlloc: {}", code.0)))
}

/// All that is free, by `cuMemAlloc`.
fn ballast(case: &mut Case<'_>) -> Option<u64> {
    let all = info().0 / GRANULE * GRANULE;
    if all == 0 {
        return None;
    }
    match Classic.take(all) {
        Ok(at) => Some(at),
        Err(code) => {
            case.fits(code, all, "cuMemAlloc");
            None
        }
    }
}

fn drop_ballast(held: Option<u64>) {
    if let Some(at) = held {
        cuMemFree_v2(at);
    }
}

/// Loads a kernel and launches it.
fn use_module(case: &mut Case<'_>, text: &str, what: &str) -> bool {
    let mut module = 0;
    let mut code = cuModuleLoadData(&mut module, text.as_ptr().cast());
    if code.is_ok() {
        code = launch(module);
        case.top();
        cuModuleUnload(module);
    }
    if !code.is_ok() {
        case.refusal(code, what);
    }
    code.is_ok()
}

/// Sizes that are taken when they are set.
fn set(case: &mut Case<'_>, full: bool, limit: u32, values: &[usize], fitting: usize) -> Done {
    let own = Own::new(case.stage())?;
    let mut before = 0;
    need(cuCtxGetLimit(&mut before, limit), "cuCtxGetLimit")?;
    let held = if full { ballast(case) } else { None };
    for &value in values {
        let mut last = 0;
        cuCtxGetLimit(&mut last, limit);
        let code = cuCtxSetLimit(limit, value);
        if code.is_missing() {
            drop_ballast(held);
            return Err(Stop::Skip(format!(
                "cuCtxSetLimit: the driver answers {}",
                code.0
            )));
        }
        case.top();
        // A value that the driver does not like is its own matter (1).
        if !code.is_ok() && code.0 != 1 {
            case.refusal(code, "cuCtxSetLimit");
        }
        if !code.is_ok() && !full && value <= fitting {
            case.refused(format!("cuCtxSetLimit({limit}, {value}): {}", code.0));
        }
        let mut now = 0;
        cuCtxGetLimit(&mut now, limit);
        if !code.is_ok() && now != last {
            case.wrong(format!(
                "a limit of {value} was refused: it is {now}, was {last}"
            ));
        }
        use_module(case, PTX, "a launch after cuCtxSetLimit");
        // What is left can be had, and no more.
        let rest = ballast(case);
        case.top();
        drop_ballast(rest);
    }
    cuCtxSetLimit(limit, before);
    drop_ballast(held);
    drop(own);
    Ok(())
}

/// The heap: its size is set, and it is taken by code that uses it. `late`: all is taken by `cuMemAlloc` in between.
fn heap(case: &mut Case<'_>, late: usize, fitting: usize) -> Done {
    for size in [16 * MIB as usize, 64 << 20, 200 << 20, 400 << 20] {
        let own = Own::new(case.stage())?;
        let out = result()?;
        let set = cuCtxSetLimit(HEAP, size);
        if !set.is_ok() {
            case.refusal(set, "cuCtxSetLimit of the heap");
            if size <= fitting {
                case.refused(format!("a heap of {size}: {}", set.0));
            }
        }
        let mut module = 0;
        let mut held = if late == 0 { ballast(case) } else { None };
        let mut code = cuModuleLoadData(&mut module, HEAP_PTX.as_ptr().cast());
        if code.is_ok() {
            if late == 1 {
                held = ballast(case);
            }
            let found = function(module, "heap_u32");
            if late == 2 {
                held = ballast(case);
            }
            code = match found {
                Ok(function) => {
                    let launched = start(function, &[16, out]);
                    case.top();
                    launched
                }
                Err(code) => code,
            };
            case.top();
            if !code.is_ok() {
                case.refusal(code, "code that uses the heap");
            }
            if code == Code::OUT_OF_MEMORY && late > 1 && size <= fitting {
                case.refused(format!("code that uses a heap of {size}"));
            }
            cuModuleUnload(module);
        } else {
            case.refusal(code, "cuModuleLoadData of code that uses the heap");
        }
        drop_ballast(held);
        drop(own);
        case.released("after a context with a heap");
    }
    Ok(())
}

/// Kernels whose local memory makes the stack grow. `late`: all is taken by `cuMemAlloc` once they are found.
fn grown(case: &mut Case<'_>, late: bool) -> Done {
    for bytes in [768, 1280, 1536, 2048, 4096] {
        let own = Own::new(case.stage())?;
        let out = result()?;
        let text = CString::new(stack_ptx(bytes).trim_end_matches('\0')).unwrap_or_default();
        let mut module = 0;
        need(
            cuModuleLoadData(&mut module, text.as_ptr().cast()),
            "cuModuleLoadData",
        )?;
        let room = info().0 / GRANULE * GRANULE;
        match function(module, "stack_u32") {
            Ok(function) => {
                // What there was before it was found, less than its code takes; then what there is.
                let greedy = if late {
                    Classic.take(room.saturating_sub(8 * MIB)).ok()
                } else {
                    None
                };
                let held = if late { ballast(case) } else { None };

                let launched = start(function, &[out, 0]);
                case.top();
                if !launched.is_ok() {
                    case.refusal(launched, "a launch with much local memory");
                }
                drop_ballast(greedy);
                drop_ballast(held);
            }
            Err(code) => {
                case.refusal(code, "a function with much local memory");
                if bytes <= 1280 {
                    case.refused(format!("a kernel with {bytes} bytes of local memory"));
                }
            }
        }
        drop(own);
        case.released("after a context with a larger stack");
    }
    Ok(())
}

/// See the module.
pub fn run(stage: &Stage) {
    // What surely fits beside two contexts: 66 MiB of stacks, 63 MiB of buffer, 112 MiB of launches.
    for (name, limit, values, fitting) in [
        (
            "stack",
            STACK,
            &[1280, 1536, 2048, 4 << 10, 64 << 10, 512 << 10, 1280][..],
            1280,
        ),
        (
            "printf buffer",
            PRINTF,
            &[16 << 20, 64 << 20, 128 << 20, 600 << 20, 32 << 20],
            64 << 20,
        ),
        (
            "pending launches",
            PENDING,
            &[4096, 16_384, 65_536, 4096],
            4096,
        ),
    ] {
        for full in [false, true] {
            let when = if full { " when all is taken" } else { "" };
            stage.case(&format!("{name}{when}"), |case| {
                set(case, full, limit, values, fitting)
            });
        }
    }
    for (late, when) in [
        "all taken before code is loaded",
        "all taken before it is found",
        "all taken before it is launched",
        "nothing else taken",
    ]
    .into_iter()
    .enumerate()
    {
        stage.case(&format!("malloc heap, {when}"), |case| {
            heap(case, late, 64 << 20)
        });
    }
    stage.case("kernels with local memory", |case| grown(case, false));
    stage.case(
        "kernels with local memory, all taken before they are launched",
        |case| grown(case, true),
    );
}
