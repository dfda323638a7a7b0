//! `libspillway_strict.so`: the same library under the soname of the driver, for strict mode.
//!
//! Preloaded, it is what the loader gives to everybody who needs `libcuda.so.1`: also to a plugin that is
//! opened with `RTLD_DEEPBIND` and looks into its own dependencies first. So it exports every name of the
//! table: what is hooked as `libspillway.so` does, from the same source, the rest as jumps to the driver
//! ([`forward`]). Names that the table does not have are not there.
//!
//! The core knows by the note that it runs in this library, and opens the driver by its path.

/// What is not hooked is passed on.
macro_rules! pass {
    (CUDA $name:ident) => {
        forward!($name);
    };
    (NVML $name:ident) => {};
}
macro_rules! passed {
    (CUDA $name:ident) => {
        $name as *const ()
    };
    (NVML $name:ident) => {
        core::ptr::null()
    };
}

#[path = "../../src/dlsym.rs"]
mod dlsym;
#[macro_use]
mod forward;
#[path = "../../src/exports.rs"]
mod exports;

use spillway_protocol::note::{Note, Role};

/// By which the library is known, whatever its file is called.
#[used]
#[unsafe(link_section = ".note.spillway")]
static NOTE: Note = Note::new(Role::Strict);
