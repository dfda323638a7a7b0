//! Green contexts: a part of a device's multiprocessors, used through the device's primary context.
//!
//! A green context keeps the primary context and takes memory of its own. While it is current, work goes to
//! its streams; all else, memory above all, is the primary context's.

use crate::capture;
use crate::code::{CONTEXT_IS_DESTROYED, INVALID_RESOURCE_CONFIGURATION, R};
use crate::config::FRAME;
use crate::context::Context;
use crate::driver::Driver;
use crate::space::{Physical, fresh_id};
use crate::stream::{Kind, Stream};
use crate::sync::lock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The smallest partition of compute capability 9.0, of which larger ones are multiples; and the same for
/// partitions that need not lie together.
pub const PARTITION: u32 = 8;
pub const PARTITION_ALONE: u32 = 2;

/// Multiprocessors of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub gpu: u32,
    pub first: u32,
    pub count: u32,
    /// The split that it came out of; 0: of none.
    pub split: u64,
}

impl Part {
    /// The groups of a split and what remains, each of at least `least` multiprocessors; at most `most` groups.
    ///
    /// # Errors
    /// `INVALID_RESOURCE_CONFIGURATION` for what a split made: a green context has to be made of it first.
    pub fn split(&self, least: u32, alone: bool, most: u32) -> R<(Vec<Self>, Self)> {
        static SPLITS: AtomicU64 = AtomicU64::new(1);
        if self.split != 0 {
            return Err(INVALID_RESOURCE_CONFIGURATION);
        }
        let unit = if alone { PARTITION_ALONE } else { PARTITION };
        let size = least.max(1).next_multiple_of(unit);
        let groups = (self.count / size).min(most);
        let split = SPLITS.fetch_add(1, Ordering::Relaxed);
        let part = |first, count| Self {
            gpu: self.gpu,
            first,
            count,
            split,
        };
        let made = (0..groups)
            .map(|n| part(self.first + n * size, size))
            .collect();
        let taken = groups * size;
        Ok((made, part(self.first + taken, self.count - taken)))
    }
}

/// A green context.
pub struct Green {
    /// As a `CUgreenCtx`, as a `CUcontext`, and its number.
    pub id: u64,
    pub context_id: u64,
    pub number: u64,
    /// The primary context.
    pub context: Arc<Context>,
    pub part: Part,
    destroyed: AtomicBool,
    charge: Mutex<Option<Arc<Physical>>>,
    default: Mutex<Option<Arc<Stream>>>,
}

impl Green {
    /// A new one. It counts as a use of the primary context, which is made if there is none.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn new(driver: &'static Driver, part: Part) -> R<Arc<Self>> {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let mut primary = lock(&driver.primaries[part.gpu as usize]);
        let context = primary.activate(driver, part.gpu)?;
        // What the driver takes for one is not published: here a quarter of a context.
        let bytes = (driver.shared.config().context / 4).next_multiple_of(FRAME);
        let charge = match bytes {
            0 => Ok(None),
            _ => Physical::charge(driver.shared, part.gpu, bytes).map(Some),
        };
        let charge = charge.inspect_err(|_| {
            if primary.references == 0 {
                primary.deactivate(driver);
            }
        })?;
        primary.references += 1;
        drop(primary);
        let green = Arc::new(Self {
            id: fresh_id(),
            context_id: fresh_id(),
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            context,
            part,
            destroyed: AtomicBool::new(false),
            charge: Mutex::new(charge),
            default: Mutex::new(None),
        });
        let default = Stream::new(
            fresh_id(),
            Kind::Legacy,
            false,
            0,
            0,
            Arc::clone(&green.context),
            Some(Arc::clone(&green)),
        );
        green.context.add_stream(&default);
        *lock(&green.default) = Some(default);
        driver.greens.insert(green.id, Arc::clone(&green));
        Ok(green)
    }

    /// The one that a `CUcontext` stands for.
    #[must_use]
    pub fn of_context(driver: &Driver, handle: u64) -> Option<Arc<Self>> {
        driver
            .greens
            .all()
            .into_iter()
            .find(|green| green.context_id == handle)
    }

    /// # Errors
    /// `CONTEXT_IS_DESTROYED`, or the lasting error of the primary context.
    pub fn check(&self) -> R {
        if self.destroyed.load(Ordering::Acquire) {
            return Err(CONTEXT_IS_DESTROYED);
        }
        self.context.check()
    }

    /// Its default stream; `None` once it is gone.
    #[must_use]
    pub fn default_stream(&self) -> Option<Arc<Stream>> {
        lock(&self.default).clone()
    }

    /// All its streams, the default one among them.
    #[must_use]
    pub fn streams(&self) -> Vec<Arc<Stream>> {
        let own = |stream: &Arc<Stream>| stream.green_id() == self.id;
        self.context.streams().into_iter().filter(own).collect()
    }

    /// Waits for all its work.
    ///
    /// # Errors
    /// `STREAM_CAPTURE_UNSUPPORTED` if one of its streams captures; the capture is spoilt.
    pub fn synchronize(&self) -> R {
        self.check()?;
        let streams = self.streams();
        capture::refuse_among(&streams)?;
        for stream in &streams {
            stream.wait(stream.submitted());
        }
        self.check()
    }

    /// Gives up what it has of its own. Work that was submitted is done first.
    pub fn let_go(&self) {
        if self.destroyed.swap(true, Ordering::AcqRel) {
            return;
        }
        for stream in self.streams() {
            stream.wait(stream.submitted());
            self.context.close_stream(stream.id);
        }
        *lock(&self.default) = None;
        *lock(&self.charge) = None;
    }

    /// Ends it, and its use of the primary context. Its streams stay known: using them is an error of its own.
    pub fn destroy(&self, driver: &'static Driver) {
        if driver.greens.remove(self.id).is_none() {
            return;
        }
        self.let_go();
        lock(&driver.primaries[self.part.gpu as usize]).release(driver);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Part = Part {
        gpu: 0,
        first: 0,
        count: 132,
        split: 0,
    };

    #[test]
    fn a_split_makes_groups_of_one_size_and_a_remainder() {
        let (groups, rest) = WHOLE.split(20, false, 100).unwrap();
        assert!(groups.iter().all(|group| group.count == 24));
        assert_eq!((groups.len(), groups[1].first), (5, 24));
        assert_eq!((rest.first, rest.count), (120, 12));
        assert!(groups.iter().all(|group| group.split == rest.split));
        let (groups, rest) = WHOLE.split(0, true, 3).unwrap();
        assert_eq!((groups.len(), groups[2].count, rest.count), (3, 2, 126));
        assert!(rest.split(8, false, 1).is_err());
    }
}
