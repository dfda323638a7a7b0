//! NVML's memory figures beside the driver's.

use std::ffi::{CStr, CString};
use std::time::{Duration, Instant};

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("nvml":
    devices_are_found_by_uuid,
    figures_agree_with_the_driver,
    used_follows_allocations,
    both_versions_agree,
    a_process_is_listed_with_its_memory,
    every_form_of_the_list_says_the_same,
    a_list_without_room_says_how_much_it_needs,
    the_listed_figure_follows_every_kind_of_memory,
    the_cuda_version_is_the_drivers,
);

/// The NVML device with the driver device's uuid.
fn device() -> Result<(Gpu, Handle), Stop> {
    let gpu = Gpu::start()?;
    let handle = by_uuid(&gpu)?;
    Ok((gpu, handle))
}

fn by_uuid(gpu: &Gpu) -> Result<Handle, Stop> {
    if !nvml_found() {
        skip!("libnvidia-ml.so.1 could not be opened");
    }
    ok!(nvmlInit_v2());
    let mut uuid = [0; 16];
    ok!(cuDeviceGetUuid_v2(&mut uuid, gpu.device));
    let hex: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
    let text = format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    let mut handle = 0;
    for prefix in ["GPU-", "MIG-"] {
        let name = CString::new(format!("{prefix}{text}")).unwrap_or_default();
        if nvmlDeviceGetHandleByUUID(name.as_ptr(), &mut handle).is_ok() {
            return Ok(handle);
        }
    }
    Err(Stop::Fail(format!("NVML knows no device with uuid {text}")))
}

fn memory(handle: Handle) -> Result<NvmlMemory, Stop> {
    let mut memory = NvmlMemory::default();
    ok!(nvmlDeviceGetMemoryInfo(handle, &mut memory));
    Ok(memory)
}

/// NVML and the driver call a device by the same uuid.
/// Source: NVML API Reference, nvmlDeviceGetHandleByUUID; cuDeviceGetUuid.
fn devices_are_found_by_uuid() -> Outcome {
    let (_gpu, handle) = device()?;
    let mut buffer = [0_u8; 96];
    ok!(nvmlDeviceGetUUID(handle, buffer.as_mut_ptr().cast(), 96));
    let text = CStr::from_bytes_until_nul(&buffer).map(|t| t.to_string_lossy().into_owned()).unwrap_or_default();
    check!(text.starts_with("GPU-") || text.starts_with("MIG-"), "uuid {text:?}");
    let mut count = 0;
    ok!(nvmlDeviceGetCount_v2(&mut count));
    check!(count >= 1, "{count} devices");
    let mut first = 0;
    ok!(nvmlDeviceGetHandleByIndex_v2(0, &mut first));
    Ok(())
}

/// Totals are close (NVML counts what the driver reserves), and free is what cuMemGetInfo says.
/// Source: NVML API Reference, nvmlDeviceGetMemoryInfo.
fn figures_agree_with_the_driver() -> Outcome {
    let (_gpu, handle) = device()?;
    let (nvml, (free, total)) = (memory(handle)?, memory_info()?);
    let (free, total) = (free as u64, total as u64);
    check!(nvml.total >= total && nvml.total - total <= nvml.total / 20, "totals: NVML {}, driver {total}", nvml.total);
    check!(nvml.total == nvml.free + nvml.used, "total {} is not free {} + used {}", nvml.total, nvml.free, nvml.used);
    let apart = nvml.free.abs_diff(free);
    check!(apart <= GIB as u64, "free: NVML {}, driver {free}", nvml.free);
    observe!("free by NVML and by the driver differ by {apart} bytes, the totals by {}", nvml.total - total);
    Ok(())
}

/// The used figure once it stands still: processes that ended just now still count for a moment.
fn settled(handle: Handle) -> Result<u64, Stop> {
    let start = Instant::now();
    let mut used = memory(handle)?.used;
    while start.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(100));
        let again = memory(handle)?.used;
        if again == used {
            break;
        }
        used = again;
    }
    Ok(used)
}

/// An allocation shows in NVML's used figure.
/// Source: NVML API Reference, nvmlDeviceGetMemoryInfo.
fn used_follows_allocations() -> Outcome {
    let (_gpu, handle) = device()?;
    ok!(cuMemFree_v2(alloc(MIB)?));
    let before = settled(handle)?;
    let address = alloc(256 * MIB)?;
    let during = memory(handle)?.used;
    let grown = during.saturating_sub(before);
    check!((256 * MIB as u64..=260 * MIB as u64).contains(&grown), "256 MiB allocated, used grew by {grown}");
    ok!(cuMemFree_v2(address));
    let start = Instant::now();
    while memory(handle)?.used > before + 2 * MIB as u64 {
        check!(start.elapsed() < Duration::from_secs(3), "used was {before}, is {}", memory(handle)?.used);
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The second version tells the reserved part apart.
/// Source: NVML API Reference, nvmlMemory_v2_t.
fn both_versions_agree() -> Outcome {
    let (_gpu, handle) = device()?;
    let first = memory(handle)?;
    let version = u32::try_from(size_of::<NvmlMemoryV2>()).unwrap_or(0) | 2 << 24;
    let mut second = NvmlMemoryV2 { version, ..Default::default() };
    ok!(nvmlDeviceGetMemoryInfo_v2(handle, &mut second));
    check!(first.total == second.total, "totals {} and {}", first.total, second.total);
    check!(second.total == second.free + second.used + second.reserved, "{second:?} does not add up");
    observe!("reserved {} bytes", second.reserved);
    let mut wrong = NvmlMemoryV2 { version: 9, ..Default::default() };
    fails!(nvmlDeviceGetMemoryInfo_v2(handle, &mut wrong));
    Ok(())
}

/// A process with a context is listed with the memory that it uses.
/// Source: NVML API Reference, nvmlDeviceGetComputeRunningProcesses (host pids: in a container, others).
fn a_process_is_listed_with_its_memory() -> Outcome {
    let (_gpu, handle) = device()?;
    let _address = alloc(256 * MIB)?;
    let mut list = [NvmlProcess::default(); 256];
    let mut n = 256;
    ok!(nvmlDeviceGetComputeRunningProcesses_v3(handle, &mut n, list.as_mut_ptr()));
    check!(n >= 1, "no process is listed");
    let listed = &list[..usize::try_from(n).unwrap_or(0).min(256)];
    let Some(own) = listed.iter().find(|p| p.pid == std::process::id()) else {
        skip!("{n} processes are listed, none with this pid: another pid namespace");
    };
    if own.used_bytes == u64::MAX {
        skip!("NVML knows this process but not what it uses");
    }
    check!(own.used_bytes >= 256 * MIB as u64, "listed with {} bytes", own.used_bytes);
    check!(own.used_bytes < 4 * GIB as u64, "listed with {} bytes", own.used_bytes);
    observe!("beside 256 MiB the context takes {} bytes", own.used_bytes - 256 * MIB as u64);
    Ok(())
}

/// This process in the list of compute processes: what it is said to use.
fn listed(handle: Handle) -> Result<u64, Stop> {
    let mut list = [NvmlProcess::default(); 256];
    let mut n = 256;
    ok!(nvmlDeviceGetComputeRunningProcesses_v3(handle, &mut n, list.as_mut_ptr()));
    let listed = &list[..usize::try_from(n).unwrap_or(0).min(256)];
    match listed.iter().find(|p| p.pid == std::process::id()) {
        Some(own) if own.used_bytes != u64::MAX => Ok(own.used_bytes),
        Some(_) => skip!("NVML knows this process but not what it uses"),
        None => skip!("{n} processes are listed, none with this pid: another pid namespace"),
    }
}

/// What NVML says that this process uses of the device; `None` where it does not say.
pub(super) fn own_figure(gpu: &Gpu) -> Option<u64> {
    let handle = by_uuid(gpu).ok()?;
    listed(handle).ok()
}

/// The list has three forms, with two layouts; they name the same processes with the same memory.
/// Source: nvml.h, nvmlProcessInfo_v1_t and _v2_t; NVML API Reference, nvmlDeviceGetComputeRunningProcesses.
fn every_form_of_the_list_says_the_same() -> Outcome {
    let (_gpu, handle) = device()?;
    let _address = alloc(64 * MIB)?;
    let wanted = listed(handle)?;
    let mut old = [NvmlProcessV1::default(); 256];
    let mut n = 256;
    ok!(nvmlDeviceGetComputeRunningProcesses(handle, &mut n, old.as_mut_ptr()));
    let own = old[..n as usize].iter().find(|p| p.pid == std::process::id());
    check!(own.map(|p| p.used_bytes) == Some(wanted), "the first form says {own:?}, the third {wanted}");
    let mut middle = [NvmlProcess::default(); 256];
    let mut n = 256;
    ok!(nvmlDeviceGetComputeRunningProcesses_v2(handle, &mut n, middle.as_mut_ptr()));
    let own = middle[..n as usize].iter().find(|p| p.pid == std::process::id());
    check!(own.map(|p| p.used_bytes) == Some(wanted), "the second form says {own:?}, the third {wanted}");
    let (mut n, mut old_n) = (256, 256);
    ok!(nvmlDeviceGetGraphicsRunningProcesses_v3(handle, &mut n, middle.as_mut_ptr()));
    ok!(nvmlDeviceGetGraphicsRunningProcesses(handle, &mut old_n, old.as_mut_ptr()));
    check!(n == old_n, "graphics: {old_n} in the first form, {n} in the third");
    let (mut n, mut old_n) = (256, 256);
    ok!(nvmlDeviceGetMPSComputeRunningProcesses_v3(handle, &mut n, middle.as_mut_ptr()));
    ok!(nvmlDeviceGetMPSComputeRunningProcesses(handle, &mut old_n, old.as_mut_ptr()));
    check!(n == old_n, "MPS: {old_n} in the first form, {n} in the third");
    Ok(())
}

/// Without room the list answers INSUFFICIENT_SIZE and how many there are.
/// Source: NVML API Reference, nvmlDeviceGetComputeRunningProcesses.
fn a_list_without_room_says_how_much_it_needs() -> Outcome {
    const INSUFFICIENT_SIZE: Code = Code(7);
    let (_gpu, handle) = device()?;
    let mut n = 0;
    let code = nvmlDeviceGetComputeRunningProcesses_v3(handle, &mut n, std::ptr::null_mut());
    check!(code == INSUFFICIENT_SIZE && n >= 1, "{code:?}, {n} processes");
    Ok(())
}

/// What a process is said to use grows and shrinks with allocations, VMM handles that nothing maps, and what a
/// pool keeps.
/// Source: NVML API Reference, nvmlProcessInfo_t (usedGpuMemory); cuda.h on cuMemCreate and pools.
fn the_listed_figure_follows_every_kind_of_memory() -> Outcome {
    let (gpu, handle) = device()?;
    ok!(cuMemFree_v2(alloc(MIB)?));
    let size = 64 * MIB;
    let about = |before: u64, what: &str| -> Outcome {
        let grown = listed(handle)?.saturating_sub(before);
        check!((size as u64..=size as u64 + 4 * MIB as u64).contains(&grown), "{what}: {size} bytes, listed {grown} more");
        Ok(())
    };
    let back = |before: u64, what: &str| -> Outcome {
        let start = Instant::now();
        while listed(handle)? > before + 2 * MIB as u64 {
            check!(start.elapsed() < Duration::from_secs(3), "{what}: was {before}, is {}", listed(handle)?);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    };
    let before = listed(handle)?;
    let address = alloc(size)?;
    about(before, "cuMemAlloc")?;
    ok!(cuMemFree_v2(address));
    back(before, "cuMemFree")?;
    let mut memory = 0;
    ok!(cuMemCreate(&mut memory, size, &gpu.prop(), 0));
    about(before, "cuMemCreate")?;
    ok!(cuMemRelease(memory));
    back(before, "cuMemRelease")?;
    gpu.needs(115, "memory pools")?;
    let mut pool = 0;
    ok!(cuDeviceGetDefaultMemPool(&mut pool, gpu.device));
    let mut keep = u64::MAX;
    ok!(cuMemPoolSetAttribute(pool, 4, (&raw mut keep).cast()));
    let mut pooled = 0;
    ok!(cuMemAllocAsync(&mut pooled, size, 0));
    ok!(cuMemFreeAsync(pooled, 0));
    ok!(cuCtxSynchronize());
    about(before, "kept by a pool")?;
    ok!(cuMemPoolTrimTo(pool, 0));
    back(before, "cuMemPoolTrimTo")
}

/// NVML's CUDA version is what the driver itself says.
/// Source: NVML API Reference, nvmlSystemGetCudaDriverVersion.
fn the_cuda_version_is_the_drivers() -> Outcome {
    let (_gpu, _handle) = device()?;
    let (mut by_nvml, mut by_driver) = (0, 0);
    ok!(nvmlSystemGetCudaDriverVersion_v2(&mut by_nvml));
    ok!(cuDriverGetVersion(&mut by_driver));
    check!(by_nvml == by_driver, "NVML says {by_nvml}, the driver {by_driver}");
    Ok(())
}
