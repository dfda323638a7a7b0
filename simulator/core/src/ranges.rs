//! A set of free address ranges: first fit, coalescing.

use std::collections::BTreeMap;

/// Free ranges, none touching another.
#[derive(Clone, Debug, Default)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// One free range.
    #[must_use]
    pub fn new(start: u64, length: u64) -> Self {
        Self(BTreeMap::from([(start, length)]))
    }

    /// The lowest free range of `length` at a multiple of `alignment` (a power of two).
    pub fn take(&mut self, length: u64, alignment: u64) -> Option<u64> {
        let at = self.0.iter().find_map(|(start, free)| {
            let at = start.checked_next_multiple_of(alignment)?;
            (at.checked_add(length)? <= start + free).then_some(at)
        })?;
        self.take_at(at, length).then_some(at)
    }

    /// Whether some free range has this length.
    #[must_use]
    pub fn fits(&self, length: u64) -> bool {
        self.0.values().any(|free| *free >= length)
    }

    /// Takes exactly this range, if all of it is free.
    pub fn take_at(&mut self, at: u64, length: u64) -> bool {
        let Some((&start, &free)) = self.0.range(..=at).next_back() else {
            return false;
        };
        let Some(end) = at.checked_add(length) else {
            return false;
        };
        if length == 0 || end > start + free {
            return false;
        }
        self.0.remove(&start);
        if at > start {
            self.0.insert(start, at - start);
        }
        if start + free > end {
            self.0.insert(end, start + free - end);
        }
        true
    }

    /// Gives a range back.
    pub fn give(&mut self, mut start: u64, mut length: u64) {
        if let Some((&before, &size)) = self.0.range(..start).next_back()
            && before + size == start
        {
            self.0.remove(&before);
            start = before;
            length += size;
        }
        if let Some(size) = self.0.remove(&(start + length)) {
            length += size;
        }
        self.0.insert(start, length);
    }

    /// Whether exactly this range, and nothing beside it, is free.
    #[must_use]
    pub fn is_all(&self, start: u64, length: u64) -> bool {
        self.0.get(&start) == Some(&length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_merges() {
        let mut ranges = Ranges::new(0x1000, 0x1000);
        let a = ranges.take(0x200, 0x200).unwrap();
        let b = ranges.take(0x400, 0x400).unwrap();
        assert_eq!((a, b), (0x1000, 0x1400));
        assert!(!ranges.take_at(0x1500, 0x100));
        assert!(ranges.take_at(0x1200, 0x200));
        ranges.give(a, 0x200);
        ranges.give(b, 0x400);
        assert!(!ranges.is_all(0x1000, 0x1000));
        ranges.give(0x1200, 0x200);
        assert!(ranges.is_all(0x1000, 0x1000));
    }

    #[test]
    fn nothing_fits_twice() {
        let mut ranges = Ranges::new(0, 0x1000);
        assert_eq!(ranges.take(0x1000, 0x1000), Some(0));
        assert_eq!(ranges.take(1, 1), None);
    }
}
