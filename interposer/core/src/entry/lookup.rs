//! What the exported `dlsym` does with names that may be the driver's.
//!
//! Neither allocates nor loads anything, calls no `getenv`, and takes no lock but the loader's own,
//! as `dlsym` itself does.
//!
//! # What it answers
//! A hooked name is answered by our export exactly when the real look-up would have found the driver's
//! function. With an ordinary handle that is asked of the real `dlsym`. `RTLD_DEFAULT` and `RTLD_NEXT`
//! depend on the caller, which a call from here cannot stand in for; so the real `dlsym` is asked what
//! follows *this library* in the global scope, and if that is nothing, whether the driver is loaded at
//! all: a caller whose own dependencies include it finds it, as without us. Different from a program
//! without this library is only a caller outside of whose scope the driver is loaded: it finds our
//! export where it would have found nothing. Every other case ends in a jump to the real `dlsym` with
//! the caller's registers and return address.
//!
//! # The strict library
//! It *is* `libcuda.so.1` for the loader, so a search that meets it has found the driver, and is answered
//! by our export unless the real driver lacks the name. That cannot be known before the real one is loaded,
//! which happens at the first call: until then every name of the table is found, and one that the driver
//! turns out to lack answers [`Status::NOT_FOUND`](crate::driver::Status::NOT_FOUND).
//!
//! # Names that the table does not have
//! If the driver has them, they are counted (see [`unknown`]), and found by the real `dlsym`. In strict mode
//! they are not found.

use super::Exports;
use crate::driver::library::real_dlsym;
use crate::driver::{Object, loaded_function, object_of, own_role, strict, unknown};
use crate::table::{Library, Row};
use crate::trace;
use core::ffi::{CStr, c_char, c_void};
use core::ptr::null_mut;
use spillway_protocol::note::Role;

/// What the exported `dlsym` should do.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// 0: jump to the real `dlsym`. 1: return `address`.
    decided: usize,
    address: *const c_void,
}

impl Answer {
    const REAL: Self = Self {
        decided: 0,
        address: core::ptr::null(),
    };

    const fn address(address: *const c_void) -> Self {
        Self {
            decided: 1,
            address,
        }
    }
}

/// Decides about `name`, which begins like one of the driver's, for a caller that returns to `caller`.
///
/// # Safety
/// `name` is a C string.
pub unsafe extern "C" fn lookup(
    handle: *mut c_void,
    name: *const c_char,
    caller: *const (),
    exports: &'static Exports,
) -> Answer {
    // SAFETY: the caller's promise.
    let answer = unsafe { decide(handle, name, caller, exports) };
    if trace::is_on() {
        // SAFETY: as above.
        return recorded(
            answer,
            handle,
            unsafe { CStr::from_ptr(name) },
            caller,
            exports,
        );
    }
    answer
}

/// The function that records the call, where the caller gets an export or the driver's own function.
#[cold]
fn recorded(
    answer: Answer,
    handle: *mut c_void,
    symbol: &CStr,
    caller: *const (),
    exports: &'static Exports,
) -> Answer {
    let Some((row, known)) = crate::table::find(symbol.to_bytes()) else {
        return answer;
    };
    if known.library != Library::CUDA
        || matches!(object_of(caller), Object::Driver(_) | Object::Companion)
    {
        return answer;
    }
    let is_recorded = if answer.decided == 1 {
        answer.address == exports.driver[row].cast() && !answer.address.is_null()
    } else if handle == libc::RTLD_NEXT {
        // What follows the caller is not ours to ask for.
        false
    } else {
        real_dlsym().is_some_and(|dlsym| {
            // SAFETY: the application's own handle, and a C string.
            let found = unsafe { dlsym(handle, symbol.as_ptr()) };
            object_of(found.cast_const().cast()) == Object::Driver(Library::CUDA)
        })
    };
    match trace::wrapper(exports, row) {
        Some(wrapper) if is_recorded => Answer::address(wrapper.cast()),
        _ => answer,
    }
}

/// As [`lookup`], without a look at whether calls are recorded.
///
/// # Safety
/// As there.
unsafe fn decide(
    handle: *mut c_void,
    name: *const c_char,
    caller: *const (),
    exports: &'static Exports,
) -> Answer {
    // SAFETY: the caller's promise.
    let symbol = unsafe { CStr::from_ptr(name) };
    let known = exports.find(symbol);
    if known.is_none() && !is_unknown(symbol) {
        return Answer::REAL;
    }
    let Some(dlsym) = real_dlsym() else {
        return Answer::REAL;
    };
    // SAFETY: the application's own arguments, or constants, and a C string.
    let ask = |handle| unsafe { dlsym(handle, name) }.cast_const();
    let in_place = own_role() == Some(Role::Strict);
    if matches!(object_of(caller), Object::Driver(_) | Object::Companion) {
        return drivers_own(handle, symbol, in_place, ask);
    }
    match known {
        None => not_in_the_table(handle, symbol, in_place, ask),
        Some((row, export)) => {
            let export = export.cast::<c_void>();
            in_the_table(handle, symbol, row, export, in_place, ask)
        }
    }
}

/// Whether the name may be the driver's and has no row. (Rows that are not hooked have no export.)
fn is_unknown(symbol: &CStr) -> bool {
    let name = symbol.to_bytes();
    unknown::is_drivers(name)
        && crate::table::find(name).is_none()
        && !crate::table::is_interop(name)
}

/// The driver's own libraries find the driver, whatever we export.
fn drivers_own(
    handle: *mut c_void,
    symbol: &CStr,
    in_place: bool,
    ask: impl Fn(*mut c_void) -> *const c_void,
) -> Answer {
    if !in_place || handle == libc::RTLD_NEXT {
        return Answer::REAL;
    }
    let found = ask(handle);
    if !found.is_null() && !matches!(object_of(found.cast()), Object::Spillway(_)) {
        return Answer::REAL;
    }
    match loaded_function(Library::CUDA, symbol) {
        Some(function) if !function.is_null() => Answer::address(function),
        Some(_) if !found.is_null() => not_found(symbol, LACKING),
        _ => Answer::REAL,
    }
}

fn in_the_table(
    handle: *mut c_void,
    symbol: &CStr,
    row: &Row,
    export: *const c_void,
    in_place: bool,
    ask: impl Fn(*mut c_void) -> *const c_void,
) -> Answer {
    let in_place = in_place && row.library == Library::CUDA;
    if handle == libc::RTLD_NEXT {
        return match of(ask(libc::RTLD_NEXT), row) {
            Found::Driver => Answer::address(export),
            Found::Another(_) => Answer::REAL,
            Found::Nothing => if_loaded(symbol, row, export, in_place),
        };
    }
    let real = ask(handle);
    if real != export {
        return match of(real, row) {
            Found::Driver => Answer::address(export),
            // Nothing: the real one says so again, with the caller's name in its message.
            Found::Another(_) | Found::Nothing => Answer::REAL,
        };
    }
    // The search has met this library itself.
    if in_place && handle != libc::RTLD_DEFAULT {
        return if_loaded(symbol, row, export, in_place);
    }
    // What would it have met without us?
    match of(ask(libc::RTLD_NEXT), row) {
        Found::Driver => Answer::address(export),
        Found::Another(address) => Answer::address(address),
        Found::Nothing if handle == libc::RTLD_DEFAULT => if_loaded(symbol, row, export, in_place),
        Found::Nothing => Answer::address(null_mut()),
    }
}

enum Found {
    Driver,
    Another(*const c_void),
    Nothing,
}

fn of(address: *const c_void, row: &Row) -> Found {
    if address.is_null() {
        Found::Nothing
    } else if object_of(address.cast()) == Object::Driver(row.library) {
        Found::Driver
    } else {
        Found::Another(address)
    }
}

/// The export if the driver is loaded anywhere and has the function; where this library is in the driver's
/// place, also if the driver is not loaded yet. Otherwise it is not found.
fn if_loaded(symbol: &CStr, row: &Row, export: *const c_void, in_place: bool) -> Answer {
    match loaded_function(row.library, symbol) {
        // Asked before this: what follows this library has set `dlerror`.
        None if !in_place => Answer::address(null_mut()),
        Some(function) if function.is_null() => not_found(symbol, LACKING),
        _ => Answer::address(export),
    }
}

fn not_in_the_table(
    handle: *mut c_void,
    symbol: &CStr,
    in_place: bool,
    ask: impl Fn(*mut c_void) -> *const c_void,
) -> Answer {
    let found = ask(handle);
    let mut drivers = found;
    if found.is_null() {
        // The caller's scope may have it, or the driver that this library is in the place of.
        if !in_place && handle != libc::RTLD_NEXT && handle != libc::RTLD_DEFAULT {
            return Answer::REAL;
        }
        match loaded_function(Library::CUDA, symbol) {
            Some(function) if !function.is_null() => drivers = function.cast_const(),
            None if in_place => {
                // Counts when the driver is there and has it.
                unknown::record(symbol, false);
                return Answer::REAL;
            }
            _ => return Answer::REAL,
        }
    } else if object_of(found.cast()) != Object::Driver(Library::CUDA) {
        return Answer::REAL;
    }
    let new = unknown::record(symbol, true);
    if strict::is_strict() {
        if new {
            strict::refused(symbol);
        }
        return not_found(symbol, REFUSED);
    }
    if in_place && found.is_null() {
        // Strict mode is turned off: the real driver's, as a search of this library should find it.
        return Answer::address(drivers);
    }
    Answer::REAL
}

const REFUSED: &str = " (refused: SPILLWAY_STRICT)";
const LACKING: &str = " (the driver lacks it)";

/// Null, with `dlerror` saying that there is no such symbol, and why.
///
/// Only a question that finds nothing sets `dlerror`, and any handle may find the name itself. So it is
/// asked for with the reason behind it, which no symbol's name has. The C library copies the text.
fn not_found(symbol: &CStr, why: &str) -> Answer {
    let mut text = [0_u8; 256];
    let name = symbol.to_bytes();
    let name = &name[..name.len().min(text.len() - 1 - REFUSED.len())];
    let why = why.as_bytes();
    text[..name.len()].copy_from_slice(name);
    text[name.len()..name.len() + why.len()].copy_from_slice(why);
    if let Some(dlsym) = real_dlsym() {
        // SAFETY: a constant, and a C string: its last byte is still zero.
        unsafe { dlsym(libc::RTLD_DEFAULT, text.as_ptr().cast()) };
    }
    Answer::address(null_mut())
}
