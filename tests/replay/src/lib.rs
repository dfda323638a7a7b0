//! Playing a trace of driver calls (`docs/trace.md`) again.
//!
//! | file | idea |
//! | --- | --- |
//! | `trace` | reading a trace, which is not trusted |
//! | `roles` | what each argument of each call means to the player: a table |
//! | `player` | one run of a trace, on whatever driver the process finds |
//! | `compare` | the run without Spillway, the run under it with evictions, and what differs |
//!
//! A run prints one line for each call. What is in it depends on the trace and on the driver's answers alone: no
//! address, no handle and no time. So two runs are the same if their lines are.

pub mod compare;
pub mod player;
pub mod roles;
pub mod trace;
