//! Mapping what the coordinator hands over: the two pages and host segments.
//!
//! A mapping of a page is never undone: a thread may hold a reference to the page of a coordinator
//! that is gone. That is 4 KiB for each restart of the daemon.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;

use spillway_protocol::page::{DESIRED_MAGIC, Desired, OBSERVED_MAGIC, Observed, PAGE_BYTES};

use crate::descriptor::Descriptor;

/// Maps `bytes` of a memfd, shared.
pub fn map(fd: &Descriptor, bytes: usize, writable: bool) -> io::Result<*mut libc::c_void> {
    let fd = fd.get()?;
    // SAFETY: an all-zero stat is a valid value for the kernel to fill.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the buffer is a stat.
    if unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if u64::try_from(stat.st_size).unwrap_or(0) < bytes as u64 {
        return Err(io::Error::other("the coordinator's file is too small"));
    }
    let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            protection,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // A forked child must not keep a tenant's segments or write the parent's page. Best effort: an
    // old kernel that refuses leaves the child a mapping that it does not know of.
    // SAFETY: the range is the mapping made above.
    let _ = unsafe { libc::madvise(address, bytes, libc::MADV_DONTFORK) };
    Ok(address)
}

/// Maps the coordinator's page.
pub fn desired(fd: &Descriptor) -> io::Result<&'static Desired> {
    // SAFETY: the mapping is at least a page, page-aligned, never unmapped, and consists of atomics
    // for which every bit pattern is valid.
    let page = unsafe { &*map(fd, PAGE_BYTES, false)?.cast::<Desired>() };
    if page.magic.load(SeqCst) != DESIRED_MAGIC {
        return Err(io::Error::other("the coordinator's page is not one"));
    }
    Ok(page)
}

/// Maps our own page and signs it.
pub fn observed(fd: &Descriptor) -> io::Result<&'static Observed> {
    // SAFETY: as above; it is written by this process alone.
    let page = unsafe { &*map(fd, PAGE_BYTES, true)?.cast::<Observed>() };
    page.magic.store(OBSERVED_MAGIC, SeqCst);
    page.version
        .store(u64::from(spillway_protocol::PROTOCOL_VERSION), SeqCst);
    Ok(page)
}
