//! The real driver, as this library calls it.
//!
//! * [`Status`]: a result code, any value that the driver may answer.
//! * [`slots`]: per entry point one word that holds where to jump. It starts at a stub that looks the
//!   real function up (see [`library`]) and calls it, so a slot can be called at any time.
//! * [`call`]: typed calls of the real functions, past every hook and past the gate. For this library's
//!   own use; a caller that touches device memory owes the gate's protocol itself.
//!
//! A function that the driver lacks answers [`Status::NOT_FOUND`]; for NVML, its
//! [`Status::NVML_FUNCTION_NOT_FOUND`]. Where there is no driver at all, [`library::missing`] says so.

mod find;
pub mod library;
mod objects;
mod slot;
mod status;
pub mod strict;
mod symbols;
pub mod unknown;

pub use objects::{Object, find_loaded, loaded_function, object_of, own_handle, own_role};
pub use slot::{Function, Slot};
pub use status::Status;
pub(crate) use strict::{has_environment, variable};

/// The words that hold the real addresses, one per row that is hooked or called.
pub mod slots {
    #![allow(non_upper_case_globals, reason = "named after the entry points")]
    use super::{Slot, stubs};
    use crate::table::sig;

    macro_rules! slot {
        (off $name:ident) => {};
        (hot $name:ident) => {};
        ($how:ident $name:ident) => {
            #[doc = concat!("Where `", stringify!($name), "` is.")]
            pub static $name: Slot<sig::$name> = Slot::new(stubs::$name as *mut ());
        };
    }
    macro_rules! all {
        ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
           [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
            $(slot!($how $name);)*
        };
    }
    driver_rows!(all);
    nvml_rows!(all);
}

/// What a slot holds until its function has been looked up.
pub(crate) mod stubs {
    #![allow(non_snake_case, reason = "named after the entry points")]
    use super::{Status, library};
    use crate::slot_of;
    use crate::table::{CUipcMemHandle, CUmemLocation, Library};
    use core::ffi::{c_char, c_void};

    macro_rules! stub {
        (off $library:ident $name:ident ($($argument:ident: $type:ty),*)) => {};
        ($how:ident $library:ident $name:ident ($($argument:ident: $type:ty),*)) => {
            #[cold]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> Status {
                let Some(real) = library::resolve(Library::$library, c_name!($name), slot_of!($how $name)) else {
                    return library::missing(Library::$library);
                };
                // SAFETY: the driver's function of this name, with the arguments the caller gave for it.
                unsafe { real($($argument),*) }
            }
        };
    }
    macro_rules! all {
        ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
           [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
            $(stub!($how $library $name ($($argument: $type),*));)*
        };
    }
    driver_rows!(all);
    nvml_rows!(all);
}

/// The real functions, called past hooks and gate.
pub mod call {
    #![allow(non_snake_case, reason = "named after the entry points")]
    #![allow(clippy::too_many_arguments, reason = "the driver's own signatures")]
    use super::Status;
    use crate::slot_of;
    use crate::table::{CUipcMemHandle, CUmemLocation};
    use core::ffi::{c_char, c_void};

    macro_rules! call {
        (off $name:ident ($($argument:ident: $type:ty),*)) => {};
        ($how:ident $name:ident ($($argument:ident: $type:ty),*)) => {
            #[doc = concat!("The real `", stringify!($name), "`, whatever hooks exist.")]
            ///
            /// # Safety
            /// The driver's own rules for this call.
            #[inline]
            pub unsafe fn $name($($argument: $type),*) -> Status {
                // SAFETY: a slot holds a function of its row's signature; the caller keeps the driver's rules.
                unsafe { slot_of!($how $name).get()($($argument),*) }
            }
        };
    }
    macro_rules! all {
        ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
           [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
            $(call!($how $name ($($argument: $type),*));)*
        };
    }
    driver_rows!(all);
    nvml_rows!(all);
}
