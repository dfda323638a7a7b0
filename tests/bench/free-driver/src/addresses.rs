//! Addresses and handles that nobody else has, without a word that threads share.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Address space of a thread.
const REGION: u64 = 1 << 40;
const FIRST: u64 = 1 << 44;
const GRANULE: u64 = 2 << 20;

static REGIONS: AtomicU64 = AtomicU64::new(0);

fn region() -> u64 {
    FIRST + REGION * (REGIONS.fetch_add(1, Relaxed) % 96)
}

thread_local! {
    static SMALL: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    static RANGES: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    static HANDLES: Cell<u64> = const { Cell::new(0) };
    /// Ranges that were given back, with their sizes.
    static SPARE: RefCell<Vec<(u64, u64)>> = const { RefCell::new(Vec::new()) };
}

fn next(of: &Cell<(u64, u64)>, bytes: u64) -> u64 {
    let (mut base, mut used) = of.get();
    if base == 0 {
        base = region();
    }
    // Long before a thread is here again, what it had there is gone.
    if used + bytes > REGION {
        used = 0;
    }
    of.set((base, used + bytes));
    base + used
}

/// For an allocation.
pub fn take(bytes: usize) -> u64 {
    SMALL.with(|cell| next(cell, (bytes as u64).next_multiple_of(512)))
}

/// A range; one that this thread gave back, if the size is the same.
pub fn reserve(bytes: usize) -> u64 {
    let bytes = (bytes as u64).next_multiple_of(GRANULE);
    let spare = SPARE.with_borrow_mut(|spare| {
        let index = spare.iter().rposition(|&(_, size)| size == bytes)?;
        Some(spare.swap_remove(index).0)
    });
    spare.unwrap_or_else(|| RANGES.with(|cell| next(cell, bytes)))
}

/// Takes a range back.
pub fn unreserve(address: u64, bytes: usize) {
    SPARE.with_borrow_mut(|spare| spare.push((address, (bytes as u64).next_multiple_of(GRANULE))));
}

/// A number for physical memory.
pub fn handle() -> u64 {
    HANDLES.with(|cell| {
        let mut last = cell.get();
        if last == 0 {
            last = region() + 1;
        }
        cell.set(last + 1);
        last
    })
}
