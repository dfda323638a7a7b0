//! `cuGetProcAddress`: the real one answers, then its *answer* is mapped to our export.
//!
//! Choosing by name and version would hand a caller another signature sooner or later; an address is
//! what it is. The map is built once from all rows of the table, by the real `dlsym` and by the real
//! `cuGetProcAddress` with each row's exact version. Where several rows share an address (a driver may
//! fold functions that only refuse), the one whose base name was asked for is taken. An address that no row
//! has is counted as an unknown entry point: by name, or by address if the table has the name in other
//! versions. It stays the driver's answer; in strict mode the answer is that there is no such symbol.

use super::Exports;
use crate::driver::{Status, call, library, strict, unknown};
use crate::table::{Library, ROWS, Row};
use core::ffi::{CStr, c_char, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, Ordering};

/// Where an entry point of the real driver is, and which row that is.
type Known = (usize, usize);

/// The map, sorted by address; null until built. Never freed.
static MAP: AtomicPtr<Vec<Known>> = AtomicPtr::new(null_mut());

/// `CU_GET_PROC_ADDRESS_DEFAULT`, `_LEGACY_STREAM`, `_PER_THREAD_DEFAULT_STREAM`.
const DEFAULT: u64 = 0;
const LEGACY_STREAM: u64 = 1;
const PER_THREAD_DEFAULT_STREAM: u64 = 2;

/// `CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND`
const SYMBOL_NOT_FOUND: u32 = 1;

/// The exported `cuGetProcAddress_v2`.
///
/// # Safety
/// The driver's own rules for this call.
pub unsafe fn get_proc_address_v2(
    exports: &'static Exports,
    symbol: *const c_char,
    function: *mut *mut c_void,
    version: i32,
    flags: u64,
    found: *mut u32,
) -> Status {
    // SAFETY: the application's own arguments.
    let status = unsafe { call::cuGetProcAddress_v2(symbol, function, version, flags, found) };
    // SAFETY: the driver has accepted the pointers if it says success.
    let answer = unsafe { substitute(exports, status, symbol, function) };
    if answer != status && !found.is_null() {
        // SAFETY: the driver has written it, too.
        unsafe { *found = SYMBOL_NOT_FOUND };
    }
    answer
}

/// The exported `cuGetProcAddress`, as CUDA 11.3 to 11.8 called it.
///
/// # Safety
/// The driver's own rules for this call.
pub unsafe fn get_proc_address(
    exports: &'static Exports,
    symbol: *const c_char,
    function: *mut *mut c_void,
    version: i32,
    flags: u64,
) -> Status {
    // SAFETY: the application's own arguments.
    let status = unsafe { call::cuGetProcAddress(symbol, function, version, flags) };
    // SAFETY: the driver has accepted both pointers if it says success.
    unsafe { substitute(exports, status, symbol, function) }
}

/// Puts our export in the place of the driver's; in strict mode takes away what is unknown, with
/// another status.
///
/// # Safety
/// After success `symbol` is a C string and `function` null or valid.
unsafe fn substitute(
    exports: &'static Exports,
    status: Status,
    symbol: *const c_char,
    function: *mut *mut c_void,
) -> Status {
    if !status.is_success() || symbol.is_null() || function.is_null() {
        return status;
    }
    // SAFETY: the caller's promise.
    let (asked, real) = unsafe { (CStr::from_ptr(symbol), *function) };
    if real.is_null() {
        return status;
    }
    match find(map(), real as usize, asked) {
        Some(row) => {
            let recorded = if crate::trace::is_on() {
                crate::trace::wrapper(exports, row)
            } else {
                None
            };
            let export = recorded.unwrap_or(exports.driver[row]);
            if !export.is_null() {
                // SAFETY: as above.
                unsafe { *function = export.cast_mut().cast() };
            }
        }
        None => {
            let new = count_unknown(asked, real as usize);
            if strict::is_strict() {
                if new {
                    strict::refused(asked);
                }
                // SAFETY: as above.
                unsafe { *function = null_mut() };
                return Status::NOT_FOUND;
            }
        }
    }
    status
}

/// Notes what the driver has handed out for `asked`; whether it is one more.
fn count_unknown(asked: &CStr, address: usize) -> bool {
    let listed = ROWS
        .iter()
        .any(|row| row.base == asked || row.symbol == asked);
    if crate::table::is_interop(asked.to_bytes()) {
        false
    } else if !listed && unknown::is_drivers(asked.to_bytes()) {
        unknown::record(asked, true)
    } else {
        unknown::record_address(address)
    }
}

/// The row behind `address` that goes by the name `asked`.
fn find(map: &[Known], address: usize, asked: &CStr) -> Option<usize> {
    let first = map.partition_point(|&(known, _)| known < address);
    map[first..]
        .iter()
        .take_while(|&&(known, _)| known == address)
        .map(|&(_, row)| row)
        .find(|&row| ROWS[row].base == asked || ROWS[row].symbol == asked)
}

fn map() -> &'static [Known] {
    let mut known = MAP.load(Ordering::Acquire);
    if known.is_null() {
        let built = Box::into_raw(Box::new(build()));
        // No lock: two threads may build, one wins; a forked child finds it whole or not at all.
        known = match MAP.compare_exchange(null_mut(), built, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => built,
            Err(theirs) => {
                // SAFETY: made above, seen by nobody.
                drop(unsafe { Box::from_raw(built) });
                theirs
            }
        };
    }
    // SAFETY: published above, never freed or changed.
    unsafe { &*known }
}

fn build() -> Vec<Known> {
    let mut map = Vec::with_capacity(3 * ROWS.len());
    for (index, row) in ROWS.iter().enumerate() {
        let mut add = |address: *mut c_void| {
            if !address.is_null() {
                map.push((address as usize, index));
            }
        };
        add(library::symbol(Library::CUDA, row.symbol));
        if row.is_per_thread() {
            add(ask(row, PER_THREAD_DEFAULT_STREAM));
        } else {
            add(ask(row, LEGACY_STREAM));
            add(ask(row, DEFAULT));
        }
    }
    map.sort_unstable();
    map.dedup();
    map
}

/// What the real `cuGetProcAddress` answers for the row's base name at its exact version.
fn ask(row: &Row, flags: u64) -> *mut c_void {
    let mut function = null_mut();
    let mut found = 0;
    let name = row.base.as_ptr();
    // SAFETY: a C string and two valid results.
    let mut status = unsafe {
        call::cuGetProcAddress_v2(name, &raw mut function, row.version, flags, &raw mut found)
    };
    if status == Status::missing(Library::CUDA) && function.is_null() {
        // Either this name is not there, or the driver is older than the second version (12.0).
        // SAFETY: as above.
        status = unsafe { call::cuGetProcAddress(name, &raw mut function, row.version, flags) };
    }
    if status.is_success() {
        function
    } else {
        null_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str) -> usize {
        crate::table::find(name.as_bytes()).expect(name).0
    }

    #[test]
    fn the_asked_name_decides_between_rows_of_one_address() {
        let map = [
            (16, row("cuMemAlloc_v2")),
            (32, row("cuMemFree_v2")),
            (32, row("cuLaunchKernel")),
        ];
        assert_eq!(find(&map, 16, c"cuMemAlloc"), Some(row("cuMemAlloc_v2")));
        assert_eq!(
            find(&map, 32, c"cuLaunchKernel"),
            Some(row("cuLaunchKernel"))
        );
        assert_eq!(find(&map, 32, c"cuMemFree"), Some(row("cuMemFree_v2")));
        assert_eq!(
            find(&map, 32, c"cuCtxSynchronize"),
            None,
            "folded with others: not ours to replace"
        );
        assert_eq!(find(&map, 24, c"cuMemAlloc"), None);
        assert_eq!(find(&[], 24, c"cuMemAlloc"), None);
    }
}
