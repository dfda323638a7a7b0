//! Host memory as `cuMemCreate` makes it: a memfd, so that it can be shared by its descriptor, and mapped where
//! the CPU is given access.

use crate::code::{OUT_OF_MEMORY, R};
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

const NAME: &std::ffi::CStr = c"spillway-sim-host";

/// A piece of host memory.
pub struct HostMemory {
    file: File,
    base: *mut u8,
    length: u64,
}

// SAFETY: shared pages that are only read and written by simulated work, as device memory is.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

fn map(file: &File, at: u64, length: u64, access: libc::c_int) -> R<*mut u8> {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED };
    // SAFETY: maps a file; a fixed place is one of the device addresses, which nobody else maps.
    let base = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            length as usize,
            access,
            libc::MAP_SHARED | fixed,
            file.as_raw_fd(),
            0,
        )
    };
    if base == libc::MAP_FAILED {
        Err(OUT_OF_MEMORY)
    } else {
        Ok(base.cast())
    }
}

impl HostMemory {
    /// Fresh memory of `length` bytes.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn new(length: u64) -> R<Self> {
        // SAFETY: a plain call with a C string; the descriptor is owned by the file made of it.
        let file = unsafe {
            let fd = libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(OUT_OF_MEMORY);
            }
            File::from_raw_fd(fd)
        };
        file.set_len(length).map_err(|_| OUT_OF_MEMORY)?;
        Self::of(file, length)
    }

    fn of(file: File, length: u64) -> R<Self> {
        let base = map(&file, 0, length, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Self { file, base, length })
    }

    /// The memory of a descriptor; `None` if it is not one of ours.
    #[must_use]
    pub fn import(fd: i32) -> Option<Self> {
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
        let wanted = format!("/memfd:{} ", NAME.to_str().ok()?);
        if fd < 0 || !link.to_str()?.starts_with(&wanted) {
            return None;
        }
        // SAFETY: open, as its link could be read; copied at once.
        let file = File::from(
            unsafe { BorrowedFd::borrow_raw(fd) }
                .try_clone_to_owned()
                .ok()?,
        );
        let length = file.metadata().ok()?.len();
        Self::of(file, length).ok()
    }

    /// A descriptor for another process.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` without descriptors.
    pub fn export(&self) -> R<File> {
        self.file.try_clone().map_err(|_| OUT_OF_MEMORY)
    }

    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.length
    }

    /// Where `offset` lies in this process.
    #[must_use]
    pub fn at(&self, offset: u64) -> *mut u8 {
        // SAFETY: callers stay within the memory, as with frames.
        unsafe { self.base.add(offset as usize) }
    }

    /// Lets the CPU see the first `length` bytes at `address`, one of the device addresses.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn show(&self, address: u64, length: u64, writes: bool) -> R {
        let access = if writes { libc::PROT_WRITE } else { 0 } | libc::PROT_READ;
        map(&self.file, address, length, access).map(|_| ())
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `of`; what was shown elsewhere is hidden when it is unmapped.
        unsafe { libc::munmap(self.base.cast(), self.length as usize) };
    }
}

/// Makes device addresses inaccessible to the CPU, as they are made.
pub fn hide(address: u64, length: u64) {
    // SAFETY: inside the reservation of device addresses, of which this restores a part.
    unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            length as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        );
    }
}
