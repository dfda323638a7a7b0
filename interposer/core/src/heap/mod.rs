//! The heap's bookkeeping: which application pointers exist, which block of device memory each
//! lies in, and what of a block can be given back. Pure: it calls no driver and takes no lock.
//!
//! A *block* is one address reservation with its physical memory in *chunks*. A large allocation is
//! a block of its own; small ones are carved from blocks that serve as slabs. Some allocations are
//! the driver's own (swap off, or not movable): they are recorded for their charge only.
//!
//! **Invariants.** A live pointer has exactly one record. A block that the pager is moving is
//! neither released nor changed by anybody else: frees meanwhile only mark it dead. Space is reused
//! only after `give_back`, which the caller calls when no work can use the memory any more.

mod records;
mod slab;

use std::collections::{BTreeMap, BTreeSet};

use records::{Record, Records};
pub use slab::{SMALL, Slab, small_size};

/// Part of a host segment that holds part of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPiece {
    /// Index of the segment in the pager's list.
    pub segment: usize,
    /// Where in the segment.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A piece of physical memory: what one driver handle stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Offset in the block.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// The driver's handle; 0 while there is no physical memory.
    pub handle: u64,
    /// Where the content is while it is on the host.
    pub host: Vec<HostPiece>,
}

/// One address reservation.
#[derive(Debug)]
pub struct Block {
    /// Device address.
    pub base: u64,
    /// Bytes, whole granules: also what it is charged.
    pub bytes: u64,
    /// Device index.
    pub device: usize,
    /// The context that owns it, as the driver's handle.
    pub context: usize,
    /// It may move to the host; else it is pinned.
    pub pageable: bool,
    /// In address order, without gaps.
    pub chunks: Vec<Chunk>,
    /// Small allocations live in it.
    small: Option<Small>,
    dead: bool,
}

/// What a block that serves as a slab holds.
#[derive(Debug)]
struct Small {
    space: Slab,
    live: Records,
}

impl Block {
    /// A block whose chunks the caller has created.
    #[must_use]
    pub fn new(
        base: u64,
        device: usize,
        context: usize,
        pageable: bool,
        chunks: Vec<Chunk>,
    ) -> Self {
        let bytes = chunks.iter().map(|c| c.bytes).sum();
        Self {
            base,
            bytes,
            device,
            context,
            pageable,
            chunks,
            small: None,
            dead: false,
        }
    }

    /// Makes it serve small allocations.
    #[must_use]
    pub fn into_slab(mut self) -> Self {
        self.small = Some(Small {
            space: Slab::new(self.bytes),
            live: Records::new(self.bytes),
        });
        self
    }

    fn alloc(&self, offset: u64, record: Record) -> Alloc {
        Alloc {
            ptr: self.base + offset,
            bytes: record.bytes,
            id: record.id,
            place: Place::Slab(self.base),
            context: self.context,
            device: self.device,
            pool: record.pool,
        }
    }
}

/// Where an allocation's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A block of its own, at the same address.
    Own,
    /// Carved from the slab whose block starts here.
    Slab(u64),
    /// The driver's own allocation.
    Driver,
    /// The driver's own, from a pool of the driver's: charged with the pool.
    Pool,
    /// Managed memory that is being freed in stream order: it is recorded elsewhere until then.
    Managed,
}

impl Place {
    /// The driver made it, and is to free it.
    #[must_use]
    pub fn is_drivers(self) -> bool {
        matches!(self, Self::Driver | Self::Pool | Self::Managed)
    }
}

/// One live application pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alloc {
    /// The application's pointer.
    pub ptr: u64,
    /// What the application asked for, in bytes.
    pub bytes: u64,
    /// Unique over the process's life: `CU_POINTER_ATTRIBUTE_BUFFER_ID`.
    pub id: u64,
    /// Where the memory is.
    pub place: Place,
    /// The context that owns it.
    pub context: usize,
    /// Device index.
    pub device: usize,
    /// The memory pool of the stream-ordered call that it came from; 0: it came from another call.
    pub pool: u64,
}

/// The bookkeeping.
#[derive(Default)]
pub struct Heap {
    blocks: BTreeMap<u64, Block>,
    /// By pointer; those in slabs are in their slab's records instead.
    allocs: BTreeMap<u64, Alloc>,
    /// (context, largest free interval, base) of every slab with space.
    slabs: BTreeSet<(usize, u64, u64)>,
    /// How many slabs are entirely free.
    empty_slabs: usize,
    moving: bool,
    ids: u64,
    /// Pointers whose copies the program wants synchronous.
    sync_memops: BTreeSet<u64>,
}

impl Heap {
    fn next_id(&mut self) -> u64 {
        // The driver numbers its own from small figures; ours must not meet them.
        self.ids += 1;
        self.ids | 1 << 40
    }

    /// The slab that `ptr` points into, and where.
    fn slab_at(&self, ptr: u64) -> Option<(&Block, &Records, u64)> {
        let (&base, block) = self.blocks.range(..=ptr).next_back()?;
        let offset = ptr - base;
        let small = block.small.as_ref().filter(|_| offset < block.bytes)?;
        Some((block, &small.live, offset))
    }

    fn slab_at_mut(&mut self, ptr: u64) -> Option<(&mut Block, u64)> {
        let (&base, block) = self.blocks.range_mut(..=ptr).next_back()?;
        let offset = ptr - base;
        (block.small.is_some() && offset < block.bytes).then_some((block, offset))
    }

    /// The live allocation that starts at `ptr`.
    #[must_use]
    pub fn find(&self, ptr: u64) -> Option<Alloc> {
        match self.slab_at(ptr) {
            Some((block, live, offset)) => Some(block.alloc(offset, live.get(offset)?)),
            None => self.allocs.get(&ptr).copied(),
        }
    }

    /// The live allocation that `ptr` points into.
    #[must_use]
    pub fn containing(&self, ptr: u64) -> Option<Alloc> {
        let alloc = match self.slab_at(ptr) {
            Some((block, live, offset)) => {
                let (start, record) = live.before(offset)?;
                block.alloc(start, record)
            }
            None => *self.allocs.range(..=ptr).next_back()?.1,
        };
        (ptr - alloc.ptr < alloc.bytes.max(1)).then_some(alloc)
    }

    /// Carves a small allocation from a slab of `context`, the fullest that has room.
    pub fn carve(&mut self, context: usize, bytes: u64, pool: u64) -> Option<u64> {
        let need = small_size(bytes);
        let &key = self
            .slabs
            .range((context, need, 0)..=(context, u64::MAX, u64::MAX))
            .next()?;
        let base = key.2;
        let id = self.next_id();
        let small = self.blocks.get_mut(&base)?.small.as_mut()?;
        let was_empty = small.space.is_empty();
        let offset = small.space.carve(need)?;
        self.empty_slabs -= usize::from(was_empty);
        small.live.insert(offset, Record { id, pool, bytes });
        let largest = small.space.largest();
        if largest != key.1 {
            self.slabs.remove(&key);
            if largest > 0 {
                self.slabs.insert((context, largest, base));
            }
        }
        Some(base + offset)
    }

    /// Adds a block that serves small allocations.
    pub fn add_slab(&mut self, block: Block) {
        debug_assert!(block.small.is_some());
        self.slabs.insert((block.context, block.bytes, block.base));
        self.empty_slabs += 1;
        self.blocks.insert(block.base, block);
    }

    /// Adds a block that is one allocation of `bytes`.
    pub fn add_own(&mut self, block: Block, bytes: u64, pool: u64) {
        let (ptr, context, device) = (block.base, block.context, block.device);
        let id = self.next_id();
        self.allocs.insert(
            ptr,
            Alloc {
                ptr,
                bytes,
                id,
                place: Place::Own,
                context,
                device,
                pool,
            },
        );
        self.blocks.insert(ptr, block);
    }

    /// Records an allocation that the driver made: [`Place::Driver`] or [`Place::Pool`].
    pub fn add_driver(
        &mut self,
        (ptr, bytes): (u64, u64),
        device: usize,
        context: usize,
        pool: u64,
        place: Place,
    ) {
        let id = self.next_id();
        self.allocs.insert(
            ptr,
            Alloc {
                ptr,
                bytes,
                id,
                place,
                context,
                device,
                pool,
            },
        );
    }

    /// A pool is gone: what came from it lives on as of no pool. Returns what the driver made there, which
    /// is charged by itself from now on.
    pub fn pool_gone(&mut self, pool: u64) -> Vec<Alloc> {
        let mut made = Vec::new();
        for small in self.blocks.values_mut().filter_map(|b| b.small.as_mut()) {
            small.live.forget_pool(pool);
        }
        for alloc in self.allocs.values_mut().filter(|a| a.pool == pool) {
            alloc.pool = 0;
            if alloc.place == Place::Pool {
                alloc.place = Place::Driver;
                made.push(*alloc);
            }
        }
        made
    }

    /// Notes `CU_POINTER_ATTRIBUTE_SYNC_MEMOPS` of a live pointer, to be set again after a restore.
    pub fn set_sync_memops(&mut self, ptr: u64, on: bool) {
        if on {
            self.sync_memops.insert(ptr);
        } else {
            self.sync_memops.remove(&ptr);
        }
    }

    /// Pointers whose copies are to be synchronous.
    #[must_use]
    pub fn sync_memops(&self) -> &BTreeSet<u64> {
        &self.sync_memops
    }

    /// Ends a pointer's life: it is unknown from now on, its space not yet reusable.
    pub fn take(&mut self, ptr: u64) -> Option<Alloc> {
        if !self.sync_memops.is_empty() {
            self.sync_memops.remove(&ptr);
        }
        match self.slab_at_mut(ptr) {
            Some((block, offset)) => {
                let record = block.small.as_mut()?.live.remove(offset)?;
                Some(block.alloc(offset, record))
            }
            None => self.allocs.remove(&ptr),
        }
    }

    /// The same, only for an allocation that the driver made.
    pub fn take_drivers(&mut self, ptr: u64) -> Option<Alloc> {
        let drivers = self.allocs.get(&ptr)?.place.is_drivers();
        if drivers { self.take(ptr) } else { None }
    }

    /// Undoes a `take` whose free was refused.
    pub fn put_back(&mut self, alloc: Alloc) {
        if let Place::Slab(base) = alloc.place {
            let small = self.blocks.get_mut(&base).and_then(|b| b.small.as_mut());
            if let Some(small) = small {
                let Alloc {
                    id, pool, bytes, ..
                } = alloc;
                small
                    .live
                    .insert(alloc.ptr - base, Record { id, pool, bytes });
            }
            return;
        }
        self.allocs.insert(alloc.ptr, alloc);
    }

    /// Brings a taken allocation back to life, under the same pointer, for an equal rounded size.
    pub fn revive(&mut self, alloc: Alloc, bytes: u64) -> u64 {
        let id = self.next_id();
        self.put_back(Alloc { bytes, id, ..alloc });
        alloc.ptr
    }

    /// Makes a taken allocation's space reusable. Returns a block for the caller to release: the
    /// allocation's own, or a slab that became empty while another empty one is kept.
    pub fn give_back(&mut self, alloc: &Alloc) -> Option<Block> {
        match alloc.place {
            Place::Driver | Place::Pool | Place::Managed => None,
            Place::Own => {
                let block = self.blocks.get_mut(&alloc.ptr)?;
                if self.moving {
                    block.dead = true;
                    return None;
                }
                self.blocks.remove(&alloc.ptr)
            }
            Place::Slab(base) => {
                let block = self.blocks.get_mut(&base)?;
                let context = block.context;
                let size = block.bytes;
                let space = &mut block.small.as_mut()?.space;
                let before = space.largest();
                space.give_back(alloc.ptr - base, small_size(alloc.bytes));
                let (now, empty) = (space.largest(), space.is_empty());
                if now != before {
                    self.slabs.remove(&(context, before, base));
                    self.slabs.insert((context, now, base));
                }
                self.empty_slabs += usize::from(empty);
                if !empty || self.moving || self.empty_slabs == 1 {
                    return None;
                }
                let spare = self
                    .slabs
                    .range((context, size, 0)..=(context, u64::MAX, u64::MAX))
                    .any(|&(_, _, other)| other != base);
                if spare { self.remove_slab(base) } else { None }
            }
        }
    }

    /// Takes an empty slab out.
    fn remove_slab(&mut self, base: u64) -> Option<Block> {
        self.empty_slabs -= 1;
        let block = self.blocks.remove(&base)?;
        let largest = block.small.as_ref().map_or(0, |s| s.space.largest());
        self.slabs.remove(&(block.context, largest, base));
        Some(block)
    }

    fn empty_slabs_on(&self, device: usize) -> Vec<u64> {
        let empty =
            |b: &&Block| b.device == device && b.small.as_ref().is_some_and(|s| s.space.is_empty());
        self.blocks.values().filter(empty).map(|b| b.base).collect()
    }

    /// Takes out the empty slabs of a device, for the caller to release.
    pub fn take_empty_slabs(&mut self, device: usize) -> Vec<Block> {
        if self.moving || self.empty_slabs == 0 {
            return Vec::new();
        }
        let bases = self.empty_slabs_on(device);
        bases
            .into_iter()
            .filter_map(|base| self.remove_slab(base))
            .collect()
    }

    /// Bytes of empty slabs on a device: could be given back at once.
    #[must_use]
    pub fn spare_bytes(&self, device: usize) -> u64 {
        if self.empty_slabs == 0 {
            return 0;
        }
        self.slabs
            .iter()
            .filter_map(|&(_, largest, base)| {
                let block = self.blocks.get(&base)?;
                (block.device == device && largest == block.bytes).then_some(block.bytes)
            })
            .sum()
    }

    /// Takes out all that a context owns: its blocks and the driver's allocations on record.
    pub fn take_context(&mut self, context: usize) -> (Vec<Block>, Vec<Alloc>) {
        debug_assert!(!self.moving);
        let bases: Vec<u64> = self
            .blocks
            .values()
            .filter(|b| b.context == context)
            .map(|b| b.base)
            .collect();
        let blocks: Vec<Block> = bases
            .iter()
            .filter_map(|base| self.blocks.remove(base))
            .collect();
        let in_slabs = blocks.iter().filter_map(|block| {
            let live = &block.small.as_ref()?.live;
            Some(
                live.iter()
                    .map(|(offset, record)| block.alloc(offset, record)),
            )
        });
        let mut allocs: Vec<Alloc> = in_slabs.flatten().collect();
        self.slabs.retain(|&(c, _, _)| c != context);
        let empty = |b: &&Block| b.small.as_ref().is_some_and(|s| s.space.is_empty());
        self.empty_slabs -= blocks.iter().filter(empty).count();
        let ptrs: Vec<u64> = self
            .allocs
            .values()
            // A pool is its device's, and outlives contexts.
            .filter(|a| a.context == context && a.place != Place::Pool)
            .map(|a| a.ptr)
            .collect();
        allocs.extend(ptrs.iter().filter_map(|ptr| self.allocs.remove(ptr)));
        (blocks, allocs)
    }

    /// A move is under way.
    #[must_use]
    pub fn moving(&self) -> bool {
        self.moving
    }

    /// Begins a move: until `end_move` the caller alone may change the chunks of blocks. Returns
    /// every pageable block's chunks with (base, device, context), in address order.
    pub fn begin_move(&mut self) -> Vec<Moving> {
        debug_assert!(!self.moving);
        self.moving = true;
        let pageable = self.blocks.values_mut().filter(|b| b.pageable);
        pageable
            .map(|b| Moving {
                base: b.base,
                device: b.device,
                context: b.context,
                chunks: std::mem::take(&mut b.chunks),
            })
            .collect()
    }

    /// Ends a move: takes the chunks back. Returns the blocks that were freed meanwhile, for the
    /// caller to release.
    pub fn end_move(&mut self, moved: Vec<Moving>) -> Vec<Block> {
        debug_assert!(self.moving);
        self.moving = false;
        for part in moved {
            if let Some(block) = self.blocks.get_mut(&part.base) {
                block.chunks = part.chunks;
            }
        }
        let dead: Vec<u64> = self
            .blocks
            .values()
            .filter(|b| b.dead)
            .map(|b| b.base)
            .collect();
        dead.iter()
            .filter_map(|base| self.blocks.remove(base))
            .collect()
    }

    /// Blocks on a device, for changes of access.
    pub fn blocks_on(&self, device: usize) -> impl Iterator<Item = &Block> {
        self.blocks.values().filter(move |b| b.device == device)
    }

    /// Pageable bytes: what an eviction has to carry.
    #[must_use]
    pub fn pageable_bytes(&self) -> u64 {
        self.blocks
            .values()
            .filter(|b| b.pageable)
            .map(|b| b.bytes)
            .sum()
    }
}

/// A pageable block in a move.
#[derive(Debug)]
pub struct Moving {
    /// Device address of the block.
    pub base: u64,
    /// Device index.
    pub device: usize,
    /// Owning context.
    pub context: usize,
    /// Its chunks.
    pub chunks: Vec<Chunk>,
}

#[cfg(test)]
mod tests;
