//! Host memory for what is swapped out: how much is promised to whom, and the segments that hold it.
//!
//! Promises: a segment belongs to one session for its life and is never handed to another; when the
//! session ends or releases it, its pages are given back to the system *before* its file is closed,
//! so that a process that kept its old mapping reads zeros, and nothing of anybody's. Segments are
//! populated on a thread of their own, and emptied on another, never on the main loop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::unistd::ftruncate;
use spillway_arbiter::ProcessId;

use super::handle::Waker;

/// What of the host stays free when the pool grows on demand.
const KEEP_FREE: u64 = 2 << 30;
/// Populated at once: short enough that an end of the daemon does not wait for it.
const PIECE: usize = 32 << 20;
/// At most so many threads populate a segment: memory is not zeroed faster by more.
const POPULATORS: usize = 8;
/// Size of the huge pages that are used where the system has them.
const HUGE_PAGE: u64 = 2 << 20;

/// The accounts.
#[derive(Debug)]
pub struct Pool {
    fixed: Option<u64>,
    capacity: u64,
    reserved: u64,
    populated: Arc<AtomicU64>,
}

impl Pool {
    /// With a fixed size, or one that grows on demand.
    #[must_use]
    pub fn new(fixed: Option<u64>) -> Self {
        let capacity = fixed.unwrap_or_else(|| available_memory() / 4);
        Self {
            fixed,
            capacity,
            reserved: 0,
            populated: Arc::default(),
        }
    }

    /// What may be reserved now.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// What is reserved.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// What is populated.
    #[must_use]
    pub fn populated(&self) -> u64 {
        self.populated.load(Relaxed)
    }

    /// Reserves `bytes`, growing the pool if it may grow. `false`: there is no space, nothing was
    /// reserved.
    pub fn reserve(&mut self, bytes: u64) -> bool {
        let wanted = self.reserved.saturating_add(bytes);
        if wanted > self.capacity && self.fixed.is_none() {
            let most = self
                .populated()
                .saturating_add(available_memory().saturating_sub(KEEP_FREE));
            self.capacity = self.capacity.max(wanted.min(most));
        }
        if wanted > self.capacity {
            return false;
        }
        self.reserved = wanted;
        true
    }

    /// Reserves what a resumed process holds already, whatever the capacity.
    pub fn adopt(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_add(bytes);
        self.capacity = self.capacity.max(self.reserved);
    }

    /// Gives reserved bytes back.
    pub fn release(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    /// Starts the threads that make and empty segments.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn start(&self, waker: Waker) -> io::Result<Workshop> {
        let (made_sender, made) = channel();
        let (orders, order_receiver) = channel::<Order>();
        let (bin, bin_receiver) = channel::<Segment>();
        let populated = Arc::clone(&self.populated);
        let thrown = bin.clone();
        thread::Builder::new()
            .name("populate".to_owned())
            .spawn(move || {
                for order in order_receiver {
                    let result = Segment::make(order.bytes, &populated);
                    let made = Made {
                        session: order.session,
                        ticket: order.ticket,
                        bytes: order.bytes,
                        result,
                    };
                    if let Err(lost) = made_sender.send(made)
                        && let Ok(segment) = lost.0.result
                    {
                        let _ = thrown.send(segment);
                    }
                    waker.wake();
                }
            })?;
        thread::Builder::new()
            .name("empty".to_owned())
            // Dropping a segment empties it.
            .spawn(move || bin_receiver.into_iter().for_each(drop))?;
        Ok(Workshop { orders, bin, made })
    }

    /// The counter that adopted segments are added to.
    #[must_use]
    pub fn counter(&self) -> &Arc<AtomicU64> {
        &self.populated
    }
}

/// A segment that is to be made.
#[derive(Debug)]
struct Order {
    session: ProcessId,
    ticket: u64,
    bytes: u64,
}

/// A segment that was made, or why it was not.
#[derive(Debug)]
pub struct Made {
    /// For whom.
    pub session: ProcessId,
    /// Echoed.
    pub ticket: u64,
    /// The size that was wanted.
    pub bytes: u64,
    /// The segment.
    pub result: Result<Segment, String>,
}

/// The two threads.
#[derive(Debug)]
pub struct Workshop {
    orders: Sender<Order>,
    bin: Sender<Segment>,
    made: Receiver<Made>,
}

impl Workshop {
    /// Asks for a segment; it arrives by [`Workshop::made`] after a wake-up.
    pub fn order(&self, session: ProcessId, ticket: u64, bytes: u64) {
        let _ = self.orders.send(Order {
            session,
            ticket,
            bytes,
        });
    }

    /// Empties a segment in the background.
    pub fn discard(&self, segment: Segment) {
        let _ = self.bin.send(segment);
    }

    /// The next finished one.
    pub fn made(&self) -> Option<Made> {
        self.made.try_recv().ok()
    }
}

/// Host memory of one session. Dropping it gives the pages back, also under mappings of others.
#[derive(Debug)]
pub struct Segment {
    file: OwnedFd,
    bytes: u64,
    populated: Arc<AtomicU64>,
    /// Emptied at its end. Not while the only copy of somebody's memory may be in it.
    emptied: bool,
}

impl Segment {
    /// Makes and populates a segment.
    ///
    /// # Errors
    /// One line: the host has no memory left for it.
    pub fn make(bytes: u64, populated: &Arc<AtomicU64>) -> Result<Self, String> {
        if free_huge_pages().saturating_mul(HUGE_PAGE) >= bytes
            && bytes.is_multiple_of(HUGE_PAGE)
            && let Ok(segment) = Self::make_of(bytes, MFdFlags::MFD_HUGETLB, populated)
        {
            return Ok(segment);
        }
        Self::make_of(bytes, MFdFlags::empty(), populated).map_err(|error| {
            format!("the host has no memory for a segment of {bytes} bytes: {error}")
        })
    }

    fn make_of(bytes: u64, kind: MFdFlags, populated: &Arc<AtomicU64>) -> nix::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | kind;
        let file = memfd_create("spillway-segment", flags)?;
        ftruncate(&file, i64::try_from(bytes).map_err(|_| nix::Error::EFBIG)?)?;
        populate(&file, bytes)?;
        fcntl(
            &file,
            FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW),
        )?;
        populated.fetch_add(bytes, Relaxed);
        Ok(Self {
            file,
            bytes,
            populated: Arc::clone(populated),
            emptied: true,
        })
    }

    /// Takes over a segment from before a restart. The caller has checked the file. It is its owner's
    /// alone until [`Segment::settle`].
    #[must_use]
    pub fn adopt(file: OwnedFd, bytes: u64, populated: &Arc<AtomicU64>) -> Self {
        populated.fetch_add(bytes, Relaxed);
        Self {
            file,
            bytes,
            populated: Arc::clone(populated),
            emptied: false,
        }
    }

    /// Its owner is in: from now on it ends with the session.
    pub fn settle(&mut self) {
        self.emptied = true;
    }

    /// Its owner was sent away and may hold memory in it: it is left to the owner, who may come back.
    pub fn leave(mut self) {
        self.emptied = false;
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if self.emptied {
            self.empty();
        }
        // Counted down last: who sees the figure sees the pages gone.
        self.populated.fetch_sub(self.bytes, Relaxed);
    }
}

impl Segment {
    fn empty(&self) {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let len = i64::try_from(self.bytes).unwrap_or(i64::MAX);
        while let Err(error) = fallocate(&self.file, flags, 0, len) {
            if error != nix::Error::EINTR {
                tracing::error!(%error, "cannot empty a host segment");
                break;
            }
        }
    }
}

/// Gives every page of the file memory now, in pieces.
fn populate(file: &OwnedFd, bytes: u64) -> nix::Result<()> {
    let bytes = usize::try_from(bytes).map_err(|_| nix::Error::EFBIG)?;
    let len = std::num::NonZeroUsize::new(bytes).ok_or(nix::Error::EINVAL)?;
    // SAFETY: a fresh mapping of a file that nobody else has yet.
    let base = unsafe {
        mmap(
            None,
            len,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_SHARED,
            file,
            0,
        )
    }?;
    // Zeroing pages is what takes the time, and a thread alone does about 2 GB/s of it.
    let next = AtomicUsize::new(0);
    let base_address = base.as_ptr() as usize;
    let work = || -> nix::Result<()> {
        loop {
            let at = next.fetch_add(PIECE, Relaxed);
            if at >= bytes {
                return Ok(());
            }
            populate_piece(base_address + at, PIECE.min(bytes - at))?;
        }
    };
    let result = thread::scope(|scope| {
        let others: Vec<_> = (1..populators().min(bytes.div_ceil(PIECE)))
            // Without a thread more, this one does it all.
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
            .collect();
        let own = work();
        others
            .into_iter()
            .map(|other| other.join().unwrap_or(Err(nix::Error::ENOMEM)))
            .fold(own, |all, one| all.and(one))
    });
    // SAFETY: mapped above with this length, used nowhere else.
    unsafe { munmap(base, bytes) }?;
    if result == Err(nix::Error::EINVAL) {
        // A kernel before 5.14: the pages come with the first touch.
        return fallocate(
            file,
            FallocateFlags::empty(),
            0,
            i64::try_from(bytes).unwrap_or(0),
        );
    }
    result
}

/// Gives a piece of a mapping memory.
fn populate_piece(at: usize, bytes: usize) -> nix::Result<()> {
    let at = std::ptr::NonNull::new(at as *mut std::ffi::c_void).ok_or(nix::Error::EFAULT)?;
    loop {
        // SAFETY: a piece of the mapping that the caller keeps; populating changes no contents.
        match unsafe { madvise(at, bytes, MmapAdvise::MADV_POPULATE_WRITE) } {
            Err(nix::Error::EINTR) => {}
            other => return other,
        }
    }
}

/// How many threads populate at once: not more than half of the CPUs, since tenants need them, too.
fn populators() -> usize {
    thread::available_parallelism().map_or(1, |cpus| (cpus.get() / 2).clamp(1, POPULATORS))
}

/// `MemAvailable`, in bytes; 0 if the system does not say.
fn available_memory() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else {
        return 0;
    };
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

fn free_huge_pages() -> u64 {
    std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Mapping(std::ptr::NonNull<std::ffi::c_void>, usize);

    impl Mapping {
        fn of(segment: &Segment) -> Self {
            let bytes = usize::try_from(segment.bytes()).expect("fits");
            let len = std::num::NonZeroUsize::new(bytes).expect("not zero");
            let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a fresh mapping.
            let at = unsafe { mmap(None, len, both, MapFlags::MAP_SHARED, segment, 0) };
            Self(at.expect("maps"), bytes)
        }

        fn bytes(&mut self) -> &mut [u8] {
            // SAFETY: mapped with this length; the only reference.
            unsafe { std::slice::from_raw_parts_mut(self.0.cast().as_ptr(), self.1) }
        }
    }

    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: mapped in `of`.
            let _ = unsafe { munmap(self.0, self.1) };
        }
    }

    #[test]
    fn a_former_owner_reads_zeros_and_sees_nothing_of_the_next() {
        let populated = Arc::default();
        let segment = Segment::make(4 << 20, &populated).expect("made");
        assert_eq!(populated.load(Relaxed), 4 << 20);
        let mut former = Mapping::of(&segment);
        former.bytes().fill(0xaa);
        drop(segment);
        assert_eq!(populated.load(Relaxed), 0);
        assert!(former.bytes().iter().all(|byte| *byte == 0));
        // The next owner's segment is another file.
        let next = Segment::make(4 << 20, &populated).expect("made");
        let mut owner = Mapping::of(&next);
        owner.bytes().fill(0xbb);
        assert!(former.bytes().iter().all(|byte| *byte == 0));
        // What the former owner writes reaches nobody either.
        former.bytes().fill(0xcc);
        assert!(owner.bytes().iter().all(|byte| *byte == 0xbb));
    }

    #[test]
    fn a_segment_cannot_be_resized() {
        let segment = Segment::make(2 << 20, &Arc::default()).expect("made");
        assert!(ftruncate(&segment.file, 0).is_err());
        assert!(ftruncate(&segment.file, 8 << 20).is_err());
    }

    #[test]
    fn reservations_stay_within_a_fixed_pool() {
        let mut pool = Pool::new(Some(100));
        assert!(pool.reserve(60));
        assert!(!pool.reserve(41));
        assert!(pool.reserve(40));
        pool.release(50);
        assert_eq!(pool.reserved(), 50);
        assert!(!pool.reserve(u64::MAX));
    }

    #[test]
    fn a_pool_on_demand_leaves_memory_to_the_host() {
        let mut pool = Pool::new(None);
        assert!(pool.capacity() > 0);
        let first = pool.capacity();
        if available_memory() > KEEP_FREE + first + (1 << 30) {
            assert!(pool.reserve(first + (1 << 20)), "grows on demand");
        }
        assert!(!pool.reserve(1 << 60));
    }
}
