//! Modules, libraries, functions, and the sizes that a context sets aside: what makes the driver take
//! device memory for itself. See [`crate::overhead`].

use core::ffi::{c_char, c_void};

use spillway_protocol::GRANULE;

use crate::driver::{Status, call};
use crate::gate;
use crate::runtime::Runtime;
use crate::table::sig;

use super::limited;

/// Runs a call of the current context; without quota or context it goes to the driver as it is.
fn taking(make: impl FnOnce() -> Status, undo: impl FnOnce(&Runtime)) -> Status {
    taking_most(|_| 0, make, undo)
}

/// The same, for what may take as much as `most` says, in bytes.
fn taking_most(
    most: impl FnOnce(i32) -> u64,
    make: impl FnOnce() -> Status,
    undo: impl FnOnce(&Runtime),
) -> Status {
    let current = limited().and_then(|runtime| Some((runtime, runtime.current().ok()?)));
    let Some((runtime, (_, device))) = current else {
        let _inside = gate::enter();
        return make();
    };
    let most = most(runtime.devices[device].ordinal);
    runtime.taking_overhead(device, (GRANULE, most), make, || undo(runtime))
}

macro_rules! loads {
    ($($name:ident $end:ident ($($argument:ident: $type:ty),*);)*) => {$(
        pub unsafe fn $name(
            real: sig::$name,
            made: *mut *mut c_void,
            $($argument: $type),*
        ) -> Status {
            taking(
                // SAFETY: the application's own call.
                || unsafe { real(made, $($argument),*) },
                |_| {
                    if !made.is_null() {
                        // SAFETY: made above; the application has not been told of it.
                        let _ = unsafe { call::$end(*made) };
                    }
                },
            )
        }
    )*};
}
loads! {
    cuModuleLoad cuModuleUnload (fname: *const c_char);
    cuModuleLoadData cuModuleUnload (image: *const c_void);
    cuModuleLoadDataEx cuModuleUnload (image: *const c_void, numOptions: u32, options: *mut u32, optionValues: *mut *mut c_void);
    cuModuleLoadFatBinary cuModuleUnload (fatCubin: *const c_void);
    cuLibraryLoadData cuLibraryUnload (code: *const c_void, jitOptions: *mut u32, jitOptionsValues: *mut *mut c_void, numJitOptions: u32, libraryOptions: *mut u32, libraryOptionValues: *mut *mut c_void, numLibraryOptions: u32);
    cuLibraryLoadFromFile cuLibraryUnload (fileName: *const c_char, jitOptions: *mut u32, jitOptionsValues: *mut *mut c_void, numJitOptions: u32, libraryOptions: *mut u32, libraryOptionValues: *mut *mut c_void, numLibraryOptions: u32);
}

macro_rules! ends {
    ($($name:ident)*) => {$(
        pub unsafe fn $name(real: sig::$name, module: *mut c_void) -> Status {
            if let Some(runtime) = limited() {
                runtime.module_ends(module as usize);
                runtime.overhead_changed();
            }
            // SAFETY: the application's own call.
            unsafe { real(module) }
        }
    )*};
}
ends! { cuModuleUnload cuLibraryUnload }

/// Notes a function that was found in `module`.
///
/// # Safety
/// After success `function` is null or holds the driver's answer.
unsafe fn found(status: Status, module: usize, function: *mut *mut c_void) -> Status {
    if status.is_success()
        && !function.is_null()
        && let Some(runtime) = limited()
    {
        // SAFETY: the caller's promise.
        runtime.function_found(module, unsafe { *function } as usize);
    }
    status
}

pub unsafe fn cuModuleGetFunction(
    real: sig::cuModuleGetFunction,
    hfunc: *mut *mut c_void,
    hmod: *mut c_void,
    name: *const c_char,
) -> Status {
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(hfunc, hmod, name) };
    drop(inside);
    // SAFETY: the driver has written it if it says success.
    unsafe { found(status, hmod as usize, hfunc) }
}

pub unsafe fn cuKernelGetFunction(
    real: sig::cuKernelGetFunction,
    pFunc: *mut *mut c_void,
    kernel: *mut c_void,
) -> Status {
    let inside = gate::enter();
    // SAFETY: the application's own call.
    let status = unsafe { real(pFunc, kernel) };
    drop(inside);
    let mut library = core::ptr::null_mut();
    // SAFETY: a kernel that the driver has just accepted; it fills one handle.
    let known = status.is_success()
        && unsafe { call::cuKernelGetLibrary(&raw mut library, kernel) }.is_success();
    if !known {
        // Without its library nobody could tell when it ends.
        return status;
    }
    // SAFETY: the driver has written it if it says success.
    unsafe { found(status, library as usize, pFunc) }
}

/// `CU_LIMIT_STACK_SIZE`
const STACK_SIZE: u32 = 0;

/// How many threads a device runs at a time; many, if it does not say.
fn resident_threads(ordinal: i32) -> u64 {
    /// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`
    const MULTIPROCESSORS: u32 = 16;
    /// `CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR`
    const THREADS_EACH: u32 = 39;
    let ask = |attribute, otherwise| {
        let mut value = 0;
        // SAFETY: the driver fills one integer.
        let asked = unsafe { call::cuDeviceGetAttribute(&raw mut value, attribute, ordinal) };
        let known = asked.is_success().then(|| u64::try_from(value).ok());
        known.flatten().unwrap_or(otherwise)
    };
    ask(MULTIPROCESSORS, 256) * ask(THREADS_EACH, 2048)
}

pub unsafe fn cuCtxSetLimit(real: sig::cuCtxSetLimit, limit: u32, value: usize) -> Status {
    let mut before = 0;
    // SAFETY: the driver fills one integer.
    let known = unsafe { call::cuCtxGetLimit(&raw mut before, limit) }.is_success();
    taking_most(
        |ordinal| match limit {
            // A stack for every thread that can be resident: measured so on an H200 with driver 580.
            STACK_SIZE => (value as u64).saturating_mul(resident_threads(ordinal)),
            _ => value as u64,
        },
        // SAFETY: the application's own call.
        || unsafe { real(limit, value) },
        |_| {
            if known {
                // SAFETY: the value that was in force.
                let _ = unsafe { real(limit, before) };
            }
        },
    )
}
