//! libcuda.so.1 over the simulated device.
//!
//! Each file holds one family of exports; `abi.rs` is the border they all cross. Whatever is not
//! implemented exists nevertheless and answers NOT_SUPPORTED (`build.rs`). Loading the library only
//! hides what the simulated driver is too old for (`visible.rs`); everything begins with `cuInit`.

// The ABI is that of 64-bit Linux: usize and u64 are the same, and counts are small.
#![allow(clippy::cast_possible_truncation)]
// Signatures are the driver's.
#![allow(clippy::too_many_arguments, non_snake_case)]
#![recursion_limit = "256"]

mod abi;
mod array;
mod array_shape;
mod attributes;
mod context;
mod copy;
mod device;
mod event;
mod external;
mod fill;
mod graph;
mod graph_memory;
mod graph_query;
mod green;
mod host;
mod init;
mod ipc;
mod launch;
mod layout;
mod legacy;
mod link;
mod managed;
mod memop;
mod memory;
mod module;
mod multicast;
mod newcomer;
mod occupancy;
mod pointer;
mod pool;
mod stream;
mod stubs;
mod submit;
mod table;
mod visible;
mod vmm;
