//! Modules, libraries, functions, and the sizes that a context sets aside: what makes the driver take
//! device memory for itself. See [`crate::overhead`].

use core::ffi::{c_char, c_void};

use spillway_protocol::GRANULE;

use crate::driver::{Status, call};
use crate::gate;
use crate::runtime::Runtime;
use crate::standing::text_uses_heap;
use crate::table::sig;

use super::limited;

/// Runs a call of the current context, which takes at least what `least` says of context and device; without
/// quota or context it goes to the driver as it is.
fn taking(
    least: impl FnOnce(&Runtime, usize, usize) -> u64,
    make: impl FnOnce() -> Status,
    undo: impl FnOnce(&Runtime),
) -> Status {
    let current = limited().and_then(|runtime| Some((runtime, runtime.current().ok()?)));
    let Some((runtime, (context, device))) = current else {
        let _inside = gate::enter();
        return make();
    };
    let least = least(runtime, context, device);
    runtime.taking_overhead(device, least, make, || undo(runtime))
}

/// The text of an image, if it is PTX.
///
/// # Safety
/// The application's pointer to a module image, as the driver takes it.
unsafe fn text<'a>(image: *const c_void) -> Option<&'a [u8]> {
    let first = image.cast::<u8>();
    if first.is_null() {
        return None;
    }
    // SAFETY: an image has at least a byte; PTX is text that ends in NUL and begins with a word, a comment or
    // blank, as no machine code does.
    unsafe {
        matches!(*first, b'.' | b'/' | b' ' | b'\t' | b'\r' | b'\n')
            .then(|| core::ffi::CStr::from_ptr(image.cast()).to_bytes())
    }
}

/// Code is about to be loaded eagerly or not: what the heap that it may use will take, too.
fn with_heap(runtime: &Runtime, context: usize, image: Option<&[u8]>) -> u64 {
    runtime.code_loaded(image);
    let uses = image.is_none_or(text_uses_heap);
    let heap = if uses {
        runtime.heap_to_come(context)
    } else {
        0
    };
    heap.saturating_add(GRANULE)
}

macro_rules! loads {
    (@image data $first:ident) => {
        // SAFETY: the application's own image.
        unsafe { text($first.cast()) }
    };
    (@image file $first:ident) => {{
        let _ = $first;
        None
    }};
    ($($from:ident $name:ident $end:ident ($first:ident: $of:ty $(, $argument:ident: $type:ty)*);)*) => {$(
        pub unsafe fn $name(
            real: sig::$name,
            made: *mut *mut c_void,
            $first: $of,
            $($argument: $type),*
        ) -> Status {
            taking(
                |runtime, context, _| with_heap(runtime, context, loads!(@image $from $first)),
                // SAFETY: the application's own call.
                || unsafe { real(made, $first, $($argument),*) },
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
    file cuModuleLoad cuModuleUnload (fname: *const c_char);
    data cuModuleLoadData cuModuleUnload (image: *const c_void);
    data cuModuleLoadDataEx cuModuleUnload (image: *const c_void, numOptions: u32, options: *mut u32, optionValues: *mut *mut c_void);
    data cuModuleLoadFatBinary cuModuleUnload (fatCubin: *const c_void);
    data cuLibraryLoadData cuLibraryUnload (code: *const c_void, jitOptions: *mut u32, jitOptionsValues: *mut *mut c_void, numJitOptions: u32, libraryOptions: *mut u32, libraryOptionValues: *mut *mut c_void, numLibraryOptions: u32);
    file cuLibraryLoadFromFile cuLibraryUnload (fileName: *const c_char, jitOptions: *mut u32, jitOptionsValues: *mut *mut c_void, numJitOptions: u32, libraryOptions: *mut u32, libraryOptionValues: *mut *mut c_void, numLibraryOptions: u32);
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

/// Notes a function that was found in `module`; refuses it if what its launch would take does not fit.
///
/// # Safety
/// After success `function` is null or holds the driver's answer.
unsafe fn found(status: Status, module: Option<usize>, function: *mut *mut c_void) -> Status {
    if status.is_success()
        && !function.is_null()
        && let Some(runtime) = limited()
    {
        // SAFETY: the caller's promise.
        let function = unsafe { *function } as usize;
        if let Err(why) = runtime.stands(function) {
            return why;
        }
        if let Some(module) = module {
            runtime.function_found(module, function);
        }
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
    unsafe { found(status, Some(hmod as usize), hfunc) }
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
    // Without its library nobody could tell when it ends.
    let library = known.then_some(library as usize);
    // SAFETY: the driver has written it if it says success.
    unsafe { found(status, library, pFunc) }
}

pub unsafe fn cuCtxSetLimit(real: sig::cuCtxSetLimit, limit: u32, value: usize) -> Status {
    /// `CU_LIMIT_MAX_L2_FETCH_GRANULARITY`, `CU_LIMIT_PERSISTING_L2_CACHE_SIZE`: of the cache, not of memory. Programs
    /// set them between launches.
    const OF_CACHE: [u32; 2] = [5, 6];
    if OF_CACHE.contains(&limit) {
        let _inside = gate::enter();
        // SAFETY: the application's own call.
        return unsafe { real(limit, value) };
    }
    let mut before = 0;
    // SAFETY: the driver fills one integer.
    let known = unsafe { call::cuCtxGetLimit(&raw mut before, limit) }.is_success();
    let status = if known && value <= before {
        // What gives memory back is not refused for want of it.
        let _inside = gate::enter();
        // SAFETY: the application's own call.
        unsafe { real(limit, value) }
    } else {
        taking(
            |runtime, _, device| {
                let more = runtime.limit_growth(device, limit, before as u64, value as u64);
                more.max(GRANULE)
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
    };
    if let (true, Some(runtime)) = (status.is_success(), limited()) {
        // It may be much more than is looked after near the limit.
        runtime.measure_now();
    }
    status
}
