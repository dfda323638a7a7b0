//! Managed memory: which of its pages are on which GPU, and what moves them.
//!
//! The bytes stay in host memory of this process, where kernels find them wherever they are said to be:
//! residency is an account. A GPU is charged whole frames for its resident pages of 64 KiB.
//! - A touch by work of a GPU moves a page there, unless its advice says otherwise; so does a prefetch.
//! - When a GPU is full, the pages that came first leave, for other pages and for any other allocation
//!   of this process. Without any to leave, a page stays where it is and is used from afar.
//! - A touch by the CPU is not seen: pages go back by a prefetch, by leaving or with the allocation.

use crate::code::{INVALID_VALUE, R};
use crate::config::{FRAME, GPUS_MAX};
use crate::driver::Driver;
use crate::shared::Shared;
use crate::space::Physical;
pub use crate::space::Place;
use crate::sync::lock;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that move as one.
pub const PAGE: u64 = 64 << 10;
const PAGES_OF_FRAME: usize = (FRAME / PAGE) as usize;

/// Bit of the CPU in [`Page::accessed_by`]; the others are GPUs.
pub const CPU_BIT: u32 = 1 << 31;

#[derive(Clone, Copy, Default)]
struct Page {
    /// GPUs that have it, a bit each; none: it is on the host.
    on: u16,
    /// When it left the host, in [`Gpu::order`].
    stamp: u64,
    read_mostly: bool,
    preferred: Place,
    accessed_by: u32,
    prefetched: Place,
}

#[derive(Default)]
struct Gpu {
    /// Resident pages by age: allocation and index.
    order: BTreeMap<u64, (u64, usize)>,
    frames: Vec<Arc<Physical>>,
}

impl Gpu {
    fn shrink(&mut self) {
        let needed = self.order.len().div_ceil(PAGES_OF_FRAME);
        self.frames.truncate(needed);
    }
}

/// All managed allocations of the process.
#[derive(Default)]
pub struct Managed {
    ranges: BTreeMap<u64, (u64, Vec<Page>)>,
    gpus: [Gpu; GPUS_MAX],
    clock: u64,
}

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// An allocation's entry; its pages leave all GPUs with it.
pub struct Entry {
    driver: &'static Driver,
    start: u64,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "managed memory at {:#x}", self.start)
    }
}

/// Notes an allocation, all of it on the host.
#[must_use]
pub fn register(driver: &'static Driver, start: u64, length: u64) -> Arc<Entry> {
    let pages = vec![Page::default(); length.div_ceil(PAGE) as usize];
    lock(&driver.managed).ranges.insert(start, (length, pages));
    ALLOCATIONS.fetch_add(1, Ordering::Release);
    Arc::new(Entry { driver, start })
}

impl Drop for Entry {
    fn drop(&mut self) {
        ALLOCATIONS.fetch_sub(1, Ordering::Release);
        let mut managed = lock(&self.driver.managed);
        let Some((_, pages)) = managed.ranges.remove(&self.start) else {
            return;
        };
        for page in pages.iter().filter(|p| p.on != 0) {
            for gpu in &mut managed.gpus {
                gpu.order.remove(&page.stamp);
            }
        }
        managed.gpus.iter_mut().for_each(Gpu::shrink);
    }
}

impl Managed {
    /// The allocation that the range lies in, and the pages that it touches.
    fn find(&self, at: u64, length: u64) -> Option<(u64, Range<usize>)> {
        let (start, (bytes, _)) = self.ranges.range(..=at).next_back()?;
        let end = at.checked_add(length)?;
        (at < start + bytes && length > 0 && end <= start + bytes).then(|| {
            let first = (at - start) / PAGE;
            (
                *start,
                first as usize..(end - start).div_ceil(PAGE) as usize,
            )
        })
    }

    fn page(&mut self, start: u64, index: usize) -> Option<&mut Page> {
        self.ranges.get_mut(&start)?.1.get_mut(index)
    }

    /// Takes a page from `gpu`.
    fn leave(&mut self, gpu: usize, start: u64, index: usize) {
        if let Some(page) = self.page(start, index) {
            page.on &= !(1 << gpu);
            let stamp = page.stamp;
            self.gpus[gpu].order.remove(&stamp);
        }
    }

    /// Brings a page to `gpu`, if there is or can be made room.
    fn enter(&mut self, shared: &'static Shared, gpu: usize, start: u64, index: usize) {
        let held = &mut self.gpus[gpu];
        if held.order.len() == held.frames.len() * PAGES_OF_FRAME {
            match Physical::charge_managed(shared, gpu as u32, FRAME) {
                Ok(frame) => held.frames.push(frame),
                Err(_) => {
                    let Some((_, &(victim, at))) = held.order.first_key_value() else {
                        return;
                    };
                    self.leave(gpu, victim, at);
                }
            }
        }
        self.clock += 1;
        let clock = self.clock;
        let Some(page) = self.page(start, index) else {
            return;
        };
        if page.on == 0 {
            page.stamp = clock;
        }
        page.on |= 1 << gpu;
        let stamp = page.stamp;
        self.gpus[gpu].order.insert(stamp, (start, index));
    }

    /// Takes a page from all GPUs but `keep`.
    fn only(&mut self, keep: Option<usize>, start: u64, index: usize) {
        let on = self.page(start, index).map_or(0, |p| p.on);
        for gpu in (0..GPUS_MAX).filter(|g| on >> g & 1 != 0 && Some(*g) != keep) {
            self.leave(gpu, start, index);
        }
    }

    fn touch_page(
        &mut self,
        shared: &'static Shared,
        gpu: usize,
        start: u64,
        index: usize,
        writes: bool,
    ) {
        let Some(page) = self.page(start, index).copied() else {
            return;
        };
        let (here, read_only) = (page.on >> gpu & 1 != 0, page.read_mostly && !writes);
        if here {
            if !read_only && page.on.count_ones() > 1 {
                self.only(Some(gpu), start, index);
            }
            return;
        }
        // Where it prefers to be, it stays: the GPU can reach it there.
        let at_home = match page.preferred.gpu_index() {
            Some(home) => page.on >> home & 1 != 0,
            None => page.preferred.is_host() && page.on == 0,
        };
        if read_only {
            self.enter(shared, gpu, start, index);
        } else if !at_home {
            self.only(None, start, index);
            self.enter(shared, gpu, start, index);
        }
    }
}

/// What work of `gpu` does to managed pages of the range, if it is managed.
pub fn touch(driver: &Driver, gpu: u32, at: u64, length: u64, writes: bool) {
    if ALLOCATIONS.load(Ordering::Acquire) == 0 {
        return;
    }
    let mut managed = lock(&driver.managed);
    if let Some((start, pages)) = managed.find(at, length) {
        for index in pages {
            managed.touch_page(driver.shared, gpu as usize, start, index, writes);
        }
        managed.gpus.iter_mut().for_each(Gpu::shrink);
    }
}

/// Lets the oldest pages of `gpu` go until `frames` frames are free; false if there were none.
pub fn make_room(driver: &Driver, gpu: u32, frames: u64) -> bool {
    if ALLOCATIONS.load(Ordering::Acquire) == 0 {
        return false;
    }
    let mut managed = lock(&driver.managed);
    let gpu = gpu as usize;
    let held = managed.gpus[gpu].frames.len();
    let keep = held.saturating_sub(frames as usize);
    while managed.gpus[gpu].order.len() > keep * PAGES_OF_FRAME {
        let Some((_, &(start, index))) = managed.gpus[gpu].order.first_key_value() else {
            break;
        };
        managed.leave(gpu, start, index);
    }
    managed.gpus[gpu].shrink();
    held > 0
}

/// Whether the whole range is managed memory of one allocation.
#[must_use]
pub fn covers(driver: &Driver, at: u64, length: u64) -> bool {
    lock(&driver.managed).find(at, length).is_some()
}

/// Notes that the range was asked to be at a place.
///
/// # Errors
/// `INVALID_VALUE` if it is not managed.
pub fn note_prefetch(driver: &Driver, at: u64, length: u64, to: Place) -> R {
    each(driver, at, length, |page| page.prefetched = to)
}

/// Moves the range to a place.
pub fn prefetch(driver: &Driver, at: u64, length: u64, to: Place) {
    let mut managed = lock(&driver.managed);
    let Some((start, pages)) = managed.find(at, length) else {
        // Freed meanwhile.
        return;
    };
    for index in pages {
        match to.gpu_index() {
            None => managed.only(None, start, index),
            Some(gpu) => {
                let Some(page) = managed.page(start, index).copied() else {
                    continue;
                };
                if !page.read_mostly {
                    managed.only(Some(gpu), start, index);
                }
                if page.on >> gpu & 1 == 0 {
                    managed.enter(driver.shared, gpu, start, index);
                }
            }
        }
    }
    managed.gpus.iter_mut().for_each(Gpu::shrink);
}

fn each(driver: &Driver, at: u64, length: u64, f: impl Fn(&mut Page)) -> R {
    let mut managed = lock(&driver.managed);
    let (start, pages) = managed.find(at, length).ok_or(INVALID_VALUE)?;
    for index in pages {
        if let Some(page) = managed.page(start, index) {
            f(page);
        }
    }
    Ok(())
}

/// Advice for the range, by `CUmem_advise`.
///
/// # Errors
/// `INVALID_VALUE` if the range is not managed, or for an unknown advice.
pub fn advise(driver: &Driver, at: u64, length: u64, advice: u32, place: Place) -> R {
    let bit = match place.gpu_index() {
        Some(gpu) => 1 << gpu,
        None => CPU_BIT,
    };
    each(driver, at, length, |page| match advice {
        1 => page.read_mostly = true,
        2 => page.read_mostly = false,
        3 => page.preferred = place,
        4 => page.preferred = Place::NONE,
        5 => page.accessed_by |= bit,
        6 => page.accessed_by &= !bit,
        _ => {}
    })?;
    if (1..=6).contains(&advice) {
        Ok(())
    } else {
        Err(INVALID_VALUE)
    }
}

/// What the whole range has in common.
pub struct Common {
    pub read_mostly: bool,
    pub preferred: Place,
    pub accessed_by: u32,
    pub prefetched: Place,
}

/// # Errors
/// `INVALID_VALUE` if the range is not managed.
pub fn common(driver: &Driver, at: u64, length: u64) -> R<Common> {
    let managed = lock(&driver.managed);
    let (start, range) = managed.find(at, length).ok_or(INVALID_VALUE)?;
    let pages = managed
        .ranges
        .get(&start)
        .and_then(|r| r.1.get(range))
        .ok_or(INVALID_VALUE)?;
    let same = |of: fn(&Page) -> Place| {
        let first = pages.first().map_or(Place::NONE, of);
        if pages.iter().all(|p| of(p) == first) {
            first
        } else {
            Place::NONE
        }
    };
    Ok(Common {
        read_mostly: pages.iter().all(|p| p.read_mostly),
        preferred: same(|p| p.preferred),
        accessed_by: pages.iter().fold(u32::MAX, |all, p| all & p.accessed_by),
        prefetched: same(|p| p.prefetched),
    })
}
