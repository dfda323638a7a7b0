//! What crosses a process boundary in Spillway: the two shared pages, the session messages, sizes
//! and limits; and what both sides must know of each other's files. No IO happens here but the look at
//! a file in [`driver_file`]; both sides bring their own sockets and mappings.
//!
//! Everything in here may have been written by a hostile process. Readers therefore load a word
//! once, check it, and clamp it; nothing is ever decoded into a closed enum without a check.

pub mod driver_file;
pub mod limits;
pub mod message;
pub mod names;
pub mod note;
pub mod page;
pub mod settings;
pub mod size;
pub mod wire;

pub use limits::*;
pub use settings::Settings;
pub use size::{Amount, SizeError, format_bytes, parse_amount};
