//! The coordinator of one node: `spillwayd`, and what the `spillway` command shares with it.

pub mod api;
pub mod cli;
pub mod daemon;
pub mod model;
pub mod snapshot;
