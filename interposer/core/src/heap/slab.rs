//! Free space inside one slab: a block from which small allocations are carved.

use std::collections::BTreeMap;

/// Small allocations are aligned to, and sized in, this many bytes: what `cuMemAlloc` gives.
pub const ALIGN: u64 = 512;

/// Allocations below this many bytes come out of slabs: two of 1 MiB fit into one, as in the driver's own
/// blocks.
pub const SMALL: u64 = (1 << 20) + 1;

/// Rounds a small size up to whole alignment units.
#[must_use]
pub const fn small_size(bytes: u64) -> u64 {
    bytes.div_ceil(ALIGN) * ALIGN
}

/// Free intervals of a slab: offset to length, never adjacent, never overlapping.
#[derive(Debug)]
pub struct Slab {
    free: BTreeMap<u64, u64>,
    size: u64,
    largest: u64,
}

impl Slab {
    /// An empty slab of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            free: BTreeMap::from([(0, size)]),
            size,
            largest: size,
        }
    }

    /// The largest carve that succeeds, in bytes.
    #[must_use]
    pub fn largest(&self) -> u64 {
        self.largest
    }

    /// Nothing is carved.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.largest == self.size
    }

    /// Carves `bytes` (whole alignment units) at the lowest offset that fits.
    pub fn carve(&mut self, bytes: u64) -> Option<u64> {
        if bytes > self.largest {
            return None;
        }
        let (&offset, &len) = self.free.iter().find(|&(_, &len)| len >= bytes)?;
        self.free.remove(&offset);
        if len > bytes {
            self.free.insert(offset + bytes, len - bytes);
        }
        if len == self.largest {
            self.largest = self.free.values().copied().max().unwrap_or(0);
        }
        Some(offset)
    }

    /// Gives back what `carve` returned.
    pub fn give_back(&mut self, offset: u64, bytes: u64) {
        let (mut start, mut len) = (offset, bytes);
        if let Some((&before, &before_len)) = self.free.range(..offset).next_back() {
            debug_assert!(before + before_len <= offset, "carved twice");
            if before + before_len == offset {
                self.free.remove(&before);
                (start, len) = (before, before_len + len);
            }
        }
        if let Some(&after_len) = self.free.get(&(offset + bytes)) {
            self.free.remove(&(offset + bytes));
            len += after_len;
        }
        self.free.insert(start, len);
        self.largest = self.largest.max(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carves_until_full_and_merges_back() {
        let mut slab = Slab::new(4096);
        let offsets: Vec<u64> = (0..8).map(|_| slab.carve(512).unwrap()).collect();
        assert_eq!(slab.carve(512), None);
        assert_eq!(slab.largest(), 0);
        for &offset in offsets.iter().step_by(2) {
            slab.give_back(offset, 512);
        }
        assert_eq!(slab.largest(), 512);
        assert_eq!(slab.carve(1024), None);
        for &offset in offsets.iter().skip(1).step_by(2) {
            slab.give_back(offset, 512);
        }
        assert!(slab.is_empty());
        assert_eq!(slab.carve(4096), Some(0));
    }

    #[test]
    fn seeded_carving_never_overlaps() {
        let (mut slab, mut live, mut seed) = (Slab::new(2 << 20), Vec::new(), 7u64);
        for _ in 0..20_000 {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            if seed >> 63 == 0 || live.is_empty() {
                let bytes = small_size(1 + (seed >> 33) % 60_000);
                if let Some(offset) = slab.carve(bytes) {
                    assert!(
                        live.iter()
                            .all(|&(o, b)| offset + bytes <= o || o + b <= offset)
                    );
                    assert!(offset + bytes <= 2 << 20);
                    live.push((offset, bytes));
                }
            } else {
                let (offset, bytes) = live.swap_remove((seed >> 33) as usize % live.len());
                slab.give_back(offset, bytes);
            }
        }
        for (offset, bytes) in live {
            slab.give_back(offset, bytes);
        }
        assert!(slab.is_empty());
    }
}
