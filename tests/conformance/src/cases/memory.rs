//! cuMemAlloc and its relatives: sizes, figures, refusals, ranges.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("memory":
    free_figure_follows_allocations,
    alloc_of_zero_bytes_is_refused,
    alloc_needs_a_place_for_the_answer,
    addresses_are_aligned_and_apart,
    free_of_unknown_addresses_is_refused,
    double_free_is_refused,
    free_inside_an_allocation_is_refused,
    host_and_device_frees_do_not_mix,
    out_of_memory_is_its_own_code_and_leaks_nothing,
    device_fills_to_the_brim_and_comes_back,
    pitch_covers_the_width,
    pitch_takes_elements_of_4_8_16,
    range_names_the_whole_allocation,
    range_answers_are_optional,
    range_of_unknown_address_is_refused,
    free_waits_for_the_device,
    managed_memory_is_seen_by_both,
    contents_stay_until_overwritten,
);

/// cuMemGetInfo's free figure falls by an allocation and rises by its free.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemGetInfo.
fn free_figure_follows_allocations() -> Outcome {
    let _gpu = Gpu::start()?;
    let size = 256 * MIB;
    // What the context allocates lazily is there before the measurement.
    ok!(cuMemFree_v2(alloc(MIB)?));
    let before = quiet()?;
    let address = alloc(size)?;
    let during = free_bytes()?;
    ok!(cuMemFree_v2(address));
    let after = wait_free(before, Duration::from_secs(2))?;
    check!((size..=size + 4 * MIB).contains(&(before - during)), "{} bytes allocated, free fell by {}", size, before - during);
    check!(after == before, "free was {before}, is {after}");
    Ok(())
}

/// cuMemAlloc of 0 bytes is INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemAlloc.
fn alloc_of_zero_bytes_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut address = 0;
    is!(cuMemAlloc_v2(Some(&mut address), 0), INVALID_VALUE);
    Ok(())
}

/// A null place for the address is INVALID_VALUE, and nothing is allocated.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemAlloc (returned codes).
fn alloc_needs_a_place_for_the_answer() -> Outcome {
    let _gpu = Gpu::start()?;
    let before = quiet()?;
    is!(cuMemAlloc_v2(None, 64 * MIB), INVALID_VALUE);
    check!(free_bytes()? == before, "memory is gone");
    Ok(())
}

/// Addresses are aligned to 256 bytes at least, and allocations do not overlap.
/// Source: CUDA C++ Programming Guide, Device Memory Accesses (256-byte alignment).
fn addresses_are_aligned_and_apart() -> Outcome {
    let _gpu = Gpu::start()?;
    let sizes = [1, 3, 100, 256, 257, 4096, 5000, MIB - 1, MIB, 2 * MIB + 1, 3 * MIB];
    let mut ranges = Vec::new();
    for size in sizes.into_iter().cycle().take(44) {
        let address = alloc(size)?;
        check!(address % 256 == 0, "{size} bytes at {address:#x}");
        ranges.push((address, address + size as u64));
    }
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        check!(pair[0].1 <= pair[1].0, "{:x?} and {:x?} overlap", pair[0], pair[1]);
    }
    for (address, _) in ranges {
        ok!(cuMemFree_v2(address));
    }
    Ok(())
}

/// cuMemFree of an address that was never allocated is INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree (returned codes).
fn free_of_unknown_addresses_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    is!(cuMemFree_v2(0x1000), INVALID_VALUE);
    is!(cuMemFree_v2(0xdead_beef_0000), INVALID_VALUE);
    observe!("cuMemFree(0): {:?}", cuMemFree_v2(0));
    Ok(())
}

/// Freeing twice is INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree.
fn double_free_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    ok!(cuMemFree_v2(address));
    is!(cuMemFree_v2(address), INVALID_VALUE);
    let small = alloc(1000)?;
    ok!(cuMemFree_v2(small));
    is!(cuMemFree_v2(small), INVALID_VALUE);
    Ok(())
}

/// Only the address that the allocation returned frees it.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree ("must have been returned by").
fn free_inside_an_allocation_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    fails!(cuMemFree_v2(address + 256));
    fails!(cuMemFree_v2(address + 2 * MIB as u64));
    ok!(cuMemsetD8_v2(address, 1, 4 * MIB));
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// cuMemFree refuses host memory, cuMemFreeHost refuses device memory and plain memory.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemFree, cuMemFreeHost.
fn host_and_device_frees_do_not_mix() -> Outcome {
    let _gpu = Gpu::start()?;
    let device = alloc(MIB)?;
    let pages = Pages::new(MIB)?;
    fails!(cuMemFreeHost(usize::try_from(device).unwrap_or(0)));
    fails!(cuMemFreeHost(pages.address));
    fails!(cuMemFree_v2(pages.address as u64));
    ok!(cuMemsetD8_v2(device, 1, MIB));
    Ok(())
}

/// More than there is answers OUT_OF_MEMORY at once, takes nothing, and the context goes on.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemAlloc (returned codes).
fn out_of_memory_is_its_own_code_and_leaks_nothing() -> Outcome {
    let _gpu = Gpu::start()?;
    ok!(cuMemFree_v2(alloc(MIB)?));
    let (free, total) = (quiet()?, memory_info()?.1);
    for _ in 0..20 {
        let mut address = 0;
        is!(cuMemAlloc_v2(Some(&mut address), total + GIB), OUT_OF_MEMORY);
        is!(cuMemAlloc_v2(Some(&mut address), free + 64 * MIB), OUT_OF_MEMORY);
    }
    check!(free_bytes()? + 8 * MIB >= free, "free was {free}, is {}", free_bytes()?);
    let address = alloc(MIB)?;
    ok!(cuMemsetD8_v2(address, 3, MIB));
    Ok(())
}

/// The device can be filled to within a little of its free figure, then everything comes back.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemGetInfo ("an estimate", yet a close one).
fn device_fills_to_the_brim_and_comes_back() -> Outcome {
    let _gpu = Gpu::start()?;
    ok!(cuMemFree_v2(alloc(MIB)?));
    let before = quiet()?;
    let step = (before / 64).next_multiple_of(2 * MIB);
    let mut held = Vec::new();
    loop {
        let mut address = 0;
        match cuMemAlloc_v2(Some(&mut address), step) {
            Code::SUCCESS => held.push(address),
            Code::OUT_OF_MEMORY => break,
            code => check!(false, "allocation {} gave {code:?}", held.len()),
        }
        check!(held.len() <= 64, "more was handed out than was free");
    }
    check!(held.len() >= 60, "only {} of 64 pieces fit", held.len());
    check!(free_bytes()? < 2 * step, "{} free after out of memory for {step}", free_bytes()?);
    for address in held {
        ok!(cuMemFree_v2(address));
    }
    let after = wait_free(before, Duration::from_secs(3))?;
    check!(after == before, "free was {before}, is {after}");
    rest_after_a_release();
    Ok(())
}

/// A pitch is at least the width and a multiple of the texture pitch alignment; all rows are there.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemAllocPitch.
fn pitch_covers_the_width() -> Outcome {
    let gpu = Gpu::start()?;
    let alignment = usize::try_from(gpu.attribute(51)?).unwrap_or(0);
    check!(alignment > 0, "TEXTURE_PITCH_ALIGNMENT is {alignment}");
    for (width, height) in [(1, 1), (100, 50), (1000, 3), (4096, 64), (70_001, 31)] {
        let (mut address, mut pitch) = (0, 0);
        ok!(cuMemAllocPitch_v2(&mut address, &mut pitch, width, height, 4));
        check!(pitch >= width && pitch % alignment == 0, "width {width}: pitch {pitch}, alignment {alignment}");
        ok!(cuMemsetD8_v2(address, 0x77, pitch * height));
        ok!(cuMemFree_v2(address));
    }
    Ok(())
}

/// cuMemAllocPitch takes element sizes 4, 8 and 16 only, and no empty area.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemAllocPitch.
fn pitch_takes_elements_of_4_8_16() -> Outcome {
    let _gpu = Gpu::start()?;
    let (mut address, mut pitch) = (0, 0);
    for element in [4, 8, 16] {
        ok!(cuMemAllocPitch_v2(&mut address, &mut pitch, 512, 4, element));
    }
    for element in [0, 1, 3, 32] {
        is!(cuMemAllocPitch_v2(&mut address, &mut pitch, 512, 4, element), INVALID_VALUE);
    }
    is!(cuMemAllocPitch_v2(&mut address, &mut pitch, 0, 4, 4), INVALID_VALUE);
    is!(cuMemAllocPitch_v2(&mut address, &mut pitch, 512, 0, 4), INVALID_VALUE);
    Ok(())
}

/// cuMemGetAddressRange gives an allocation's base and size for any address inside.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemGetAddressRange.
fn range_names_the_whole_allocation() -> Outcome {
    let _gpu = Gpu::start()?;
    for size in [4 * MIB, 64 * MIB] {
        let address = alloc(size)?;
        for inside in [0, 1, 4095, size / 2, size - 1] {
            let (mut base, mut bytes) = (0, 0);
            ok!(cuMemGetAddressRange_v2(Some(&mut base), Some(&mut bytes), address + inside as u64));
            check!(base == address && bytes == size, "{size} bytes at {address:#x}: {bytes} at {base:#x}");
        }
    }
    let odd = alloc(1000)?;
    let (mut base, mut bytes) = (0, 0);
    ok!(cuMemGetAddressRange_v2(Some(&mut base), Some(&mut bytes), odd + 999));
    check!(base == odd && bytes >= 1000, "1000 bytes at {odd:#x}: {bytes} at {base:#x}");
    observe!("the range of an allocation of 1000 bytes has {bytes}");
    Ok(())
}

/// Both answers of cuMemGetAddressRange are optional.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemGetAddressRange.
fn range_answers_are_optional() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    let (mut base, mut bytes) = (0, 0);
    ok!(cuMemGetAddressRange_v2(Some(&mut base), None, address + 5));
    ok!(cuMemGetAddressRange_v2(None, Some(&mut bytes), address + 5));
    check!(base == address && bytes == 4 * MIB, "{bytes} at {base:#x}");
    Ok(())
}

/// cuMemGetAddressRange refuses addresses of no allocation.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemGetAddressRange (returned codes).
fn range_of_unknown_address_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let (mut base, mut bytes) = (0, 0);
    fails!(cuMemGetAddressRange_v2(Some(&mut base), Some(&mut bytes), 0xdead_beef_0000));
    let address = alloc(4 * MIB)?;
    ok!(cuMemFree_v2(address));
    fails!(cuMemGetAddressRange_v2(Some(&mut base), Some(&mut bytes), address));
    Ok(())
}

/// cuMemFree returns only when work that may use the memory is done.
/// Source: CUDA C++ Programming Guide, Stream Ordered Memory Allocator ("cudaFree ... synchronize across all
/// executing CUDA streams"); PyTorch's caching allocator relies on it.
fn free_waits_for_the_device() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let address = alloc(4 * MIB)?;
    let stream = stream(BLOCKING)?;
    ok!(kernels.spin(stream, Duration::from_millis(150)));
    ok!(kernels.fill(stream, address, 1024, 5));
    let (code, time) = timed(|| cuMemFree_v2(address));
    ok!(code);
    check!(time >= Duration::from_millis(75), "free returned after {time:?} with 150 ms of work ahead of it");
    ok!(cuStreamQuery(stream));
    ok!(cuCtxSynchronize());
    Ok(())
}

/// Managed memory is read and written by the host and by kernels; flags other than global and host are refused.
/// Source: NVIDIA CUDA Driver API, Unified Memory, cuMemAllocManaged.
fn managed_memory_is_seen_by_both() -> Outcome {
    let gpu = Gpu::start()?;
    gpu.needs(83, "managed memory")?;
    let mut address = 0;
    is!(cuMemAllocManaged(&mut address, 4 * MIB, 0), INVALID_VALUE);
    is!(cuMemAllocManaged(&mut address, 0, 1), INVALID_VALUE);
    ok!(cuMemAllocManaged(&mut address, 4 * MIB, 1));
    let words = MIB as u64;
    let kernels = Kernels::load()?;
    ok!(kernels.fill(0, address, words, 0x0102_0304));
    ok!(cuCtxSynchronize());
    // SAFETY: managed memory is host-accessible while no kernel runs; the allocation has 4 MiB.
    let host = unsafe { std::slice::from_raw_parts_mut(address as *mut u32, MIB) };
    check!(host.iter().all(|w| *w == 0x0102_0304), "the host does not see the kernel's words");
    host.fill(9);
    check!(read_u32(address + 4096)? == 9, "the device does not see the host's words");
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// What one allocation holds is not touched by others coming and going.
/// Source: the meaning of an allocation.
fn contents_stay_until_overwritten() -> Outcome {
    let _gpu = Gpu::start()?;
    let sizes = [700, 4096, 100_000, 3 * MIB + 5];
    let mut kept = Vec::new();
    for (seed, size) in sizes.into_iter().cycle().take(40).enumerate() {
        let address = alloc(size)?;
        write(address, &pattern(size, seed as u64))?;
        if seed % 2 == 1 {
            kept.push((address, size, seed as u64));
        } else {
            ok!(cuMemFree_v2(address));
            let other = alloc(size)?;
            ok!(cuMemsetD8_v2(other, 0xee, size));
        }
    }
    for (address, size, seed) in kept {
        check!(read(address, size)? == pattern(size, seed), "allocation {seed} of {size} bytes changed");
    }
    Ok(())
}
