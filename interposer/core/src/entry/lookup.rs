//! What the exported `dlsym` does with names that may be the driver's.
//!
//! Neither allocates nor loads anything, reads no environment, and takes no lock but the loader's own,
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

use super::Exports;
use crate::driver::library::real_dlsym;
use crate::driver::{Object, find_loaded, object_of};
use crate::table::Row;
use core::ffi::{CStr, c_char, c_void};
use core::ptr::null_mut;

/// What the exported `dlsym` should do.
#[repr(C)]
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
    let symbol = unsafe { CStr::from_ptr(name) };
    let Some((row, export)) = exports.find(symbol) else {
        return Answer::REAL;
    };
    if object_of(caller) != Object::Other {
        return Answer::REAL;
    }
    let Some(dlsym) = real_dlsym() else {
        return Answer::REAL;
    };
    let export = export.cast::<c_void>();
    // SAFETY: the application's own arguments, or constants, and a C string.
    let ask = |handle| unsafe { dlsym(handle, name) }.cast_const();
    if handle == libc::RTLD_NEXT {
        return match of(ask(libc::RTLD_NEXT), row) {
            Found::Driver => Answer::address(export),
            Found::Another(_) => Answer::REAL,
            Found::Nothing => if_loaded(row, export, ask),
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
    // The search has met this library itself: what would it have met without us?
    match of(ask(libc::RTLD_NEXT), row) {
        Found::Driver => Answer::address(export),
        Found::Another(address) => Answer::address(address),
        Found::Nothing if handle == libc::RTLD_DEFAULT => if_loaded(row, export, ask),
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

/// The export if the driver is loaded anywhere and has the function. Otherwise null, with `dlerror` set
/// by the question that found nothing.
fn if_loaded(
    row: &Row,
    export: *const c_void,
    ask: impl Fn(*mut c_void) -> *const c_void,
) -> Answer {
    let loaded = find_loaded(row.library);
    if loaded.is_null() || ask(loaded).is_null() {
        return Answer::address(null_mut());
    }
    Answer::address(export)
}
