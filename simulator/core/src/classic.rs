//! `cuMemAlloc` and its kin: memory with an address of its own, owned by a context or a pool.
//!
//! Up to half a frame an allocation shares a 2 MiB block with others of its owner, as the real
//! driver does it, in steps of 512 bytes; larger ones get whole frames.

use crate::code::{INVALID_VALUE, OUT_OF_MEMORY, R};
use crate::config::{FRAME, GPUS_MAX};
use crate::driver::Driver;
use crate::ranges::Ranges;
use crate::space::{Allocation, Physical, READ_WRITE, Region, fresh_id};
use crate::sync::{lock, read, write};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const SMALL: u64 = 512;
/// Larger ones get whole frames.
pub const SMALL_MAX: u64 = FRAME / 2;

/// Blocks of 2 MiB that small allocations of one owner share.
#[derive(Default)]
pub struct Blocks(BTreeMap<u64, Ranges>);

impl Blocks {
    /// What all of them take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.len() as u64 * FRAME
    }

    /// Whether an allocation fits without a new block.
    #[must_use]
    pub fn has_room(&self, bytes: u64) -> bool {
        self.0.values().any(|free| free.fits(rounded(bytes)))
    }

    fn take(&mut self, length: u64) -> Option<u64> {
        self.0
            .values_mut()
            .find_map(|free| free.take(length, SMALL))
    }

    /// Gives a piece back; true with the block's start if the block is empty now.
    fn give(&mut self, start: u64, length: u64) -> Option<u64> {
        let (&block, free) = self.0.range_mut(..=start).next_back()?;
        free.give(start, length);
        free.is_all(block, FRAME).then(|| {
            self.0.remove(&block);
            block
        })
    }
}

/// Who an allocation is made for.
pub struct Request<'a> {
    pub gpu: u32,
    pub context: u64,
    pub pool: u64,
    pub blocks: &'a Mutex<Blocks>,
    /// Its address has 32 bits.
    pub low: bool,
    /// What each GPU may do with it; `None`: the GPU itself and its peers may read and write.
    pub access: Option<[u8; GPUS_MAX]>,
}

/// What an allocation of `bytes` takes.
#[must_use]
pub fn rounded(bytes: u64) -> u64 {
    if bytes <= SMALL_MAX {
        bytes.next_multiple_of(SMALL)
    } else {
        bytes.next_multiple_of(FRAME)
    }
}

fn map(driver: &'static Driver, request: &Request<'_>, length: u64) -> R<u64> {
    let physical = Physical::new(driver.shared, request.gpu, length, 0, [0; 8])?;
    let access = request
        .access
        .unwrap_or_else(|| peers_access(driver, request.gpu));
    place(driver, physical, request.pool, access, request.low)
}

/// Access for the GPU itself and for those that it is a peer of.
fn peers_access(driver: &Driver, gpu: u32) -> [u8; GPUS_MAX] {
    let mut access = [0; GPUS_MAX];
    for (from, rights) in access.iter_mut().enumerate() {
        if from as u32 == gpu || driver.peer_enabled(from as u32, gpu) {
            *rights = READ_WRITE;
        }
    }
    access
}

/// Maps memory at an address of its own.
fn place(
    driver: &Driver,
    physical: Arc<Physical>,
    pool: u64,
    access: [u8; GPUS_MAX],
    low: bool,
) -> R<u64> {
    let length = physical.bytes();
    let mut space = write(&driver.space);
    let start = if low {
        space.take_low_addresses(length)
    } else {
        space.take_addresses(length, FRAME, 0)
    };
    let start = start.ok_or(OUT_OF_MEMORY)?;
    let region = Region {
        length,
        physical,
        access,
        host_access: 0,
        vmm: false,
        pool,
    };
    space.regions.insert(start, region);
    Ok(start)
}

/// Stands where a pool would: memory of another process.
pub const IMPORTED: u64 = 1;
/// The same for a buffer of external memory, which `cuMemFree` takes.
pub const EXTERNAL: u64 = 3;

/// Whose an import is: a context's, or a pool's with what each GPU may do with it.
pub enum Importer {
    Context(u64),
    Pool(u64, [u8; GPUS_MAX]),
    /// A buffer of external memory, for a context.
    External(u64),
}

/// Maps another process's memory; `offset` and `length` are the allocation's.
///
/// # Errors
/// `INVALID_VALUE` if the allocation would not lie inside, `OUT_OF_MEMORY` without addresses.
pub fn import(
    driver: &Driver,
    importer: &Importer,
    physical: Arc<Physical>,
    offset: u64,
    length: u64,
) -> R<u64> {
    let inside = offset
        .checked_add(length)
        .is_some_and(|end| end <= physical.bytes());
    if !inside || length == 0 {
        return Err(INVALID_VALUE);
    }
    let gpu = physical.gpu().ok_or(INVALID_VALUE)?;
    let (context, pool, base) = match importer {
        Importer::Context(context) => {
            let access = peers_access(driver, gpu);
            (
                *context,
                IMPORTED,
                place(driver, physical, 0, access, false)?,
            )
        }
        Importer::External(context) => {
            let access = peers_access(driver, gpu);
            (
                *context,
                EXTERNAL,
                place(driver, physical, 0, access, false)?,
            )
        }
        Importer::Pool(pool, access) => (0, *pool, place(driver, physical, *pool, *access, false)?),
    };
    let start = base + offset;
    let allocation = Allocation {
        start,
        length,
        gpu,
        context,
        pool,
        id: fresh_id(),
    };
    write(&driver.space).allocations.insert(start, allocation);
    Ok(start)
}

/// Unmaps what [`import`] mapped.
///
/// # Errors
/// `INVALID_VALUE` if there is nothing.
pub fn free_import(driver: &Driver, start: u64) -> R {
    let known = write(&driver.space).allocations.remove(&start).is_some();
    let region = read(&driver.space).region(start).map(|r| r.0);
    unmap(driver, region.filter(|_| known).ok_or(INVALID_VALUE)?);
    Ok(())
}

fn unmap(driver: &Driver, start: u64) {
    let region = {
        let mut space = write(&driver.space);
        let region = space.regions.remove(&start);
        if let Some(region) = &region {
            space.give_addresses(start, region.length);
        }
        region
    };
    drop(region);
}

/// Allocates `bytes`; returns the address.
///
/// # Errors
/// `INVALID_VALUE` for none, `OUT_OF_MEMORY`.
pub fn allocate(driver: &'static Driver, request: &Request<'_>, bytes: u64) -> R<u64> {
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    if bytes > driver.shared.config().memory {
        return Err(OUT_OF_MEMORY);
    }
    let length = rounded(bytes);
    let start = if bytes <= SMALL_MAX {
        let mut blocks = lock(request.blocks);
        match blocks.take(length) {
            Some(start) => start,
            None => {
                let block = map(driver, request, FRAME)?;
                let mut free = Ranges::new(block, FRAME);
                let start = free.take(length, SMALL).ok_or(OUT_OF_MEMORY)?;
                blocks.0.insert(block, free);
                start
            }
        }
    } else {
        map(driver, request, length)?
    };
    let allocation = Allocation {
        start,
        length: bytes,
        gpu: request.gpu,
        context: request.context,
        pool: request.pool,
        id: fresh_id(),
    };
    write(&driver.space).allocations.insert(start, allocation);
    Ok(start)
}

/// The allocation that starts at `start`.
///
/// # Errors
/// `INVALID_VALUE` if there is none.
pub fn find(driver: &Driver, start: u64) -> R<Allocation> {
    read(&driver.space)
        .allocations
        .get(&start)
        .cloned()
        .ok_or(INVALID_VALUE)
}

/// Frees the allocation that starts at `start`, at once.
///
/// # Errors
/// `INVALID_VALUE` if there is none.
pub fn free(driver: &Driver, start: u64, blocks: &Mutex<Blocks>) -> R {
    if matches!(find(driver, start)?.pool, IMPORTED | EXTERNAL) {
        return free_import(driver, start);
    }
    let allocation = write(&driver.space)
        .allocations
        .remove(&start)
        .ok_or(INVALID_VALUE)?;
    let length = rounded(allocation.length);
    if length <= SMALL_MAX {
        let mut blocks = lock(blocks);
        if let Some(block) = blocks.give(start, length) {
            unmap(driver, block);
        }
    } else {
        unmap(driver, start);
    }
    Ok(())
}

/// Frees everything that the context owns.
pub fn drop_context(driver: &'static Driver, context: u64) {
    let owned: Vec<u64> = read(&driver.space)
        .allocations
        .values()
        .filter(|a| a.context == context)
        .map(|a| a.start)
        .collect();
    let Some(owner) = driver.contexts.get(context) else {
        return;
    };
    for start in owned {
        let _ = free(driver, start, &owner.blocks);
    }
}

/// `cuMemFree`: waits for all work that may use the memory, then frees it.
///
/// # Errors
/// `INVALID_VALUE` if no allocation starts there.
pub fn free_and_wait(driver: &'static Driver, start: u64) -> R {
    let allocation = find(driver, start)?;
    for context in driver.contexts.all() {
        context.drain();
    }
    if allocation.pool == crate::graph_memory::GRAPH {
        return crate::graph_pool::free_now(driver, start);
    }
    if allocation.pool == EXTERNAL {
        return free_import(driver, start);
    }
    if allocation.pool != 0 {
        return crate::pool::free_now(driver, &allocation);
    }
    let owner: Arc<_> = driver
        .contexts
        .get(allocation.context)
        .ok_or(INVALID_VALUE)?;
    free(driver, start, &owner.blocks)
}
