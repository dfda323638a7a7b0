//! NVML's memory figures under the quota: what `nvidia-smi`-like tools inside the program see.
//!
//! They stand whether NVML is asked before or after CUDA is used; before, nothing is in use yet.

use core::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;

use spillway_protocol::Settings;

use crate::driver::{Status, call};
use crate::runtime::{self, Runtime};
use crate::table::sig;

/// `nvmlMemory_t`
#[repr(C)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlMemory_v2_t`
#[repr(C)]
struct MemoryV2 {
    version: u32,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// A device's uuid as NVML writes it, without its prefix: 32 hexadecimal digits and dashes.
fn uuid_bytes(text: &[u8]) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .strip_prefix(b"GPU-")
        .or_else(|| text.strip_prefix(b"MIG-"))?
        .iter()
        .copied()
        .filter(|&b| b != b'-')
        .collect();
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    (digits.len() == 32).then_some(bytes)
}

/// `nvmlProcessInfo_v1_t`
#[repr(C)]
#[derive(Clone, Copy)]
struct ProcessV1 {
    pid: u32,
    used: u64,
}

/// `nvmlProcessInfo_v2_t`, of versions 2 and 3 of the queries.
#[repr(C)]
#[derive(Clone, Copy)]
struct ProcessV2 {
    pid: u32,
    used: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

/// What NVML writes where it cannot tell.
const NOT_AVAILABLE: u64 = u64::MAX;

/// An entry of a process list.
trait Process: Copy {
    fn pid(&self) -> u32;
    fn set_used(&mut self, bytes: u64);
    fn used(&self) -> u64;
}
macro_rules! process {
    ($($name:ident)*) => {$(
        impl Process for $name {
            fn pid(&self) -> u32 {
                self.pid
            }
            fn set_used(&mut self, bytes: u64) {
                self.used = bytes;
            }
            fn used(&self) -> u64 {
                self.used
            }
        }
    )*};
}
process! { ProcessV1 ProcessV2 }

/// Whether a quota holds for this process, and what it uses of it on a device of NVML's.
enum Under {
    /// None does.
    Nothing,
    /// One does; bytes in use, overhead included.
    Quota(u64),
}

fn under(device: *mut c_void) -> Under {
    let Some(runtime) = runtime::get() else {
        // CUDA is not in use: nothing is, if there will be a quota.
        return match configured() {
            Some(_) => Under::Quota(0),
            None => Under::Nothing,
        };
    };
    if !runtime.limited {
        return Under::Nothing;
    }
    let Some(index) = index_of(runtime, device) else {
        return Under::Nothing;
    };
    let used = runtime.observed.devices[index].used.load(SeqCst);
    let overhead = runtime.desired().devices[index].overhead.load(SeqCst);
    Under::Quota(used + overhead)
}

/// Leaves in a process list what this process may know: itself, with what it has of its quota. So the
/// list agrees with the memory info; neighbours' figures would not.
///
/// # Safety
/// NVML has filled `count` entries of type `P`, if `list` is not null.
unsafe fn own_entries<P: Process>(device: *mut c_void, count: *mut u32, list: *mut c_void) {
    if count.is_null() || list.is_null() {
        return;
    }
    let Under::Quota(used) = under(device) else {
        return;
    };
    // SAFETY: the caller's promise.
    let (filled, list) = unsafe { (*count as usize, list.cast::<P>()) };
    let mut kept = 0;
    for index in 0..filled {
        // SAFETY: as above; `kept` never passes `index`.
        unsafe {
            let mut entry = list.add(index).read_unaligned();
            if entry.pid() == std::process::id() {
                if entry.used() != NOT_AVAILABLE {
                    entry.set_used(used);
                }
                list.add(kept).write_unaligned(entry);
                kept += 1;
            }
        }
    }
    // SAFETY: as above.
    unsafe { *count = u32::try_from(kept).unwrap_or(0) };
}

macro_rules! process_lists {
    ($($name:ident $entry:ident;)*) => {$(
        pub unsafe fn $name(
            real: sig::$name,
            device: *mut c_void,
            infoCount: *mut u32,
            infos: *mut c_void,
        ) -> Status {
            // SAFETY: the application's own call.
            let status = unsafe { real(device, infoCount, infos) };
            if status.is_success() {
                // SAFETY: NVML has just filled as many entries of this version as it says.
                unsafe { own_entries::<$entry>(device, infoCount, infos) };
            }
            status
        }
    )*};
}
process_lists! {
    nvmlDeviceGetComputeRunningProcesses ProcessV1;
    nvmlDeviceGetComputeRunningProcesses_v2 ProcessV2;
    nvmlDeviceGetComputeRunningProcesses_v3 ProcessV2;
    nvmlDeviceGetGraphicsRunningProcesses ProcessV1;
    nvmlDeviceGetGraphicsRunningProcesses_v2 ProcessV2;
    nvmlDeviceGetGraphicsRunningProcesses_v3 ProcessV2;
    nvmlDeviceGetMPSComputeRunningProcesses ProcessV1;
    nvmlDeviceGetMPSComputeRunningProcesses_v2 ProcessV2;
    nvmlDeviceGetMPSComputeRunningProcesses_v3 ProcessV2;
}

/// The settings, where they set a limit for this process, before CUDA is in use.
fn configured() -> Option<&'static Settings> {
    static CONFIG: OnceLock<Option<Settings>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| Settings::read(&|name| std::env::var(name).ok()).ok());
    let config = config.as_ref().filter(|config| !config.disabled)?;
    config.limit_on(0, u64::MAX / 2).map(|_| config)
}

/// The index of a device of NVML's among the driver's: by its uuid, since the orders differ.
fn index_of(runtime: &Runtime, device: *mut c_void) -> Option<usize> {
    let mut text = [0u8; 96];
    // SAFETY: the buffer has the length that is given.
    let status = unsafe { call::nvmlDeviceGetUUID(device, text.as_mut_ptr().cast(), 96) };
    if !status.is_success() {
        return None;
    }
    let end = text.iter().position(|&b| b == 0)?;
    let uuid = uuid_bytes(&text[..end])?;
    runtime.devices.iter().position(|d| d.uuid == uuid)
}

/// Free and total as the program is to see them; `None`: no quota holds for this device.
fn told(device: *mut c_void, real_total: u64) -> Option<(u64, u64)> {
    if let Some(runtime) = runtime::get() {
        if !runtime.limited {
            return None;
        }
        let index = index_of(runtime, device)?;
        let limit = runtime.desired().devices[index].limit.load(SeqCst);
        return Some(runtime.told(index)).map(|(free, _)| (free, limit));
    }
    let limit = configured()?.limit_on(0, real_total)?;
    Some((limit, limit))
}

pub unsafe fn nvmlDeviceGetMemoryInfo(
    real: sig::nvmlDeviceGetMemoryInfo,
    device: *mut c_void,
    memory: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(device, memory) };
    if status.is_success() && !memory.is_null() {
        // SAFETY: NVML has just filled a structure of this layout.
        let memory = unsafe { &mut *memory.cast::<Memory>() };
        if let Some((free, total)) = told(device, memory.total) {
            *memory = Memory {
                total,
                free,
                used: total - free.min(total),
            };
        }
    }
    status
}

pub unsafe fn nvmlDeviceGetMemoryInfo_v2(
    real: sig::nvmlDeviceGetMemoryInfo_v2,
    device: *mut c_void,
    memory: *mut c_void,
) -> Status {
    // SAFETY: the application's own call.
    let status = unsafe { real(device, memory) };
    if status.is_success() && !memory.is_null() {
        // SAFETY: NVML has just filled a structure of this layout.
        let memory = unsafe { &mut *memory.cast::<MemoryV2>() };
        if let Some((free, total)) = told(device, memory.total) {
            memory.total = total;
            memory.reserved = 0;
            memory.free = free;
            memory.used = total - free.min(total);
        }
    }
    status
}

#[cfg(test)]
mod tests {
    use super::uuid_bytes;

    #[test]
    fn reads_a_uuid_as_nvml_writes_it() {
        let uuid = uuid_bytes(b"GPU-00010203-0405-0607-0809-0a0b0c0d0e0f").unwrap();
        assert_eq!(uuid, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(uuid_bytes(b"GPU-00"), None);
        assert_eq!(uuid_bytes(b"00010203-0405-0607-0809-0a0b0c0d0e0f"), None);
    }
}
