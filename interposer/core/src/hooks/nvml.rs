//! NVML's memory figures under the quota: what `nvidia-smi`-like tools inside the program see.
//!
//! They stand whether NVML is asked before or after CUDA is used; before, nothing is in use yet.

use core::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;

use spillway_protocol::Settings;

use crate::driver::{Status, call};
use crate::runtime;
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

/// Free and total as the program is to see them; `None`: no quota holds for this device.
fn told(device: *mut c_void, real_total: u64) -> Option<(u64, u64)> {
    if let Some(runtime) = runtime::get() {
        if !runtime.limited {
            return None;
        }
        let mut text = [0u8; 96];
        // SAFETY: the buffer has the length that is given.
        let status = unsafe { call::nvmlDeviceGetUUID(device, text.as_mut_ptr().cast(), 96) };
        if !status.is_success() {
            return None;
        }
        let end = text.iter().position(|&b| b == 0)?;
        let uuid = uuid_bytes(&text[..end])?;
        let index = runtime.devices.iter().position(|d| d.uuid == uuid)?;
        let limit = runtime.desired().devices[index].limit.load(SeqCst);
        return Some(runtime.told(index)).map(|(free, _)| (free, limit));
    }
    static CONFIG: OnceLock<Option<Settings>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| Settings::read(&|name| std::env::var(name).ok()).ok());
    let config = config.as_ref().filter(|config| !config.disabled)?;
    let limit = config.limit_on(0, real_total)?;
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
