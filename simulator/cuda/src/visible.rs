//! The library file has the names of every release. Those that the simulated driver is too old for
//! are taken out of this process's view of the symbol table when the library is loaded, so that
//! `dlsym` answers null for them, as it would with that driver's own file.
//!
//! What was bound before that (a program linked to the library and bound at its start) is refused
//! by `abi::enter` instead.

use crate::table::{ROWS, Row};
use spillway_simulator_core::driver;
use std::ffi::{CStr, c_void};

#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = hide;

/// The GNU C library's `dladdr` that also finds the table's entry.
const SYMBOL_ENTRY: i32 = 1;

unsafe extern "C" {
    fn dladdr1(
        address: *const c_void,
        info: *mut libc::Dl_info,
        extra: *mut *mut c_void,
        flags: i32,
    ) -> i32;
}

/// The entry of a row's symbol in the loaded table; `None` if it is not exported (in unit tests).
fn entry(row: &Row) -> Option<*mut libc::Elf64_Sym> {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    let mut entry = std::ptr::null_mut();
    let address = row.address as *const c_void;
    // SAFETY: the address is one of this library's functions, the two results are ours.
    let found = unsafe { dladdr1(address, &raw mut info, &raw mut entry, SYMBOL_ENTRY) };
    if found == 0 || entry.is_null() || info.dli_sname.is_null() {
        return None;
    }
    // SAFETY: the name that the loader just gave is a string in the loaded library.
    let name = unsafe { CStr::from_ptr(info.dli_sname) };
    (name.to_bytes() == row.symbol.as_bytes()).then_some(entry.cast())
}

/// Makes the pages that the bytes lie on readable and, for a moment, writable.
fn protect(start: usize, end: usize, writable: bool) -> bool {
    // SAFETY: a question without preconditions.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let (start, end) = (start / page * page, end.next_multiple_of(page));
    let rights = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    // SAFETY: the pages hold this library's symbol table, in its read-only segment; they stay
    // readable throughout, and hold no code (the library is linked with separate segments, which
    // its test sees to).
    unsafe { libc::mprotect(start as *mut c_void, end - start, rights) == 0 }
}

extern "C" fn hide() {
    let Ok(driver) = driver::version() else {
        // cuInit will say what is wrong.
        return;
    };
    let newer: Vec<*mut libc::Elf64_Sym> = ROWS
        .iter()
        .filter(|row| row.version > driver)
        .filter_map(entry)
        .collect();
    let bounds = (newer.iter().min(), newer.iter().max());
    let (Some(first), Some(last)) = bounds else {
        return;
    };
    let (start, end) = (
        *first as usize,
        *last as usize + size_of::<libc::Elf64_Sym>(),
    );
    if !protect(start, end, true) {
        return;
    }
    for entry in newer {
        // SAFETY: entries of the mapped table, writable now; the loader reads them under its lock,
        // which this thread holds while it loads the library.
        unsafe {
            (*entry).st_value = 0;
            (*entry).st_shndx = 0;
        }
    }
    protect(start, end, false);
}
