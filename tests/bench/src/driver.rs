//! The driver's functions that the benches call, from one source of addresses or the other.
#![allow(non_snake_case)]
#![allow(clippy::too_many_arguments, reason = "the driver's own signatures")]

use std::ffi::{CStr, c_char, c_void};

use anyhow::{Result, bail};

use crate::symbols::Library;

/// A result code of the driver: any number.
pub type Code = i32;
/// Any object of the driver.
pub type Handle = *mut c_void;

macro_rules! functions {
    ($($name:ident($($type:ty),*);)*) => {
        /// Addresses of the driver's functions, all from one source.
        pub struct Driver {
            $(#[allow(missing_docs)] pub $name: unsafe extern "C" fn($($type),*) -> Code,)*
        }

        /// The names in [`Driver`].
        pub const NAMES: &[&CStr] = &[$(name(concat!(stringify!($name), "\0")),)*];

        impl Driver {
            fn from(find: impl Fn(&CStr) -> *mut c_void) -> Result<Self> {
                Ok(Self {
                    $($name: {
                        let address = find(name(concat!(stringify!($name), "\0")));
                        if address.is_null() {
                            bail!("the driver has no {}", stringify!($name));
                        }
                        // SAFETY: the function of this name has this C signature.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> Code>(address) }
                    },)*
                })
            }

            fn addresses(&self) -> Vec<usize> {
                vec![$(self.$name as usize,)*]
            }
        }
    };
}

const fn name(text: &str) -> &CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(name) => name,
        Err(_) => c"",
    }
}

functions! {
    cuInit(u32);
    cuDriverGetVersion(*mut i32);
    cuDeviceGet(*mut i32, i32);
    cuDeviceGetName(*mut c_char, i32, i32);
    cuDevicePrimaryCtxRetain(*mut Handle, i32);
    cuCtxSetCurrent(Handle);
    cuCtxSynchronize();
    cuModuleLoadData(*mut Handle, *const c_void);
    cuModuleGetFunction(*mut Handle, Handle, *const c_char);
    cuStreamCreate(*mut Handle, u32);
    cuEventCreate(*mut Handle, u32);
    cuEventRecord(Handle, Handle);
    cuLaunchKernel(Handle, u32, u32, u32, u32, u32, u32, u32, Handle, *mut *mut c_void, *mut *mut c_void);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, Handle);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, Handle);
    cuMemAllocHost_v2(*mut *mut c_void, usize);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuPointerGetAttribute(*mut c_void, u32, u64);
    cuMemAddressReserve(*mut u64, usize, usize, u64, u64);
    cuMemAddressFree(u64, usize);
    cuMemCreate(*mut u64, usize, *const c_void, u64);
    cuMemRelease(u64);
    cuMemMap(u64, usize, usize, u64, u64);
    cuMemUnmap(u64, usize);
    cuMemSetAccess(u64, usize, *const c_void, usize);
}

/// Both sources of addresses of one driver.
pub struct Both {
    /// The driver's own functions.
    pub direct: Driver,
    /// What a program gets.
    pub hooked: Driver,
    /// The driver's file.
    pub path: String,
    /// How many of the functions are not the driver's own: 0 without a preloaded library.
    pub replaced: usize,
}

impl Both {
    /// Opens the driver that the loader finds.
    ///
    /// # Errors
    /// There is none, or it lacks a function.
    pub fn open() -> Result<Self> {
        let library = Library::open(c"libcuda.so.1")?;
        let direct = Driver::from(|name| library.own(name))?;
        let hooked = Driver::from(|name| library.as_programs(name))?;
        let replaced = direct
            .addresses()
            .iter()
            .zip(hooked.addresses())
            .filter(|&(&own, programs)| own != programs)
            .count();
        let path = library.path();
        Ok(Self {
            direct,
            hooked,
            path,
            replaced,
        })
    }
}

/// Fails with the driver's code.
///
/// # Errors
/// The code is not success.
pub fn check(what: &str, code: Code) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    bail!("{what} answers {code}")
}
