//! Managed memory: when it takes device memory, what moves it, and what ranges are told of it.

use std::time::Duration;

use super::nvml;
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("managed":
    an_allocation_takes_no_device_memory,
    a_kernel_brings_pages_and_a_free_returns_them,
    no_process_is_listed_with_it,
    memsets_and_copies_bring_pages,
    prefetches_bring_pages_and_take_them_away,
    advice_keeps_pages_on_the_host,
    it_leaves_for_allocations,
    more_than_the_device_has_room_for_is_used,
    attributes_tell_advice_and_prefetches,
    attributes_of_mixed_ranges,
    other_memory_is_refused,
    a_free_in_stream_order_frees_or_is_refused,
    locations_of_the_second_version,
    flags_and_sizes_are_checked,
);

const SIZE: usize = 64 * MIB;
/// What else may come and go meanwhile.
const SLACK: usize = 6 * MIB;
const CPU: i32 = -1;
const NOWHERE: i32 = -2;

const READ_MOSTLY: i32 = 1;
const PREFERRED: i32 = 2;
const ACCESSED_BY: i32 = 3;
const LAST_PREFETCH: i32 = 4;

const SET_READ_MOSTLY: i32 = 1;
const UNSET_READ_MOSTLY: i32 = 2;
const SET_PREFERRED: i32 = 3;
const UNSET_PREFERRED: i32 = 4;
const SET_ACCESSED_BY: i32 = 5;
const UNSET_ACCESSED_BY: i32 = 6;

/// A device on which managed memory moves by pages, with kernels ready.
fn start() -> Result<(Gpu, Kernels), Stop> {
    let gpu = Gpu::start()?;
    gpu.needs(83, "managed memory")?;
    gpu.needs(89, "concurrent access to managed memory")?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    // The first use of managed memory may take some for itself.
    let first = managed(MIB)?;
    ok!(kernels.fill(0, first, 16, 1));
    ok!(cuCtxSynchronize());
    ok!(cuMemFree_v2(first));
    Ok((gpu, kernels))
}

fn managed(bytes: usize) -> Result<Dptr, Stop> {
    let mut address = 0;
    ok!(cuMemAllocManaged(&mut address, bytes, 1));
    check!(address != 0, "cuMemAllocManaged succeeded with a null address");
    Ok(address)
}

/// By the CPU, as any memory.
fn words(address: Dptr, bytes: usize) -> &'static mut [u32] {
    // SAFETY: managed memory of the case, which waits for the device before it looks, and frees it last.
    unsafe { std::slice::from_raw_parts_mut(address as *mut u32, bytes / 4) }
}

/// A device may have some set aside for managed memory before, which then shows in no figure.
fn taken(before: usize, what: &str) -> Outcome {
    let free = free_bytes()?;
    if !Gpu::start()?.is_simulated()? {
        observe!("{what}: {} of {SIZE} bytes are seen taken", before.saturating_sub(free));
        return Ok(());
    }
    check!(before.saturating_sub(free) + SLACK >= SIZE, "{what}: {} of {SIZE} bytes are taken", before.saturating_sub(free));
    Ok(())
}

fn given_back(before: usize, what: &str) -> Outcome {
    let free = wait_free(before.saturating_sub(SLACK), Duration::from_secs(2))?;
    check!(free + SLACK >= before, "{what}: free was {before}, is {free}");
    Ok(())
}

fn prefetch(address: Dptr, bytes: usize, to: i32) -> Outcome {
    ok!(cuMemPrefetchAsync(address, bytes, to, 0));
    ok!(cuCtxSynchronize());
    Ok(())
}

fn attribute(which: i32, address: Dptr, bytes: usize) -> Result<i32, Stop> {
    let mut value = 77_i32;
    ok!(cuMemRangeGetAttribute((&raw mut value).cast(), 4, which, address, bytes));
    Ok(value)
}

/// Managed memory that nobody touched, or only the CPU, is not on the device.
/// Source: CUDA C++ Programming Guide, Unified Memory Programming (pages are populated on first touch).
fn an_allocation_takes_no_device_memory() -> Outcome {
    let (_gpu, _kernels) = start()?;
    let before = quiet()?;
    let address = managed(SIZE)?;
    given_back(before, "an allocation")?;
    words(address, SIZE).fill(3);
    given_back(before, "touched by the CPU")?;
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// What a kernel writes becomes resident, the CPU sees it, and the free gives the memory back.
/// Source: CUDA C++ Programming Guide, Unified Memory Programming (on-demand migration).
fn a_kernel_brings_pages_and_a_free_returns_them() -> Outcome {
    let (_gpu, kernels) = start()?;
    let before = quiet()?;
    let address = managed(SIZE)?;
    words(address, SIZE).fill(3);
    ok!(kernels.fill(0, address, (SIZE / 8) as u64, 4));
    ok!(kernels.fill(0, address + SIZE as u64 / 2, (SIZE / 8) as u64, 5));
    ok!(cuCtxSynchronize());
    taken(before, "written by a kernel")?;
    let (first, second) = words(address, SIZE).split_at(SIZE / 8);
    check!(first.iter().all(|w| *w == 4) && second.iter().all(|w| *w == 5), "the CPU sees other words");
    ok!(cuMemFree_v2(address));
    given_back(before, "freed")
}

/// Resident or not, NVML counts it to no process.
/// Source: open-gpu-kernel-modules, what a process is listed with is the memory objects of its clients, and the
/// pages of unified memory are none; seen with driver 580 on an H200.
fn no_process_is_listed_with_it() -> Outcome {
    let (gpu, kernels) = start()?;
    let Some(before) = nvml::own_figure(&gpu) else {
        skip!("NVML does not say what this process uses");
    };
    let address = managed(SIZE)?;
    ok!(kernels.fill(0, address, (SIZE / 4) as u64, 4));
    ok!(cuCtxSynchronize());
    let touched = nvml::own_figure(&gpu).unwrap_or(0);
    check!(touched <= before + SLACK as u64, "written by a kernel: listed with {touched} bytes, before with {before}");
    prefetch(address, SIZE, gpu.device)?;
    let fetched = nvml::own_figure(&gpu).unwrap_or(0);
    check!(fetched <= before + SLACK as u64, "prefetched: listed with {fetched} bytes, before with {before}");
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// Memsets, and copies to it, are work of the device too.
/// Source: CUDA C++ Programming Guide, Unified Memory Programming (memcpy and memset on managed memory).
fn memsets_and_copies_bring_pages() -> Outcome {
    let (_gpu, _kernels) = start()?;
    let source = alloc(SIZE)?;
    ok!(cuMemsetD8_v2(source, 9, SIZE));
    let before = quiet()?;
    let address = managed(SIZE)?;
    ok!(cuMemsetD8_v2(address, 7, SIZE));
    ok!(cuCtxSynchronize());
    taken(before, "memset")?;
    ok!(cuMemFree_v2(address));
    given_back(before, "freed")?;
    let address = managed(SIZE)?;
    ok!(cuMemcpyDtoD_v2(address, source, SIZE));
    ok!(cuCtxSynchronize());
    observe!("a copy from the device makes {} bytes of {SIZE} resident", before.saturating_sub(free_bytes()?));
    check!(words(address, SIZE).iter().all(|w| *w == 0x0909_0909), "contents differ");
    ok!(cuMemFree_v2(address));
    given_back(before, "freed")
}

/// A prefetch to the device takes memory, one to the CPU gives it back; contents stay.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuMemPrefetchAsync.
fn prefetches_bring_pages_and_take_them_away() -> Outcome {
    let (gpu, _kernels) = start()?;
    let before = quiet()?;
    let address = managed(SIZE)?;
    for (at, word) in (0..).zip(words(address, SIZE)) {
        *word = at;
    }
    for _ in 0..3 {
        prefetch(address, SIZE, gpu.device)?;
        taken(before, "prefetched to the device")?;
        prefetch(address, SIZE, CPU)?;
        given_back(before, "prefetched to the CPU")?;
    }
    let same = (0..).zip(words(address, SIZE)).all(|(at, word)| *word == at);
    check!(same, "contents differ");
    prefetch(address, SIZE, gpu.device)?;
    taken(before, "prefetched once more")?;
    ok!(cuMemFree_v2(address));
    given_back(before, "freed")
}

/// With the CPU as preferred location and the device mapped to it, touches do not move pages; a prefetch does.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuMemAdvise (SET_PREFERRED_LOCATION, SET_ACCESSED_BY).
fn advice_keeps_pages_on_the_host() -> Outcome {
    let (gpu, kernels) = start()?;
    let before = quiet()?;
    let address = managed(SIZE)?;
    ok!(cuMemAdvise(address, SIZE, SET_PREFERRED, CPU));
    ok!(cuMemAdvise(address, SIZE, SET_ACCESSED_BY, gpu.device));
    ok!(kernels.fill(0, address, (SIZE / 4) as u64, 0x1212_1212));
    ok!(cuCtxSynchronize());
    given_back(before, "touched where the CPU is preferred")?;
    ok!(cuMemsetD8_v2(address, 0x13, SIZE / 2));
    ok!(cuCtxSynchronize());
    given_back(before, "memset where the CPU is preferred")?;
    let (first, second) = words(address, SIZE).split_at(SIZE / 8);
    check!(first.iter().all(|w| *w == 0x1313_1313) && second.iter().all(|w| *w == 0x1212_1212), "contents differ");
    prefetch(address, SIZE, gpu.device)?;
    taken(before, "prefetched all the same")?;
    prefetch(address, SIZE, CPU)?;
    ok!(cuMemAdvise(address, SIZE, UNSET_PREFERRED, CPU));
    ok!(cuMemAdvise(address, SIZE, UNSET_ACCESSED_BY, gpu.device));
    ok!(kernels.fill(0, address, (SIZE / 4) as u64, 1));
    ok!(cuCtxSynchronize());
    taken(before, "touched without the advice")?;
    ok!(cuMemFree_v2(address));
    given_back(before, "freed")
}

/// Takes memory until about `leave` bytes are free.
fn ballast(gpu: &Gpu, leave: usize) -> Result<MemHandle, Stop> {
    let mut handle = 0;
    let size = quiet()?.saturating_sub(leave) / (2 * MIB) * (2 * MIB);
    ok!(cuMemCreate(&mut handle, size, &gpu.prop(), 0));
    Ok(handle)
}

/// Resident pages make room for an allocation that would not fit beside them; contents stay.
/// Source: CUDA C++ Programming Guide, Unified Memory Programming, GPU memory oversubscription.
fn it_leaves_for_allocations() -> Outcome {
    let (gpu, kernels) = start()?;
    let address = managed(SIZE * 2)?;
    let rest = ballast(&gpu, SIZE * 4)?;
    ok!(kernels.fill(0, address, (SIZE / 2) as u64, 0x2323_2323));
    ok!(cuCtxSynchronize());
    let free = free_bytes()?;
    check!(free < SIZE * 3, "{free} bytes are free beside {} resident ones", SIZE * 2);
    let mut handle = 0;
    ok!(cuMemCreate(&mut handle, SIZE * 3, &gpu.prop(), 0));
    check!(words(address, SIZE * 2).iter().all(|w| *w == 0x2323_2323), "contents differ");
    ok!(cuMemRelease(handle));
    ok!(cuMemRelease(rest));
    ok!(cuMemFree_v2(address));
    rest_after_a_release();
    Ok(())
}

/// A kernel may use more managed memory than the device has room for.
/// Source: CUDA C++ Programming Guide, Unified Memory Programming, GPU memory oversubscription.
fn more_than_the_device_has_room_for_is_used() -> Outcome {
    let (gpu, kernels) = start()?;
    if !gpu.is_simulated()? {
        skip!("more managed memory than is free can hang a GPU for everybody on it");
    }
    let address = managed(SIZE * 3)?;
    let rest = ballast(&gpu, SIZE)?;
    for value in [0x3131_3131, 0x3232_3232] {
        ok!(kernels.fill(0, address, (SIZE / 4 * 3) as u64, value));
        ok!(cuCtxSynchronize());
        prefetch(address, SIZE * 3, gpu.device)?;
        check!(words(address, SIZE * 3).iter().all(|w| *w == value), "contents differ");
    }
    ok!(cuMemRelease(rest));
    ok!(cuMemFree_v2(address));
    rest_after_a_release();
    Ok(())
}

/// What was advised and prefetched is told of a range, singly and several at once.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuMemRangeGetAttribute, cuMemRangeGetAttributes.
fn attributes_tell_advice_and_prefetches() -> Outcome {
    let (gpu, _kernels) = start()?;
    let address = managed(SIZE)?;
    check!(attribute(READ_MOSTLY, address, SIZE)? == 0, "read mostly from the start");
    check!(attribute(PREFERRED, address, SIZE)? == NOWHERE, "a preferred location from the start");
    check!(attribute(LAST_PREFETCH, address, SIZE)? == NOWHERE, "prefetched from the start");
    ok!(cuMemAdvise(address, SIZE, SET_READ_MOSTLY, CPU));
    ok!(cuMemAdvise(address, SIZE, SET_PREFERRED, gpu.device));
    ok!(cuMemAdvise(address, SIZE, SET_ACCESSED_BY, CPU));
    ok!(cuMemAdvise(address, SIZE, SET_ACCESSED_BY, gpu.device));
    prefetch(address, SIZE, gpu.device)?;
    let mut by = [77_i32; 4];
    ok!(cuMemRangeGetAttribute(by.as_mut_ptr().cast(), 16, ACCESSED_BY, address, SIZE));
    check!(by[2..] == [NOWHERE; 2] && by[..2].contains(&CPU) && by[..2].contains(&gpu.device), "accessed by {by:?}");
    let (mut mostly, mut preferred, mut last) = (77_i32, 77_i32, 77_i32);
    let mut out = [(&raw mut mostly).cast(), (&raw mut preferred).cast(), (&raw mut last).cast()];
    let (mut sizes, mut which) = ([4, 4, 4], [READ_MOSTLY, PREFERRED, LAST_PREFETCH]);
    ok!(cuMemRangeGetAttributes(out.as_mut_ptr(), sizes.as_mut_ptr(), which.as_mut_ptr(), 3, address, SIZE));
    check!((mostly, preferred, last) == (1, gpu.device, gpu.device), "read mostly {mostly}, preferred {preferred}, last prefetch {last}");
    prefetch(address, SIZE, CPU)?;
    check!(attribute(LAST_PREFETCH, address, SIZE)? == CPU, "last prefetch is not the CPU");
    ok!(cuMemAdvise(address, SIZE, UNSET_READ_MOSTLY, CPU));
    ok!(cuMemAdvise(address, SIZE, UNSET_PREFERRED, CPU));
    check!(attribute(READ_MOSTLY, address, SIZE)? == 0, "still read mostly");
    check!(attribute(PREFERRED, address, SIZE)? == NOWHERE, "still preferred somewhere");
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// What only a part of a range was told is not the range's.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuMemRangeGetAttribute ("all pages in the memory range").
fn attributes_of_mixed_ranges() -> Outcome {
    let (gpu, _kernels) = start()?;
    let (address, half) = (managed(SIZE)?, SIZE / 2);
    ok!(cuMemAdvise(address, half, SET_READ_MOSTLY, CPU));
    ok!(cuMemAdvise(address, half, SET_PREFERRED, CPU));
    ok!(cuMemAdvise(address, half, SET_ACCESSED_BY, gpu.device));
    let mut by = [77_i32];
    ok!(cuMemRangeGetAttribute(by.as_mut_ptr().cast(), 4, ACCESSED_BY, address, half));
    check!(by == [gpu.device], "the first half is accessed by {by:?}");
    ok!(cuMemRangeGetAttribute(by.as_mut_ptr().cast(), 4, ACCESSED_BY, address, SIZE));
    check!(by == [NOWHERE], "the whole is accessed by {by:?}");
    check!(attribute(READ_MOSTLY, address, half)? == 1, "the first half is not read mostly");
    check!(attribute(READ_MOSTLY, address, SIZE)? == 0, "the whole is read mostly");
    check!(attribute(PREFERRED, address, half)? == CPU, "the first half prefers another place");
    check!(attribute(PREFERRED, address, SIZE)? == NOWHERE, "the whole prefers a place");
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// Prefetches, advice and questions are for managed memory (or pageable memory, where the device reaches that).
/// Source: NVIDIA CUDA Driver API, Unified Addressing (returned codes of each function).
fn other_memory_is_refused() -> Outcome {
    let (gpu, _kernels) = start()?;
    let (classic, address) = (alloc(4 * MIB)?, managed(4 * MIB)?);
    let mut value = 0_i32;
    let out = (&raw mut value).cast();
    is!(cuMemPrefetchAsync(classic, 4 * MIB, gpu.device, 0), INVALID_VALUE);
    is!(cuMemAdvise(classic, 4 * MIB, SET_READ_MOSTLY, gpu.device), INVALID_VALUE);
    is!(cuMemRangeGetAttribute(out, 4, READ_MOSTLY, classic, 4 * MIB), INVALID_VALUE);
    is!(cuMemAdvise(address, 4 * MIB, 99, gpu.device), INVALID_VALUE);
    fails!(cuMemAdvise(address, 4 * MIB, SET_PREFERRED, 99));
    fails!(cuMemPrefetchAsync(address, 4 * MIB, 99, 0));
    is!(cuMemRangeGetAttribute(out, 3, READ_MOSTLY, address, 4 * MIB), INVALID_VALUE);
    is!(cuMemRangeGetAttribute(out, 8, READ_MOSTLY, address, 4 * MIB), INVALID_VALUE);
    ok!(cuMemFree_v2(address));
    fails!(cuMemFree_v2(address));
    Ok(())
}

/// Whether it can be freed in stream order is not documented. If so, it is gone after the work before; if not, it stays.
/// Source: NVIDIA CUDA Driver API, Stream Ordered Memory Allocator, cuMemFreeAsync (says nothing of managed memory).
fn a_free_in_stream_order_frees_or_is_refused() -> Outcome {
    let (gpu, kernels) = start()?;
    gpu.needs(115, "memory pools")?;
    let (before, stream) = (quiet()?, stream(NON_BLOCKING)?);
    let address = managed(SIZE)?;
    ok!(kernels.fill(stream, address, (SIZE / 4) as u64, 4));
    let code = cuMemFreeAsync(address, stream);
    observe!("cuMemFreeAsync of managed memory answers {code:?}");
    ok!(cuStreamSynchronize(stream));
    if code.is_ok() {
        fails!(cuMemFree_v2(address));
    } else {
        check!(words(address, SIZE).iter().all(|w| *w == 4), "contents differ");
        ok!(cuMemFree_v2(address));
    }
    given_back(before, "freed")
}

/// The second version of prefetches and advice names places by kind, and ranges can be asked for that.
/// Source: NVIDIA CUDA Driver API, Unified Addressing, cuMemPrefetchAsync_v2, cuMemAdvise_v2 (12.2 and later).
fn locations_of_the_second_version() -> Outcome {
    let (gpu, kernels) = start()?;
    if exported("cuMemAdvise_v2") == 0 || exported("cuMemPrefetchAsync_v2") == 0 {
        skip!("the driver has no second version of them");
    }
    let (before, host) = (quiet()?, Location { kind: 2, id: 0 });
    let address = managed(SIZE)?;
    ok!(cuMemAdvise_v2(address, SIZE, SET_PREFERRED, host));
    ok!(cuMemAdvise_v2(address, SIZE, SET_ACCESSED_BY, gpu.location()));
    ok!(kernels.fill(0, address, (SIZE / 4) as u64, 1));
    ok!(cuCtxSynchronize());
    given_back(before, "touched where the host is preferred")?;
    check!(attribute(PREFERRED, address, SIZE)? == CPU, "another place is preferred");
    // Kinds and ids of the preferred place and of the last prefetch.
    check!(attribute(5, address, SIZE)? == host.kind, "preferred is kind {}", attribute(5, address, SIZE)?);
    ok!(cuMemPrefetchAsync_v2(address, SIZE, gpu.location(), 0, 0));
    ok!(cuCtxSynchronize());
    taken(before, "prefetched")?;
    check!(attribute(7, address, SIZE)? == 1 && attribute(8, address, SIZE)? == gpu.device, "the last prefetch went elsewhere");
    ok!(cuMemPrefetchAsync_v2(address, SIZE, host, 0, 0));
    ok!(cuCtxSynchronize());
    given_back(before, "prefetched to the host")?;
    is!(cuMemPrefetchAsync_v2(address, SIZE, gpu.location(), 1, 0), INVALID_VALUE);
    ok!(cuMemFree_v2(address));
    Ok(())
}

/// An allocation has a size, and is attached globally or to the host.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemAllocManaged (returned codes).
fn flags_and_sizes_are_checked() -> Outcome {
    let (_gpu, _kernels) = start()?;
    let mut address = 0;
    is!(cuMemAllocManaged(&mut address, 0, 1), INVALID_VALUE);
    is!(cuMemAllocManaged(&mut address, MIB, 0), INVALID_VALUE);
    is!(cuMemAllocManaged(&mut address, MIB, 4), INVALID_VALUE);
    ok!(cuMemAllocManaged(&mut address, MIB, 2));
    ok!(cuMemFree_v2(address));
    Ok(())
}
