//! Start, versions, errors and the search for functions.

use crate::abi::{In, Out, exports, text};
use crate::submit::here;
use crate::table::{Found, search};
use spillway_simulator_core::code::{INVALID_VALUE, NOT_FOUND, NOT_SUPPORTED, R, lookup};
use spillway_simulator_core::driver;
use spillway_simulator_core::release::{DEFAULT, Release};
use std::ffi::{c_char, c_void};

const PER_THREAD_STREAM: u64 = 2;

/// From this version on a request for a version later than the driver's is refused; before, it
/// finds what the driver has.
const REFUSES_LATER: u32 = 13_000;

/// `CUdriverProcAddressQueryResult`.
const FOUND: u32 = 0;
const SYMBOL_NOT_FOUND: u32 = 1;
const VERSION_NOT_SUFFICIENT: u32 = 2;

fn driver_version() -> R<u32> {
    driver::version().map_err(|_| INVALID_VALUE)
}

fn known_code(error: u32) -> R<Option<(&'static str, &'static str)>> {
    let release = Release::of(driver_version()?).unwrap_or(DEFAULT);
    Ok(lookup(error).filter(|_| release.has_code(error)))
}

fn find(symbol: In<c_char>, pfn: Out<*const c_void>, version: i32, flags: u64) -> R<u32> {
    let name = text(symbol)?;
    pfn.set(std::ptr::null())?;
    let driver = driver_version()?;
    let version = u32::try_from(version).map_err(|_| INVALID_VALUE)?;
    if flags > PER_THREAD_STREAM || version > driver && driver >= REFUSES_LATER {
        return Err(INVALID_VALUE);
    }
    match search(&name, version, flags == PER_THREAD_STREAM, driver) {
        Found::Symbol(row) => {
            pfn.set(row.address as *const c_void)?;
            Ok(FOUND)
        }
        Found::Nothing => Ok(SYMBOL_NOT_FOUND),
        Found::TooNew => Ok(VERSION_NOT_SUFFICIENT),
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
        let found = known_code(error)?;
        name.set(found.map_or(std::ptr::null(), |f| f.0.as_ptr().cast()))?;
        found.map(|_| ()).ok_or(INVALID_VALUE)
    }

    fn cuGetErrorString(error: u32, description: Out<*const c_char>) {
        let found = known_code(error)?;
        description.set(found.map_or(std::ptr::null(), |f| f.1.as_ptr().cast()))?;
        found.map(|_| ()).ok_or(INVALID_VALUE)
    }

    fn cuGetProcAddress(symbol: In<c_char>, pfn: Out<*const c_void>, version: i32, flags: u64) {
        match find(symbol, pfn, version, flags)? {
            FOUND => Ok(()),
            _ => Err(NOT_FOUND),
        }
    }

    fn cuGetProcAddress_v2(
        symbol: In<c_char>, pfn: Out<*const c_void>, version: i32, flags: u64, status: Out<u32>,
    ) {
        let outcome = find(symbol, pfn, version, flags);
        status.offer(*outcome.as_ref().unwrap_or(&SYMBOL_NOT_FOUND));
        outcome.map(|_| ())
    }

    fn cuProfilerInitialize(config: In<c_char>, output: In<c_char>, mode: u32) {
        let _ = (config, output, mode);
        // Gone from the driver's profiler; the name is still there.
        driver::get().and(Err(NOT_SUPPORTED))
    }

    fn cuProfilerStart() {
        here().map(|_| ())
    }

    fn cuProfilerStop() {
        here().map(|_| ())
    }

    fn cuGetExportTable(table: Out<*const c_void>, id: In<[u8; 16]>) {
        // Private interfaces between the vendor's own libraries: there are none here. One table of the
        // simulator's own, with nothing in it but its size, is there to see what comes of handing one out.
        if id.get()? == *b"spillwaysimtable" {
            static TABLE: [usize; 1] = [size_of::<usize>()];
            return table.set(TABLE.as_ptr().cast());
        }
        table.set(std::ptr::null())?;
        Err(NOT_FOUND)
    }
}
