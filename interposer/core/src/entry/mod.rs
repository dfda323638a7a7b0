//! The way into the library: `dlsym`, `cuGetProcAddress`, and what every export shares.

mod exports;
mod lookup;
mod proc_address;
mod shield;

pub use crate::driver::unknown::{unknown_entry_points, unknown_names};
pub use exports::Exports;
pub use lookup::{Answer, lookup};
pub use proc_address::{get_proc_address, get_proc_address_v2};
pub use shield::{detach, is_detached, shield};
