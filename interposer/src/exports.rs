//! The exports of what is hooked, in both libraries.
//!
//! The crate defines before it what becomes of a name that is not hooked: `pass!(LIBRARY name)` as an item,
//! `passed!(LIBRARY name)` as its address. Everything expands from the core's table. Addresses of our own exports are bound within this object
//! (`-Bsymbolic-functions`, see `build.rs`), so that a program's or another preload's function of the same name
//! never ends up in the map.

#![allow(non_snake_case, reason = "named after the driver's entry points")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the driver's own rules for each call"
)]
#![allow(clippy::too_many_arguments, reason = "the driver's own signatures")]

use core::ffi::{c_char, c_void};
use spillway_interposer_core::driver::Status;
use spillway_interposer_core::entry::{self, Exports};
use spillway_interposer_core::table::{CUipcMemHandle, CUmemLocation};
use spillway_interposer_core::{custom_body, driver_rows, gated_body, nvml_rows};

macro_rules! export {
    (off $library:ident $name:ident ($($argument:ident: $type:ty),*)) => {
        pass!($library $name);
    };
    (slot $library:ident $name:ident ($($argument:ident: $type:ty),*)) => {
        pass!($library $name);
    };
    // Written out below.
    (entry $library:ident $name:ident ($($argument:ident: $type:ty),*)) => {};
    (custom $library:ident $name:ident ($($argument:ident: $type:ty),*)) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> Status {
            custom_body!($name ($($argument),*))
        }
    };
    ($how:ident $library:ident $name:ident ($($argument:ident: $type:ty),*)) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> Status {
            gated_body!($how $name ($($argument),*))
        }
    };
}

macro_rules! export_all {
    ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
       [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
        $(export!($how $library $name ($($argument: $type),*));)*
    };
}
driver_rows!(export_all);
nvml_rows!(export_all);

macro_rules! address {
    (off $library:ident $name:ident) => {
        passed!($library $name)
    };
    (slot $library:ident $name:ident) => {
        passed!($library $name)
    };
    ($how:ident $library:ident $name:ident) => {
        $name as *const ()
    };
}

macro_rules! addresses {
    ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
       [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
        &[$(address!($how $library $name)),*]
    };
}

/// The address of every export, by row.
pub(crate) static EXPORTS: Exports = Exports {
    driver: driver_rows!(addresses),
    nvml: nvml_rows!(addresses),
};

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress(
    symbol: *const c_char,
    pfn: *mut *mut c_void,
    cudaVersion: i32,
    flags: u64,
) -> Status {
    // SAFETY: the application's own arguments.
    entry::shield(|| unsafe { entry::get_proc_address(&EXPORTS, symbol, pfn, cudaVersion, flags) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    pfn: *mut *mut c_void,
    cudaVersion: i32,
    flags: u64,
    symbolStatus: *mut u32,
) -> Status {
    // SAFETY: the application's own arguments.
    entry::shield(|| unsafe {
        entry::get_proc_address_v2(&EXPORTS, symbol, pfn, cudaVersion, flags, symbolStatus)
    })
}
