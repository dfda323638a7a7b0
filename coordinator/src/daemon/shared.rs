//! The shared pages as files and mappings.
//!
//! Promises: a process cannot write its *desired* page through any path (the file is sealed against
//! writable mappings and writes before its descriptor leaves us; ours was mapped before). No process
//! can resize a file that we have mapped. Only atomics are behind the mappings.

use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::SeqCst;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;
use spillway_protocol::page::{DESIRED_MAGIC, Desired, OBSERVED_MAGIC, Observed, PAGE_BYTES};

/// Structures that consist of atomics alone, for which all-zero bytes (a fresh file) are valid, and
/// which fit a page.
///
/// # Safety
/// All of that must hold.
pub unsafe trait Page {}
// SAFETY: `#[repr(C)]`, atomics alone; the protocol asserts the size.
unsafe impl Page for Desired {}
// SAFETY: as above.
unsafe impl Page for Observed {}

/// A page shared with a process.
pub struct Shared<T: Page> {
    map: NonNull<T>,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to this value alone and holds only atomics.
unsafe impl<T: Page> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Page> Sync for Shared<T> {}

impl<T: Page> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping lives as long as `self`, is at least as large as T (the file was made
        // or checked to be PAGE_BYTES and is sealed against shrinking), and T is atomics alone, so
        // that concurrent writers in other processes are no data race.
        unsafe { self.map.as_ref() }
    }
}

impl<T: Page> std::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({})", raw(&self.file))
    }
}

impl<T: Page> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `map_file` with this size; no reference outlives `self`.
        let _ = unsafe { munmap(self.map.cast(), PAGE_BYTES) };
    }
}

impl<T: Page> AsFd for Shared<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl<T: Page> Shared<T> {
    fn map_file(file: OwnedFd, prot: ProtFlags) -> nix::Result<Self> {
        let len = std::num::NonZeroUsize::new(PAGE_BYTES).ok_or(nix::Error::EINVAL)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else is touched.
        let map = unsafe {
            mmap(
                None,
                len,
                prot,
                MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE,
                &file,
                0,
            )
        }?;
        Ok(Self {
            map: map.cast(),
            file,
        })
    }
}

fn create(name: &str) -> nix::Result<OwnedFd> {
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    ftruncate(&file, i64::try_from(PAGE_BYTES).unwrap_or(i64::MAX))?;
    Ok(file)
}

impl Shared<Desired> {
    /// A new page, writable here and nowhere else.
    ///
    /// # Errors
    /// The system has no memory or descriptors left.
    pub fn desired() -> nix::Result<Self> {
        let file = create("spillway-desired")?;
        let page = Self::map_file(file, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        page.magic.store(DESIRED_MAGIC, SeqCst);
        page.version
            .store(u64::from(spillway_protocol::PROTOCOL_VERSION), SeqCst);
        let seals = SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_FUTURE_WRITE
            | SealFlag::F_SEAL_SEAL;
        fcntl(&page.file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(page)
    }
}

impl Shared<Observed> {
    /// A new page for a process to write; read-only here.
    ///
    /// # Errors
    /// The system has no memory or descriptors left.
    pub fn observed() -> nix::Result<Self> {
        let file = create("spillway-observed")?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Self::map_file(file, ProtFlags::PROT_READ)
    }

    /// The page that a process brought along from before a restart.
    ///
    /// # Errors
    /// One line: it is not a page that this could be, or it can still be resized (which would end us
    /// at the next access).
    pub fn adopt(file: OwnedFd) -> Result<Self, String> {
        check_file(&file, PAGE_BYTES as u64).map_err(|why| format!("the observed page {why}"))?;
        let page = Self::map_file(file, ProtFlags::PROT_READ)
            .map_err(|error| format!("the observed page cannot be mapped: {error}"))?;
        if page.magic.load(SeqCst) != OBSERVED_MAGIC {
            return Err("the observed page does not begin with its mark".to_owned());
        }
        Ok(page)
    }
}

/// Checks that a descriptor from outside is a memfd of exactly this size that nobody can resize.
///
/// # Errors
/// What is wrong with it, to be put after its name.
pub fn check_file(file: &OwnedFd, bytes: u64) -> Result<(), String> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map_err(|_| "is not a memfd".to_owned())?;
    let needed = (SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW).bits();
    if seals & needed != needed {
        return Err("is not sealed against resizing".to_owned());
    }
    let size = fstat(file.as_fd())
        .map(|stat| stat.st_size)
        .map_err(|error| format!("cannot be examined: {error}"))?;
    if u64::try_from(size) != Ok(bytes) {
        return Err(format!("has {size} bytes instead of {bytes}"));
    }
    Ok(())
}

/// The descriptor's number, for messages about it.
#[must_use]
pub fn raw(file: &impl AsFd) -> i32 {
    file.as_fd().as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Write;

    fn map(file: BorrowedFd<'_>, prot: ProtFlags) -> nix::Result<()> {
        let len = std::num::NonZeroUsize::new(PAGE_BYTES).expect("not zero");
        // SAFETY: a fresh mapping, removed at once.
        unsafe {
            mmap(None, len, prot, MapFlags::MAP_SHARED, file, 0)
                .and_then(|at| munmap(at, PAGE_BYTES))
        }
    }

    #[test]
    fn the_desired_page_cannot_be_written_through_any_path() {
        let page = Shared::desired().expect("makes a page");
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        assert_eq!(map(page.as_fd(), both), Err(nix::Error::EPERM));
        assert_eq!(map(page.as_fd(), ProtFlags::PROT_READ), Ok(()));
        let path = format!("/proc/self/fd/{}", raw(&page));
        // Opening the file anew gives no writable mapping either, and no write.
        let mut again = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .expect("root may open it");
        assert!(again.write_all(b"x").is_err());
        assert_eq!(map(again.as_fd(), both), Err(nix::Error::EPERM));
        assert!(ftruncate(&again, 0).is_err());
        // We still can, and it arrives.
        page.command.store(77, SeqCst);
        assert_eq!(page.command.load(SeqCst), 77);
    }

    #[test]
    fn only_sealed_memfds_of_the_right_size_are_adopted() {
        let text = |file: OwnedFd| Shared::<Observed>::adopt(file).expect_err("refused");
        let ordinary = tempfile::tempfile().expect("a file");
        assert!(text(ordinary.into()).contains("not a memfd"));
        let unsealed = create("unsealed").expect("a memfd");
        assert!(text(unsealed).contains("not sealed"));
        let small = memfd_create("small", MFdFlags::MFD_ALLOW_SEALING).expect("a memfd");
        fcntl(
            &small,
            FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW),
        )
        .expect("seals");
        assert!(text(small).contains("0 bytes instead of 4096"));
        let (pipe, _other) = nix::unistd::pipe().expect("a pipe");
        assert!(text(pipe).contains("not a memfd"));
    }
}
