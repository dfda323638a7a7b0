//! Multicast objects: a team of GPUs, and memory of each bound to it.

use crate::abi::{In, Out, exports};
use crate::device::device;
use crate::layout::{MulticastProperties, POSIX_FD};
use crate::vmm::{handle, remember};
use spillway_simulator_core::code::{INVALID_VALUE, NOT_SUPPORTED, R};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::multicast::{GRANULARITY, Multicast};
use spillway_simulator_core::space::Physical;
use spillway_simulator_core::sync::read;
use std::sync::Arc;

/// What an object is to be like, if this machine has any.
fn wanted(driver: &Driver, properties: &MulticastProperties) -> R<Multicast> {
    let gpus = driver.shared.config().gpus;
    if gpus < 2 || properties.handle_types & !u64::from(POSIX_FD) != 0 {
        return Err(NOT_SUPPORTED);
    }
    let size = properties.bytes as u64;
    if properties.devices < 1 || properties.devices > gpus || properties.flags != 0 || size == 0 {
        return Err(INVALID_VALUE);
    }
    Ok(Multicast::new(size, properties.devices as usize))
}

fn object(driver: &Driver, id: u64) -> R<Arc<Physical>> {
    handle(driver, id).and_then(|physical| {
        if physical.multicast().is_some() {
            Ok(physical)
        } else {
            Err(INVALID_VALUE)
        }
    })
}

fn bind(
    driver: &Driver,
    id: u64,
    offset: usize,
    memory: &Arc<Physical>,
    from: u64,
    size: usize,
    flags: u64,
) -> R {
    let object = object(driver, id)?;
    let multicast = object.multicast().ok_or(INVALID_VALUE)?;
    if flags != 0 || memory.multicast().is_some() {
        return Err(INVALID_VALUE);
    }
    multicast.bind(offset as u64, memory, from, size as u64)
}

exports! {
    fn cuMulticastGetGranularity(out: Out<usize>, props: In<MulticastProperties>, option: u32) {
        out.needed()?;
        wanted(driver::get()?, &props.get()?)?;
        if option > 1 {
            return Err(INVALID_VALUE);
        }
        out.set(GRANULARITY as usize)
    }

    fn cuMulticastCreate(out: Out<u64>, props: In<MulticastProperties>) {
        out.needed()?;
        let driver = driver::get()?;
        let multicast = wanted(driver, &props.get()?)?;
        if !multicast.length.is_multiple_of(GRANULARITY) {
            return Err(INVALID_VALUE);
        }
        let physical = Physical::team(driver.shared, multicast);
        remember(driver, &physical);
        out.set(physical.id)
    }

    fn cuMulticastAddDevice(id: u64, ordinal: i32) {
        let (driver, gpu) = device(ordinal)?;
        let object = object(driver, id)?;
        object.multicast().ok_or(INVALID_VALUE)?.add(gpu)
    }

    fn cuMulticastBindMem(id: u64, offset: usize, memory: u64, from: usize, size: usize, flags: u64) {
        let driver = driver::get()?;
        bind(driver, id, offset, &handle(driver, memory)?, from as u64, size, flags)
    }

    fn cuMulticastBindAddr(id: u64, offset: usize, address: u64, size: usize, flags: u64) {
        let driver = driver::get()?;
        let space = read(&driver.space);
        let (start, memory) = space
            .region(address)
            .filter(|(_, region)| region.vmm)
            .map(|(start, region)| (start, Arc::clone(&region.physical)))
            .ok_or(INVALID_VALUE)?;
        drop(space);
        bind(driver, id, offset, &memory, address - start, size, flags)
    }

    fn cuMulticastUnbind(id: u64, ordinal: i32, offset: usize, size: usize) {
        let (driver, gpu) = device(ordinal)?;
        let object = object(driver, id)?;
        object.multicast().ok_or(INVALID_VALUE)?.unbind(gpu, offset as u64, size as u64)
    }
}
