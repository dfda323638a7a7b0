//! Memory pools made with properties of their own: shared with processes, with a maximum, for other devices.

use super::peer;
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;
use crate::helpers::{Helper, hex, inheritable};

cases!("pool_sharing":
    another_process_uses_a_pools_memory,
    an_imported_pool_has_no_memory_of_its_own,
    export_needs_the_property,
    what_is_not_a_pool_is_not_imported,
    a_maximum_is_kept,
    reserved_is_whole_and_bounds_used,
    pools_are_found_by_location,
    access_is_given_to_a_peer,
    peers_of_contexts_have_no_access,
);

const POSIX_FD: i32 = 1;
const RESERVED: i32 = 5;
const USED: i32 = 7;

fn start() -> Result<Gpu, Stop> {
    let gpu = Gpu::start()?;
    gpu.needs(115, "memory pools")?;
    Ok(gpu)
}

fn shareable(gpu: &Gpu) -> Result<Handle, Stop> {
    if gpu.attribute(119)? & POSIX_FD == 0 {
        skip!("pools of the device cannot be shared by file descriptors");
    }
    let (mut pool, props) = (0, PoolProps { handle_types: POSIX_FD, ..props(gpu) });
    ok!(cuMemPoolCreate(&mut pool, &props));
    Ok(pool)
}

fn props(gpu: &Gpu) -> PoolProps {
    PoolProps { kind: 1, location: gpu.location(), ..PoolProps::default() }
}

fn from_pool(pool: Handle, bytes: usize) -> Result<Dptr, Stop> {
    let mut address = 0;
    ok!(cuMemAllocFromPoolAsync(&mut address, bytes, pool, 0));
    ok!(cuCtxSynchronize());
    Ok(address)
}

fn figure(pool: Handle, attribute: i32) -> Result<u64, Stop> {
    let mut value = u64::MAX;
    ok!(cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()));
    Ok(value)
}

fn exported(pool: Handle) -> Result<i32, Stop> {
    let mut fd = -1_i32;
    ok!(cuMemPoolExportToShareableHandle((&raw mut fd).cast(), pool, POSIX_FD, 0));
    check!(fd >= 0, "descriptor {fd}");
    inheritable(fd)
}

/// A process that imports the pool, and a pointer of it, sees the same memory and takes none for it.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolImportPointer.
fn another_process_uses_a_pools_memory() -> Outcome {
    let gpu = start()?;
    let pool = shareable(&gpu)?;
    let fd = exported(pool)?.to_string();
    for bytes in [64 * MIB, 3 * MIB, 4096] {
        let address = from_pool(pool, bytes)?;
        write(address, &pattern(bytes, 77))?;
        let mut data = PoolPointer([0; 64]);
        ok!(cuMemPoolExportPointer(&mut data, address));
        let helper = Helper::start(&["pool", &fd, &hex(&data.0), &bytes.to_string()])?;
        let seen = read(address, bytes)?;
        check!(seen[..4096].iter().all(|b| *b == 0x3c), "{bytes} bytes: what the other process wrote is not there");
        check!(seen[4096..] == pattern(bytes, 77)[4096..], "{bytes} bytes: others changed");
        drop(helper);
        ok!(cuMemFreeAsync(address, 0));
        ok!(cuCtxSynchronize());
    }
    ok!(cuMemPoolDestroy(pool));
    Ok(())
}

/// Nothing can be allocated from an imported pool.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolImportFromShareableHandle.
fn an_imported_pool_has_no_memory_of_its_own() -> Outcome {
    let gpu = start()?;
    let pool = shareable(&gpu)?;
    let fd = exported(pool)?.to_string();
    drop(Helper::start(&["pool-alloc", &fd])?);
    Ok(())
}

/// Only pools that were made for it have descriptors, and their allocations names.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolExportToShareableHandle.
fn export_needs_the_property() -> Outcome {
    let gpu = start()?;
    let (mut pool, mut own, mut fd) = (0, 0, -1_i32);
    ok!(cuDeviceGetDefaultMemPool(&mut pool, gpu.device));
    fails!(cuMemPoolExportToShareableHandle((&raw mut fd).cast(), pool, POSIX_FD, 0));
    ok!(cuMemPoolCreate(&mut own, &props(&gpu)));
    fails!(cuMemPoolExportToShareableHandle((&raw mut fd).cast(), own, POSIX_FD, 0));
    let mut data = PoolPointer([0; 64]);
    for address in [from_pool(own, MIB)?, alloc(MIB)?] {
        fails!(cuMemPoolExportPointer(&mut data, address));
        ok!(cuMemFree_v2(address));
    }
    ok!(cuMemPoolDestroy(own));
    Ok(())
}

/// A descriptor of something else is refused.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolImportFromShareableHandle (codes).
fn what_is_not_a_pool_is_not_imported() -> Outcome {
    use std::os::fd::AsRawFd;
    let _gpu = start()?;
    let file = std::fs::File::open("/dev/null").map_err(|e| Stop::Fail(e.to_string()))?;
    let mut pool = 0;
    fails!(cuMemPoolImportFromShareableHandle(&mut pool, usize::try_from(file.as_raw_fd()).unwrap_or(0), POSIX_FD, 0));
    fails!(cuMemPoolImportFromShareableHandle(&mut pool, 9999, POSIX_FD, 0));
    Ok(())
}

/// A pool with a maximum is out of memory beyond it, and goes on below it.
/// Source: NVIDIA CUDA Driver API, CUmemPoolProps, maxSize (12.2 and later).
fn a_maximum_is_kept() -> Outcome {
    let gpu = start()?;
    let mut version = 0;
    ok!(cuDriverGetVersion(&mut version));
    if version < 12_020 {
        skip!("the driver knows no maximum");
    }
    let (mut pool, mut address) = (0, 0);
    ok!(cuMemPoolCreate(&mut pool, &PoolProps { max_bytes: 64 * MIB, ..props(&gpu) }));
    is!(cuMemAllocFromPoolAsync(&mut address, 256 * MIB, pool, 0), OUT_OF_MEMORY);
    for _ in 0..3 {
        let kept = from_pool(pool, 32 * MIB)?;
        is!(cuMemAllocFromPoolAsync(&mut address, 48 * MIB, pool, 0), OUT_OF_MEMORY);
        check!(figure(pool, RESERVED)? <= 64 * MIB as u64, "{} bytes are reserved", figure(pool, RESERVED)?);
        ok!(cuMemFreeAsync(kept, 0));
        ok!(cuCtxSynchronize());
        let large = from_pool(pool, 48 * MIB)?;
        ok!(cuMemFreeAsync(large, 0));
        ok!(cuCtxSynchronize());
    }
    ok!(cuMemPoolDestroy(pool));
    Ok(())
}

/// What a pool has reserved is never less than what is used of it, small allocations included.
/// Source: NVIDIA CUDA Driver API, CUmemPool_attribute (reserved: backing memory currently allocated).
fn reserved_is_whole_and_bounds_used() -> Outcome {
    let gpu = start()?;
    let mut pool = 0;
    ok!(cuMemPoolCreate(&mut pool, &props(&gpu)));
    let mut all = Vec::new();
    for bytes in [1, 4096, 700_000, 700_000, 3 * MIB] {
        all.push(from_pool(pool, bytes)?);
        let (reserved, used) = (figure(pool, RESERVED)?, figure(pool, USED)?);
        check!(used <= reserved, "{used} bytes of {reserved} are used");
        check!(reserved % (2 * MIB as u64) == 0, "{reserved} bytes are reserved");
    }
    for address in all {
        ok!(cuMemFreeAsync(address, 0));
    }
    ok!(cuCtxSynchronize());
    ok!(cuMemPoolTrimTo(pool, 0));
    check!(figure(pool, RESERVED)? == 0, "{} bytes are reserved by a pool without allocations", figure(pool, RESERVED)?);
    ok!(cuMemPoolDestroy(pool));
    Ok(())
}

/// Drivers from 13.0 on also find a device's pools by its location.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemGetMemPool, cuMemSetMemPool.
fn pools_are_found_by_location() -> Outcome {
    let gpu = start()?;
    if crate::api::exported("cuMemGetMemPool") == 0 {
        skip!("the driver has no cuMemGetMemPool");
    }
    let (mut version, mut default, mut current, mut own, mut got) = (0, 0, 0, 0, 0);
    ok!(cuDriverGetVersion(&mut version));
    if version < 13_000 {
        skip!("the driver has no cuMemGetMemPool");
    }
    ok!(cuMemGetDefaultMemPool(&mut default, &gpu.location(), 1));
    ok!(cuDeviceGetDefaultMemPool(&mut got, gpu.device));
    check!(got == default, "the default pools differ");
    ok!(cuMemPoolCreate(&mut own, &props(&gpu)));
    ok!(cuMemSetMemPool(&gpu.location(), 1, own));
    ok!(cuMemGetMemPool(&mut current, &gpu.location(), 1));
    ok!(cuDeviceGetMemPool(&mut got, gpu.device));
    check!(current == own && got == own, "the pool that was set is not current");
    ok!(cuMemSetMemPool(&gpu.location(), 1, default));
    ok!(cuMemPoolDestroy(own));
    fails!(cuMemGetMemPool(&mut got, &Location { kind: 1, id: 99 }, 1));
    Ok(())
}

/// A pool's memory is used by a peer's kernels once that has access.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemPoolSetAccess.
fn access_is_given_to_a_peer() -> Outcome {
    let (here, there) = peer::reaching()?;
    let gpu = start()?;
    let (mut pool, mut flags) = (0, 9);
    ok!(cuMemPoolCreate(&mut pool, &props(&gpu)));
    let early = from_pool(pool, 4 * MIB)?;
    let location = Location { kind: 1, id: 1 };
    ok!(cuMemPoolGetAccess(&mut flags, pool, &location));
    check!(flags == 0, "access {flags} from the start");
    let access = AccessDesc { location, flags: 3 };
    ok!(cuMemPoolSetAccess(pool, &access, 1));
    ok!(cuMemPoolGetAccess(&mut flags, pool, &location));
    check!(flags == 3, "access {flags} after it was set");
    let late = from_pool(pool, 4 * MIB)?;
    ok!(cuCtxSetCurrent(there));
    let kernels = Kernels::load()?;
    for (address, value) in [(early, 0x1717_1717), (late, 0x1818_1818)] {
        ok!(kernels.fill(0, address, MIB as u64, value));
        ok!(cuCtxSynchronize());
        check!(read_u32(address)? == value, "the peer's words are not there");
    }
    ok!(cuCtxSetCurrent(here));
    let own = AccessDesc { location: gpu.location(), flags: 0 };
    fails!(cuMemPoolSetAccess(pool, &own, 1));
    Ok(())
}

/// cuCtxEnablePeerAccess says nothing about memory of pools.
/// Source: CUDA C++ Programming Guide, Stream Ordered Memory Allocator, device accessibility.
fn peers_of_contexts_have_no_access() -> Outcome {
    let (here, there) = peer::reaching()?;
    let gpu = start()?;
    let mut pool = 0;
    ok!(cuMemPoolCreate(&mut pool, &props(&gpu)));
    ok!(cuCtxSetCurrent(there));
    ok!(cuCtxEnablePeerAccess(here, 0));
    let kernels = Kernels::load()?;
    kernels.warm()?;
    ok!(cuCtxSetCurrent(here));
    let address = from_pool(pool, 4 * MIB)?;
    ok!(cuCtxSetCurrent(there));
    ok!(kernels.fill(0, address, 16, 1));
    is!(cuCtxSynchronize(), ILLEGAL_ADDRESS);
    Ok(())
}
