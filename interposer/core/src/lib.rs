//! Everything that `libspillway.so` does; the cdylib beside this crate only emits the exports.
//!
//! Layers, lower never includes higher: [`table`] (what exists), [`driver`] (the real functions),
//! [`gate`] (who may submit), [`entry`] (the way in); above them heap, pager, session, runtime, and
//! [`hooks`], which the exports call.

#[macro_use]
pub mod table;
pub mod driver;
pub mod entry;
pub mod gate;
pub mod hooks;
pub mod wrappers;
