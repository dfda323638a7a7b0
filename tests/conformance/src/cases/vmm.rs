//! Virtual memory management: what reserve, create, map, access and unmap take and refuse.

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("vmm":
    granularity_is_2_mib,
    create_takes_whole_granules,
    reservations_are_aligned,
    reservations_do_not_overlap,
    address_free_takes_the_whole_reservation,
    map_offset_must_be_zero,
    map_needs_a_reservation,
    map_over_a_mapping_is_refused,
    unmap_takes_whole_mappings,
    unmap_of_what_is_not_reserved_is_refused,
    access_must_be_set_after_a_map,
    access_does_not_survive_a_remap,
    access_spans_many_handles,
    access_over_a_hole_is_refused,
    access_can_be_asked,
    a_range_of_many_handles_is_one_to_kernels,
    one_handle_may_be_mapped_twice,
    release_of_unknown_handles_is_refused,
    creating_more_than_there_is,
);

/// A reservation with handles mapped side by side and accessible.
pub(super) fn mapped(gpu: &Gpu, pieces: &[usize]) -> Result<(Dptr, Vec<MemHandle>), Stop> {
    let (mut address, total) = (0, pieces.iter().sum());
    ok!(cuMemAddressReserve(&mut address, total, 0, 0, 0));
    let (mut handles, mut at) = (Vec::new(), address);
    for piece in pieces {
        let mut handle = 0;
        ok!(cuMemCreate(&mut handle, *piece, &gpu.prop(), 0));
        ok!(cuMemMap(at, *piece, 0, handle, 0));
        handles.push(handle);
        at += *piece as u64;
    }
    ok!(cuMemSetAccess(address, total, &gpu.read_write(), 1));
    Ok((address, handles))
}

/// Both granularities are multiples of 2 MiB, the recommended one not the smaller.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemGetAllocationGranularity; 2 MiB on all GPUs
/// since Pascal.
fn granularity_is_2_mib() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut minimum, mut recommended) = (0, 0);
    ok!(cuMemGetAllocationGranularity(&mut minimum, &gpu.prop(), 0));
    ok!(cuMemGetAllocationGranularity(&mut recommended, &gpu.prop(), 1));
    check!(minimum == 2 * MIB, "minimum {minimum}");
    check!(recommended >= minimum && recommended % minimum == 0, "recommended {recommended}");
    Ok(())
}

/// cuMemCreate takes multiples of the granularity, more than none, of a device that exists.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemCreate.
fn create_takes_whole_granules() -> Outcome {
    let gpu = Gpu::start()?;
    let mut handle = 0;
    for size in [0, 1, 4096, MIB, 2 * MIB + 4096, 3 * MIB] {
        is!(cuMemCreate(&mut handle, size, &gpu.prop(), 0), INVALID_VALUE);
    }
    ok!(cuMemCreate(&mut handle, 2 * MIB, &gpu.prop(), 0));
    fails!(cuMemCreate(&mut handle, 2 * MIB, &gpu.prop(), 1));
    let elsewhere = AllocationProp { location: Location { kind: 1, id: 999 }, ..gpu.prop() };
    fails!(cuMemCreate(&mut handle, 2 * MIB, &elsewhere, 0));
    let kindless = AllocationProp { kind: 0, ..gpu.prop() };
    fails!(cuMemCreate(&mut handle, 2 * MIB, &kindless, 0));
    Ok(())
}

/// cuMemAddressReserve takes no empty range and no flags, and gives addresses aligned as asked.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemAddressReserve.
fn reservations_are_aligned() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut address = 0;
    is!(cuMemAddressReserve(&mut address, 0, 0, 0, 0), INVALID_VALUE);
    observe!("reserving 4096 bytes: {:?}", cuMemAddressReserve(&mut address, 4096, 0, 0, 0));
    observe!("reserving 1000 bytes: {:?}", cuMemAddressReserve(&mut address, 1000, 0, 0, 0));
    fails!(cuMemAddressReserve(&mut address, 2 * MIB, 0, 0, 1));
    for size in [2 * MIB, 6 * MIB, 64 * GIB] {
        ok!(cuMemAddressReserve(&mut address, size, 0, 0, 0));
        check!(address != 0 && address % (2 * MIB as u64) == 0, "{size} bytes at {address:#x}");
        ok!(cuMemAddressFree(address, size));
    }
    ok!(cuMemAddressReserve(&mut address, 4 * MIB, 64 * MIB, 0, 0));
    check!(address % (64 * MIB as u64) == 0, "aligned to 64 MiB: {address:#x}");
    Ok(())
}

/// Reservations are apart from each other and from allocations; a wished address is a hint.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemAddressReserve.
fn reservations_do_not_overlap() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut ranges = Vec::new();
    for i in 0..20_usize {
        let (mut address, size) = (0, (i % 5 + 1) * 2 * MIB);
        ok!(cuMemAddressReserve(&mut address, size, 0, 0, 0));
        ranges.push((address, address + size as u64));
        let allocated = alloc(3 * MIB)?;
        ranges.push((allocated, allocated + 3 * MIB as u64));
    }
    let (mut wished, taken) = (0, ranges[0].0);
    let code = cuMemAddressReserve(&mut wished, 2 * MIB, 0, taken, 0);
    observe!("reserving at a taken address: {code:?}");
    if code.is_ok() {
        ranges.push((wished, wished + 2 * MIB as u64));
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        check!(pair[0].1 <= pair[1].0, "{:x?} and {:x?} overlap", pair[0], pair[1]);
    }
    let (mut address, mut again) = (0, 0);
    ok!(cuMemAddressReserve(&mut address, 2 * MIB, 0, 0, 0));
    ok!(cuMemAddressFree(address, 2 * MIB));
    ok!(cuMemAddressReserve(&mut again, 2 * MIB, 0, address, 0));
    observe!("a free address wished for is given: {}", address == again);
    Ok(())
}

/// cuMemAddressFree takes exactly what was reserved.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemAddressFree.
fn address_free_takes_the_whole_reservation() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut address = 0;
    ok!(cuMemAddressReserve(&mut address, 8 * MIB, 0, 0, 0));
    fails!(cuMemAddressFree(address, 4 * MIB));
    fails!(cuMemAddressFree(address + 2 * MIB as u64, 2 * MIB));
    ok!(cuMemAddressFree(address, 8 * MIB));
    fails!(cuMemAddressFree(address, 8 * MIB));
    Ok(())
}

/// cuMemMap's offset and flags must be 0. An offset is answered by NOT_SUPPORTED (seen with driver 580).
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemMap ("must be zero").
fn map_offset_must_be_zero() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut address, mut handle) = (0, 0);
    ok!(cuMemAddressReserve(&mut address, 4 * MIB, 0, 0, 0));
    ok!(cuMemCreate(&mut handle, 4 * MIB, &gpu.prop(), 0));
    fails!(cuMemMap(address, 2 * MIB, 2 * MIB, handle, 0));
    fails!(cuMemMap(address, 4 * MIB, 4096, handle, 0));
    fails!(cuMemMap(address, 4 * MIB, 0, handle, 1));
    ok!(cuMemMap(address, 4 * MIB, 0, handle, 0));
    Ok(())
}

/// cuMemMap takes addresses inside a reservation only, and no more than the handle holds.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemMap.
fn map_needs_a_reservation() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut address, mut handle) = (0, 0);
    ok!(cuMemAddressReserve(&mut address, 4 * MIB, 0, 0, 0));
    ok!(cuMemCreate(&mut handle, 4 * MIB, &gpu.prop(), 0));
    fails!(cuMemMap(0x6_0000_0000_0000, 4 * MIB, 0, handle, 0));
    fails!(cuMemMap(address + 4096, 2 * MIB, 0, handle, 0));
    let mut wide = 0;
    ok!(cuMemAddressReserve(&mut wide, 8 * MIB, 0, 0, 0));
    fails!(cuMemMap(wide, 8 * MIB, 0, handle, 0));
    let classic = alloc(4 * MIB)?;
    fails!(cuMemMap(classic, 4 * MIB, 0, handle, 0));
    ok!(cuMemMap(address, 4 * MIB, 0, handle, 0));
    Ok(())
}

/// An address is mapped once at a time.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemMap.
fn map_over_a_mapping_is_refused() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, _) = mapped(&gpu, &[4 * MIB])?;
    let mut other = 0;
    ok!(cuMemCreate(&mut other, 2 * MIB, &gpu.prop(), 0));
    fails!(cuMemMap(address, 2 * MIB, 0, other, 0));
    fails!(cuMemMap(address + 2 * MIB as u64, 2 * MIB, 0, other, 0));
    Ok(())
}

/// cuMemUnmap takes whole mappings, never a part of one.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemUnmap ("cannot unmap a sub-range").
fn unmap_takes_whole_mappings() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, _) = mapped(&gpu, &[4 * MIB, 4 * MIB])?;
    let step = 2 * MIB as u64;
    fails!(cuMemUnmap(address, 2 * MIB));
    fails!(cuMemUnmap(address + step, 2 * MIB));
    fails!(cuMemUnmap(address + step, 4 * MIB));
    ok!(cuMemsetD8_v2(address, 1, 8 * MIB));
    ok!(cuCtxSynchronize());
    let code = cuMemUnmap(address, 8 * MIB);
    observe!("unmapping two whole mappings by one call: {code:?}");
    if !code.is_ok() {
        ok!(cuMemUnmap(address, 4 * MIB));
        ok!(cuMemUnmap(address + 2 * step, 4 * MIB));
    }
    ok!(cuMemAddressFree(address, 8 * MIB));
    Ok(())
}

/// cuMemUnmap refuses cuMemAlloc's memory, and what is not reserved. Of a reservation where nothing is mapped it
/// may succeed (seen with driver 580): unmapping twice does no harm.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemUnmap (returned codes).
fn unmap_of_what_is_not_reserved_is_refused() -> Outcome {
    let gpu = Gpu::start()?;
    fails!(cuMemUnmap(0x6_0000_0000_0000, 4 * MIB));
    let classic = alloc(4 * MIB)?;
    fails!(cuMemUnmap(classic, 4 * MIB));
    write(classic, &pattern(4 * MIB, 5))?;
    let mut address = 0;
    ok!(cuMemAddressReserve(&mut address, 4 * MIB, 0, 0, 0));
    observe!("of a reservation: {:?}", cuMemUnmap(address, 4 * MIB));
    let (mapping, handle) = mapped(&gpu, &[2 * MIB])?;
    ok!(cuMemUnmap(mapping, 2 * MIB));
    observe!("twice: {:?}", cuMemUnmap(mapping, 2 * MIB));
    ok!(cuMemMap(mapping, 2 * MIB, 0, handle[0], 0));
    ok!(cuMemUnmap(mapping, 2 * MIB));
    Ok(())
}

/// Mapped memory cannot be touched before access is set.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemMap ("will not be accessible").
fn access_must_be_set_after_a_map() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut address, mut handle) = (0, 0);
    ok!(cuMemAddressReserve(&mut address, 4 * MIB, 0, 0, 0));
    ok!(cuMemCreate(&mut handle, 4 * MIB, &gpu.prop(), 0));
    ok!(cuMemMap(address, 4 * MIB, 0, handle, 0));
    let mut byte = 0_u8;
    fails!(cuMemcpyDtoH_v2(&raw mut byte, address, 1));
    Ok(())
}

/// Mapping anew at the same address asks for access anew.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemSetAccess; PyTorch's expandable segments set
/// it after every map.
fn access_does_not_survive_a_remap() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, handles) = mapped(&gpu, &[4 * MIB])?;
    ok!(cuMemsetD8_v2(address, 1, 4 * MIB));
    // A memset may still run when the call returns, and an unmap does not wait.
    ok!(cuCtxSynchronize());
    ok!(cuMemUnmap(address, 4 * MIB));
    ok!(cuMemMap(address, 4 * MIB, 0, handles[0], 0));
    let mut byte = 0_u8;
    fails!(cuMemcpyDtoH_v2(&raw mut byte, address, 1));
    Ok(())
}

/// One cuMemSetAccess may span many handles, in any sizes, if all are mapped.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemSetAccess.
fn access_spans_many_handles() -> Outcome {
    let gpu = Gpu::start()?;
    let pieces = [2 * MIB, 6 * MIB, 2 * MIB, 16 * MIB, 4 * MIB];
    let (address, _) = mapped(&gpu, &pieces)?;
    let total: usize = pieces.iter().sum();
    let bytes = pattern(total, 11);
    write(address, &bytes)?;
    check!(read(address, total)? == bytes, "contents differ");
    Ok(())
}

/// cuMemSetAccess over a range that is not mapped throughout fails.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemSetAccess ("must be a fully mapped range").
fn access_over_a_hole_is_refused() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut address, mut handle) = (0, 0);
    ok!(cuMemAddressReserve(&mut address, 8 * MIB, 0, 0, 0));
    fails!(cuMemSetAccess(address, 8 * MIB, &gpu.read_write(), 1));
    ok!(cuMemCreate(&mut handle, 4 * MIB, &gpu.prop(), 0));
    ok!(cuMemMap(address, 4 * MIB, 0, handle, 0));
    fails!(cuMemSetAccess(address, 8 * MIB, &gpu.read_write(), 1));
    observe!("access for a part of a mapping: {:?}", cuMemSetAccess(address, 2 * MIB, &gpu.read_write(), 1));
    ok!(cuMemSetAccess(address, 4 * MIB, &gpu.read_write(), 1));
    Ok(())
}

/// cuMemGetAccess tells what was set: 3 is read and write, 0 none.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemGetAccess.
fn access_can_be_asked() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut address, mut handle, mut flags) = (0, 0, 9);
    ok!(cuMemAddressReserve(&mut address, 4 * MIB, 0, 0, 0));
    ok!(cuMemCreate(&mut handle, 4 * MIB, &gpu.prop(), 0));
    ok!(cuMemMap(address, 4 * MIB, 0, handle, 0));
    let code = cuMemGetAccess(&mut flags, &gpu.location(), address);
    observe!("before access was set: {code:?}, flags {flags}");
    check!(!code.is_ok() || flags == 0, "before access was set: {flags}");
    ok!(cuMemSetAccess(address, 4 * MIB, &gpu.read_write(), 1));
    ok!(cuMemGetAccess(&mut flags, &gpu.location(), address));
    check!(flags == 3, "after: {flags}");
    let none = AccessDesc { flags: 0, ..gpu.read_write() };
    observe!("taking access away: {:?}", cuMemSetAccess(address, 4 * MIB, &none, 1));
    Ok(())
}

/// Kernels and copies run across the borders of handles as over one allocation.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management; NVIDIA's blog "Introducing Low-Level GPU Virtual
/// Memory Management" (growing vectors).
fn a_range_of_many_handles_is_one_to_kernels() -> Outcome {
    let gpu = Gpu::start()?;
    let (address, _) = mapped(&gpu, &[2 * MIB; 8])?;
    let kernels = Kernels::load()?;
    ok!(kernels.fill(0, address, 4 * MIB as u64, 0x0a0b_0c0d));
    ok!(cuCtxSynchronize());
    let got = read(address, 16 * MIB)?;
    check!(got.chunks(4).all(|w| w == [0x0d, 0x0c, 0x0b, 0x0a]), "a word differs");
    ok!(cuMemcpyDtoD_v2(address + 3, address + 9 * MIB as u64, 5 * MIB));
    ok!(cuCtxSynchronize());
    Ok(())
}

/// A handle mapped at two addresses is one memory.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management; CUDA C++ Programming Guide, Virtual Aliasing.
fn one_handle_may_be_mapped_twice() -> Outcome {
    let gpu = Gpu::start()?;
    let before = quiet()?;
    let (address, handles) = mapped(&gpu, &[16 * MIB])?;
    let mut alias = 0;
    ok!(cuMemAddressReserve(&mut alias, 16 * MIB, 0, 0, 0));
    ok!(cuMemMap(alias, 16 * MIB, 0, handles[0], 0));
    ok!(cuMemSetAccess(alias, 16 * MIB, &gpu.read_write(), 1));
    let used = before - free_bytes()?;
    check!(used < 24 * MIB, "two mappings of 16 MiB took {used} bytes");
    let bytes = pattern(16 * MIB, 12);
    write(address, &bytes)?;
    check!(read(alias, 16 * MIB)? == bytes, "the alias shows other bytes");
    ok!(cuMemUnmap(address, 16 * MIB));
    check!(read(alias, 16 * MIB)? == bytes, "the alias lost its bytes when the other was unmapped");
    Ok(())
}

/// cuMemRelease refuses handles that it does not know.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemRelease (returned codes).
fn release_of_unknown_handles_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    fails!(cuMemRelease(0));
    Ok(())
}

/// cuMemCreate of more than there is answers OUT_OF_MEMORY, and nothing leaks.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemCreate (returned codes).
fn creating_more_than_there_is() -> Outcome {
    let gpu = Gpu::start()?;
    let (free, total) = (quiet()?, memory_info()?.1);
    let mut handle = 0;
    let size = (total + GIB).next_multiple_of(2 * MIB);
    for _ in 0..10 {
        is!(cuMemCreate(&mut handle, size, &gpu.prop(), 0), OUT_OF_MEMORY);
    }
    check!(free_bytes()? + 8 * MIB >= free, "free was {free}, is {}", free_bytes()?);
    let (address, _) = mapped(&gpu, &[2 * MIB])?;
    ok!(cuMemsetD8_v2(address, 0, 2 * MIB));
    Ok(())
}
