//! Green contexts: they take memory of the driver's own, and use the primary context of their device. Memory that is
//! allocated while one is current is the primary context's.

use core::ffi::c_void;
use std::sync::atomic::Ordering::SeqCst;

use spillway_protocol::GRANULE;

use crate::driver::{Status, call};
use crate::gate;
use crate::lock;
use crate::runtime::Runtime;
use crate::table::sig;

use super::context::{create_stream, primary_inactive, teardown};
use super::limited;

pub unsafe fn cuGreenCtxCreate(
    real: sig::cuGreenCtxCreate,
    phCtx: *mut *mut c_void,
    desc: *mut c_void,
    dev: i32,
    flags: u32,
) -> Status {
    let known = limited().and_then(|runtime| Some((runtime, runtime.device_index(dev)?)));
    let Some((runtime, device)) = known.filter(|_| !phCtx.is_null()) else {
        let _inside = gate::enter();
        // SAFETY: the application's own call.
        return unsafe { real(phCtx, desc, dev, flags) };
    };
    let before = runtime.desired().devices[device].overhead.load(SeqCst);
    // SAFETY: the application's own call.
    let make = || unsafe { real(phCtx, desc, dev, flags) };
    let first = !lock(&runtime.contexts).any_on(device);
    let status = if first {
        // As for any first context; the primary one is made with it.
        let _inside = gate::enter();
        make()
    } else {
        let least = runtime.green_cost().max(GRANULE);
        runtime.taking_overhead(device, least, make, || {
            // SAFETY: checked against null, written by the driver; the application has not been told of it.
            let _ = unsafe { call::cuGreenCtxDestroy(*phCtx) };
        })
    };
    if status.is_success() {
        // SAFETY: checked against null, written by the driver.
        note_green(runtime, unsafe { *phCtx }, dev, device);
        runtime.measure_now();
        if !first {
            runtime.green_made(device, before);
        }
    }
    status
}

/// Notes a green context with the primary context behind it: its work is waited for there, and its memory is that
/// one's.
fn note_green(runtime: &Runtime, green: *mut c_void, dev: i32, device: usize) {
    let (mut context, mut primary) = (core::ptr::null_mut(), core::ptr::null_mut());
    // SAFETY: a green context that was just made; the driver fills one handle each. The primary context stays as
    // it is: the green one uses it.
    let known = unsafe {
        call::cuCtxFromGreenCtx(&raw mut context, green).is_success()
            && call::cuDevicePrimaryCtxRetain(&raw mut primary, dev).is_success()
            && call::cuDevicePrimaryCtxRelease_v2(dev).is_success()
    };
    if known {
        let mut contexts = lock(&runtime.contexts);
        contexts.add(primary as usize, device, true);
        contexts.add_green(green as usize, context as usize, primary as usize);
    }
}

pub unsafe fn cuGreenCtxDestroy(real: sig::cuGreenCtxDestroy, hCtx: *mut c_void) -> Status {
    let known = limited().and_then(|runtime| {
        let green = lock(&runtime.contexts).green(hCtx as usize)?;
        Some((runtime, green.primary))
    });
    let Some((runtime, primary)) = known else {
        // SAFETY: the application's own call.
        return unsafe { real(hCtx) };
    };
    let green = hCtx as usize;
    let destroy = || {
        let taken = lock(&runtime.contexts).take_green(green);
        // SAFETY: the application's own call.
        let status = unsafe { real(hCtx) };
        if let (false, Some(taken)) = (status.is_success(), taken) {
            lock(&runtime.contexts).put_green_back(green, taken);
        }
        status
    };
    let device = lock(&runtime.contexts).device_of(primary);
    let gone = || device.is_some_and(|device| primary_inactive(runtime.devices[device].ordinal));
    teardown(Some(primary), destroy, gone)
}

pub unsafe fn cuGreenCtxStreamCreate(
    real: sig::cuGreenCtxStreamCreate,
    phStream: *mut *mut c_void,
    greenCtx: *mut c_void,
    flags: u32,
    priority: i32,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        create_stream(phStream, Some(greenCtx as usize), || {
            real(phStream, greenCtx, flags, priority)
        })
    }
}
