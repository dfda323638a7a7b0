//! Stream-ordered allocations and frees.

use core::ffi::c_void;
use std::time::Duration;

use crate::driver::Status;
use crate::graphs;
use crate::handles::Kind;
use crate::heap::{Alloc, Place, SMALL, small_size};
use crate::lock;
use crate::runtime::Runtime;
use crate::stores::{Growth, Unmade, pool_reserved};
use crate::table::sig;
use crate::vmm;
use spillway_protocol::granules_up;

use super::limited;
use super::memory::{answer, made};

/// `CU_STREAM_PER_THREAD`
const PER_THREAD: usize = 2;
/// How often a refusal is looked at again while other threads are in allocations of the same pool.
const IN_FLIGHT: u32 = 20;

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

/// The context whose work a stream carries: its own, or for a default stream the current one.
fn context_of(runtime: &Runtime, stream: usize) -> Result<usize, Status> {
    let owner = lock(&runtime.contexts).context_of_stream(stream);
    owner.map_or_else(|| runtime.current().map(|(context, _)| context), Ok)
}

/// From a pool whose memory is ours.
fn from_own(runtime: &Runtime, pool: u64, bytes: u64, stream: usize) -> Result<u64, Status> {
    let context = context_of(runtime, stream)?;
    let rounded = if bytes < SMALL {
        small_size(bytes)
    } else {
        granules_up(bytes)
    };
    let name = reuse_name(stream);
    if name != 0
        && let Some(ptr) = runtime.reuse(name, context, pool, bytes)
    {
        return Ok(ptr);
    }
    runtime.reap_deferred();
    let kept = lock(&runtime.pools).take_kept(pool, context, rounded);
    if let Some(alloc) = kept {
        return Ok(lock(&runtime.heap).revive(alloc, bytes));
    }
    if !lock(&runtime.pools).fits(pool, rounded) {
        return Err(Status::OUT_OF_MEMORY);
    }
    let made = vmm::in_context(context, || {
        let device = runtime.device_of_pool(pool);
        let (context, current) = runtime.current()?;
        match device.filter(|&device| device != current) {
            // Another device's pool: no slab of this context's device will do.
            Some(device) => runtime.allocate_on(context, device, bytes, pool, false),
            None => runtime.allocate(bytes, pool),
        }
    })?;
    lock(&runtime.pools).took(pool, rounded);
    Ok(made)
}

/// From a pool whose memory is the driver's: charged by what the pool reserves.
unsafe fn from_drivers(
    runtime: &Runtime,
    pool: u64,
    (ptr, bytes): (*mut u64, u64),
    stream: usize,
    real: impl FnMut() -> Status,
) -> Status {
    let Some((device, meter)) = lock(&runtime.pools).meter(pool) else {
        return Status::INVALID_VALUE;
    };
    // Without a context the driver refuses for a reason of its own.
    let context = context_of(runtime, stream).unwrap_or(0);
    let mut real = real;
    // All of it, though the pool may have room: whether the room serves this request only the driver knows.
    // Where that does not fit, the room is given back first, and then it does.
    let most = granules_up(bytes);
    let mut patience = IN_FLIGHT;
    let (status, undo) = loop {
        let growth = Growth {
            meter: &meter,
            device,
            most,
            claim: 0,
            reserved: Box::new(move || pool_reserved(pool)),
        };
        match runtime.metered(&[growth], &mut real) {
            Ok(()) => break (Status::SUCCESS, false),
            Err(Unmade::Failed(why)) => break (why, false),
            Err(Unmade::Over) => break (Status::OUT_OF_MEMORY, true),
            // Other threads may have reserved more than they are about to take.
            Err(Unmade::Refused) if patience > 0 && lock(&meter).in_flight() => {
                patience -= 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(Unmade::Refused) => break (Status::OUT_OF_MEMORY, false),
        }
    };
    if undo {
        // SAFETY: checked against null by the caller, written by the driver; nobody else knows it yet.
        unsafe {
            let _ = crate::driver::call::cuMemFreeAsync(*ptr, stream as *mut c_void);
        }
        runtime
            .pool_frees
            .store(true, std::sync::atomic::Ordering::SeqCst);
        runtime.trim_stores(device);
    } else if status.is_success() {
        // SAFETY: as above.
        let ptr = unsafe { made(status, ptr) };
        lock(&runtime.heap).add_driver((ptr, bytes), device, context, pool, Place::Pool);
    }
    status
}

/// A stream-ordered allocation; `pool`: `None` for the device's current one.
unsafe fn allocate(
    dptr: *mut u64,
    bytes: usize,
    pool: Option<*mut c_void>,
    stream: usize,
    mut real: impl FnMut() -> Status,
) -> Status {
    let Some(runtime) = limited() else {
        return real();
    };
    if dptr.is_null() || bytes == 0 {
        return real();
    }
    if capturing(runtime, stream) {
        graphs::node_made();
        return real();
    }
    let pool = match pool {
        Some(pool) => runtime.known_pool(pool as u64),
        None => match context_of(runtime, stream) {
            Ok(context) => runtime.current_pool(context),
            Err(_) => return real(),
        },
    };
    // A pool of host memory, or one that the driver will refuse.
    let Some((pool, own)) = pool else {
        return real();
    };
    if own {
        // SAFETY: checked against null.
        return unsafe { answer(dptr, from_own(runtime, pool, bytes as u64, stream)) };
    }
    // SAFETY: checked against null.
    unsafe { from_drivers(runtime, pool, (dptr, bytes as u64), stream, real) }
}

pub unsafe fn cuMemAllocAsync(
    real: sig::cuMemAllocAsync,
    dptr: *mut u64,
    bytesize: usize,
    hStream: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    unsafe {
        allocate(dptr, bytesize, None, hStream as usize, || {
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
        allocate(dptr, bytesize, None, per_thread(hStream), || {
            real(dptr, bytesize, hStream)
        })
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
        allocate(dptr, bytesize, Some(pool), hStream as usize, || {
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
        allocate(dptr, bytesize, Some(pool), per_thread(hStream), || {
            real(dptr, bytesize, pool, hStream)
        })
    }
}

/// Managed memory, an import that others are charged for, or what is on no record at all. Whether it can be freed so
/// is the driver's to say; what is charged stays so until it is gone.
fn free_other(runtime: &Runtime, ptr: u64, stream: usize, real: impl FnOnce() -> Status) -> Status {
    let known = lock(&runtime.handles).take_address(ptr);
    let on_host = lock(&runtime.managed).take(ptr);
    let status = real();
    if !status.is_success() {
        if let Some((other, context)) = known {
            lock(&runtime.handles).add_other(ptr, other, context);
        }
        if let Some(on_host) = on_host {
            lock(&runtime.managed).put_back(ptr, on_host);
        }
        return status;
    }
    let Some((other, owner)) = known else {
        return status;
    };
    if other.kind != Kind::Managed {
        runtime.other_gone(other);
        return status;
    }
    let (device, bytes) = other.charge;
    let alloc = Alloc {
        ptr,
        bytes,
        id: 0,
        place: Place::Managed,
        context: owner,
        device,
        pool: 0,
    };
    let context = context_of(runtime, stream).unwrap_or(owner);
    let marked = vmm::in_context(context, || {
        runtime.defer_charge(alloc, stream, context);
        Ok(())
    });
    if marked.is_err() {
        runtime.finish(&alloc);
    }
    status
}

fn free_async(ptr: u64, stream: usize, real: impl FnOnce() -> Status) -> Status {
    let Some(runtime) = limited() else {
        return real();
    };
    let found = lock(&runtime.heap).find(ptr);
    match found {
        _ if capturing(runtime, stream) => real(),
        None => free_other(runtime, ptr, stream, real),
        Some(_) => {
            // Somebody else may have freed it meanwhile: the driver refuses the second. Off the record
            // before it is freed, since the address may come again at once.
            let Some(alloc) = lock(&runtime.heap).take(ptr) else {
                return real();
            };
            if alloc.place.is_drivers() {
                let _changing = runtime.changing();
                let held = runtime.unhold(ptr);
                let status = real();
                if status.is_success() {
                    let context = context_of(runtime, stream).unwrap_or(alloc.context);
                    runtime.drivers_leaving(alloc, stream, context);
                } else {
                    runtime.hold_again(ptr, held);
                    lock(&runtime.heap).put_back(alloc);
                }
                return status;
            }
            // A default stream is the current context's, whoever owns the memory.
            let context = context_of(runtime, stream).unwrap_or(alloc.context);
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
