//! A driver for one device whose calls do nothing, succeed, and cost next to nothing.
//!
//! For measuring what is added to a call, and for nothing else: there is no memory behind its addresses, and
//! nothing runs. It has what the benches call and what Spillway needs to move memory. The device's UUID is
//! that of the variable `FREE_DRIVER_UUID` (as NVML writes it), so that a coordinator knows the device.

#![allow(non_snake_case, reason = "named after the driver's entry points")]
#![allow(clippy::missing_safety_doc, reason = "the driver's own rules")]
#![allow(clippy::too_many_arguments, reason = "the driver's own signatures")]

mod addresses;

use std::ffi::{c_char, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

const SUCCESS: i32 = 0;
const INVALID_VALUE: i32 = 1;
const OUT_OF_MEMORY: i32 = 2;
const NOT_FOUND: i32 = 500;
/// Bytes of the device.
const MEMORY: usize = 64 << 30;
/// `CUcontext` of the one context that there is.
const CONTEXT: *mut c_void = 0xc0de_0000 as *mut c_void;

/// Writes an answer, if there is a place for it.
///
/// # Safety
/// `out` is null or the caller's place for a `T`.
unsafe fn answer<T>(out: *mut T, value: T) -> i32 {
    if out.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's promise.
    unsafe { out.write(value) };
    SUCCESS
}

/// A handle for an object that has no state.
fn handle() -> *mut c_void {
    static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
    NEXT.fetch_add(16, Relaxed) as *mut c_void
}

macro_rules! does_nothing {
    ($($name:ident($($type:ty),*);)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($(_: $type),*) -> i32 {
            SUCCESS
        }
    )*};
}

does_nothing! {
    cuInit(u32);
    cuDevicePrimaryCtxRelease_v2(i32);
    cuCtxSetCurrent(*mut c_void);
    cuCtxPushCurrent_v2(*mut c_void);
    cuCtxSynchronize();
    cuFuncLoad(*mut c_void);
    cuModuleUnload(*mut c_void);
    cuStreamDestroy_v2(*mut c_void);
    cuStreamSynchronize(*mut c_void);
    cuStreamQuery(*mut c_void);
    cuEventDestroy_v2(*mut c_void);
    cuEventQuery(*mut c_void);
    cuEventSynchronize(*mut c_void);
    cuEventRecord(*mut c_void, *mut c_void);
    cuLaunchKernel(*mut c_void, u32, u32, u32, u32, u32, u32, u32, *mut c_void, *mut *mut c_void, *mut *mut c_void);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, *mut c_void);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, *mut c_void);
    cuMemHostRegister_v2(*mut c_void, usize, u32);
    cuMemHostUnregister(*mut c_void);
    cuMemRelease(u64);
    cuMemMap(u64, usize, usize, u64, u64);
    cuMemUnmap(u64, usize);
    cuMemSetAccess(u64, usize, *const c_void, usize);
    cuPointerSetAttribute(*const c_void, u32, u64);
    cuThreadExchangeStreamCaptureMode(*mut u32);
}

/// NAME [arguments before] type of the answer [arguments after] = the answer.
macro_rules! answers {
    ($($name:ident [$($before:ident: $before_type:ty),*] $type:ty [$($after:ident: $after_type:ty),*] = $value:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($before: $before_type,)* out: *mut $type, $($after: $after_type),*) -> i32 {
            // SAFETY: the caller's place for the answer, by the driver's signature.
            unsafe { answer(out, $value) }
        }
    )*};
}

answers! {
    cuDriverGetVersion [] i32 [] = 12080;
    cuDeviceGetCount [] i32 [] = 1;
    cuDeviceGet [] i32 [_index: i32] = 0;
    cuDeviceTotalMem_v2 [] usize [_device: i32] = MEMORY;
    cuDevicePrimaryCtxRetain [] *mut c_void [_device: i32] = CONTEXT;
    cuCtxGetCurrent [] *mut c_void [] = CONTEXT;
    cuCtxPopCurrent_v2 [] *mut c_void [] = CONTEXT;
    cuCtxGetDevice [] i32 [] = 0;
    cuModuleLoadData [] *mut c_void [_image: *const c_void] = handle();
    cuModuleGetFunction [] *mut c_void [_module: *mut c_void, _name: *const c_char] = handle();
    cuFuncIsLoaded [] i32 [_function: *mut c_void] = 1;
    cuStreamCreate [] *mut c_void [_flags: u32] = handle();
    cuStreamIsCapturing [_stream: *mut c_void] i32 [] = 0;
    cuEventCreate [] *mut c_void [_flags: u32] = handle();
    cuMemCreate [] u64 [_size: usize, _properties: *const c_void, _flags: u64] = addresses::handle();
}

/// Everything is supported, also mapped memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(out: *mut i32, _attribute: i32, _device: i32) -> i32 {
    // SAFETY: the caller's place for an integer.
    unsafe { answer(out, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxGetState(
    _device: i32,
    flags: *mut u32,
    active: *mut i32,
) -> i32 {
    // SAFETY: the caller's places for two integers.
    unsafe { answer(flags, 0) | answer(active, 1) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(out: *mut c_char, length: i32, _device: i32) -> i32 {
    for (index, byte) in (0..length).zip(b"Free driver\0") {
        // SAFETY: the caller's buffer of `length` bytes.
        unsafe { out.offset(index as isize).write(byte.cast_signed()) };
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(out: *mut [u8; 16], _device: i32) -> i32 {
    // SAFETY: the caller's place for 16 bytes.
    unsafe { answer(out, uuid()) }
}

fn uuid() -> [u8; 16] {
    let text = std::env::var("FREE_DRIVER_UUID").unwrap_or_default();
    let digits: Vec<u8> = text
        .trim_start_matches("GPU-")
        .bytes()
        .filter(u8::is_ascii_hexdigit)
        .collect();
    let mut bytes = [0xf0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).unwrap_or("0");
        *byte = u8::from_str_radix(pair, 16).unwrap_or(0);
    }
    bytes
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(out: *mut u64, bytes: usize) -> i32 {
    if bytes == 0 {
        return INVALID_VALUE;
    }
    if bytes > MEMORY {
        return OUT_OF_MEMORY;
    }
    // SAFETY: the caller's place for an address.
    unsafe { answer(out, addresses::take(bytes)) }
}

/// The size is not known here, so the address is not used again.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(_address: u64) -> i32 {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(out: *mut *mut c_void, bytes: usize) -> i32 {
    let layout = std::alloc::Layout::from_size_align(bytes.max(1), 4096);
    let made = layout.map_or(null_mut(), |layout| {
        // SAFETY: not of size 0.
        unsafe { std::alloc::alloc_zeroed(layout) }
    });
    if made.is_null() {
        return OUT_OF_MEMORY;
    }
    // SAFETY: the caller's place for a pointer.
    unsafe { answer(out, made.cast()) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> i32 {
    // SAFETY: the caller's places for two integers.
    unsafe { answer(free, MEMORY) | answer(total, MEMORY) }
}

/// Everything is of the one context; whatever else is asked is 64 bits wide at most.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(
    out: *mut c_void,
    attribute: u32,
    _address: u64,
) -> i32 {
    /// `CU_POINTER_ATTRIBUTE_CONTEXT`
    const OF_CONTEXT: u32 = 1;
    if attribute == OF_CONTEXT {
        // SAFETY: the caller's place for a handle.
        return unsafe { answer(out.cast(), CONTEXT) };
    }
    INVALID_VALUE
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressReserve(
    out: *mut u64,
    bytes: usize,
    _alignment: usize,
    _hint: u64,
    _flags: u64,
) -> i32 {
    // SAFETY: the caller's place for an address.
    unsafe { answer(out, addresses::reserve(bytes)) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAddressFree(address: u64, bytes: usize) -> i32 {
    addresses::unreserve(address, bytes);
    SUCCESS
}

/// Who wants this driver asks it by its exports.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    _name: *const c_char,
    out: *mut *mut c_void,
    _version: i32,
    _flags: u64,
    _status: *mut u32,
) -> i32 {
    // SAFETY: the caller's place for an address.
    unsafe { answer(out, null_mut()) };
    NOT_FOUND
}
