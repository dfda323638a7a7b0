//! What the driver takes for itself on a program's behalf: contexts, green contexts, modules, streams
//! and events. None of it may lift a program over its limit.

use std::ffi::{CString, c_void};

use crate::driver::{
    Code, Handle, cuCtxCreate_v2, cuCtxDestroy_v2, cuCtxFromGreenCtx, cuCtxPopCurrent_v2,
    cuCtxSetCurrent, cuCtxSynchronize, cuDevResourceGenerateDesc, cuDeviceGetDevResource,
    cuEventCreate, cuEventDestroy_v2, cuEventRecord, cuGreenCtxCreate, cuGreenCtxDestroy,
    cuLaunchKernel, cuLibraryGetModule, cuLibraryLoadData, cuLibraryUnload, cuMemFree_v2,
    cuModuleGetFunction, cuModuleLoadData, cuModuleUnload, cuStreamCreate, cuStreamDestroy_v2,
};
use crate::family::classic::Classic;
use crate::stage::{Case, Done, GRANULE, Stage, Stop, info, need};
use crate::types::{DeviceResource, NOTHING};
use crate::way::Way;

/// The project's kernels.
pub const PTX: &str = concat!(
    include_str!("../../../../simulator/kernels/spillway.ptx"),
    "\0"
);

/// More of anything than fits into twice the limit.
const MANY: usize = 400;

/// Takes all that is free by `cuMemAlloc`, if `full`, then something of the driver's again and again.
fn many<T>(
    case: &mut Case<'_>,
    what: &str,
    full: bool,
    mut make: impl FnMut() -> Result<T, Code>,
    mut free: impl FnMut(T) -> Code,
) -> Done {
    let all = info().0 / GRANULE * GRANULE;
    let ballast = if full && all > 0 {
        match Classic.take(all) {
            Ok(at) => Some(at),
            Err(code) => {
                case.fits(code, all, "cuMemAlloc");
                None
            }
        }
    } else {
        None
    };
    let mut held = Vec::new();
    let mut end = None;
    while held.len() < MANY {
        match make() {
            Ok(one) => held.push(one),
            Err(code) => {
                end = Some(code);
                break;
            }
        }
        if held.len() % 16 == 1 {
            case.top();
        }
    }
    case.top();
    let none = held.is_empty();
    for one in held {
        let code = free(one);
        if !code.is_ok() {
            case.wrong(format!("{what}: giving back: {}", code.0));
        }
    }
    if let Some(at) = ballast {
        cuMemFree_v2(at);
    }
    match end {
        Some(code) if none && code.is_missing() => {
            Err(Stop::Skip(format!("{what}: the driver answers {}", code.0)))
        }
        Some(code) => {
            case.refusal(code, what);
            if none && !full {
                case.refused(format!("{what}: not even one, with {all} free"));
            }
            Ok(())
        }
        None => Ok(()),
    }
}

/// Contexts of a program's own.
pub fn contexts(stage: &Stage) {
    let own = stage.context;
    let make = move || {
        let (mut context, mut popped) = (0, 0);
        let code = cuCtxCreate_v2(&mut context, 0, 0);
        if code.is_ok() {
            cuCtxPopCurrent_v2(&mut popped);
        }
        cuCtxSetCurrent(own);
        code.then(context)
    };
    stage.case("contexts", |case| {
        many(case, "cuCtxCreate", false, make, |context| {
            cuCtxDestroy_v2(context)
        })
    });
    stage.case("contexts when all is taken", |case| {
        many(case, "cuCtxCreate", true, make, |context| {
            cuCtxDestroy_v2(context)
        })
    });
    stage.case("memory after contexts", |case| {
        let mut held = Vec::new();
        for _ in 0..3 {
            match make() {
                Ok(context) => held.push(context),
                Err(code) => {
                    case.fits(code, 32 << 20, "cuCtxCreate");
                }
            }
        }
        // Memory of those contexts, as much as is said to be free, and no more.
        for &context in &held {
            cuCtxSetCurrent(context);
            let mut pieces = Vec::new();
            while pieces.len() < MANY {
                match Classic.take(4 << 20) {
                    Ok(at) => pieces.push(at),
                    Err(code) => {
                        case.refusal(code, "cuMemAlloc");
                        break;
                    }
                }
            }
            case.top();
            // Every second context goes with its memory.
            if context % 128 == 0 {
                for at in pieces {
                    cuMemFree_v2(at);
                }
            }
            cuCtxDestroy_v2(context);
        }
        cuCtxSetCurrent(own);
        Ok(())
    });
}

/// Green contexts: parts of a device with a context each.
pub fn green(stage: &Stage) {
    /// `CU_GREEN_CTX_DEFAULT_STREAM`.
    const DEFAULT_STREAM: u32 = 1;
    let make = || {
        let mut resource = DeviceResource([0; 256]);
        let room = (&raw mut resource).cast::<c_void>();
        let mut code = cuDeviceGetDevResource(0, room, 1);
        let (mut description, mut green, mut context) = (0, 0, 0);
        if code.is_ok() {
            code = cuDevResourceGenerateDesc(&mut description, room, 1);
        }
        if code.is_ok() {
            code = cuGreenCtxCreate(&mut green, description, 0, DEFAULT_STREAM);
        }
        if code.is_ok() {
            code = cuCtxFromGreenCtx(&mut context, green);
            if !code.is_ok() {
                cuGreenCtxDestroy(green);
            }
        }
        code.then((green, context))
    };
    let free = |(green, _): (Handle, Handle)| cuGreenCtxDestroy(green);
    for (name, full) in [
        ("green contexts", false),
        ("green contexts when all is taken", true),
    ] {
        stage.case(name, |case| {
            many(case, "cuGreenCtxCreate", full, make, free)
        });
    }
    let own = stage.context;
    stage.case("memory in a green context", |case| {
        let (green, context) = make().map_err(|code| match need(code, "cuGreenCtxCreate") {
            Err(stop) => stop,
            Ok(()) => Stop::Broken("cuGreenCtxCreate".to_owned()),
        })?;
        need(cuCtxSetCurrent(context), "cuCtxSetCurrent")?;
        let mut sum = 0;
        let (free, _) = info();
        let mut held = Vec::new();
        while held.len() < MANY {
            match Classic.take(4 << 20) {
                Ok(at) => held.push(at),
                Err(code) => {
                    case.refusal(code, "cuMemAlloc");
                    break;
                }
            }
            sum += 4 << 20;
            case.took(4 << 20);
        }
        case.top();
        if sum + (4 << 20) <= free {
            case.refused(format!(
                "cuMemAlloc: {sum} bytes in a green context, {free} were free"
            ));
        }
        for at in held {
            cuMemFree_v2(at);
        }
        cuCtxSetCurrent(own);
        need(cuGreenCtxDestroy(green), "cuGreenCtxDestroy")
    });
}

/// A function of a module.
///
/// # Errors
/// The driver's refusal.
pub fn function(module: Handle, name: &str) -> Result<Handle, Code> {
    let mut function = 0;
    let name = CString::new(name).unwrap_or_default();
    cuModuleGetFunction(&mut function, module, name.as_ptr()).then(function)
}

/// Launches one thread with numbers for parameters, and waits for it.
pub fn start(function: Handle, numbers: &[u64]) -> Code {
    let values: Vec<*const c_void> = numbers
        .iter()
        .map(|n| std::ptr::from_ref(n).cast())
        .collect();
    let code = cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, 0, values.as_ptr(), NOTHING);
    if code.is_ok() {
        cuCtxSynchronize()
    } else {
        code
    }
}

/// Launches a kernel that does nothing for long, so that the module is really loaded.
pub fn launch(module: Handle) -> Code {
    match function(module, "spin_ns") {
        Ok(function) => start(function, &[1]),
        Err(code) => code,
    }
}

/// Modules and libraries, loaded at once or when first used (the runner sets which).
pub fn modules(stage: &Stage) {
    let make = || {
        let mut module = 0;
        let code = cuModuleLoadData(&mut module, PTX.as_ptr().cast());
        if !code.is_ok() {
            return Err(code);
        }
        let launched = launch(module);
        if !launched.is_ok() {
            cuModuleUnload(module);
        }
        launched.then(module)
    };
    let library = || {
        let (mut library, mut module) = (0, 0);
        let code = cuLibraryLoadData(
            &mut library,
            PTX.as_ptr().cast(),
            NOTHING,
            NOTHING,
            0,
            NOTHING,
            NOTHING,
            0,
        );
        if !code.is_ok() {
            return Err(code);
        }
        let mut code = cuLibraryGetModule(&mut module, library);
        if code.is_ok() {
            code = launch(module);
        }
        if !code.is_ok() {
            cuLibraryUnload(library);
        }
        code.then(library)
    };
    for full in [false, true] {
        let when = if full { " when all is taken" } else { "" };
        stage.case(&format!("modules{when}"), |case| {
            many(
                case,
                "cuModuleLoadData and a launch",
                full,
                make,
                cuModuleUnload,
            )
        });
        stage.case(&format!("libraries{when}"), |case| {
            many(
                case,
                "cuLibraryLoadData and a launch",
                full,
                library,
                cuLibraryUnload,
            )
        });
    }
}

/// Streams and events by the hundred and thousand.
pub fn objects(stage: &Stage) {
    for full in [false, true] {
        let when = if full { " when all is taken" } else { "" };
        stage.case(&format!("streams{when}"), |case| {
            let make = || {
                let mut stream = 0;
                cuStreamCreate(&mut stream, 1).then(stream)
            };
            many(case, "cuStreamCreate", full, make, |stream| {
                cuStreamDestroy_v2(stream)
            })
        });
        stage.case(&format!("events{when}"), |case| {
            let make = || {
                let mut events = [0; 10];
                for event in &mut events {
                    let code = cuEventCreate(event, 0);
                    if !code.is_ok() {
                        return Err(code);
                    }
                    cuEventRecord(*event, 0);
                }
                Ok(events)
            };
            many(case, "cuEventCreate", full, make, |events| {
                events
                    .into_iter()
                    .map(cuEventDestroy_v2)
                    .max_by_key(|code| code.0)
                    .unwrap_or(Code::SUCCESS)
            })
        });
    }
}
