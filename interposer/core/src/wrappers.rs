//! What stands behind the exports: expanded from the table, one piece per hooked row.
//!
//! The exports themselves are emitted by the cdylib, which expands [`gated_body!`](crate::gated_body) and
//! [`custom_body!`](crate::custom_body) in place, so that a gated export *is* the fast path. Here are the
//! parts that are off it.

/// The slot of a row: in the gate's cache line for `hot` rows, on its own otherwise.
#[doc(hidden)]
#[macro_export]
macro_rules! slot_of {
    (hot $name:ident) => {
        &$crate::gate::LINE.hot.$name
    };
    ($how:ident $name:ident) => {
        &$crate::driver::slots::$name
    };
}

/// The body of an exported function that [`crate::hooks`] answers.
#[doc(hidden)]
#[macro_export]
macro_rules! custom_body {
    ($name:ident ($($argument:ident),*)) => {
        $crate::entry::shield(|| {
            // SAFETY: the real function of this name, and the application's arguments as they came.
            unsafe { $crate::hooks::$name($crate::driver::slots::$name.get(), $($argument),*) }
        })
    };
}

/// What a gated call does when the fast path stops half way.
#[doc(hidden)]
pub mod slow {
    #![allow(non_snake_case, reason = "named after the entry points")]
    #![allow(
        clippy::missing_safety_doc,
        reason = "the driver's own rules for each call"
    )]
    #![allow(clippy::too_many_arguments, reason = "the driver's own signatures")]
    use crate::driver::Status;
    use crate::gate;
    use core::ffi::{c_char, c_void};

    macro_rules! slow {
        (hot $name:ident ($($argument:ident: $type:ty),*)) => {
            slow!(@ hot $name ($($argument: $type),*));
        };
        (gated $name:ident ($($argument:ident: $type:ty),*)) => {
            slow!(@ gated $name ($($argument: $type),*));
        };
        (@ $how:ident $name:ident ($($argument:ident: $type:ty),*)) => {
            #[cold]
            #[inline(never)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> Status {
                let pass = gate::settle();
                // SAFETY: the slot has the row's signature; the caller keeps the driver's rules.
                let status = unsafe { slot_of!($how $name).get()($($argument),*) };
                gate::leave_settled(pass);
                status
            }
        };
        ($how:ident $name:ident ($($argument:ident: $type:ty),*)) => {};
    }
    macro_rules! all {
        ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
           [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
            $(slow!($how $name ($($argument: $type),*));)*
        };
    }
    driver_rows!(all);
}

/// The very first gated call: starts the gate, then goes on slowly.
#[doc(hidden)]
pub mod unstarted {
    #![allow(non_snake_case, reason = "named after the entry points")]
    #![allow(
        clippy::missing_safety_doc,
        reason = "the driver's own rules for each call"
    )]
    #![allow(clippy::too_many_arguments, reason = "the driver's own signatures")]
    use crate::driver::Status;
    use crate::gate;
    use core::ffi::{c_char, c_void};

    macro_rules! unstarted {
        (hot $name:ident ($($argument:ident: $type:ty),*)) => {
            unstarted!(@ $name ($($argument: $type),*));
        };
        (gated $name:ident ($($argument:ident: $type:ty),*)) => {
            unstarted!(@ $name ($($argument: $type),*));
        };
        (@ $name:ident ($($argument:ident: $type:ty),*)) => {
            #[cold]
            #[inline(never)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> Status {
                gate::start_and_arrive();
                // SAFETY: the same arguments, and an entry has begun.
                unsafe { super::slow::$name($($argument),*) }
            }
        };
        ($how:ident $name:ident ($($argument:ident: $type:ty),*)) => {};
    }
    macro_rules! all {
        ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
           [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
            $(unstarted!($how $name ($($argument: $type),*));)*
        };
    }
    driver_rows!(all);
}
