//! Descriptors of cuMemCreate memory: what they keep alive, here and in other processes, and as external memory.

use std::time::Duration;

use super::nvml;
use crate::api::*;
use crate::gpu::*;
use crate::harness::*;
use crate::helpers::{Helper, inheritable, receive_descriptor};

cases!("vmm_sharing":
    a_descriptor_keeps_memory_until_it_is_closed,
    an_import_keeps_memory_that_its_maker_released,
    memory_outlives_the_process_that_made_it,
    another_process_maps_the_same_memory,
    what_is_no_memory_is_not_imported,
    external_memory_of_a_descriptor,
    a_buffer_keeps_external_memory,
    external_buffers_lie_inside,
);

const SIZE: usize = 64 * MIB;
const LIMIT: Duration = Duration::from_secs(3);

fn start() -> Result<(Gpu, AllocationProp), Stop> {
    let gpu = Gpu::start()?;
    gpu.needs(103, "handles as file descriptors")?;
    let prop = AllocationProp { handle_types: 1, ..gpu.prop() };
    // What the first of its kind takes, another way.
    let (mut handle, mut fd) = (0, -1_i32);
    ok!(cuMemCreate(&mut handle, 2 * MIB, &prop, 0));
    ok!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, 1, 0));
    close(fd);
    ok!(cuMemRelease(handle));
    Ok((gpu, prop))
}

fn close(fd: i32) {
    // SAFETY: a descriptor that the driver gave to the case, closed once.
    unsafe { libc::close(fd) };
}

fn descriptor(fd: i32) -> usize {
    usize::try_from(fd).unwrap_or(0)
}

/// Memory with a descriptor.
fn exported(prop: &AllocationProp) -> Result<(MemHandle, i32), Stop> {
    let (mut handle, mut fd) = (0, -1_i32);
    ok!(cuMemCreate(&mut handle, SIZE, prop, 0));
    ok!(cuMemExportToShareableHandle((&raw mut fd).cast(), handle, 1, 0));
    check!(fd >= 0, "descriptor {fd}");
    Ok((handle, fd))
}

fn map(gpu: &Gpu, handle: MemHandle) -> Result<Dptr, Stop> {
    let mut address = 0;
    ok!(cuMemAddressReserve(&mut address, SIZE, 0, 0, 0));
    ok!(cuMemMap(address, SIZE, 0, handle, 0));
    ok!(cuMemSetAccess(address, SIZE, &gpu.read_write(), 1));
    Ok(address)
}

fn held(before: usize, what: &str) -> Outcome {
    let free = free_bytes()?;
    check!(free + SIZE <= before + 4 * MIB, "{what}: the memory is gone: free was {before}, is {free}");
    Ok(())
}

fn gone(before: usize, what: &str) -> Outcome {
    let free = wait_free(before.saturating_sub(4 * MIB), LIMIT)?;
    check!(free + 4 * MIB >= before, "{what}: the memory is still held: free was {before}, is {free}");
    Ok(())
}

/// A released handle's memory stays as long as a descriptor of it is open, and goes with that.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemRelease (references of exported handles).
fn a_descriptor_keeps_memory_until_it_is_closed() -> Outcome {
    let (_gpu, prop) = start()?;
    let before = quiet()?;
    let (handle, fd) = exported(&prop)?;
    ok!(cuMemRelease(handle));
    std::thread::sleep(Duration::from_millis(100));
    held(before, "an open descriptor")?;
    let copy = inheritable(fd)?;
    close(fd);
    held(before, "a copy of it")?;
    close(copy);
    gone(before, "all closed")
}

/// An imported handle keeps the memory after descriptor and first handle are gone, with its contents.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemImportFromShareableHandle.
fn an_import_keeps_memory_that_its_maker_released() -> Outcome {
    let (gpu, prop) = start()?;
    let before = quiet()?;
    let (handle, fd) = exported(&prop)?;
    let first = map(&gpu, handle)?;
    let bytes = pattern(SIZE, 91);
    write(first, &bytes)?;
    let mut imported = 0;
    ok!(cuMemImportFromShareableHandle(&mut imported, descriptor(fd), 1));
    ok!(cuMemUnmap(first, SIZE));
    ok!(cuMemRelease(handle));
    close(fd);
    held(before, "imported")?;
    let second = map(&gpu, imported)?;
    check!(read(second, SIZE)? == bytes, "contents differ");
    ok!(cuMemRelease(imported));
    held(before, "mapped")?;
    ok!(cuMemUnmap(second, SIZE));
    gone(before, "unmapped and released")
}

/// Who imported memory has it, with its contents, after its maker was killed; then it counts once.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemImportFromShareableHandle.
fn memory_outlives_the_process_that_made_it() -> Outcome {
    let (gpu, _) = start()?;
    let before = quiet()?;
    let listed = nvml::own_figure(&gpu);
    let (helper, fd) = receive_descriptor(|socket| Helper::start(&["vmm-export", socket, &SIZE.to_string()]))?;
    let mut handle = 0;
    ok!(cuMemImportFromShareableHandle(&mut handle, descriptor(fd), 1));
    close(fd);
    helper.kill();
    let address = map(&gpu, handle)?;
    check!(read(address, SIZE)? == pattern(SIZE, 92), "contents differ after the maker's death");
    let free = wait_free(before.saturating_sub(SIZE + 4 * MIB), LIMIT)?;
    check!(free + SIZE + 4 * MIB >= before, "more than the memory is missing: free was {before}, is {free}");
    held(before, "its maker was killed")?;
    if let (Some(was), Some(is)) = (listed, nvml::own_figure(&gpu)) {
        observe!("NVML lists the importer with {} bytes more", is.saturating_sub(was));
    }
    ok!(cuMemUnmap(address, SIZE));
    ok!(cuMemRelease(handle));
    gone(before, "unmapped and released")
}

/// Two processes see each other's writes, and the memory is there once.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemImportFromShareableHandle.
fn another_process_maps_the_same_memory() -> Outcome {
    let (gpu, prop) = start()?;
    let (handle, fd) = exported(&prop)?;
    let address = map(&gpu, handle)?;
    write(address, &pattern(SIZE, 77))?;
    let fd = inheritable(fd)?;
    let helper = Helper::start(&["vmm-import", &fd.to_string(), &SIZE.to_string()])?;
    check!(read(address, 4096)?.iter().all(|b| *b == 0x3c), "what the other process wrote is not there");
    drop(helper);
    check!(read(address, SIZE)?[4096..] == pattern(SIZE, 77)[4096..], "contents differ after the other's end");
    Ok(())
}

/// A descriptor of something else is refused.
/// Source: NVIDIA CUDA Driver API, Virtual Memory Management, cuMemImportFromShareableHandle (returned codes).
fn what_is_no_memory_is_not_imported() -> Outcome {
    use std::os::fd::AsRawFd;
    let (_gpu, _) = start()?;
    let file = std::fs::File::open("/dev/null").map_err(|e| Stop::Fail(e.to_string()))?;
    let mut handle = 0;
    fails!(cuMemImportFromShareableHandle(&mut handle, descriptor(file.as_raw_fd()), 1));
    fails!(cuMemImportFromShareableHandle(&mut handle, 9999, 1));
    Ok(())
}

/// External memory of a descriptor, or a skip: not every driver imports its own.
fn external(fd: i32) -> Result<Handle, Stop> {
    let (mut memory, wanted) = (0, ExternalMemory { kind: 1, fd: i64::from(fd), bytes: SIZE as u64, ..Default::default() });
    match cuImportExternalMemory(&mut memory, &wanted) {
        code if code.is_ok() => Ok(memory),
        code => {
            close(fd);
            skip!("the driver does not import descriptors of cuMemCreate as external memory: {code:?}")
        }
    }
}

fn buffer(memory: Handle, offset: u64, bytes: u64) -> Result<Dptr, Stop> {
    let mut address = 0;
    ok!(cuExternalMemoryGetMappedBuffer(&mut address, memory, &ExternalBuffer { offset, bytes, ..Default::default() }));
    Ok(address)
}

/// A buffer of it shows the memory, and takes none.
/// Source: NVIDIA CUDA Driver API, External Resource Interoperability, cuExternalMemoryGetMappedBuffer.
fn external_memory_of_a_descriptor() -> Outcome {
    let (gpu, prop) = start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let (handle, fd) = exported(&prop)?;
    let address = map(&gpu, handle)?;
    write(address, &pattern(SIZE, 93))?;
    let before = quiet()?;
    let memory = external(fd)?;
    let whole = buffer(memory, 0, SIZE as u64)?;
    check!(read(whole, SIZE)? == pattern(SIZE, 93), "contents differ");
    let part = buffer(memory, 2 * MIB as u64, 4 * MIB as u64)?;
    ok!(kernels.fill(0, part, MIB as u64, 0x6767_6767));
    ok!(cuCtxSynchronize());
    check!(read(address + 2 * MIB as u64, 4 * MIB)?.iter().all(|b| *b == 0x67), "the kernel's words are not there");
    let free = free_bytes()?;
    check!(free + 8 * MIB >= before, "the memory counts twice: free was {before}, is {free}");
    ok!(cuMemFree_v2(part));
    ok!(cuMemFree_v2(whole));
    fails!(cuMemFree_v2(whole));
    ok!(cuDestroyExternalMemory(memory));
    check!(read(address, 4096)? == pattern(SIZE, 93)[..4096], "contents differ after all");
    Ok(())
}

/// The memory stays until external memory and its buffers are gone, whoever released it first.
/// Source: NVIDIA CUDA Driver API, External Resource Interoperability, cuDestroyExternalMemory.
fn a_buffer_keeps_external_memory() -> Outcome {
    let (_gpu, prop) = start()?;
    let before = quiet()?;
    let (handle, fd) = exported(&prop)?;
    let memory = external(fd)?;
    ok!(cuMemRelease(handle));
    held(before, "external memory")?;
    let address = buffer(memory, 0, SIZE as u64)?;
    ok!(cuMemsetD8_v2(address, 8, SIZE));
    ok!(cuCtxSynchronize());
    held(before, "a buffer")?;
    ok!(cuMemFree_v2(address));
    ok!(cuDestroyExternalMemory(memory));
    gone(before, "destroyed")
}

/// A buffer lies inside its memory.
/// Source: NVIDIA CUDA Driver API, External Resource Interoperability, CUDA_EXTERNAL_MEMORY_BUFFER_DESC.
fn external_buffers_lie_inside() -> Outcome {
    let (_gpu, prop) = start()?;
    let (_handle, fd) = exported(&prop)?;
    let memory = external(fd)?;
    let (mut address, reach) = (0, SIZE as u64);
    let outside = ExternalBuffer { offset: reach / 2, bytes: reach, ..Default::default() };
    fails!(cuExternalMemoryGetMappedBuffer(&mut address, memory, &outside));
    let flagged = ExternalBuffer { bytes: reach, flags: 1, ..Default::default() };
    fails!(cuExternalMemoryGetMappedBuffer(&mut address, memory, &flagged));
    ok!(cuDestroyExternalMemory(memory));
    Ok(())
}
