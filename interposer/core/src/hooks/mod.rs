//! The hand-written hooks, one function per `custom` row of the table, named like it.
//!
//! Each is called by the export of that name inside [`crate::entry::shield`], outside the gate, with the
//! real function (always callable) before the application's arguments.

#![allow(non_snake_case, reason = "named after the entry points")]
#![allow(
    clippy::missing_safety_doc,
    reason = "the driver's own rules for each call"
)]
#![allow(clippy::too_many_arguments, reason = "the driver's own signatures")]

mod arrays;
mod code;
mod context;
mod export_tables;
mod graph_memory;
mod green;
mod managed;
mod memory;
mod multicast;
mod nvml;
mod ordered;
mod pools;
mod report;
mod sharing;
mod virtual_memory;

pub use arrays::*;
pub use code::*;
pub use context::*;
pub use graph_memory::*;
pub use green::*;
pub use managed::*;
pub use memory::*;
pub use multicast::*;
pub use nvml::*;
pub use ordered::*;
pub use pools::*;
pub use report::*;
pub use sharing::*;
pub use virtual_memory::*;

use crate::runtime::{self, Runtime};

/// The runtime, where quotas are in force; else the hook passes through.
#[inline]
fn limited() -> Option<&'static Runtime> {
    runtime::get().filter(|runtime| runtime.limited)
}
