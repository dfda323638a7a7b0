//! Start, versions, errors and the search for functions.

use crate::abi::{In, Out, exports, text};
use crate::table::{Found, search};
use spillway_simulator_core::code::{INVALID_VALUE, NOT_FOUND, R, lookup};
use spillway_simulator_core::{config, driver};
use std::ffi::{c_char, c_void};

const PER_THREAD_STREAM: u64 = 2;

fn driver_version() -> R<u32> {
    match driver::get() {
        Ok(driver) => Ok(driver.shared.config().driver),
        // Asked before cuInit: the environment is all there is.
        Err(_) => config::Config::from_env()
            .map(|c| c.driver)
            .map_err(|_| INVALID_VALUE),
    }
}

fn find(symbol: In<c_char>, pfn: Out<*const c_void>, version: i32, flags: u64) -> R<u32> {
    let name = text(symbol)?;
    pfn.set(std::ptr::null())?;
    let driver = driver_version()?;
    if flags > PER_THREAD_STREAM || version < 0 || version as u32 > driver {
        return Err(INVALID_VALUE);
    }
    match search(&name, version as u32, flags == PER_THREAD_STREAM, driver) {
        Found::Symbol(row) => {
            pfn.set(row.address as *const c_void)?;
            Ok(0)
        }
        Found::Nothing => Ok(1),
        Found::TooNew => Ok(2),
    }
}

exports! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        driver::init()
    }

    fn cuDriverGetVersion(version: Out<i32>) {
        version.set(driver_version()? as i32)
    }

    fn cuGetErrorName(error: u32, name: Out<*const c_char>) {
        let found = lookup(error);
        name.set(found.map_or(std::ptr::null(), |f| f.0.as_ptr().cast()))?;
        found.map(|_| ()).ok_or(INVALID_VALUE)
    }

    fn cuGetErrorString(error: u32, description: Out<*const c_char>) {
        let found = lookup(error);
        description.set(found.map_or(std::ptr::null(), |f| f.1.as_ptr().cast()))?;
        found.map(|_| ()).ok_or(INVALID_VALUE)
    }

    fn cuGetProcAddress(symbol: In<c_char>, pfn: Out<*const c_void>, version: i32, flags: u64) {
        match find(symbol, pfn, version, flags)? {
            0 => Ok(()),
            _ => Err(NOT_FOUND),
        }
    }

    fn cuGetProcAddress_v2(
        symbol: In<c_char>, pfn: Out<*const c_void>, version: i32, flags: u64, status: Out<u32>,
    ) {
        let outcome = find(symbol, pfn, version, flags);
        status.offer(*outcome.as_ref().unwrap_or(&1));
        outcome.map(|_| ())
    }

    fn cuGetExportTable(table: Out<*const c_void>, id: In<[u8; 16]>) {
        // Private interfaces between the vendor's own libraries: there are none here.
        id.get()?;
        table.set(std::ptr::null())?;
        Err(NOT_FOUND)
    }
}
