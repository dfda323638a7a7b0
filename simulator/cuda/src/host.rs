//! Host memory: pinned allocations and registrations.

use crate::abi::{Out, exports};
use crate::submit::here;
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{INVALID_VALUE, R};
use spillway_simulator_core::driver;
use spillway_simulator_core::host::{self, HostRegion, Kind};
use spillway_simulator_core::space::fresh_id;
use spillway_simulator_core::sync::{read, write};

fn region(start: u64, length: u64, kind: Kind, flags: u32) -> R<HostRegion> {
    let (_, context) = here()?;
    Ok(HostRegion {
        start,
        length,
        kind,
        flags,
        context: context.id,
        gpu: context.gpu,
        id: fresh_id(),
        managed: None,
    })
}

/// Pinned memory.
///
/// # Errors
/// `INVALID_VALUE`, `OUT_OF_MEMORY`.
pub fn allocate(out: Out<u64>, bytes: usize, flags: u32) -> R {
    out.needed()?;
    let (driver, _) = here()?;
    capture::allow_unsafe(driver)?;
    // PORTABLE, DEVICEMAP, WRITECOMBINED.
    if bytes == 0 || flags & !7 != 0 {
        return Err(INVALID_VALUE);
    }
    let region = region(
        host::pages(bytes as u64)?,
        bytes as u64,
        Kind::Allocated,
        flags,
    )?;
    let address = region.start;
    write(&driver.host).insert(region);
    out.set(address)
}

fn register(address: u64, bytes: usize, flags: u32) -> R {
    let (driver, _) = here()?;
    capture::allow_unsafe(driver)?;
    // PORTABLE, DEVICEMAP, IOMEMORY (not simulated), READ_ONLY.
    if flags & !0xb != 0 {
        return Err(INVALID_VALUE);
    }
    let region = region(address, bytes as u64, Kind::Registered, flags)?;
    write(&driver.host).register(region)
}

/// Where a device finds host memory: at the same address.
///
/// # Errors
/// `INVALID_VALUE` for memory that is not pinned.
pub fn device_pointer(address: u64, flags: u32) -> R<u64> {
    let (driver, _) = here()?;
    let known = read(&driver.host).find(address).is_some();
    if known && flags == 0 {
        Ok(address)
    } else {
        Err(INVALID_VALUE)
    }
}

exports! {
    fn cuMemAllocHost_v2(out: Out<u64>, bytes: usize) {
        allocate(out, bytes, 0)
    }

    fn cuMemHostAlloc(out: Out<u64>, bytes: usize, flags: u32) {
        allocate(out, bytes, flags)
    }

    fn cuMemFreeHost(address: u64) {
        let (driver, _) = here()?;
        capture::allow_unsafe(driver)?;
        if read(&driver.host).0.get(&address).is_none_or(|r| r.kind != Kind::Allocated) {
            return Err(INVALID_VALUE);
        }
        for context in driver.contexts.all() {
            context.drain();
        }
        write(&driver.host).free(address, false)
    }

    fn cuMemHostRegister(address: u64, bytes: usize, flags: u32) {
        register(address, bytes, flags)
    }

    fn cuMemHostRegister_v2(address: u64, bytes: usize, flags: u32) {
        register(address, bytes, flags)
    }

    fn cuMemHostUnregister(address: u64) {
        let (driver, _) = here()?;
        capture::allow_unsafe(driver)?;
        write(&driver.host).unregister(address)
    }

    fn cuMemHostGetDevicePointer_v2(out: Out<u64>, address: u64, flags: u32) {
        out.needed()?;
        out.set(device_pointer(address, flags)?)
    }

    fn cuMemHostGetFlags(out: Out<u32>, address: u64) {
        let driver = driver::get()?;
        let flags = read(&driver.host).find(address).filter(|r| r.kind == Kind::Allocated).map(|r| r.flags);
        // Addressing is unified: every such allocation is mapped.
        out.set(flags.ok_or(INVALID_VALUE)? | spillway_simulator_core::host::DEVICE_MAP)
    }
}
