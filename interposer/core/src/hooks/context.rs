//! Contexts, streams, captures and peer access: what is watched so that a drain knows what to wait
//! for, and that a destroyed context takes its memory along.

use core::ffi::c_void;
use std::sync::atomic::Ordering::SeqCst;

use spillway_protocol::GRANULE;

use crate::driver::{Status, call};
use crate::gate;
use crate::lock;
use crate::quota::Backing;
use crate::runtime::{self, Runtime};
use crate::table::sig;
use crate::trace;
use crate::vmm;

use super::limited;

pub unsafe fn cuInit(real: sig::cuInit, Flags: u32) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(Flags) };
    if !status.is_success() {
        return status;
    }
    if trace::is_bypassed() {
        trace::say_bypassed();
    }
    match runtime::start() {
        Ok(()) => Status::SUCCESS,
        Err(failure) => failure.0,
    }
}

/// Makes a context inside the gate, notes it, and has its overhead measured. The first one on a device is
/// refused only if another process of the workload has shown what a context takes, and that does not fit:
/// otherwise nobody can know without it, and an allocation will be refused.
fn make_context(
    runtime: &Runtime,
    device: usize,
    make: impl FnOnce() -> Status,
    undo: impl FnOnce(),
    note: impl FnOnce(),
) -> Status {
    let before = runtime.desired().devices[device].overhead.load(SeqCst);
    let first = !lock(&runtime.contexts).any_on(device);
    let mut held = 0;
    let status = if first {
        match runtime.reserve_context(device) {
            Ok(bytes) => held = bytes,
            Err(()) => return Status::OUT_OF_MEMORY,
        }
        let inside = gate::enter();
        let status = make();
        drop(inside);
        status
    } else {
        let least = runtime.context_cost().max(GRANULE);
        runtime.taking_overhead(device, least, make, undo)
    };
    if status.is_success() {
        note();
        runtime.measure_now();
        runtime.context_made(device, before);
    }
    if held > 0 {
        // It is overhead now, or there is none.
        runtime.unreserve(device, held, Backing::Pinned);
    }
    status
}

unsafe fn create(out: *mut *mut c_void, dev: i32, make: impl FnOnce() -> Status) -> Status {
    let known = limited().and_then(|runtime| Some((runtime, runtime.device_index(dev)?)));
    let Some((runtime, device)) = known.filter(|_| !out.is_null()) else {
        let _inside = gate::enter();
        return make();
    };
    make_context(
        runtime,
        device,
        make,
        || {
            // SAFETY: checked against null, written by the driver; the application has not been told of it.
            let _ = unsafe { call::cuCtxDestroy_v2(*out) };
        },
        || {
            // SAFETY: as above.
            let context = unsafe { *out } as usize;
            runtime.await_gone(context);
            lock(&runtime.contexts).add(context, device, false);
        },
    )
}

pub unsafe fn cuCtxCreate(
    real: sig::cuCtxCreate,
    pctx: *mut *mut c_void,
    flags: u32,
    dev: i32,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { create(pctx, dev, || real(pctx, flags, dev)) };
    if let (true, false, Some(runtime)) = (status.is_success(), pctx.is_null(), limited()) {
        // SAFETY: checked against null, written by the driver.
        lock(&runtime.contexts).set_old(unsafe { *pctx } as usize);
        runtime.any_old.store(true, SeqCst);
    }
    status
}

pub unsafe fn cuCtxCreate_v2(
    real: sig::cuCtxCreate_v2,
    pctx: *mut *mut c_void,
    flags: u32,
    dev: i32,
) -> Status {
    // SAFETY: the application's own call.
    unsafe { create(pctx, dev, || real(pctx, flags, dev)) }
}

pub unsafe fn cuCtxCreate_v3(
    real: sig::cuCtxCreate_v3,
    pctx: *mut *mut c_void,
    paramsArray: *mut c_void,
    numParams: i32,
    flags: u32,
    dev: i32,
) -> Status {
    // SAFETY: the application's own call.
    unsafe { create(pctx, dev, || real(pctx, paramsArray, numParams, flags, dev)) }
}

pub unsafe fn cuCtxCreate_v4(
    real: sig::cuCtxCreate_v4,
    pctx: *mut *mut c_void,
    ctxCreateParams: *mut c_void,
    flags: u32,
    dev: i32,
) -> Status {
    // SAFETY: the application's own call.
    unsafe { create(pctx, dev, || real(pctx, ctxCreateParams, flags, dev)) }
}

pub unsafe fn cuDevicePrimaryCtxRetain(
    real: sig::cuDevicePrimaryCtxRetain,
    pctx: *mut *mut c_void,
    dev: i32,
) -> Status {
    let Some(runtime) = limited() else {
        // SAFETY: the application's own call.
        return unsafe { real(pctx, dev) };
    };
    let device = runtime.device_index(dev);
    let known = device.is_some_and(|d| lock(&runtime.contexts).primary_of(d).is_some());
    // Only the first one takes device memory; the others must not wait while swapped out.
    let Some(device) = device.filter(|_| !known && !pctx.is_null()) else {
        // SAFETY: the application's own call.
        let status = unsafe { real(pctx, dev) };
        if status.is_success() && !pctx.is_null() {
            // SAFETY: checked against null, written by the driver.
            let context = unsafe { *pctx } as usize;
            // Another thread may just have ended the one before; this one is a new one then.
            runtime.await_gone(context);
            if let Some(device) = device {
                lock(&runtime.contexts).add(context, device, true);
            }
        }
        return status;
    };
    make_context(
        runtime,
        device,
        // SAFETY: the application's own call.
        || unsafe { real(pctx, dev) },
        || {
            // SAFETY: retained above; the application has not been told of it.
            let _ = unsafe { call::cuDevicePrimaryCtxRelease_v2(dev) };
        },
        || {
            // SAFETY: checked against null, written by the driver.
            let context = unsafe { *pctx } as usize;
            runtime.await_gone(context);
            lock(&runtime.contexts).add(context, device, true);
        },
    )
}

/// Ends a context: waits for a running swap, lets the driver destroy, and lets go of its memory if
/// `gone` says so. Never waits at the gate and never restores.
pub(super) fn teardown(
    context: Option<usize>,
    destroy: impl FnOnce() -> Status,
    gone: impl FnOnce() -> bool,
) -> Status {
    let Some(runtime) = limited() else {
        return destroy();
    };
    if let Some(context) = context {
        runtime.modules_end_with(context);
    }
    runtime.teardown_begun();
    let status = match context {
        // Out of our books before anybody of ours may use the handle again.
        Some(context) => runtime.destroying(context, || {
            let status = destroy();
            if status.is_success() && gone() {
                runtime.context_gone(context);
            }
            status
        }),
        None => destroy(),
    };
    runtime.teardown_ended();
    runtime.overhead_changed();
    status
}

pub unsafe fn cuCtxDestroy_v2(real: sig::cuCtxDestroy_v2, ctx: *mut c_void) -> Status {
    // SAFETY: the application's own call.
    teardown(Some(ctx as usize), || unsafe { real(ctx) }, || true)
}

pub unsafe fn cuCtxDestroy(real: sig::cuCtxDestroy, ctx: *mut c_void) -> Status {
    // SAFETY: the application's own call.
    teardown(Some(ctx as usize), || unsafe { real(ctx) }, || true)
}

pub unsafe fn cuCtxDetach(real: sig::cuCtxDetach, ctx: *mut c_void) -> Status {
    let gone = || {
        let mut version = 0;
        // SAFETY: the driver refuses a context that is gone, and fills one integer otherwise.
        !unsafe { call::cuCtxGetApiVersion(ctx, &raw mut version) }.is_success()
    };
    // SAFETY: the application's own call.
    teardown(Some(ctx as usize), || unsafe { real(ctx) }, gone)
}

fn primary(dev: i32) -> Option<usize> {
    let runtime = limited()?;
    let device = runtime.device_index(dev)?;
    lock(&runtime.contexts).primary_of(device)
}

pub(super) fn primary_inactive(dev: i32) -> bool {
    let (mut flags, mut active) = (0, 1);
    // SAFETY: the driver fills two integers.
    let status = unsafe { call::cuDevicePrimaryCtxGetState(dev, &raw mut flags, &raw mut active) };
    status.is_success() && active == 0
}

pub unsafe fn cuDevicePrimaryCtxRelease_v2(
    real: sig::cuDevicePrimaryCtxRelease_v2,
    dev: i32,
) -> Status {
    // SAFETY: the application's own call.
    teardown(
        primary(dev),
        || unsafe { real(dev) },
        || primary_inactive(dev),
    )
}

pub unsafe fn cuDevicePrimaryCtxRelease(real: sig::cuDevicePrimaryCtxRelease, dev: i32) -> Status {
    // SAFETY: the application's own call.
    teardown(
        primary(dev),
        || unsafe { real(dev) },
        || primary_inactive(dev),
    )
}

pub unsafe fn cuDevicePrimaryCtxReset_v2(
    real: sig::cuDevicePrimaryCtxReset_v2,
    dev: i32,
) -> Status {
    // SAFETY: the application's own call.
    teardown(primary(dev), || unsafe { real(dev) }, || true)
}

pub unsafe fn cuDevicePrimaryCtxReset(real: sig::cuDevicePrimaryCtxReset, dev: i32) -> Status {
    // SAFETY: the application's own call.
    teardown(primary(dev), || unsafe { real(dev) }, || true)
}

/// Makes a stream inside the gate (it takes a little device memory) and notes it. `of`: the green context that it
/// is made for, whatever is current.
pub(super) unsafe fn create_stream(
    out: *mut *mut c_void,
    of: Option<usize>,
    make: impl FnOnce() -> Status,
) -> Status {
    let Some(runtime) = limited() else {
        return make();
    };
    let inside = gate::enter();
    let status = make();
    if status.is_success() && !out.is_null() {
        // SAFETY: checked against null, written by the driver.
        let stream = unsafe { *out } as usize;
        let green = of.or_else(|| runtime.current_green());
        let owner = green.and_then(|green| lock(&runtime.contexts).green(green));
        let context = match owner {
            Some(green) => Some(green.primary),
            None => runtime.current().ok().map(|(context, _)| context),
        };
        runtime.await_gone(stream);
        let mut contexts = lock(&runtime.contexts);
        if let Some(context) = context {
            contexts.add_stream(context, stream);
        }
        if let Some(green) = green {
            contexts.add_green_stream(green, stream);
        }
    }
    drop(inside);
    status
}

pub unsafe fn cuStreamCreate(
    real: sig::cuStreamCreate,
    phStream: *mut *mut c_void,
    Flags: u32,
) -> Status {
    // SAFETY: the application's own call.
    unsafe { create_stream(phStream, None, || real(phStream, Flags)) }
}

pub unsafe fn cuStreamCreateWithPriority(
    real: sig::cuStreamCreateWithPriority,
    phStream: *mut *mut c_void,
    flags: u32,
    priority: i32,
) -> Status {
    // SAFETY: the application's own call.
    unsafe { create_stream(phStream, None, || real(phStream, flags, priority)) }
}

fn destroy_stream(stream: *mut c_void, destroy: impl FnOnce() -> Status) -> Status {
    let Some(runtime) = limited() else {
        return destroy();
    };
    let handle = stream as usize;
    // Forgotten before it is destroyed: another thread may get the same handle for a new stream.
    let owner = lock(&runtime.contexts).context_of_stream(handle);
    let status = runtime.destroying(handle, || {
        lock(&runtime.contexts).remove_stream(handle);
        runtime.forget_stream(handle);
        destroy()
    });
    if let (false, Some(context)) = (status.is_success(), owner) {
        lock(&runtime.contexts).add_stream(context, handle);
    }
    status
}

pub unsafe fn cuStreamDestroy_v2(real: sig::cuStreamDestroy_v2, hStream: *mut c_void) -> Status {
    // SAFETY: the application's own call.
    destroy_stream(hStream, || unsafe { real(hStream) })
}

pub unsafe fn cuStreamDestroy(real: sig::cuStreamDestroy, hStream: *mut c_void) -> Status {
    // SAFETY: the application's own call.
    destroy_stream(hStream, || unsafe { real(hStream) })
}

/// A stream's name among the captures: default streams differ by thread. Of those only the thread's own captures,
/// and a per-thread entry point names it by null, too.
fn capture_key(stream: *mut c_void) -> (usize, u64) {
    /// `CU_STREAM_PER_THREAD`
    const PER_THREAD: usize = 2;
    if stream as usize > PER_THREAD {
        return (stream as usize, 0);
    }
    // SAFETY: no pointers are involved.
    let thread = unsafe { libc::gettid() };
    (PER_THREAD, u64::try_from(thread).unwrap_or(1))
}

/// Begins a capture inside the gate: a process that captures is not moved.
fn begin_capture(stream: *mut c_void, begin: impl FnOnce() -> Status) -> Status {
    let Some(runtime) = limited() else {
        return begin();
    };
    let inside = gate::enter();
    let status = runtime.beginning_capture(capture_key(stream), begin);
    drop(inside);
    status
}

/// Ends a capture, if the driver agrees that it is at an end.
fn end_capture(stream: *mut c_void, end: impl FnOnce() -> Status) -> Status {
    let status = end();
    if let Some(runtime) = limited()
        && (status.is_success() || !vmm::is_capturing(stream as usize))
    {
        let (stream, thread) = capture_key(stream);
        lock(&runtime.contexts).end_capture(stream, thread);
        // An eviction may be wanted right away; the report must not say any longer that one is open.
        runtime.pager.poke();
    }
    status
}

macro_rules! captures {
    ($($which:ident $name:ident ($($argument:ident: $type:ty),*);)*) => {$(
        pub unsafe fn $name(real: sig::$name, hStream: *mut c_void, $($argument: $type),*) -> Status {
            // SAFETY: the application's own call.
            $which(hStream, || unsafe { real(hStream, $($argument),*) })
        }
    )*};
}
captures! {
    begin_capture cuStreamBeginCapture ();
    begin_capture cuStreamBeginCapture_ptsz ();
    begin_capture cuStreamBeginCapture_v2 (mode: u32);
    begin_capture cuStreamBeginCapture_v2_ptsz (mode: u32);
    begin_capture cuStreamBeginCaptureToCig (streamCigCaptureParams: *mut c_void);
    begin_capture cuStreamBeginCaptureToCig_ptsz (streamCigCaptureParams: *mut c_void);
    begin_capture cuStreamBeginCaptureToGraph (hGraph: *mut c_void, dependencies: *const *mut c_void, dependencyData: *const c_void, numDependencies: usize, mode: u32);
    begin_capture cuStreamBeginCaptureToGraph_ptsz (hGraph: *mut c_void, dependencies: *const *mut c_void, dependencyData: *const c_void, numDependencies: usize, mode: u32);
    begin_capture cuStreamBeginRecaptureToGraph (mode: u32, hGraph: *mut c_void, callbackFunc: *mut c_void, userData: *mut c_void);
    begin_capture cuStreamBeginRecaptureToGraph_ptsz (mode: u32, hGraph: *mut c_void, callbackFunc: *mut c_void, userData: *mut c_void);
    end_capture cuStreamEndCapture (phGraph: *mut *mut c_void);
    end_capture cuStreamEndCapture_ptsz (phGraph: *mut *mut c_void);
    end_capture cuStreamEndCaptureToCig ();
    end_capture cuStreamEndCaptureToCig_ptsz ();
}

/// Access for every block on the peer's device, present and (by the record) future.
fn change_peer(peer: *mut c_void, enable: bool) {
    let Some(runtime) = limited().filter(|runtime| runtime.paging) else {
        return;
    };
    let Ok((_, accessor)) = runtime.current() else {
        return;
    };
    let owner = vmm::in_context(peer as usize, || {
        runtime.current().map(|(_, device)| device)
    });
    let Ok(owner) = owner else { return };
    give_access(runtime, owner, accessor, enable);
}

/// Gives or takes a device's access to all memory of ours on another, present and (by the record)
/// future.
pub(super) fn give_access(runtime: &Runtime, owner: usize, accessor: usize, enable: bool) {
    let inside = gate::enter();
    {
        let mut peers = lock(&runtime.peers);
        if enable && !peers.contains(&(owner, accessor)) {
            peers.push((owner, accessor));
        } else if !enable {
            peers.retain(|&pair| pair != (owner, accessor));
        }
    }
    let blocks: Vec<(u64, u64)> = lock(&runtime.heap)
        .blocks_on(owner)
        .map(|b| (b.base, b.bytes))
        .collect();
    let ordinal = runtime.devices[accessor].ordinal;
    for (base, bytes) in blocks {
        let changed = if enable {
            vmm::set_access(base, bytes, &[ordinal])
        } else {
            vmm::remove_access(base, bytes, ordinal)
        };
        if let Err(why) = changed {
            crate::say::warning!(
                "peer access of device {ordinal}: the driver answers {}",
                why.0
            );
        }
    }
    drop(inside);
}

pub unsafe fn cuCtxEnablePeerAccess(
    real: sig::cuCtxEnablePeerAccess,
    peerContext: *mut c_void,
    Flags: u32,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(peerContext, Flags) };
    if status.is_success() {
        change_peer(peerContext, true);
    }
    status
}

pub unsafe fn cuCtxDisablePeerAccess(
    real: sig::cuCtxDisablePeerAccess,
    peerContext: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(peerContext) };
    if status.is_success() {
        change_peer(peerContext, false);
    }
    status
}
