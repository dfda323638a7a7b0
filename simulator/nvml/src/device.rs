//! Which devices there are and what they are.

use crate::abi::{INVALID_ARGUMENT, NOT_FOUND, NOT_SUPPORTED, Out, R, exports, put_text, text};
use crate::state::{self, gpu, handle};
use spillway_simulator_core::identity;
use std::ffi::c_char;

/// `nvmlPciInfo_t`, which says the same in two spellings.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PciInfo {
    legacy: [u8; 16],
    domain: u32,
    bus: u32,
    device: u32,
    device_id: u32,
    subsystem_id: u32,
    bus_id: [u8; 32],
}

/// The layout before that.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PciInfo2 {
    bus_id: [u8; 16],
    domain: u32,
    bus: u32,
    device: u32,
    device_id: u32,
    subsystem_id: u32,
    reserved: [u32; 4],
}

const DEVICE_ID: u32 = 0x2330_10de;

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

fn pci(of: u64, to: Out<PciInfo>) -> R {
    let (shared, gpu) = gpu(of)?;
    to.set(PciInfo {
        legacy: padded(&identity::bus_id(shared, gpu)),
        domain: 0,
        bus: identity::bus(shared, gpu),
        device: 0,
        device_id: DEVICE_ID,
        subsystem_id: 0,
        bus_id: padded(&format!("0000{}", identity::bus_id(shared, gpu))),
    })
}

fn by_index(index: u32, to: Out<u64>) -> R {
    if index < state::shared()?.config().gpus {
        to.set(handle(index))
    } else {
        Err(INVALID_ARGUMENT)
    }
}

fn by_bus(name: *const c_char, to: Out<u64>) -> R {
    let shared = state::shared()?;
    let name = text(name)?;
    to.set(handle(
        (0..shared.config().gpus)
            .find(|gpu| identity::is_bus_id(shared, *gpu, &name))
            .ok_or(NOT_FOUND)?,
    ))
}

fn count(to: Out<u32>) -> R {
    to.set(state::shared()?.config().gpus)
}

exports! {
    fn nvmlDeviceGetCount(to: Out<u32>) {
        count(to)
    }

    fn nvmlDeviceGetCount_v2(to: Out<u32>) {
        count(to)
    }

    fn nvmlDeviceGetHandleByIndex(index: u32, to: Out<u64>) {
        by_index(index, to)
    }

    fn nvmlDeviceGetHandleByIndex_v2(index: u32, to: Out<u64>) {
        by_index(index, to)
    }

    fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, to: Out<u64>) {
        let shared = state::shared()?;
        let uuid = text(uuid)?;
        let found = (0..shared.config().gpus).find(|gpu| identity::uuid_text(identity::uuid(shared, *gpu)) == uuid);
        to.set(handle(found.ok_or(NOT_FOUND)?))
    }

    fn nvmlDeviceGetHandleByPciBusId(name: *const c_char, to: Out<u64>) {
        by_bus(name, to)
    }

    fn nvmlDeviceGetHandleByPciBusId_v2(name: *const c_char, to: Out<u64>) {
        by_bus(name, to)
    }

    fn nvmlDeviceGetUUID(of: u64, to: Out<u8>, capacity: u32) {
        let (shared, gpu) = gpu(of)?;
        put_text(to, capacity, &identity::uuid_text(identity::uuid(shared, gpu)))
    }

    fn nvmlDeviceGetName(of: u64, to: Out<u8>, capacity: u32) {
        gpu(of)?;
        put_text(to, capacity, identity::NAME)
    }

    fn nvmlDeviceGetIndex(of: u64, to: Out<u32>) {
        to.set(gpu(of)?.1)
    }

    fn nvmlDeviceGetMinorNumber(of: u64, to: Out<u32>) {
        to.set(gpu(of)?.1)
    }

    fn nvmlDeviceGetBrand(of: u64, to: Out<u32>) {
        gpu(of)?;
        // Unknown.
        to.set(0)
    }

    fn nvmlDeviceGetSerial(of: u64, to: Out<u8>, capacity: u32) {
        let _ = (to, capacity);
        gpu(of)?;
        Err(NOT_SUPPORTED)
    }

    fn nvmlDeviceGetVbiosVersion(of: u64, to: Out<u8>, capacity: u32) {
        gpu(of)?;
        put_text(to, capacity, "00.00.00.00.00")
    }

    fn nvmlDeviceGetPciInfo(of: u64, to: Out<PciInfo>) {
        pci(of, to)
    }

    fn nvmlDeviceGetPciInfo_v3(of: u64, to: Out<PciInfo>) {
        pci(of, to)
    }

    fn nvmlDeviceGetPciInfo_v2(of: u64, to: Out<PciInfo2>) {
        let (shared, gpu) = gpu(of)?;
        to.set(PciInfo2 {
            bus_id: padded(&identity::bus_id(shared, gpu)),
            domain: 0,
            bus: identity::bus(shared, gpu),
            device: 0,
            device_id: DEVICE_ID,
            subsystem_id: 0,
            reserved: [0; 4],
        })
    }

    fn nvmlDeviceGetCudaComputeCapability(of: u64, major: Out<i32>, minor: Out<i32>) {
        gpu(of)?;
        major.set(9)?;
        minor.set(0)
    }

    fn nvmlDeviceGetArchitecture(of: u64, to: Out<u32>) {
        gpu(of)?;
        // Hopper.
        to.set(9)
    }

    fn nvmlDeviceGetNumGpuCores(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(16_896)
    }

    fn nvmlDeviceGetMemoryBusWidth(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(5120)
    }

    fn nvmlDeviceGetMigMode(of: u64, current: Out<u32>, pending: Out<u32>) {
        gpu(of)?;
        current.set(0)?;
        pending.set(0)
    }

    fn nvmlDeviceIsMigDeviceHandle(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetMaxMigDeviceCount(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetMigDeviceHandleByIndex(of: u64, index: u32, to: Out<u64>) {
        let _ = (index, to);
        gpu(of)?;
        Err(NOT_FOUND)
    }

    fn nvmlDeviceGetTopologyCommonAncestor(of: u64, other: u64, to: Out<u32>) {
        gpu(of)?;
        gpu(other)?;
        // One NUMA node.
        to.set(40)
    }

    fn nvmlDeviceGetP2PStatus(of: u64, other: u64, index: u32, to: Out<u32>) {
        let _ = index;
        gpu(of)?;
        gpu(other)?;
        to.set(0)
    }

    fn nvmlDeviceGetNvLinkState(of: u64, link: u32, to: Out<u32>) {
        let _ = (link, to);
        gpu(of)?;
        Err(NOT_SUPPORTED)
    }
}
