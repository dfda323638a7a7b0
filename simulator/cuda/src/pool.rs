//! Stream-ordered allocation and memory pools.

use crate::abi::{In, Out, exports};
use crate::device::device;
use crate::graph_memory;
use crate::layout::{AccessDescriptor, LOCATION_DEVICE, Location, POSIX_FD, PoolProperties};
use crate::submit::{here, stream};
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{INVALID_VALUE, NOT_SUPPORTED, R, STREAM_CAPTURE_INVALIDATED};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::pool::{self, Kind, Pool};
use spillway_simulator_core::sharing::{self, PoolPointer};
use spillway_simulator_core::sync::lock;
use std::ffi::c_void;
use std::os::fd::IntoRawFd;
use std::sync::Arc;

fn pool_of(driver: &Driver, handle: u64) -> R<Arc<Pool>> {
    driver
        .pools
        .get(handle)
        .filter(|p| !p.destroyed())
        .ok_or(INVALID_VALUE)
}

fn current_pool(driver: &Driver, gpu: u32) -> R<Arc<Pool>> {
    let id = *lock(&driver.current_pools[gpu as usize]);
    pool_of(driver, id)
}

fn set_current(driver: &Driver, gpu: u32, pool: u64) -> R {
    let pool = pool_of(driver, pool)?;
    if pool.gpu != gpu || pool.kind == Kind::Imported {
        return Err(INVALID_VALUE);
    }
    *lock(&driver.current_pools[gpu as usize]) = pool.id;
    Ok(())
}

/// The GPU of a location; host memory in pools is not simulated.
fn device_location(location: Location) -> R<(&'static Driver, u32)> {
    match location.kind {
        LOCATION_DEVICE => device(location.id),
        2..=4 => Err(NOT_SUPPORTED),
        _ => Err(INVALID_VALUE),
    }
}

/// The GPU that a call asks for the pool of; managed memory has none here.
fn pinned_at(location: In<Location>, kind: u32) -> R<(&'static Driver, u32)> {
    match kind {
        1 => device_location(location.get()?),
        2 => Err(NOT_SUPPORTED),
        _ => Err(INVALID_VALUE),
    }
}

fn allocate(out: Out<u64>, bytes: usize, from: Option<u64>, on: u64, per_thread: bool) -> R {
    out.needed()?;
    let (driver, context) = here()?;
    let stream = stream(on, per_thread)?;
    crate::submit::refuse_implicit(&stream)?;
    stream.context.check()?;
    let pool = match from {
        Some(handle) => pool_of(driver, handle)?,
        None => current_pool(driver, context.gpu)?,
    };
    let capture = capture::current(&stream);
    if capture.as_ref().is_some_and(|capture| capture.invalid()) {
        return Err(STREAM_CAPTURE_INVALIDATED);
    }
    if let Some(capture) = capture {
        // The pool says only what the memory shall be like: it is the graph's.
        return out.set(graph_memory::capture_alloc(
            &capture,
            &stream,
            pool.gpu,
            bytes as u64,
        )?);
    }
    out.set(pool.allocate(driver, &stream, bytes as u64)?)
}

exports! {
    fn cuMemAllocAsync / cuMemAllocAsync_ptsz [per_thread] (out: Out<u64>, bytes: usize, on: u64) {
        allocate(out, bytes, None, on, per_thread)
    }

    fn cuMemAllocFromPoolAsync / cuMemAllocFromPoolAsync_ptsz [per_thread] (out: Out<u64>, bytes: usize, pool: u64, on: u64) {
        allocate(out, bytes, Some(pool), on, per_thread)
    }

    fn cuMemFreeAsync / cuMemFreeAsync_ptsz [per_thread] (address: u64, on: u64) {
        let driver = driver::get()?;
        let stream = stream(on, per_thread)?;
        stream.context.check()?;
        crate::submit::refuse_implicit(&stream)?;
        if let Some(capture) = capture::current(&stream) {
            return graph_memory::capture_free(&capture, &stream, address);
        }
        pool::free_async(driver, &stream, address)
    }

    fn cuDeviceGetDefaultMemPool(out: Out<u64>, ordinal: i32) {
        let (driver, gpu) = device(ordinal)?;
        out.set(driver.default_pools[gpu as usize].id)
    }

    fn cuDeviceGetMemPool(out: Out<u64>, ordinal: i32) {
        let (driver, gpu) = device(ordinal)?;
        out.set(current_pool(driver, gpu)?.id)
    }

    fn cuDeviceSetMemPool(ordinal: i32, pool: u64) {
        let (driver, gpu) = device(ordinal)?;
        set_current(driver, gpu, pool)
    }

    fn cuMemPoolCreate(out: Out<u64>, props: In<PoolProperties>) {
        let driver = driver::get()?;
        out.needed()?;
        let props = props.get()?;
        if props.kind != 1 {
            return Err(INVALID_VALUE);
        }
        let (_, gpu) = device_location(props.location)?;
        let kind = match props.handle_types {
            0 => Kind::Own,
            POSIX_FD => Kind::Shareable,
            _ => return Err(NOT_SUPPORTED),
        };
        let pool = Pool::new(gpu, kind, props.max_bytes as u64, sharing::pool_key(driver));
        driver.pools.insert(pool.id, Arc::clone(&pool));
        out.set(pool.id)
    }

    fn cuMemPoolDestroy(handle: u64) {
        let driver = driver::get()?;
        let pool = pool_of(driver, handle)?;
        if pool.kind == Kind::Default {
            return Err(INVALID_VALUE);
        }
        let mut current = lock(&driver.current_pools[pool.gpu as usize]);
        if *current == pool.id {
            *current = driver.default_pools[pool.gpu as usize].id;
        }
        drop(current);
        pool.destroy(driver);
        Ok(())
    }

    fn cuMemPoolGetAttribute(handle: u64, attribute: i32, out: Out<c_void>) {
        let driver = driver::get()?;
        out.needed()?;
        let value = pool_of(driver, handle)?.attribute(attribute)?;
        // The first three are ints.
        let bytes = value.to_le_bytes();
        crate::abi::put_bytes(out.raw(), if attribute <= 3 { &bytes[..4] } else { &bytes });
        Ok(())
    }

    fn cuMemPoolSetAttribute(handle: u64, attribute: i32, value: In<u32>) {
        let driver = driver::get()?;
        let low = u64::from(value.get()?);
        let high = if attribute <= 3 { 0 } else { u64::from(value.at(1)?) };
        pool_of(driver, handle)?.set_attribute(attribute, high << 32 | low)
    }

    fn cuMemPoolTrimTo(handle: u64, keep: usize) {
        let driver = driver::get()?;
        pool_of(driver, handle)?.trim(driver, keep as u64);
        Ok(())
    }

    fn cuMemPoolSetAccess(handle: u64, descriptors: In<AccessDescriptor>, count: usize) {
        let driver = driver::get()?;
        let pool = pool_of(driver, handle)?;
        let mut rights = Vec::new();
        for descriptor in descriptors.list(count)? {
            let (_, gpu) = device_location(descriptor.location)?;
            // The owner's cannot be taken away.
            if !matches!(descriptor.flags, 0 | 3) || gpu == pool.gpu && descriptor.flags != 3 {
                return Err(INVALID_VALUE);
            }
            rights.push((gpu, descriptor.flags as u8));
        }
        for (gpu, flags) in rights {
            pool.set_access(driver, gpu, flags);
        }
        Ok(())
    }

    fn cuMemPoolGetAccess(out: Out<u32>, handle: u64, location: In<Location>) {
        let driver = driver::get()?;
        let pool = pool_of(driver, handle)?;
        let (_, gpu) = device_location(location.get()?)?;
        out.set(u32::from(pool.access(gpu)))
    }

    fn cuMemPoolExportToShareableHandle(out: Out<i32>, handle: u64, kind: u32, flags: u64) {
        out.needed()?;
        let driver = driver::get()?;
        let pool = pool_of(driver, handle)?;
        if kind != POSIX_FD || flags != 0 {
            return Err(INVALID_VALUE);
        }
        out.set(sharing::export_pool(driver, &pool)?.into_raw_fd())
    }

    fn cuMemPoolImportFromShareableHandle(out: Out<u64>, descriptor: u64, kind: u32, flags: u64) {
        out.needed()?;
        let driver = driver::get()?;
        if kind != POSIX_FD || flags != 0 {
            return Err(INVALID_VALUE);
        }
        let pool = sharing::import_pool(driver, descriptor as i32)?;
        out.set(pool.id)
    }

    fn cuMemPoolExportPointer(out: Out<PoolPointer>, address: u64) {
        out.needed()?;
        out.set(sharing::export_pointer(driver::get()?, address)?)
    }

    fn cuMemPoolImportPointer(out: Out<u64>, pool: u64, data: In<PoolPointer>) {
        out.needed()?;
        let driver = driver::get()?;
        let pool = pool_of(driver, pool)?;
        out.set(sharing::import_pointer(driver, &pool, &data.get()?)?)
    }

    fn cuMemGetDefaultMemPool(out: Out<u64>, location: In<Location>, kind: u32) {
        out.needed()?;
        let (driver, gpu) = pinned_at(location, kind)?;
        out.set(driver.default_pools[gpu as usize].id)
    }

    fn cuMemGetMemPool(out: Out<u64>, location: In<Location>, kind: u32) {
        out.needed()?;
        let (driver, gpu) = pinned_at(location, kind)?;
        out.set(current_pool(driver, gpu)?.id)
    }

    fn cuMemSetMemPool(location: In<Location>, kind: u32, pool: u64) {
        let (driver, gpu) = pinned_at(location, kind)?;
        set_current(driver, gpu, pool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exported_pointer_is_as_large_as_in_the_header() {
        assert_eq!(
            size_of::<PoolPointer>(),
            size_of::<cudarc::driver::sys::CUmemPoolPtrExportData_st>()
        );
    }
}
