//! A caching allocator with PyTorch's habits: blocks cut out of segments, kept when freed, given back to the driver
//! only when it is out of memory. Where segments come from is a [`Source`]; see `segments`.
//!
//! **Promises.** A block is inside one segment, or inside segments that lie one behind the other where the source
//! says that these are one. No two blocks overlap. Out of memory is said only after everything free was given back.

use std::collections::BTreeMap;

use cudarc::driver::DriverError;

use crate::device::is_out_of_memory;

/// Blocks are multiples of this.
const ROUND: u64 = 512;
/// Up to here a request comes out of a small segment.
const SMALL: u64 = 1 << 20;
const SMALL_SEGMENT: u64 = 2 << 20;
/// Up to here it comes out of a large one; beyond, a segment is made for it.
const LARGE: u64 = 10 << 20;
const LARGE_SEGMENT: u64 = 20 << 20;

/// Where segments come from.
pub trait Source {
    /// Memory of so many bytes, by the address.
    ///
    /// # Errors
    /// What the driver says.
    fn get(&mut self, bytes: u64) -> Result<u64, DriverError>;

    /// Back to the driver.
    ///
    /// # Errors
    /// What the driver says.
    fn put(&mut self, at: u64, bytes: u64) -> Result<(), DriverError>;

    /// Segments that lie one behind the other are one: they have been mapped side by side.
    fn joins(&self) -> bool;

    /// Waits until nothing uses what is about to be given back.
    ///
    /// # Errors
    /// What the driver says.
    fn wait(&mut self) -> Result<(), DriverError>;
}

/// The size that is asked of the source for a request.
#[must_use]
pub fn segment_for(bytes: u64) -> u64 {
    if bytes <= SMALL {
        SMALL_SEGMENT
    } else if bytes < LARGE {
        LARGE_SEGMENT
    } else {
        bytes.next_multiple_of(SMALL_SEGMENT)
    }
}

/// One pool of blocks: small or large, and whose graph's. See the module.
#[derive(Default)]
pub struct Pool {
    /// Segments by address.
    segments: BTreeMap<u64, u64>,
    /// Free parts by address.
    free: BTreeMap<u64, u64>,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub segments: u64,
    /// Out of memory at first, and not after everything free was given back.
    pub retries: u64,
    /// Out of memory all the same.
    pub refusals: u64,
}

impl Pool {
    /// Bytes of all segments.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.segments.values().sum()
    }

    fn take(&mut self, bytes: u64) -> Option<u64> {
        let fits = self.free.iter().filter(|part| *part.1 >= bytes);
        let (&at, &len) = fits.min_by_key(|part| *part.1)?;
        self.free.remove(&at);
        if len > bytes {
            self.free.insert(at + bytes, len - bytes);
        }
        Some(at)
    }

    /// Whether a segment ends at `at` and another begins there.
    fn border(&self, at: u64) -> bool {
        self.segments.contains_key(&at)
    }

    /// Makes a part free and joins it with its neighbours.
    pub fn give(&mut self, at: u64, bytes: u64, joins: bool) {
        let (mut start, mut end) = (at, at + bytes);
        if let Some((&before, &len)) = self.free.range(..at).next_back()
            && before + len == at
            && (joins || !self.border(at))
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(&len) = self.free.get(&end)
            && (joins || !self.border(end))
        {
            self.free.remove(&end);
            end += len;
        }
        self.free.insert(start, end - start);
    }

    /// A block of at least so many bytes.
    ///
    /// # Errors
    /// What the source says.
    pub fn allocate(&mut self, source: &mut dyn Source, bytes: u64) -> Result<u64, DriverError> {
        let bytes = rounded(bytes);
        if let Some(at) = self.take(bytes) {
            return Ok(at);
        }
        let size = segment_for(bytes);
        let at = source.get(size)?;
        self.segments.insert(at, size);
        self.give(at, size, source.joins());
        // What was just added holds it.
        self.take(bytes).map_or(Ok(at), Ok)
    }

    /// Gives all segments back that are free as a whole.
    ///
    /// # Errors
    /// What the source says.
    pub fn empty(&mut self, source: &mut dyn Source) -> Result<(), DriverError> {
        source.wait()?;
        let whole = |free: &BTreeMap<u64, u64>, at: u64, len: u64| {
            let part = free.range(..=at).next_back();
            part.is_some_and(|(start, bytes)| start + bytes >= at + len)
        };
        let unused: Vec<(u64, u64)> = self
            .segments
            .iter()
            .map(|(at, len)| (*at, *len))
            .filter(|&(at, len)| whole(&self.free, at, len))
            .collect();
        for (at, len) in unused {
            if let Some((&start, &bytes)) = self.free.range(..=at).next_back() {
                self.free.remove(&start);
                if start < at {
                    self.free.insert(start, at - start);
                }
                if start + bytes > at + len {
                    self.free.insert(at + len, start + bytes - at - len);
                }
            }
            self.segments.remove(&at);
            source.put(at, len)?;
        }
        Ok(())
    }
}

/// What a request takes.
#[must_use]
pub fn rounded(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(ROUND)
}

/// Pools of small and large blocks over one source.
pub struct Caching {
    source: Box<dyn Source>,
    small: Pool,
    large: Pool,
    pub counts: Counts,
}

impl Caching {
    #[must_use]
    pub fn new(source: Box<dyn Source>) -> Self {
        Self {
            source,
            small: Pool::default(),
            large: Pool::default(),
            counts: Counts::default(),
        }
    }

    /// The driver's memory that is kept.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.small.reserved() + self.large.reserved()
    }

    fn pool(&mut self, bytes: u64) -> (&mut Pool, &mut dyn Source) {
        let pool = if bytes <= SMALL {
            &mut self.small
        } else {
            &mut self.large
        };
        (pool, &mut *self.source)
    }

    /// A block; when the driver is out of memory everything free is given back first, and it is asked again.
    ///
    /// # Errors
    /// What the driver says the second time.
    pub fn allocate(&mut self, bytes: u64) -> Result<u64, DriverError> {
        let (pool, source) = self.pool(bytes);
        let before = pool.segments.len();
        let mut got = pool.allocate(source, bytes);
        let mut again = false;
        if got.as_ref().is_err_and(is_out_of_memory) {
            again = true;
            self.empty()?;
            let (pool, source) = self.pool(bytes);
            got = pool.allocate(source, bytes);
        }
        let (pool, _) = self.pool(bytes);
        let grown = pool.segments.len() > before;
        self.counts.segments += u64::from(grown);
        self.counts.retries += u64::from(again && got.is_ok());
        self.counts.refusals += u64::from(got.is_err());
        got
    }

    /// The block is free, and kept.
    pub fn free(&mut self, at: u64, bytes: u64) {
        let joins = self.source.joins();
        let (pool, _) = self.pool(bytes);
        pool.give(at, rounded(bytes), joins);
    }

    /// `torch.cuda.empty_cache`.
    ///
    /// # Errors
    /// What the driver says.
    pub fn empty(&mut self) -> Result<(), DriverError> {
        self.small.empty(&mut *self.source)?;
        self.large.empty(&mut *self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter {
        next: u64,
        joins: bool,
        back: Vec<(u64, u64)>,
    }

    impl Source for std::rc::Rc<std::cell::RefCell<Counter>> {
        fn get(&mut self, bytes: u64) -> Result<u64, DriverError> {
            let mut this = self.borrow_mut();
            this.next += bytes;
            Ok(this.next - bytes)
        }

        fn put(&mut self, at: u64, bytes: u64) -> Result<(), DriverError> {
            self.borrow_mut().back.push((at, bytes));
            Ok(())
        }

        fn joins(&self) -> bool {
            self.borrow().joins
        }

        fn wait(&mut self) -> Result<(), DriverError> {
            Ok(())
        }
    }

    fn source(joins: bool) -> std::rc::Rc<std::cell::RefCell<Counter>> {
        std::rc::Rc::new(std::cell::RefCell::new(Counter {
            next: 1 << 30,
            joins,
            back: Vec::new(),
        }))
    }

    #[test]
    fn sizes_are_pytorchs() {
        assert_eq!(segment_for(1), 2 << 20);
        assert_eq!(segment_for(3 << 20), 20 << 20);
        assert_eq!(segment_for(11 << 20), 12 << 20);
    }

    #[test]
    fn blocks_do_not_overlap_and_come_back() -> Result<(), DriverError> {
        for joins in [false, true] {
            let counter = source(joins);
            let mut caching = Caching::new(Box::new(counter.clone()));
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (number, round) in (0..400_u64).enumerate() {
                let bytes = (round * 7919 % 97 + 1) << (round % 18);
                let at = caching.allocate(bytes)?;
                for &(other, len) in &held {
                    assert!(at + rounded(bytes) <= other || other + rounded(len) <= at);
                }
                held.push((at, bytes));
                if round % 3 == 2 {
                    let (at, bytes) = held.swap_remove(number % held.len());
                    caching.free(at, bytes);
                }
            }
            for (at, bytes) in held {
                caching.free(at, bytes);
            }
            let all = caching.reserved();
            caching.empty()?;
            assert_eq!(caching.reserved(), 0);
            let back: u64 = counter.borrow().back.iter().map(|part| part.1).sum();
            assert_eq!(back, all, "joined: {joins}");
        }
        Ok(())
    }
}
