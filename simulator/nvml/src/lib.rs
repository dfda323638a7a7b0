//! libnvidia-ml.so.1 over the simulated device: what pynvml, nvitop, gpustat and torch ask.
//!
//! It only looks: a process that uses NVML alone takes no slot of the machine. Sensors show plain
//! constants; memory, processes and utilisation are those of the machine.

// The ABI is that of 64-bit Linux; counts are small.
#![allow(clippy::cast_possible_truncation)]
// Names are NVML's.
#![allow(non_snake_case)]

mod abi;
mod device;
mod memory;
mod sensors;
mod state;
mod system;
