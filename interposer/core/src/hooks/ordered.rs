//! Stream-ordered allocations and frees, and the pools that they would come from.

use core::ffi::c_void;

use crate::driver::{Status, call};
use crate::heap::Place;
use crate::lock;
use crate::runtime::Runtime;
use crate::table::sig;
use crate::vmm;

use super::limited;
use super::memory::{answer, made, pass_charged};

/// `CU_STREAM_PER_THREAD`
const PER_THREAD: usize = 2;

/// The stream is part of a capture: what is allocated or freed there are nodes of a graph.
fn capturing(runtime: &Runtime, stream: usize) -> bool {
    // Two statements: the lock must not be held over the driver's call.
    let any = lock(&runtime.contexts).any_capture();
    any && vmm::is_capturing(stream)
}

/// The name under which a stream's frees may be reused: 0 for streams that differ by thread.
fn reuse_name(stream: usize) -> usize {
    match stream {
        PER_THREAD => 0,
        0 => 1,
        other => other,
    }
}

/// The program has made another pool than the default one current: its allocations come from there.
fn own_pool(runtime: &Runtime) -> bool {
    use std::sync::atomic::Ordering::SeqCst;
    let devices = runtime.own_pools.load(SeqCst);
    devices != 0
        && runtime
            .current()
            .is_ok_and(|(_, device)| devices >> device & 1 != 0)
}

pub unsafe fn cuDeviceSetMemPool(
    real: sig::cuDeviceSetMemPool,
    dev: i32,
    pool: *mut c_void,
) -> Status {
    use std::sync::atomic::Ordering::SeqCst;
    // SAFETY: the application's own call.
    let status = unsafe { real(dev, pool) };
    if let (true, Some(runtime)) = (status.is_success(), limited())
        && let Some(device) = runtime.device_index(dev)
    {
        let mut default = core::ptr::null_mut();
        // SAFETY: the driver fills one handle.
        let known = unsafe { call::cuDeviceGetDefaultMemPool(&raw mut default, dev) };
        if known.is_success() && default == pool {
            runtime.own_pools.fetch_and(!(1 << device), SeqCst);
        } else {
            runtime.own_pools.fetch_or(1 << device, SeqCst);
        }
    }
    status
}

unsafe fn alloc_async(
    dptr: *mut u64,
    bytes: usize,
    stream: usize,
    real: impl FnOnce() -> Status,
) -> Status {
    let Some(runtime) = limited() else {
        return real();
    };
    if dptr.is_null() || bytes == 0 || capturing(runtime, stream) {
        return real();
    }
    if !runtime.paging || own_pool(runtime) {
        return pass_charged(runtime, bytes as u64, true, || {
            let status = real();
            // SAFETY: checked against null; written by the driver if it says success.
            unsafe { (status, made(status, dptr)) }
        });
    }
    let owner = lock(&runtime.contexts).context_of_stream(stream);
    let (context, made) = match owner {
        Some(context) => (context, None),
        None => match runtime.current() {
            Ok((context, _)) => (context, None),
            Err(why) => (0, Some(Err(why))),
        },
    };
    let made = made.unwrap_or_else(|| {
        let name = reuse_name(stream);
        if name != 0
            && let Some(ptr) = runtime.reuse(name, context, bytes as u64)
        {
            return Ok(ptr);
        }
        vmm::in_context(context, || runtime.allocate(bytes as u64, true))
    });
    // SAFETY: checked against null.
    unsafe { answer(dptr, made) }
}

pub unsafe fn cuMemAllocAsync(
    real: sig::cuMemAllocAsync,
    dptr: *mut u64,
    bytesize: usize,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        alloc_async(dptr, bytesize, hStream as usize, || {
            real(dptr, bytesize, hStream)
        })
    }
}

/// Stream 0 of a per-thread entry point is the calling thread's own.
fn per_thread(stream: *mut c_void) -> usize {
    if stream.is_null() {
        PER_THREAD
    } else {
        stream as usize
    }
}

pub unsafe fn cuMemAllocAsync_ptsz(
    real: sig::cuMemAllocAsync_ptsz,
    dptr: *mut u64,
    bytesize: usize,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        alloc_async(dptr, bytesize, per_thread(hStream), || {
            real(dptr, bytesize, hStream)
        })
    }
}

unsafe fn alloc_from_pool(
    dptr: *mut u64,
    bytes: usize,
    stream: usize,
    real: impl FnOnce() -> Status,
) -> Status {
    match limited() {
        Some(runtime) if !dptr.is_null() && !capturing(runtime, stream) => {
            pass_charged(runtime, bytes as u64, true, || {
                let status = real();
                // SAFETY: checked against null; written by the driver if it says success.
                unsafe { (status, made(status, dptr)) }
            })
        }
        _ => real(),
    }
}

pub unsafe fn cuMemAllocFromPoolAsync(
    real: sig::cuMemAllocFromPoolAsync,
    dptr: *mut u64,
    bytesize: usize,
    pool: *mut c_void,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        alloc_from_pool(dptr, bytesize, hStream as usize, || {
            real(dptr, bytesize, pool, hStream)
        })
    }
}

pub unsafe fn cuMemAllocFromPoolAsync_ptsz(
    real: sig::cuMemAllocFromPoolAsync_ptsz,
    dptr: *mut u64,
    bytesize: usize,
    pool: *mut c_void,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        alloc_from_pool(dptr, bytesize, per_thread(hStream), || {
            real(dptr, bytesize, pool, hStream)
        })
    }
}

fn free_async(ptr: u64, stream: usize, real: impl FnOnce() -> Status) -> Status {
    let Some(runtime) = limited() else {
        return real();
    };
    let found = lock(&runtime.heap).find(ptr);
    match found {
        None => real(),
        Some(_) if capturing(runtime, stream) => real(),
        Some(alloc) if alloc.place == Place::Driver => {
            let status = real();
            if status.is_success() && lock(&runtime.heap).take(ptr).is_some() {
                runtime.uncharge(alloc.device, alloc.bytes);
            }
            status
        }
        Some(_) => {
            // Somebody else may have freed it meanwhile: the driver refuses the second.
            let Some(alloc) = lock(&runtime.heap).take(ptr) else {
                return real();
            };
            let owner = lock(&runtime.contexts).context_of_stream(stream);
            // A default stream is the current context's, whoever owns the memory.
            let context = owner
                .or_else(|| runtime.current().ok().map(|(context, _)| context))
                .unwrap_or(alloc.context);
            let name = reuse_name(stream);
            match vmm::in_context(context, || runtime.defer(alloc, stream, name, context)) {
                Ok(()) => Status::SUCCESS,
                Err(why) => why,
            }
        }
    }
}

pub unsafe fn cuMemFreeAsync(real: sig::cuMemFreeAsync, dptr: u64, hStream: *mut c_void) -> Status {
    // SAFETY: the application's own call.
    free_async(dptr, hStream as usize, || unsafe { real(dptr, hStream) })
}

pub unsafe fn cuMemFreeAsync_ptsz(
    real: sig::cuMemFreeAsync_ptsz,
    dptr: u64,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    free_async(dptr, per_thread(hStream), || unsafe { real(dptr, hStream) })
}

/// The pool that a stream-ordered allocation of ours pretends to come from.
pub(super) fn pool_of(ordinal: i32) -> *mut c_void {
    let mut pool = core::ptr::null_mut();
    // SAFETY: the driver fills one handle.
    let status = unsafe { call::cuDeviceGetMemPool(&raw mut pool, ordinal) };
    if status.is_success() {
        pool
    } else {
        core::ptr::null_mut()
    }
}
