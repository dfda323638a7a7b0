//! Benches of what a preloaded library adds to a program's calls of the driver.
//!
//! The programs know nothing of Spillway. Each holds two addresses of every driver function: the one that any
//! program gets, which is the preloaded library's where it has one, and the driver's own, read from the
//! driver's symbol table ([`symbols`]). So each figure stands beside its baseline in the same process, in short
//! rounds that alternate ([`rounds`]), on whatever driver the loader finds: one whose calls cost nothing, the
//! simulator, or a GPU's.

pub mod alloc;
pub mod callgrind;
pub mod calls;
pub mod driver;
pub mod figures;
pub mod hooks;
pub mod options;
pub mod preloaded;
pub mod rounds;
pub mod setup;
pub mod steps;
pub mod symbols;
