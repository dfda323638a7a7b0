//! A CUDA device that needs no GPU: memory, streams, kernels, shared by processes.
//!
//! `simulator/cuda` and `simulator/nvml` are its two faces. Order of the parts, lower never using
//! higher: `code`, `release`, `config`, `sync`, `ranges`; `files`, `frames`, `selection`, `state`, `shared`, `objects` (the machine
//! all processes share); `host_memory`, `multicast`, `physical`, `space`, `host`, `managed` (this process's memory); `ptx`, `event`, `stream`, `exec`, `kernels`,
//! `graph`, `graph_memory`, `graph_pool`, `capture` (work); `classic`, `pool`, `sharing`, `module`, `limits`, `context`, `green`; `driver` (all of it together).

// The simulated ABI is that of 64-bit Linux: usize and u64 are the same, and counts are small.
#![allow(clippy::cast_possible_truncation)]

pub mod capture;
pub mod classic;
pub mod code;
pub mod config;
pub mod context;
pub mod driver;
pub mod engine;
pub mod event;
pub mod exec;
pub mod fault;
pub mod files;
pub mod frames;
pub mod graph;
pub mod graph_memory;
pub mod graph_pool;
pub mod green;
pub mod host;
pub mod host_memory;
pub mod identity;
pub mod kernels;
pub mod limits;
pub mod managed;
pub mod module;
pub mod multicast;
pub mod objects;
pub mod physical;
pub mod pool;
pub mod ptx;
pub mod ranges;
pub mod release;
pub mod selection;
pub mod shared;
pub mod sharing;
pub mod space;
pub mod state;
pub mod stream;
pub mod sync;
