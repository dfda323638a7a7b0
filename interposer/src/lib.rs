//! `libspillway.so`: exports what is hooked and `dlsym`, and nothing else.

/// What is not hooked is not exported.
macro_rules! pass {
    ($library:ident $name:ident) => {};
}
macro_rules! passed {
    ($library:ident $name:ident) => {
        core::ptr::null()
    };
}

mod dlsym;
mod exports;

use spillway_protocol::note::{Note, Role};

/// By which the library is known, whatever its file is called.
#[used]
#[unsafe(link_section = ".note.spillway")]
static NOTE: Note = Note::new(Role::Plain);
