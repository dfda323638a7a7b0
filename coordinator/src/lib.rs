//! The coordinator of one node: `spillwayd`, and what the `spillway` command shares with it.

pub mod model;
