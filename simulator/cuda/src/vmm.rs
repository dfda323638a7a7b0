//! The virtual memory calls: reserve, create, map, set access, and back.
//!
//! They cost time and serialise across processes, as the real ones do; none of them waits for
//! work, so editing a mapping that work still uses faults that work.
//! Host memory is reached by all GPUs that have access, and by the CPU where that was given access.

use crate::abi::{In, Out, exports};
use crate::layout::{AccessDescriptor, AllocationProperties, Location, POSIX_FD};
use crate::managed::place_at;
use spillway_simulator_core::code::{INVALID_VALUE, NOT_SUPPORTED, R};
use spillway_simulator_core::config::{FRAME, GPUS_MAX};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::engine::vmm_call;
use spillway_simulator_core::host_memory;
use spillway_simulator_core::space::{Physical, Place, READ, READ_WRITE, Region};
use spillway_simulator_core::sync::{lock, read, write};
use std::os::fd::IntoRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const PINNED: u32 = 1;

/// Modelled costs: fixed (ns) and per GiB (ns). Orders of magnitude from published measurements
/// with large handles.
const CREATE: (u64, u64) = (50_000, 4_000_000);
const MAP: (u64, u64) = (2_000, 0);
const ACCESS: (u64, u64) = (15_000, 1_000_000);
const UNMAP: (u64, u64) = (15_000, 500_000);
const RELEASE: (u64, u64) = (10_000, 500_000);

fn cost(driver: &Driver, of: (u64, u64), bytes: u64) {
    vmm_call(driver, of.0, of.1, bytes);
}

fn whole(bytes: u64) -> R<u64> {
    if bytes != 0 && bytes.is_multiple_of(FRAME) {
        Ok(bytes)
    } else {
        Err(INVALID_VALUE)
    }
}

fn properties(driver: &Driver, properties: &AllocationProperties) -> R<Place> {
    if properties.kind != PINNED || properties.windows != 0 {
        return Err(INVALID_VALUE);
    }
    if properties.handle_types & !POSIX_FD != 0 {
        return Err(NOT_SUPPORTED);
    }
    place_at(driver, properties.location)
}

/// The memory, or the multicast object, of a handle.
///
/// # Errors
/// `INVALID_VALUE`.
pub fn handle(driver: &Driver, handle: u64) -> R<Arc<Physical>> {
    driver.handles.get(handle).ok_or(INVALID_VALUE)
}

/// Enters a new object under its handle.
pub fn remember(driver: &Driver, physical: &Arc<Physical>) {
    let mut all = lock(&driver.physicals);
    all.retain(|_, weak| weak.strong_count() > 0);
    all.insert(physical.id, Arc::downgrade(physical));
    driver.handles.insert(physical.id, Arc::clone(physical));
}

exports! {
    fn cuMemGetAllocationGranularity(out: Out<usize>, props: In<AllocationProperties>, option: u32) {
        let driver = driver::get()?;
        out.needed()?;
        properties(driver, &props.get()?)?;
        if option > 1 {
            return Err(INVALID_VALUE);
        }
        out.set(FRAME as usize)
    }

    fn cuMemAddressReserve(out: Out<u64>, size: usize, alignment: usize, hint: u64, flags: u64) {
        let driver = driver::get()?;
        out.needed()?;
        let size = whole(size as u64)?;
        if flags != 0 || alignment != 0 && !alignment.is_power_of_two() {
            return Err(INVALID_VALUE);
        }
        cost(driver, MAP, 0);
        let mut space = write(&driver.space);
        let start = space
            .take_addresses(size, alignment as u64, hint)
            .ok_or(spillway_simulator_core::code::OUT_OF_MEMORY)?;
        space.reservations.insert(start, size);
        drop(space);
        out.set(start)
    }

    fn cuMemAddressFree(start: u64, size: usize) {
        let driver = driver::get()?;
        cost(driver, MAP, 0);
        let mut space = write(&driver.space);
        if space.reservations.get(&start) != Some(&(size as u64)) || space.any_region(start, size as u64) {
            return Err(INVALID_VALUE);
        }
        space.reservations.remove(&start);
        space.give_addresses(start, size as u64);
        Ok(())
    }

    fn cuMemCreate(out: Out<u64>, size: usize, props: In<AllocationProperties>, flags: u64) {
        let driver = driver::get()?;
        out.needed()?;
        let props = props.get()?;
        let place = properties(driver, &props)?;
        let size = whole(size as u64)?;
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        cost(driver, CREATE, size);
        let physical = match place.gpu_index() {
            Some(gpu) => Physical::new(driver.shared, gpu as u32, size, props.handle_types, props.flags)?,
            None => Physical::host(driver.shared, place, size, props.handle_types, props.flags)?,
        };
        remember(driver, &physical);
        out.set(physical.id)
    }

    fn cuMemRelease(id: u64) {
        let driver = driver::get()?;
        let physical = handle(driver, id)?;
        if physical.handles.fetch_sub(1, Ordering::AcqRel) == 1 {
            driver.handles.remove(id);
        }
        cost(driver, RELEASE, physical.bytes());
        Ok(())
    }

    fn cuMemRetainAllocationHandle(out: Out<u64>, address: u64) {
        let driver = driver::get()?;
        out.needed()?;
        let space = read(&driver.space);
        let physical = space.region(address).filter(|r| r.1.vmm).map(|r| Arc::clone(&r.1.physical)).ok_or(INVALID_VALUE)?;
        drop(space);
        physical.handles.fetch_add(1, Ordering::AcqRel);
        driver.handles.insert(physical.id, Arc::clone(&physical));
        out.set(physical.id)
    }

    fn cuMemGetAllocationPropertiesFromHandle(out: Out<AllocationProperties>, id: u64) {
        let driver = driver::get()?;
        let physical = handle(driver, id)?;
        if physical.multicast().is_some() {
            return Err(INVALID_VALUE);
        }
        out.set(AllocationProperties {
            kind: PINNED,
            handle_types: physical.handle_types,
            location: Location { kind: physical.place.kind, id: physical.place.id },
            windows: 0,
            flags: physical.flags,
        })
    }

    fn cuMemMap(start: u64, size: usize, offset: usize, id: u64, flags: u64) {
        let driver = driver::get()?;
        let physical = handle(driver, id)?;
        let size = whole(size as u64)?;
        if offset != 0 {
            return Err(NOT_SUPPORTED);
        }
        if flags != 0 || size > physical.bytes() || !start.is_multiple_of(FRAME) {
            return Err(INVALID_VALUE);
        }
        physical.multicast().map_or(Ok(()), |multicast| multicast.complete())?;
        cost(driver, MAP, size);
        let mut space = write(&driver.space);
        let fits = space.reservation(start).is_some_and(|(s, length)| start + size <= s + length);
        if !fits || space.any_region(start, size) {
            return Err(INVALID_VALUE);
        }
        space.regions.insert(start, Region { length: size, physical, access: [0; GPUS_MAX], host_access: 0, vmm: true, pool: 0 });
        Ok(())
    }

    fn cuMemUnmap(start: u64, size: usize) {
        let driver = driver::get()?;
        let size = whole(size as u64)?;
        cost(driver, UNMAP, size);
        let mut space = write(&driver.space);
        let reserved = |(s, length): (u64, u64)| start.checked_add(size).is_some_and(|end| end <= s + length);
        if !space.any_region(start, size) && space.reservation(start).is_some_and(reserved) {
            // As driver 580: nothing to do is no error.
            return Ok(());
        }
        let parts = space.exactly(start, size).ok_or(INVALID_VALUE)?;
        if parts.iter().any(|p| space.regions.get(p).is_none_or(|r| !r.vmm)) {
            return Err(INVALID_VALUE);
        }
        let mut gone: Vec<Region> = Vec::new();
        for part in parts {
            if let Some(region) = space.regions.remove(&part) {
                if region.host_access != 0 {
                    host_memory::hide(part, region.length);
                }
                gone.push(region);
            }
        }
        drop(space);
        // Memory is returned without holding up work.
        drop(gone);
        Ok(())
    }

    fn cuMemSetAccess(start: u64, size: usize, descriptors: In<AccessDescriptor>, count: usize) {
        let driver = driver::get()?;
        let size = whole(size as u64)?;
        if count == 0 {
            return Err(INVALID_VALUE);
        }
        let mut rights = Vec::new();
        for descriptor in descriptors.list(count)? {
            let place = place_at(driver, descriptor.location)?;
            let flags = match descriptor.flags {
                0 => 0,
                1 => READ,
                3 => READ_WRITE,
                _ => return Err(INVALID_VALUE),
            };
            rights.push((place, flags));
        }
        cost(driver, ACCESS, size);
        let mut space = write(&driver.space);
        let parts = space.exactly(start, size).ok_or(INVALID_VALUE)?;
        if parts.iter().any(|p| space.regions.get(p).is_none_or(|r| !r.vmm)) {
            return Err(INVALID_VALUE);
        }
        // The CPU reaches no device memory.
        let for_cpu = rights.iter().any(|(place, _)| place.is_host());
        if for_cpu && parts.iter().any(|p| space.regions.get(p).is_none_or(|r| r.physical.on_host().is_none())) {
            return Err(INVALID_VALUE);
        }
        for part in parts {
            let Some(region) = space.regions.get_mut(&part) else { continue };
            for (place, flags) in &rights {
                match (place.gpu_index(), region.physical.on_host()) {
                    (Some(gpu), _) => region.access[gpu] = *flags,
                    (None, Some(memory)) if *flags != 0 => {
                        memory.show(part, region.length, *flags == READ_WRITE)?;
                        region.host_access = *flags;
                    }
                    (None, _) => {
                        host_memory::hide(part, region.length);
                        region.host_access = 0;
                    }
                }
            }
        }
        Ok(())
    }

    fn cuMemGetAccess(out: Out<u64>, location: In<Location>, address: u64) {
        let driver = driver::get()?;
        let place = place_at(driver, location.get()?)?;
        let space = read(&driver.space);
        let (_, region) = space.region(address).ok_or(INVALID_VALUE)?;
        out.set(u64::from(place.gpu_index().map_or(region.host_access, |gpu| region.access[gpu])))
    }

    fn cuMemExportToShareableHandle(out: Out<i32>, id: u64, kind: u32, flags: u64) {
        let driver = driver::get()?;
        out.needed()?;
        let physical = handle(driver, id)?;
        // Other processes cannot join a team here.
        if physical.multicast().is_some() {
            return Err(NOT_SUPPORTED);
        }
        if flags != 0 || kind != POSIX_FD || physical.handle_types & POSIX_FD == 0 {
            return Err(INVALID_VALUE);
        }
        out.set(physical.export()?.into_raw_fd())
    }

    fn cuMemImportFromShareableHandle(out: Out<u64>, descriptor: u64, kind: u32) {
        let driver = driver::get()?;
        out.needed()?;
        if kind != POSIX_FD {
            return Err(NOT_SUPPORTED);
        }
        let physical = Physical::import(driver.shared, descriptor as i32)?;
        remember(driver, &physical);
        out.set(physical.id)
    }
}
