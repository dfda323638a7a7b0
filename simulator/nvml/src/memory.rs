//! Memory and the processes that use it.

use crate::abi::{ARGUMENT_VERSION_MISMATCH, INSUFFICIENT_SIZE, NOT_FOUND, Out, R, exports};
use crate::state::{gpu, utilisation};
use spillway_simulator_core::shared::Process;
use spillway_simulator_core::sync::now_ns;
use std::time::{SystemTime, UNIX_EPOCH};

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Memory2 {
    version: u32,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

const MEMORY_2: u32 = size_of::<Memory2>() as u32 | 2 << 24;

/// `nvmlProcessInfo_v1_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Process1 {
    pid: u32,
    bytes: u64,
}

/// `nvmlProcessInfo_v2_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Process2 {
    pid: u32,
    bytes: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

/// `nvmlProcessUtilizationSample_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ProcessSample {
    pid: u32,
    time_us: u64,
    compute: u32,
    memory: u32,
    encoder: u32,
    decoder: u32,
}

/// `nvmlUtilization_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Utilisation {
    gpu: u32,
    memory: u32,
}

/// Answers a list query: `INSUFFICIENT_SIZE` with the count needed if there is no room.
fn list<T>(count: Out<u32>, to: Out<T>, items: Vec<T>) -> R {
    let room = count.get()?;
    count.set(items.len() as u32)?;
    if items.len() > room as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    items
        .into_iter()
        .enumerate()
        .try_for_each(|(index, item)| to.set_at(index, item))
}

/// Processes with a context or memory on the GPU. One that this pid namespace cannot see has no number to
/// be listed under.
fn processes(of: u64) -> R<Vec<Process>> {
    let (shared, gpu) = gpu(of)?;
    Ok(shared
        .processes(gpu)
        .into_iter()
        .filter(|p| (p.contexts > 0 || p.bytes > 0) && p.pid != 0)
        .collect())
}

fn compute_2(of: u64, count: Out<u32>, to: Out<Process2>) -> R {
    let none = u32::MAX;
    let items = processes(of)?
        .into_iter()
        .map(|p| Process2 {
            pid: p.pid,
            bytes: p.bytes,
            gpu_instance: none,
            compute_instance: none,
        })
        .collect();
    list(count, to, items)
}

exports! {
    fn nvmlDeviceGetMemoryInfo(of: u64, to: Out<Memory>) {
        let (shared, gpu) = gpu(of)?;
        let (total, used) = (shared.config().memory, shared.used(gpu));
        to.set(Memory { total, free: total - used, used })
    }

    fn nvmlDeviceGetMemoryInfo_v2(of: u64, to: Out<Memory2>) {
        let (shared, gpu) = gpu(of)?;
        if to.get()?.version != MEMORY_2 {
            return Err(ARGUMENT_VERSION_MISMATCH);
        }
        let (total, used) = (shared.config().memory, shared.used(gpu));
        to.set(Memory2 { version: MEMORY_2, total, reserved: 0, free: total - used, used })
    }

    fn nvmlDeviceGetBAR1MemoryInfo(of: u64, to: Out<Memory>) {
        gpu(of)?;
        let (total, used) = (128 << 30, 1 << 20);
        to.set(Memory { total, free: total - used, used })
    }

    fn nvmlDeviceGetComputeRunningProcesses(of: u64, count: Out<u32>, to: Out<Process1>) {
        let items = processes(of)?.into_iter().map(|p| Process1 { pid: p.pid, bytes: p.bytes }).collect();
        list(count, to, items)
    }

    fn nvmlDeviceGetComputeRunningProcesses_v2(of: u64, count: Out<u32>, to: Out<Process2>) {
        compute_2(of, count, to)
    }

    fn nvmlDeviceGetComputeRunningProcesses_v3(of: u64, count: Out<u32>, to: Out<Process2>) {
        compute_2(of, count, to)
    }

    fn nvmlDeviceGetGraphicsRunningProcesses(of: u64, count: Out<u32>, to: Out<Process1>) {
        gpu(of)?;
        list(count, to, Vec::new())
    }

    fn nvmlDeviceGetGraphicsRunningProcesses_v2(of: u64, count: Out<u32>, to: Out<Process2>) {
        gpu(of)?;
        list(count, to, Vec::new())
    }

    fn nvmlDeviceGetGraphicsRunningProcesses_v3(of: u64, count: Out<u32>, to: Out<Process2>) {
        gpu(of)?;
        list(count, to, Vec::new())
    }

    fn nvmlDeviceGetMPSComputeRunningProcesses(of: u64, count: Out<u32>, to: Out<Process1>) {
        gpu(of)?;
        list(count, to, Vec::new())
    }

    fn nvmlDeviceGetMPSComputeRunningProcesses_v2(of: u64, count: Out<u32>, to: Out<Process2>) {
        gpu(of)?;
        list(count, to, Vec::new())
    }

    fn nvmlDeviceGetMPSComputeRunningProcesses_v3(of: u64, count: Out<u32>, to: Out<Process2>) {
        gpu(of)?;
        list(count, to, Vec::new())
    }

    fn nvmlDeviceGetUtilizationRates(of: u64, to: Out<Utilisation>) {
        let (shared, gpu) = gpu(of)?;
        let busy = shared.engines(gpu).busy_ns.load(std::sync::atomic::Ordering::Relaxed);
        let percent = utilisation(gpu, 0, busy);
        to.set(Utilisation { gpu: percent, memory: percent / 2 })
    }

    fn nvmlDeviceGetProcessUtilization(of: u64, to: Out<ProcessSample>, count: Out<u32>, since_us: u64) {
        let _ = since_us;
        let (_, gpu) = gpu(of)?;
        let time_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(now_ns() / 1000, |d| d.as_micros() as u64);
        let items: Vec<ProcessSample> = processes(of)?
            .into_iter()
            .map(|p| ProcessSample {
                pid: p.pid,
                time_us,
                compute: utilisation(gpu, p.pid, p.busy_ns),
                memory: 0,
                encoder: 0,
                decoder: 0,
            })
            .collect();
        if items.is_empty() {
            count.set(0)?;
            return Err(NOT_FOUND);
        }
        list(count, to, items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_header() {
        assert_eq!(size_of::<Memory>(), 24);
        assert_eq!(MEMORY_2, 0x0200_0028);
        assert_eq!(size_of::<Process1>(), 16);
        assert_eq!(size_of::<Process2>(), 24);
        assert_eq!(size_of::<ProcessSample>(), 32);
    }
}
