//! Client programs for tests, demo and benchmarks, on cudarc's safe API.
//!
//! They know nothing of Spillway: whatever they find out (a wrong checksum, a moved allocation, out of memory),
//! any program would. They run unchanged on the simulator and on a GPU.

pub mod batch;
pub mod caching;
pub mod device;
pub mod disk;
pub mod memory;
pub mod pattern;
pub mod segments;
pub mod sizes;
pub mod weights;
