//! Stream-ordered allocation and memory pools.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("pools":
    allocation_and_free_are_in_stream_order,
    another_stream_may_use_it_after_an_event,
    memory_is_charged_and_comes_back,
    figures_of_a_pool_add_up,
    high_watermarks_are_reset_to_zero_only,
    a_threshold_keeps_memory_until_trimmed,
    reserved_falls_when_the_device_has_the_memory,
    pools_of_ones_own,
    the_current_pool_can_be_changed,
    out_of_memory_is_answered_at_once,
    synchronous_free_takes_stream_ordered_memory,
    a_freed_allocation_is_reused_in_its_stream,
    freeing_unknown_memory_is_refused,
    pool_access_is_the_owners,
);

const RELEASE_THRESHOLD: i32 = 4;
const RESERVED: i32 = 5;
const RESERVED_HIGH: i32 = 6;
const USED: i32 = 7;
const USED_HIGH: i32 = 8;

fn start() -> Result<(Gpu, Handle), Stop> {
    let gpu = Gpu::start()?;
    gpu.needs(115, "memory pools")?;
    let stream = stream(NON_BLOCKING)?;
    Ok((gpu, stream))
}

fn default_pool(gpu: &Gpu) -> Result<Handle, Stop> {
    let mut pool = 0;
    ok!(cuDeviceGetDefaultMemPool(&mut pool, gpu.device));
    Ok(pool)
}

fn figure(pool: Handle, attribute: i32) -> Result<u64, Stop> {
    let mut value = u64::MAX;
    ok!(cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()));
    Ok(value)
}

fn set(pool: Handle, attribute: i32, value: u64) -> Code {
    let mut value = value;
    cuMemPoolSetAttribute(pool, attribute, (&raw mut value).cast())
}

fn alloc_async(bytes: usize, stream: Handle) -> Result<Dptr, Stop> {
    let mut address = 0;
    ok!(cuMemAllocAsync(&mut address, bytes, stream));
    Ok(address)
}

/// The memory may be used by work after the allocation in its stream, until the free in its stream.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemAllocAsync.
fn allocation_and_free_are_in_stream_order() -> Outcome {
    let (_gpu, stream) = start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let pinned = Pinned::new(MIB)?;
    for round in 1..=10_u8 {
        ok!(kernels.spin(stream, Duration::from_millis(10)));
        let address = alloc_async(MIB, stream)?;
        ok!(kernels.fill(stream, address, (MIB / 4) as u64, u32::from_le_bytes([round; 4])));
        ok!(cuMemcpyDtoHAsync_v2(pinned.pointer(), address, MIB, stream));
        ok!(cuMemFreeAsync(address, stream));
        let next = alloc_async(MIB, stream)?;
        ok!(cuMemsetD8Async(next, 0xff, MIB, stream));
        ok!(cuMemFreeAsync(next, stream));
        ok!(cuStreamSynchronize(stream));
        check!(pinned.all(round), "round {round}: contents differ");
    }
    Ok(())
}

/// Another stream may use the memory when it is ordered after the allocation by an event.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemAllocAsync.
fn another_stream_may_use_it_after_an_event() -> Outcome {
    let (_gpu, a) = start()?;
    let (b, ready, done) = (stream(NON_BLOCKING)?, event(2)?, event(2)?);
    let kernels = Kernels::load()?;
    kernels.warm()?;
    ok!(kernels.spin(a, Duration::from_millis(50)));
    let address = alloc_async(4 * MIB, a)?;
    ok!(cuEventRecord(ready, a));
    ok!(cuStreamWaitEvent(b, ready, 0));
    ok!(kernels.fill(b, address, MIB as u64, 77));
    ok!(cuEventRecord(done, b));
    ok!(cuStreamWaitEvent(a, done, 0));
    let pinned = Pinned::new(4096)?;
    ok!(cuMemcpyDtoHAsync_v2(pinned.pointer(), address, 4, a));
    ok!(cuMemFreeAsync(address, a));
    ok!(cuStreamSynchronize(a));
    // SAFETY: pinned memory of the driver; the copy into it is complete.
    let value = unsafe { std::ptr::read_volatile(pinned.address as *const u32) };
    check!(value == 77, "got {value}");
    Ok(())
}

/// Stream-ordered memory counts in cuMemGetInfo; freed and synchronised, it comes back by default.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD (0).
fn memory_is_charged_and_comes_back() -> Outcome {
    let (_gpu, stream) = start()?;
    ok!(cuMemFreeAsync(alloc_async(MIB, stream)?, stream));
    ok!(cuStreamSynchronize(stream));
    let before = quiet()?;
    let address = alloc_async(256 * MIB, stream)?;
    ok!(cuStreamSynchronize(stream));
    let during = free_bytes()?;
    check!(during + 250 * MIB <= before, "256 MiB allocated, free fell by {}", before - during);
    ok!(cuMemFreeAsync(address, stream));
    ok!(cuStreamSynchronize(stream));
    let after = wait_free(before - 64 * MIB, Duration::from_secs(2))?;
    check!(after + 64 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// Used is what is allocated, reserved is at least that, high watermarks are at least the present figures.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolGetAttribute.
fn figures_of_a_pool_add_up() -> Outcome {
    let (gpu, stream) = start()?;
    let pool = default_pool(&gpu)?;
    check!(figure(pool, RELEASE_THRESHOLD)? == 0, "threshold {}", figure(pool, RELEASE_THRESHOLD)?);
    check!(figure(pool, USED)? == 0, "used {} at first", figure(pool, USED)?);
    let address = alloc_async(64 * MIB, stream)?;
    ok!(cuStreamSynchronize(stream));
    let (used, reserved) = (figure(pool, USED)?, figure(pool, RESERVED)?);
    check!(used >= 64 * MIB as u64 && reserved >= used, "used {used}, reserved {reserved}");
    check!(figure(pool, USED_HIGH)? >= used && figure(pool, RESERVED_HIGH)? >= reserved, "watermarks are below");
    ok!(cuMemFreeAsync(address, stream));
    ok!(cuStreamSynchronize(stream));
    check!(figure(pool, USED)? == 0, "used {} after the free", figure(pool, USED)?);
    check!(figure(pool, USED_HIGH)? >= used, "the watermark fell");
    let mut flag = 9_i32;
    for attribute in [1, 2, 3] {
        ok!(cuMemPoolGetAttribute(pool, attribute, (&raw mut flag).cast()));
        check!(flag == 1, "reuse attribute {attribute} is {flag}, by default enabled");
    }
    Ok(())
}

/// A watermark can be set to 0 and to nothing else.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolSetAttribute.
fn high_watermarks_are_reset_to_zero_only() -> Outcome {
    let (gpu, stream) = start()?;
    let pool = default_pool(&gpu)?;
    let address = alloc_async(8 * MIB, stream)?;
    ok!(cuMemFreeAsync(address, stream));
    ok!(cuStreamSynchronize(stream));
    for attribute in [USED_HIGH, RESERVED_HIGH] {
        fails!(set(pool, attribute, 4096));
        ok!(set(pool, attribute, 0));
    }
    check!(figure(pool, USED_HIGH)? == 0, "used watermark {}", figure(pool, USED_HIGH)?);
    fails!(set(pool, USED, 0));
    Ok(())
}

/// Below the threshold a pool keeps freed memory over a synchronisation; trimming gives it back.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolTrimTo.
fn a_threshold_keeps_memory_until_trimmed() -> Outcome {
    let (gpu, stream) = start()?;
    let pool = default_pool(&gpu)?;
    ok!(set(pool, RELEASE_THRESHOLD, u64::MAX));
    check!(figure(pool, RELEASE_THRESHOLD)? == u64::MAX, "threshold {}", figure(pool, RELEASE_THRESHOLD)?);
    let before = quiet()?;
    let address = alloc_async(128 * MIB, stream)?;
    ok!(cuMemFreeAsync(address, stream));
    ok!(cuStreamSynchronize(stream));
    check!(figure(pool, RESERVED)? >= 128 * MIB as u64, "reserved {}", figure(pool, RESERVED)?);
    check!(free_bytes()? + 120 * MIB <= before, "the memory is counted as free");
    ok!(cuMemPoolTrimTo(pool, 0));
    check!(figure(pool, RESERVED)? == 0, "reserved {} after trimming", figure(pool, RESERVED)?);
    let after = wait_free(before - 2 * MIB, Duration::from_secs(2))?;
    check!(after + 2 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// What a pool has reserved falls no earlier than the device has the memory back: who reads the figure may give
/// the memory to somebody else at once. Source: an assumption of ours, without which such a reader could
/// have more than is there.
fn reserved_falls_when_the_device_has_the_memory() -> Outcome {
    const PIECE: usize = 4 * MIB;
    const PIECES: usize = 24;
    let (gpu, stream) = start()?;
    let pool = default_pool(&gpu)?;
    let before = quiet()?;
    for round in 0..40 {
        let mut pieces = Vec::new();
        for _ in 0..PIECES {
            pieces.push(alloc_async(PIECE, stream)?);
        }
        for piece in pieces {
            ok!(cuMemFreeAsync(piece, stream));
        }
        std::thread::scope(|scope| {
            let context = gpu.context;
            let giver = scope.spawn(move || {
                ok!(cuCtxSetCurrent(context));
                ok!(cuStreamSynchronize(stream));
                Ok(())
            });
            while !giver.is_finished() {
                let reserved = figure(pool, RESERVED)?;
                let gone = before.saturating_sub(free_bytes()?);
                check!(
                    gone as u64 <= reserved + (PIECE / 2) as u64,
                    "round {round}: {reserved} bytes reserved, and then {gone} are not back"
                );
            }
            giver.join().unwrap_or_else(|_| Err(Stop::Fail("a thread panicked".into())))
        })?;
    }
    Ok(())
}

fn pool_of(gpu: &Gpu) -> Result<Handle, Stop> {
    let props = PoolProps { kind: 1, location: gpu.location(), ..Default::default() };
    let mut pool = 0;
    ok!(cuMemPoolCreate(&mut pool, &props));
    Ok(pool)
}

/// A pool can be made, allocated from, and destroyed with memory still out; that memory stays valid.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolCreate, cuMemPoolDestroy.
fn pools_of_ones_own() -> Outcome {
    let (gpu, stream) = start()?;
    let pool = pool_of(&gpu)?;
    let mut address = 0;
    ok!(cuMemAllocFromPoolAsync(&mut address, 16 * MIB, pool, stream));
    ok!(cuStreamSynchronize(stream));
    check!(figure(pool, USED)? >= 16 * MIB as u64, "used {}", figure(pool, USED)?);
    check!(figure(default_pool(&gpu)?, USED)? == 0, "the default pool was charged");
    ok!(cuMemPoolDestroy(pool));
    ok!(cuMemsetD8Async(address, 3, 16 * MIB, stream));
    ok!(cuStreamSynchronize(stream));
    check!(read(address, 4096)?.iter().all(|b| *b == 3), "contents differ");
    ok!(cuMemFreeAsync(address, stream));
    ok!(cuStreamSynchronize(stream));
    fails!(cuMemPoolDestroy(default_pool(&gpu)?));
    Ok(())
}

/// cuMemAllocAsync takes from the device's current pool, which is the default one until changed.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuDeviceSetMemPool.
fn the_current_pool_can_be_changed() -> Outcome {
    let (gpu, stream) = start()?;
    let (pool, default, mut current) = (pool_of(&gpu)?, default_pool(&gpu)?, 0);
    ok!(cuDeviceGetMemPool(&mut current, gpu.device));
    check!(current == default, "the current pool is not the default one at first");
    ok!(cuDeviceSetMemPool(gpu.device, pool));
    ok!(cuDeviceGetMemPool(&mut current, gpu.device));
    check!(current == pool, "the current pool did not change");
    let address = alloc_async(16 * MIB, stream)?;
    ok!(cuStreamSynchronize(stream));
    check!(figure(pool, USED)? >= 16 * MIB as u64, "the new pool was not used");
    ok!(cuMemFreeAsync(address, stream));
    ok!(cuDeviceSetMemPool(gpu.device, default));
    ok!(cuMemPoolDestroy(pool));
    Ok(())
}

/// More than there is answers OUT_OF_MEMORY from the call itself, and the stream goes on.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemAllocAsync (returned codes).
fn out_of_memory_is_answered_at_once() -> Outcome {
    let (_gpu, stream) = start()?;
    let (free, total) = (quiet()?, memory_info()?.1);
    let mut address = 0;
    for _ in 0..5 {
        is!(cuMemAllocAsync(&mut address, total + GIB, stream), OUT_OF_MEMORY);
    }
    ok!(cuStreamSynchronize(stream));
    check!(free_bytes()? + 8 * MIB >= free, "free was {free}, is {}", free_bytes()?);
    let address = alloc_async(MIB, stream)?;
    ok!(cuMemFreeAsync(address, stream));
    ok!(cuStreamSynchronize(stream));
    let mut zero = 0;
    observe!("cuMemAllocAsync of 0 bytes: {:?}", cuMemAllocAsync(&mut zero, 0, stream));
    Ok(())
}

/// cuMemFree takes memory of cuMemAllocAsync.
/// Source: CUDA C++ Programming Guide, Stream Ordered Memory Allocator (cudaFree of cudaMallocAsync memory).
fn synchronous_free_takes_stream_ordered_memory() -> Outcome {
    let (gpu, stream) = start()?;
    let address = alloc_async(16 * MIB, stream)?;
    ok!(cuStreamSynchronize(stream));
    ok!(cuMemFree_v2(address));
    // Driver 580 goes on counting it as used, and has given it back all the same.
    observe!("counted as used afterwards: {}", figure(default_pool(&gpu)?, USED)?);
    fails!(cuMemFree_v2(address));
    let classic = alloc(4 * MIB)?;
    let code = cuMemFreeAsync(classic, stream);
    observe!("cuMemFreeAsync of cuMemAlloc memory: {code:?}");
    ok!(cuStreamSynchronize(stream));
    Ok(())
}

/// What was freed in a stream serves the next allocation in it, without new memory.
/// Source: CUDA C++ Programming Guide, Stream Ordered Memory Allocator, memory reuse; addresses are reported.
fn a_freed_allocation_is_reused_in_its_stream() -> Outcome {
    let (gpu, stream) = start()?;
    let pool = default_pool(&gpu)?;
    ok!(set(pool, RELEASE_THRESHOLD, u64::MAX));
    let first = alloc_async(64 * MIB, stream)?;
    ok!(cuMemFreeAsync(first, stream));
    let reserved = figure(pool, RESERVED)?;
    let mut same = 0;
    for _ in 0..20 {
        let next = alloc_async(64 * MIB, stream)?;
        same += u32::from(next == first);
        ok!(cuMemFreeAsync(next, stream));
    }
    ok!(cuStreamSynchronize(stream));
    check!(figure(pool, RESERVED)? == reserved, "the pool grew from {reserved} to {}", figure(pool, RESERVED)?);
    observe!("{same} of 20 allocations came at the first one's address");
    Ok(())
}

/// cuMemFreeAsync refuses addresses of no allocation.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemFreeAsync (returned codes).
fn freeing_unknown_memory_is_refused() -> Outcome {
    let (_gpu, stream) = start()?;
    fails!(cuMemFreeAsync(0xdead_beef_0000, stream));
    let address = alloc_async(MIB, stream)?;
    ok!(cuMemFreeAsync(address, stream));
    fails!(cuMemFreeAsync(address, stream));
    Ok(())
}

/// A pool's own device has read and write access.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolGetAccess.
fn pool_access_is_the_owners() -> Outcome {
    let (gpu, _stream) = start()?;
    let mut flags = 0;
    ok!(cuMemPoolGetAccess(&mut flags, default_pool(&gpu)?, &gpu.location()));
    check!(flags == 3, "flags {flags}");
    Ok(())
}
