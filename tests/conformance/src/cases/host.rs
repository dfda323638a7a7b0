//! Page-locked host memory: allocation, registration, and what copies do with it.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("host":
    allocation_is_reachable_from_the_device,
    flags_are_remembered,
    registering_twice_is_refused,
    unregistering_what_is_not_registered_is_refused,
    registered_memory_is_reachable_from_the_device,
    registering_nothing_is_refused,
    pinned_sources_are_read_when_the_copy_runs,
    pageable_sources_may_change_after_the_call,
    copies_to_pageable_memory_are_complete_on_return,
    asynchronous_copies_from_pinned_memory_return_at_once,
    borders_between_registered_regions,
    registration_seen_from_another_context,
);

/// Memory of cuMemHostAlloc is used by kernels at the same address.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, Automatic Mapping of Host Allocated Host Memory.
fn allocation_is_reachable_from_the_device() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let pinned = Pinned::new(MIB)?;
    pinned.fill(0);
    let mut device = 0;
    ok!(cuMemHostGetDevicePointer_v2(&mut device, pinned.address, 0));
    check!(device == pinned.address as u64, "device pointer {device:#x}, host {:#x}", pinned.address);
    ok!(kernels.fill(0, device, (MIB / 4) as u64, 0x5151_5151));
    ok!(cuCtxSynchronize());
    check!(pinned.all(0x51), "the kernel's words are not there");
    ok!(cuMemFreeHost(pinned.address));
    Ok(())
}

/// cuMemHostGetFlags reports how memory was allocated; unknown flags are refused.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemHostGetFlags, cuMemHostAlloc.
fn flags_are_remembered() -> Outcome {
    let _gpu = Gpu::start()?;
    for flags in [1, 2, 3, 4, 7] {
        let (mut address, mut got) = (0, 0);
        ok!(cuMemHostAlloc(&mut address, 64 * KIB, flags));
        ok!(cuMemHostGetFlags(&mut got, address));
        check!(got & flags == flags, "allocated with {flags}, reported {got}");
        ok!(cuMemFreeHost(address));
    }
    let mut address = 0;
    is!(cuMemHostAlloc(&mut address, 4096, 0x80), INVALID_VALUE);
    observe!("cuMemHostAlloc of 0 bytes: {:?}", cuMemHostAlloc(&mut address, 0, 0));
    Ok(())
}

/// Memory can be registered once at a time.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemHostRegister (HOST_MEMORY_ALREADY_REGISTERED).
fn registering_twice_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let pages = Pages::new(4 * MIB)?;
    pages.fill(1);
    ok!(cuMemHostRegister_v2(pages.address, pages.bytes, 0));
    is!(cuMemHostRegister_v2(pages.address, pages.bytes, 0), HOST_MEMORY_ALREADY_REGISTERED);
    ok!(cuMemHostUnregister(pages.address));
    ok!(cuMemHostRegister_v2(pages.address, pages.bytes, 0));
    ok!(cuMemHostUnregister(pages.address));
    Ok(())
}

/// Unregistering needs a registration, and its start.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemHostUnregister.
fn unregistering_what_is_not_registered_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let pages = Pages::new(4 * MIB)?;
    let refused = |code: Code| code == Code::HOST_MEMORY_NOT_REGISTERED || code == Code::INVALID_VALUE;
    let code = cuMemHostUnregister(pages.address);
    check!(refused(code), "never registered: {code:?}");
    observe!("unregistering plain memory: {code:?}");
    ok!(cuMemHostRegister_v2(pages.address, pages.bytes, 0));
    ok!(cuMemHostUnregister(pages.address));
    let code = cuMemHostUnregister(pages.address);
    check!(refused(code), "a second time: {code:?}");
    Ok(())
}

/// Registered memory is used by kernels through its device pointer.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemHostRegister (DEVICEMAP).
fn registered_memory_is_reachable_from_the_device() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let pages = Pages::new(2 * MIB)?;
    pages.fill(0);
    ok!(cuMemHostRegister_v2(pages.address, pages.bytes, 3));
    let mut device = 0;
    ok!(cuMemHostGetDevicePointer_v2(&mut device, pages.address, 0));
    ok!(kernels.fill(0, device, (pages.bytes / 4) as u64, 0x6262_6262));
    ok!(cuCtxSynchronize());
    check!(pages.all(0x62), "the kernel's words are not there");
    ok!(cuMemHostUnregister(pages.address));
    Ok(())
}

/// Null and empty ranges cannot be registered.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemHostRegister (returned codes).
fn registering_nothing_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    is!(cuMemHostRegister_v2(0, 4096, 0), INVALID_VALUE);
    let pages = Pages::new(4096)?;
    is!(cuMemHostRegister_v2(pages.address, 0, 0), INVALID_VALUE);
    is!(cuMemHostRegister_v2(pages.address, 4096, 0x100), INVALID_VALUE);
    Ok(())
}

const WAIT: Duration = Duration::from_millis(200);

/// An asynchronous copy reads a page-locked source when it runs, not when it is called.
/// Source: CUDA Runtime API, API synchronization behavior (asynchronous memcpy, pinned memory).
fn pinned_sources_are_read_when_the_copy_runs() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let (pinned, device) = (Pinned::new(8 * MIB)?, alloc(8 * MIB)?);
    pinned.fill(1);
    ok!(kernels.spin(stream, WAIT));
    ok!(cuMemcpyHtoDAsync_v2(device, pinned.pointer(), 8 * MIB, stream));
    is!(cuStreamQuery(stream), NOT_READY);
    pinned.fill(2);
    ok!(cuStreamSynchronize(stream));
    check!(read(device, 8 * MIB)?.iter().all(|b| *b == 2), "the source was read before the copy's turn");
    Ok(())
}

/// When a copy from pageable memory returns, its source may be changed.
/// Source: CUDA Runtime API, API synchronization behavior (pageable memory is staged first).
fn pageable_sources_may_change_after_the_call() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    for size in [4 * KIB, 64 * KIB, 8 * MIB] {
        let (pages, device) = (Pages::new(size)?, alloc(size)?);
        pages.fill(1);
        ok!(kernels.spin(stream, WAIT / 2));
        ok!(cuMemcpyHtoDAsync_v2(device, pages.address as *const u8, size, stream));
        pages.fill(2);
        ok!(cuStreamSynchronize(stream));
        check!(read(device, size)?.iter().all(|b| *b == 1), "{size} bytes: the copy took what was written later");
    }
    Ok(())
}

/// A copy to pageable memory returns when it is complete, and it waits for its turn in the stream.
/// Source: CUDA Runtime API, API synchronization behavior (device to pageable host memory).
fn copies_to_pageable_memory_are_complete_on_return() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let (pages, device) = (Pages::new(8 * MIB)?, alloc(8 * MIB)?);
    ok!(cuMemsetD8_v2(device, 1, 8 * MIB));
    ok!(cuCtxSynchronize());
    ok!(kernels.spin(stream, WAIT / 2));
    ok!(kernels.fill(stream, device, 2 * MIB as u64, 0x0707_0707));
    ok!(cuMemcpyDtoHAsync_v2(pages.address as *mut u8, device, 8 * MIB, stream));
    check!(pages.all(7), "the copy is not complete on return");
    Ok(())
}

/// A copy from page-locked memory is only enqueued by the call.
/// Source: CUDA C++ Programming Guide, Asynchronous Concurrent Execution.
fn asynchronous_copies_from_pinned_memory_return_at_once() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let (pinned, device) = (Pinned::new(8 * MIB)?, alloc(8 * MIB)?);
    pinned.fill(3);
    ok!(kernels.spin(stream, WAIT));
    let (code, time) = timed(|| cuMemcpyHtoDAsync_v2(device, pinned.pointer(), 8 * MIB, stream));
    ok!(code);
    check!(time < WAIT / 2, "the call took {time:?} beside {WAIT:?} of work");
    let (code, time) = timed(|| cuMemcpyDtoHAsync_v2(pinned.pointer(), device, 8 * MIB, stream));
    ok!(code);
    check!(time < WAIT / 2, "the call took {time:?} beside {WAIT:?} of work");
    is!(cuStreamQuery(stream), NOT_READY);
    ok!(cuStreamSynchronize(stream));
    check!(pinned.all(3), "contents differ");
    Ok(())
}

/// A copy across the border of two registered regions is refused, or right.
/// Source: reports (a copy may not cross the border between separately registered regions).
fn borders_between_registered_regions() -> Outcome {
    let _gpu = Gpu::start()?;
    let (pages, device) = (Pages::new(8 * MIB)?, alloc(8 * MIB)?);
    pages.fill(4);
    ok!(cuMemHostRegister_v2(pages.address, 4 * MIB, 1));
    ok!(cuMemHostRegister_v2(pages.address + 4 * MIB, 4 * MIB, 1));
    ok!(cuMemsetD8_v2(device, 0, 8 * MIB));
    let code = cuMemcpyHtoDAsync_v2(device, pages.address as *const u8, 8 * MIB, 0);
    observe!("a copy across the border: {code:?}");
    if code.is_ok() {
        ok!(cuCtxSynchronize());
        check!(read(device, 8 * MIB)?.iter().all(|b| *b == 4), "it succeeded with wrong bytes");
    } else {
        is!(code, INVALID_VALUE);
    }
    ok!(cuMemcpyHtoDAsync_v2(device, pages.address as *const u8, 4 * MIB, 0));
    ok!(cuMemcpyHtoDAsync_v2(device + 4 * MIB as u64, (pages.address + 4 * MIB) as *const u8, 4 * MIB, 0));
    ok!(cuCtxSynchronize());
    check!(read(device, 8 * MIB)?.iter().all(|b| *b == 4), "one copy per region: wrong bytes");
    Ok(())
}

/// Whether a registration counts as page-locked in another context, with and without PORTABLE.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemHostRegister; the time is reported, not judged.
fn registration_seen_from_another_context() -> Outcome {
    let gpu = Gpu::start()?;
    for flags in [0, 1] {
        let pages = Pages::new(8 * MIB)?;
        pages.fill(5);
        ok!(cuMemHostRegister_v2(pages.address, pages.bytes, flags));
        let mut context = 0;
        ok!(cuCtxCreate_v2(&mut context, 0, gpu.device));
        let kernels = Kernels::load()?;
        kernels.warm()?;
        let (stream, device) = (stream(NON_BLOCKING)?, alloc(8 * MIB)?);
        ok!(kernels.spin(stream, WAIT));
        let (code, time) = timed(|| cuMemcpyHtoDAsync_v2(device, pages.address as *const u8, 8 * MIB, stream));
        observe!("flags {flags}: from another context {code:?} after {time:?} beside {WAIT:?} of work");
        ok!(cuCtxSynchronize());
        if code.is_ok() {
            check!(read(device, 8 * MIB)?.iter().all(|b| *b == 5), "flags {flags}: wrong bytes");
        }
        ok!(cuCtxDestroy_v2(context));
        ok!(cuCtxSetCurrent(gpu.context));
        ok!(cuMemHostUnregister(pages.address));
    }
    Ok(())
}
