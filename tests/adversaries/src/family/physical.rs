//! `cuMemCreate`: memory without an address, that lives until its last handle, mapping and export are gone.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::driver::{
    Address, Code, cuCtxSetCurrent, cuCtxSynchronize, cuMemAddressFree, cuMemAddressReserve,
    cuMemCreate, cuMemExportToShareableHandle, cuMemImportFromShareableHandle, cuMemMap,
    cuMemRelease, cuMemRetainAllocationHandle, cuMemSetAccess, cuMemUnmap, cuMemsetD8_v2,
};
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info, need};
use crate::types::{AccessDescriptor, AllocationProperties, HOST, HOST_NUMA, Location, POSIX_FD};
use crate::way::{Way, attempt};

/// Makes a handle.
///
/// # Errors
/// The driver's refusal.
pub fn create(bytes: u64, handle_types: u32) -> Result<u64, Code> {
    let mut handle = 0;
    let properties = AllocationProperties::device(0, handle_types);
    cuMemCreate(&mut handle, bytes as usize, &properties, 0).then(handle)
}

/// Reserves addresses and maps a handle there, with access.
///
/// # Errors
/// The driver's refusal.
pub fn map(handle: u64, bytes: u64) -> Result<Address, Code> {
    let mut at = 0;
    let size = bytes as usize;
    let reserved = cuMemAddressReserve(&mut at, size, 0, 0, 0);
    if !reserved.is_ok() {
        return Err(reserved);
    }
    let mapped = cuMemMap(at, size, 0, handle, 0);
    let open = if mapped.is_ok() {
        cuMemSetAccess(at, size, &AccessDescriptor::device(0), 1)
    } else {
        mapped
    };
    if !open.is_ok() {
        cuMemUnmap(at, size);
        cuMemAddressFree(at, size);
    }
    open.then(at)
}

/// Undoes it.
pub fn unmap(at: Address, bytes: u64) -> Code {
    let code = cuMemUnmap(at, bytes as usize);
    cuMemAddressFree(at, bytes as usize);
    code
}

/// A descriptor of a handle for another process.
///
/// # Errors
/// The driver's refusal.
pub fn export(handle: u64) -> Result<OwnedFd, Code> {
    let mut descriptor: i32 = -1;
    let code = cuMemExportToShareableHandle((&raw mut descriptor).cast(), handle, POSIX_FD, 0);
    if !code.is_ok() {
        return Err(code);
    }
    // SAFETY: the driver has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// A handle from a descriptor.
///
/// # Errors
/// The driver's refusal.
pub fn import(descriptor: &OwnedFd) -> Result<u64, Code> {
    let mut handle = 0;
    let number = usize::try_from(descriptor.as_raw_fd()).unwrap_or(0);
    cuMemImportFromShareableHandle(&mut handle, number, POSIX_FD).then(handle)
}

/// Only the handle is kept.
pub struct Handles;

impl Way for Handles {
    type Held = u64;

    fn take(&mut self, bytes: u64) -> Result<u64, Code> {
        create(bytes, 0)
    }

    fn give(&mut self, held: u64) -> Code {
        cuMemRelease(held)
    }
}

/// The handle goes at once, the mapping keeps the memory.
pub struct MappedOnly;

impl Way for MappedOnly {
    type Held = (Address, u64);

    fn take(&mut self, bytes: u64) -> Result<Self::Held, Code> {
        let handle = create(bytes, 0)?;
        let at = map(handle, bytes);
        let released = cuMemRelease(handle);
        let at = at?;
        released.then((at, bytes))
    }

    fn give(&mut self, (at, bytes): Self::Held) -> Code {
        unmap(at, bytes)
    }
}

/// Mapped, written, unmapped, and the handle kept.
struct Unmapped;

impl Way for Unmapped {
    type Held = u64;

    fn take(&mut self, bytes: u64) -> Result<u64, Code> {
        let handle = create(bytes, 0)?;
        let at = map(handle, bytes)?;
        cuMemsetD8_v2(at, 7, 4096);
        // Unmapping does not wait for work.
        cuCtxSynchronize();
        unmap(at, bytes).then(handle)
    }

    fn give(&mut self, held: u64) -> Code {
        cuMemRelease(held)
    }
}

/// Mapped and released, then a handle retained by address, then unmapped: only that handle is left.
struct Retained;

impl Way for Retained {
    type Held = u64;

    fn take(&mut self, bytes: u64) -> Result<u64, Code> {
        let handle = create(bytes, 0)?;
        let at = map(handle, bytes)?;
        let released = cuMemRelease(handle);
        if !released.is_ok() {
            return Err(released);
        }
        let mut kept = 0;
        let code = cuMemRetainAllocationHandle(&mut kept, at);
        unmap(at, bytes);
        code.then(kept)
    }

    fn give(&mut self, held: u64) -> Code {
        cuMemRelease(held)
    }
}

/// Mapped twice; released; one mapping undone.
struct SecondMapping;

impl Way for SecondMapping {
    type Held = (Address, u64);

    fn take(&mut self, bytes: u64) -> Result<Self::Held, Code> {
        let handle = create(bytes, 0)?;
        let (first, second) = (map(handle, bytes)?, map(handle, bytes)?);
        cuMemRelease(handle);
        unmap(first, bytes).then((second, bytes))
    }

    fn give(&mut self, (at, bytes): Self::Held) -> Code {
        unmap(at, bytes)
    }
}

/// Exported and released: only the descriptor keeps it.
pub struct Exported;

impl Way for Exported {
    type Held = OwnedFd;

    fn take(&mut self, bytes: u64) -> Result<OwnedFd, Code> {
        let handle = create(bytes, POSIX_FD)?;
        let descriptor = export(handle);
        cuMemRelease(handle);
        descriptor
    }

    fn give(&mut self, held: OwnedFd) -> Code {
        drop(held);
        Code::SUCCESS
    }
}

/// Exported, released, imported again by the same process, the descriptor closed.
struct Imported;

impl Way for Imported {
    type Held = u64;

    fn take(&mut self, bytes: u64) -> Result<u64, Code> {
        let descriptor = Exported.take(bytes)?;
        import(&descriptor)
    }

    fn give(&mut self, held: u64) -> Code {
        cuMemRelease(held)
    }
}

/// Exported and kept: handle and descriptor are one memory, not two.
struct Both;

impl Way for Both {
    type Held = (u64, OwnedFd, u64);

    fn take(&mut self, bytes: u64) -> Result<Self::Held, Code> {
        let handle = create(bytes, POSIX_FD)?;
        let descriptor = match export(handle) {
            Ok(descriptor) => descriptor,
            Err(code) => {
                cuMemRelease(handle);
                return Err(code);
            }
        };
        match import(&descriptor) {
            Ok(again) => Ok((handle, descriptor, again)),
            Err(code) => {
                cuMemRelease(handle);
                Err(code)
            }
        }
    }

    fn give(&mut self, (handle, descriptor, again): Self::Held) -> Code {
        let first = cuMemRelease(handle);
        drop(descriptor);
        let second = cuMemRelease(again);
        if first.is_ok() { second } else { first }
    }
}

/// Made by a thread that has no context.
struct NoContext;

impl Way for NoContext {
    type Held = u64;

    fn take(&mut self, bytes: u64) -> Result<u64, Code> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                cuCtxSetCurrent(0);
                create(bytes, 0)
            });
            thread.join().unwrap_or(Err(Code::ABSENT))
        })
    }

    fn give(&mut self, held: u64) -> Code {
        cuMemRelease(held)
    }
}

/// Host memory by the same call is not the device's: it is not counted and not refused.
fn host(case: &mut Case<'_>) -> Done {
    let mut tried = 0;
    for kind in [HOST, HOST_NUMA] {
        let properties = AllocationProperties {
            kind: 1,
            location: Location { kind, id: 0 },
            ..AllocationProperties::default()
        };
        let mut handles = Vec::new();
        let (free, total) = info();
        for _ in 0..5 {
            let mut handle = 0;
            let code = cuMemCreate(&mut handle, (total / 4) as usize, &properties, 0);
            if code.is_missing() || code.0 == 1 {
                break;
            }
            tried += 1;
            if case.fits(code, total / 4, "cuMemCreate of host memory") {
                handles.push(handle);
            }
        }
        case.top();
        if info() != (free, total) {
            case.wrong("host memory is counted as the device's");
        }
        for handle in handles {
            cuMemRelease(handle);
        }
    }
    if tried == 0 {
        return Err(Stop::Skip(
            "cuMemCreate of host memory: the driver has none".to_owned(),
        ));
    }
    Ok(())
}

/// Released once too often, unmapped twice, retained and released in turns: the count stays right.
fn too_often(case: &mut Case<'_>) -> Done {
    let bytes = 32 * MIB;
    for _ in 0..4 {
        let handle = create(bytes, 0).or_else(|code| need(code, "cuMemCreate").map(|()| 0))?;
        let at = map(handle, bytes).or_else(|code| need(code, "cuMemMap").map(|()| 0))?;
        let mut kept = Vec::new();
        for _ in 0..3 {
            let mut again = 0;
            need(
                cuMemRetainAllocationHandle(&mut again, at),
                "cuMemRetainAllocationHandle",
            )?;
            kept.push(again);
        }
        cuMemRelease(handle);
        for again in kept {
            cuMemRelease(again);
        }
        for what in [cuMemRelease(handle), cuMemRelease(0x1234_5678)] {
            if what.is_ok() {
                case.wrong("cuMemRelease of what was released");
            }
        }
        let (free, _) = info();
        if free + bytes > case.before().0 {
            case.wrong(format!("{free} free while {bytes} are mapped"));
        }
        unmap(at, bytes);
        if unmap(at, bytes).is_ok() {
            case.wrong("cuMemUnmap of what was unmapped");
        }
        case.released("after a round");
    }
    // If the books went below zero, more than the limit fits now.
    crate::way::greedily(case, &mut Handles, "cuMemCreate after releases too many")
}

/// One reservation, mapped piece by piece, unmapped at once.
fn pieces(case: &mut Case<'_>) -> Done {
    let (free, _) = info();
    let most = 2 * free;
    let mut at = 0;
    need(
        cuMemAddressReserve(&mut at, most as usize, 0, 0, 0),
        "cuMemAddressReserve",
    )?;
    let mut mapped = 0;
    while mapped < most {
        let handle = match create(GRANULE, 0) {
            Ok(handle) => handle,
            Err(code) => {
                case.refusal(code, "cuMemCreate");
                break;
            }
        };
        need(
            cuMemMap(at + mapped, GRANULE as usize, 0, handle, 0),
            "cuMemMap",
        )?;
        cuMemRelease(handle);
        mapped += GRANULE;
        case.took(GRANULE);
    }
    if mapped < free / GRANULE * GRANULE {
        case.refused(format!("{mapped} mapped in pieces, {free} were free"));
    }
    if mapped > 0 {
        need(
            cuMemSetAccess(at, mapped as usize, &AccessDescriptor::device(0), 1),
            "cuMemSetAccess",
        )?;
    }
    case.top();
    // Half of it piece by piece, the rest by one call.
    let half = mapped / 2 / GRANULE * GRANULE;
    for offset in (0..half).step_by(GRANULE as usize) {
        need(cuMemUnmap(at + offset, GRANULE as usize), "cuMemUnmap")?;
    }
    if mapped > half {
        need(
            cuMemUnmap(at + half, (mapped - half) as usize),
            "cuMemUnmap",
        )?;
    }
    need(cuMemAddressFree(at, most as usize), "cuMemAddressFree")
}

/// See the module.
pub fn run(stage: &Stage) {
    attempt(stage, "handles", Handles);
    attempt(stage, "create, map, release", MappedOnly);
    attempt(stage, "create, map, unmap", Unmapped);
    attempt(stage, "map, release, retain, unmap", Retained);
    attempt(stage, "two mappings, one undone", SecondMapping);
    attempt(stage, "no current context", NoContext);
    attempt(stage, "export, release", Exported);
    attempt(stage, "export, release, import", Imported);
    attempt(stage, "export and import, all kept", Both);
    stage.case("pieces in one reservation", pieces);
    stage.case("released too often", too_often);
    stage.case("host memory", host);
}
