//! What a program gets in the place of an entry point while its calls are recorded: one function per row of
//! the table, with its signature, around the export or the driver's own function.

use crate::driver::{Status, library};
use crate::entry::Exports;
use crate::table::{Library, ROWS};
use core::ffi::CStr;
use core::sync::atomic::{AtomicPtr, Ordering};

/// The exports, once somebody has looked an entry point up.
static EXPORTS: AtomicPtr<Exports> = AtomicPtr::new(core::ptr::null_mut());

/// The function to hand out for a row of [`ROWS`] in the place of the export or of the driver's; `None` for
/// look-ups themselves, which are not recorded. Allocates nothing.
#[must_use]
pub fn wrapper(exports: &'static Exports, row: usize) -> Option<*const ()> {
    EXPORTS.store(core::ptr::from_ref(exports).cast_mut(), Ordering::Release);
    let address = *WRAPPERS.get(row)?;
    (!address.is_null()).then_some(address)
}

/// What a wrapper calls, from its word or looked up.
#[inline(never)]
#[expect(improper_ctypes_definitions, reason = "called from here alone")]
extern "C" fn target(word: &AtomicPtr<()>, name: &CStr) -> *mut () {
    let mut real = word.load(Ordering::Relaxed);
    if real.is_null() {
        real = look_up(name);
        word.store(real, Ordering::Relaxed);
    }
    real
}

/// For any arguments: they are not looked at.
extern "C" fn missing() -> Status {
    library::missing(Library::CUDA)
}

/// The export if the row has one, else the driver's function; one that says so if it has none.
#[cold]
fn look_up(name: &CStr) -> *mut () {
    let row = ROWS.binary_search_by(|row| row.symbol.cmp(name));
    // SAFETY: null, or set from a static above.
    let exports = unsafe { EXPORTS.load(Ordering::Acquire).as_ref() };
    let export = match (row, exports) {
        (Ok(row), Some(exports)) => exports.driver[row],
        _ => core::ptr::null(),
    };
    if !export.is_null() {
        return export.cast_mut();
    }
    let function = library::symbol(Library::CUDA, name);
    if function.is_null() {
        missing as *mut ()
    } else {
        function.cast()
    }
}

mod recorded {
    #![allow(non_snake_case, reason = "named after the entry points")]
    #![allow(clippy::too_many_arguments, reason = "the driver's own signatures")]
    use super::super::shape::{Argument, Shape};
    use super::super::{begin, end};
    use super::target;
    use crate::driver::Status;
    use crate::table::{CUipcEventHandle, CUipcMemHandle, CUmemLocation, sig};
    use core::ffi::{c_char, c_void};
    use core::sync::atomic::AtomicPtr;

    macro_rules! record {
        // Look-ups.
        (entry $name:ident ($($argument:ident: $type:ty),*)) => {};
        ($how:ident $name:ident ($($argument:ident: $type:ty),*)) => {
            pub(super) unsafe extern "C" fn $name($($argument: $type),*) -> Status {
                static TARGET: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
                const SHAPE: &Shape = &Shape::of(&[
                    $((stringify!($argument), <$type as Argument>::POINTED, <$type as Argument>::TEXT)),*
                ]);
                let real = target(&TARGET, c_name!($name));
                let words: &[u64] = &[$($argument.word()),*];
                let begun = begin(stringify!($name), SHAPE, words);
                // SAFETY: the export or the driver's function of this row, with the program's arguments.
                let status = unsafe {
                    core::mem::transmute::<*mut (), sig::$name>(real)($($argument),*)
                };
                end(begun, stringify!($name), SHAPE, words, status);
                status
            }
        };
    }
    macro_rules! all {
        ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
           [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
            $(record!($how $name ($($argument: $type),*));)*
        };
    }
    driver_rows!(all);
}

macro_rules! address {
    (entry $name:ident) => {
        core::ptr::null()
    };
    ($how:ident $name:ident) => {
        recorded::$name as *const ()
    };
}
macro_rules! addresses {
    ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
       [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
        &[$(address!($how $name)),*]
    };
}

struct Wrappers(&'static [*const ()]);
// SAFETY: addresses of functions, never changed.
unsafe impl Sync for Wrappers {}

impl core::ops::Deref for Wrappers {
    type Target = [*const ()];
    fn deref(&self) -> &Self::Target {
        self.0
    }
}

/// One per row of [`ROWS`]; null: not recorded.
static WRAPPERS: Wrappers = Wrappers(driver_rows!(addresses));
