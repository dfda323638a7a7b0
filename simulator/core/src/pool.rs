//! Stream-ordered allocation: pools that keep freed memory until a synchronisation trims them.
//!
//! A pool of another process has no memory of its own: what is imported into it is mapped until it is freed.

use crate::classic::{self, Blocks, Request};
use crate::code::{INVALID_VALUE, OUT_OF_MEMORY, R};
use crate::config::{FRAME, GPUS_MAX};
use crate::driver::Driver;
use crate::exec::Op;
use crate::space::{Allocation, READ_WRITE, fresh_id};
use crate::stream::Stream;
use crate::sync::{lock, write};
use std::sync::{Arc, Mutex};

/// A memory pool.
pub struct Pool {
    pub id: u64,
    pub gpu: u32,
    pub kind: Kind,
    /// How other processes know it.
    pub key: u64,
    /// Bytes that it may reserve; 0: as many as there are.
    max: u64,
    /// Held by who makes a pool with a maximum grow.
    growing: Mutex<()>,
    blocks: Mutex<Blocks>,
    state: Mutex<State>,
}

/// Where a pool comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A device's own default pool, which cannot be destroyed.
    Default,
    Own,
    /// Its descriptor may be given to other processes.
    Shareable,
    /// Another process's.
    Imported,
}

#[derive(Default)]
struct State {
    threshold: u64,
    used: u64,
    used_high: u64,
    /// Whole frames of its own allocations; the blocks of small ones come on top.
    large: u64,
    /// Of these, what is being given back: it counts as reserved until the device has it.
    trimming: u64,
    reserved_high: u64,
    /// What each GPU may do with its memory.
    access: [u8; GPUS_MAX],
    /// Freed and kept: address and length.
    cache: Vec<(u64, u64)>,
    pending: Vec<Pending>,
    reuse: [u32; 4],
    destroyed: bool,
}

/// A free that is queued.
struct Pending {
    start: u64,
    /// The allocation's: addresses come again.
    id: u64,
    length: u64,
    stream: Arc<Stream>,
    /// `u64::MAX` while it is being submitted.
    sequence: u64,
}

impl State {
    fn use_more(&mut self, bytes: u64) {
        self.used += bytes;
        self.used_high = self.used_high.max(self.used);
    }
}

impl Pool {
    /// A pool of `gpu` that reserves up to `max` bytes (0: any), known to others by `key`.
    #[must_use]
    pub fn new(gpu: u32, kind: Kind, max: u64, key: u64) -> Arc<Self> {
        let mut state = State {
            reuse: [0, 1, 1, 1],
            ..State::default()
        };
        state.access[gpu as usize] = READ_WRITE;
        Arc::new(Self {
            id: fresh_id(),
            gpu,
            kind,
            key,
            max,
            growing: Mutex::default(),
            blocks: Mutex::default(),
            state: Mutex::new(state),
        })
    }

    /// Bytes that the pool has of the device.
    fn reserved(&self, state: &State) -> u64 {
        state.large + lock(&self.blocks).bytes()
    }

    /// What `gpu` may do with the pool's memory.
    #[must_use]
    pub fn access(&self, gpu: u32) -> u8 {
        lock(&self.state).access[gpu as usize]
    }

    /// What every GPU may do with the pool's memory.
    #[must_use]
    pub fn all_access(&self) -> [u8; GPUS_MAX] {
        lock(&self.state).access
    }

    /// Changes that, also for what is allocated already.
    pub fn set_access(&self, driver: &Driver, gpu: u32, rights: u8) {
        let mut state = lock(&self.state);
        state.access[gpu as usize] = rights;
        let mut space = write(&driver.space);
        let own = space.regions.values_mut().filter(|r| r.pool == self.id);
        for region in own {
            region.access[gpu as usize] = rights;
        }
    }

    /// Whether the pool may take memory for `bytes` more.
    fn may_grow(&self, bytes: u64) -> bool {
        let state = lock(&self.state);
        let more = if bytes > classic::SMALL_MAX {
            classic::rounded(bytes)
        } else if lock(&self.blocks).has_room(bytes) {
            0
        } else {
            FRAME
        };
        self.max == 0
            || self
                .reserved(&state)
                .checked_add(more)
                .is_some_and(|all| all <= self.max.next_multiple_of(FRAME))
    }

    /// Allocates `bytes`.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if there is none even after the caches were trimmed and queued frees of
    /// this pool were waited for.
    pub fn allocate(&self, driver: &'static Driver, stream: &Arc<Stream>, bytes: u64) -> R<u64> {
        if bytes == 0 || self.kind == Kind::Imported {
            return Err(INVALID_VALUE);
        }
        if let Some(start) = self.reuse(driver, stream, bytes) {
            return Ok(start);
        }
        let request = Request {
            gpu: self.gpu,
            context: 0,
            pool: self.id,
            blocks: &self.blocks,
            low: false,
            access: Some(self.all_access()),
        };
        let _growing = (self.max != 0).then(|| lock(&self.growing));
        let allocate = || {
            if self.may_grow(bytes) {
                classic::allocate(driver, &request, bytes)
            } else {
                Err(OUT_OF_MEMORY)
            }
        };
        let mut result = allocate();
        if result == Err(OUT_OF_MEMORY) {
            self.settle();
            driver.trim_pools(self.gpu, true);
            result = allocate();
        }
        let start = result?;
        let mut state = lock(&self.state);
        let length = classic::rounded(bytes);
        if bytes > classic::SMALL_MAX {
            state.large += length;
        }
        state.reserved_high = state.reserved_high.max(self.reserved(&state));
        state.use_more(length);
        Ok(start)
    }

    /// Memory of the same size that is free already, or will be before the stream's next work.
    fn reuse(&self, driver: &Driver, stream: &Arc<Stream>, bytes: u64) -> Option<u64> {
        let length = classic::rounded(bytes);
        let mut state = lock(&self.state);
        let freed_here = state
            .pending
            .iter()
            .position(|p| Arc::ptr_eq(&p.stream, stream) && p.length == length);
        let start = if let Some(at) = freed_here {
            // The queued free finds another allocation there and leaves it alone.
            state.pending.swap_remove(at).start
        } else {
            let at = state.cache.iter().position(|c| c.1 == length)?;
            state.use_more(length);
            state.cache.swap_remove(at).0
        };
        let allocation = Allocation {
            start,
            length: bytes,
            gpu: self.gpu,
            context: 0,
            pool: self.id,
            id: fresh_id(),
        };
        write(&driver.space).allocations.insert(start, allocation);
        Some(start)
    }

    /// Waits for all queued frees.
    fn settle(&self) {
        let pending: Vec<Pending> = std::mem::take(&mut lock(&self.state).pending);
        for free in pending {
            // Still being submitted: whatever is queued before it is enough to wait for.
            free.stream.wait(if free.sequence == u64::MAX {
                free.stream.submitted()
            } else {
                free.sequence
            });
        }
    }

    /// Gives memory back to the device until no more than `keep` bytes are reserved.
    pub fn trim(&self, driver: &Driver, keep: u64) {
        loop {
            let (start, length) = {
                let mut state = lock(&self.state);
                if self.reserved(&state) - state.trimming <= keep {
                    return;
                }
                let Some((start, length)) = state.cache.pop() else {
                    return;
                };
                state.trimming += length;
                let allocation = Allocation {
                    start,
                    length,
                    gpu: self.gpu,
                    context: 0,
                    pool: self.id,
                    id: 0,
                };
                write(&driver.space).allocations.insert(start, allocation);
                (start, length)
            };
            let _ = classic::free(driver, start, &self.blocks);
            let mut state = lock(&self.state);
            state.trimming -= length;
            state.large -= length;
        }
    }

    /// What a synchronisation does: trims to the release threshold.
    pub fn synchronised(&self, driver: &Driver) {
        let threshold = lock(&self.state).threshold;
        self.trim(driver, threshold);
    }

    fn give_back(&self, driver: &Driver, allocation: &Allocation) -> R {
        // Found at its start with this id, or freed meanwhile.
        let lives = || classic::find(driver, allocation.start).is_ok_and(|a| a.id == allocation.id);
        if self.kind == Kind::Imported {
            let mut state = lock(&self.state);
            if !lives() {
                return Err(INVALID_VALUE);
            }
            state.pending.retain(|p| p.id != allocation.id);
            return classic::free_import(driver, allocation.start);
        }
        let length = classic::rounded(allocation.length);
        let destroyed = {
            let mut state = lock(&self.state);
            // Reused since it was looked up: then it is another's.
            if !lives() {
                return Err(INVALID_VALUE);
            }
            state.used -= length.min(state.used);
            state.pending.retain(|p| p.id != allocation.id);
            if length > classic::SMALL_MAX {
                write(&driver.space).allocations.remove(&allocation.start);
                state.cache.push((allocation.start, length));
                state.destroyed
            } else {
                drop(state);
                return classic::free(driver, allocation.start, &self.blocks);
            }
        };
        if destroyed {
            self.trim(driver, 0);
        }
        Ok(())
    }

    /// Ends the pool: what is cached goes now, what is used when it is freed.
    pub fn destroy(&self, driver: &Driver) {
        lock(&self.state).destroyed = true;
        self.trim(driver, 0);
    }

    #[must_use]
    pub fn destroyed(&self) -> bool {
        lock(&self.state).destroyed
    }

    /// `CUmemPool_attribute` as 64 bits.
    ///
    /// # Errors
    /// `INVALID_VALUE` for an unknown one.
    pub fn attribute(&self, attribute: i32) -> R<u64> {
        let state = lock(&self.state);
        Ok(match attribute {
            1..=3 => u64::from(state.reuse[attribute as usize]),
            4 => state.threshold,
            5 => self.reserved(&state),
            6 => state.reserved_high,
            7 => state.used,
            8 => state.used_high,
            _ => return Err(INVALID_VALUE),
        })
    }

    /// # Errors
    /// `INVALID_VALUE` for an attribute that cannot be set so.
    pub fn set_attribute(&self, attribute: i32, value: u64) -> R {
        let mut state = lock(&self.state);
        match attribute {
            1..=3 => state.reuse[attribute as usize] = value as u32,
            4 => state.threshold = value,
            6 if value == 0 => state.reserved_high = self.reserved(&state),
            8 if value == 0 => state.used_high = state.used,
            _ => return Err(INVALID_VALUE),
        }
        Ok(())
    }
}

/// Queues the free of `start` behind the work of `stream`.
///
/// # Errors
/// `INVALID_VALUE` if nothing is allocated there.
pub fn free_async(driver: &'static Driver, stream: &Arc<Stream>, start: u64) -> R {
    let allocation = classic::find(driver, start)?;
    if allocation.pool == crate::graph_memory::GRAPH {
        return crate::graph_pool::free_async(driver, stream, start);
    }
    if matches!(allocation.pool, classic::IMPORTED | classic::EXTERNAL) {
        return Err(INVALID_VALUE);
    }
    let pool = driver.pools.get(allocation.pool);
    if let Some(pool) = &pool {
        let mut state = lock(&pool.state);
        if state.pending.iter().any(|p| p.id == allocation.id) {
            return Err(INVALID_VALUE);
        }
        // Noted before it is queued, so that it cannot take effect unnoted.
        let length = classic::rounded(allocation.length);
        state.pending.push(Pending {
            start,
            id: allocation.id,
            length,
            stream: Arc::clone(stream),
            sequence: u64::MAX,
        });
    }
    let sequence = stream.submit(
        driver,
        Op::Free {
            start,
            id: allocation.id,
        },
    );
    if let Some(pool) = &pool {
        let mut state = lock(&pool.state);
        match sequence {
            Ok(sequence) => {
                let own = state.pending.iter_mut().find(|p| p.id == allocation.id);
                if let Some(own) = own {
                    own.sequence = sequence;
                }
            }
            Err(_) => state.pending.retain(|p| p.id != allocation.id),
        }
    }
    sequence.map(|_| ())
}

/// The moment at which a queued free takes effect: nothing if the memory was reused meanwhile.
pub fn finish_free(driver: &'static Driver, start: u64, id: u64) {
    if let Ok(allocation) = classic::find(driver, start).and_then(|a| {
        if a.id == id {
            Ok(a)
        } else {
            Err(INVALID_VALUE)
        }
    }) {
        let _ = free_now(driver, &allocation);
    }
}

/// Frees an allocation, of a pool or of a context, whose work is done.
///
/// # Errors
/// `INVALID_VALUE` if its owner is gone.
pub fn free_now(driver: &'static Driver, allocation: &Allocation) -> R {
    if allocation.pool != 0 {
        let pool = driver.pools.get(allocation.pool).ok_or(INVALID_VALUE)?;
        return pool.give_back(driver, allocation);
    }
    let owner = driver
        .contexts
        .get(allocation.context)
        .ok_or(INVALID_VALUE)?;
    classic::free(driver, allocation.start, &owner.blocks)
}
