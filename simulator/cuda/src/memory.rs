//! Device memory of the classic kind: allocation, freeing, queries.

use crate::abi::{Out, exports};
use crate::submit::here;
use spillway_simulator_core::capture;
use spillway_simulator_core::classic::{self, Request};
use spillway_simulator_core::code::{INVALID_VALUE, NOT_FOUND, R};
use spillway_simulator_core::host::Kind;
use spillway_simulator_core::sync::{read, write};

/// Allocates for the current context.
///
/// # Errors
/// `INVALID_VALUE`, `OUT_OF_MEMORY`, and a capture's refusal.
pub fn allocate(bytes: u64) -> R<u64> {
    let (driver, context) = here()?;
    capture::allow_unsafe(driver)?;
    let request = Request {
        gpu: context.gpu,
        context: context.id,
        pool: 0,
        blocks: &context.blocks,
        low: context.old,
        access: None,
    };
    let first = classic::allocate(driver, &request, bytes);
    if first == Err(spillway_simulator_core::code::OUT_OF_MEMORY) {
        driver.trim_pools(context.gpu, true);
        return classic::allocate(driver, &request, bytes);
    }
    first
}

/// Free bytes and all bytes of the current context's device.
///
/// # Errors
/// Those of [`here`].
pub fn info() -> R<(u64, u64)> {
    let (driver, context) = here()?;
    let memory = driver.shared.config().memory;
    Ok((memory - driver.shared.used(context.gpu), memory))
}

/// The pitch of a pitched allocation.
///
/// # Errors
/// `INVALID_VALUE`.
pub fn row(width: usize, height: usize, element: u32) -> R<usize> {
    if !matches!(element, 4 | 8 | 16) || width == 0 || height == 0 {
        return Err(INVALID_VALUE);
    }
    width.checked_next_multiple_of(512).ok_or(INVALID_VALUE)
}

/// `cuMemFree`.
///
/// # Errors
/// `INVALID_VALUE` if no allocation starts there.
pub fn free(address: u64) -> R {
    let (driver, _) = here()?;
    if address == 0 {
        return Ok(());
    }
    capture::allow_unsafe(driver)?;
    let managed = read(&driver.host)
        .find(address)
        .is_some_and(|r| r.kind == Kind::Managed);
    if managed {
        for context in driver.contexts.all() {
            context.drain();
        }
        return write(&driver.host).free(address, true);
    }
    classic::free_and_wait(driver, address)
}

/// Start and length of the memory that an address lies in.
///
/// # Errors
/// `NOT_FOUND`.
pub fn address_range(address: u64) -> R<(u64, u64)> {
    let (driver, _) = here()?;
    let space = read(&driver.space);
    let found = match space.allocation(address) {
        Some(allocation) => Some((allocation.start, allocation.length)),
        None => space
            .region(address)
            .filter(|r| r.1.vmm)
            .map(|(start, region)| (start, region.length)),
    };
    drop(space);
    let known = || {
        read(&driver.host)
            .find(address)
            .map(|r| (r.start, r.length))
    };
    found.or_else(known).ok_or(NOT_FOUND)
}

exports! {
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        free.needed()?;
        let (left, memory) = info()?;
        free.set(left as usize)?;
        total.set(memory as usize)
    }

    fn cuMemAlloc_v2(out: Out<u64>, bytes: usize) {
        out.needed()?;
        out.set(allocate(bytes as u64)?)
    }

    fn cuMemAllocPitch_v2(out: Out<u64>, pitch: Out<usize>, width: usize, height: usize, element: u32) {
        out.needed()?;
        pitch.needed()?;
        let row = row(width, height, element)?;
        let address = allocate(row.checked_mul(height).ok_or(INVALID_VALUE)? as u64)?;
        pitch.set(row)?;
        out.set(address)
    }

    fn cuMemFree_v2(address: u64) {
        free(address)
    }

    fn cuMemGetAddressRange_v2(base: Out<u64>, size: Out<usize>, address: u64) {
        let (start, length) = address_range(address)?;
        base.offer(start);
        size.offer(length as usize);
        Ok(())
    }
}
