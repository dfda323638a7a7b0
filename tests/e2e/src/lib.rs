//! What the end-to-end tests share: a simulated machine of its own for every test, a coordinator,
//! client programs, and the API as a tool would use it.
//!
//! | file | idea |
//! | --- | --- |
//! | `artifacts` | where the built programs are |
//! | `memory` | where the simulated GPUs' memory lies |
//! | `place` | one test's machine: folders, environment, clean-up, a watchdog |
//! | `daemon` | a `spillwayd`, started, asked, killed, started again |
//! | `client` | a client program, driven by lines |
//! | `http` | requests over a unix socket, and JSON answers |
//! | `wait` | waiting, always bounded |
//!
//! **Promises.** Nothing here builds anything. Every wait has an end: a test that hangs fails within
//! its place's time, with the tails of all logs. Nothing is left behind: neither processes nor files.
//!
//! ```no_run
//! use spillway_tests::Place;
//! let place = Place::new("example").memory("2GiB").build();
//! let daemon = place.daemon(&["--turn", "500ms"]);
//! let mut client = place.client("gpu-hold").workload("a").limit("1GiB").start();
//! client.ask("alloc 512MiB");
//! daemon.evict("a");
//! ```

mod artifacts;
mod client;
mod daemon;
mod http;
mod memory;
mod place;
mod wait;

pub use artifacts::{artifact, bin_dir, lay_out, repository};
pub use client::{Client, Launch};
pub use daemon::{Daemon, Operation};
pub use http::{Answer, request, send_raw};
pub use place::{Place, PlaceBuilder, Shot};
pub use wait::{until, until_within};

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes of a GiB.
pub const GIB: u64 = 1 << 30;
