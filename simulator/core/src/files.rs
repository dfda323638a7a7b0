//! Files that processes of different users share, and the kernel's record locks on their bytes.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// One line that says what cannot be done with a file.
#[must_use]
pub fn say(path: &Path, what: &str, error: &dyn std::fmt::Display) -> String {
    format!("spillway simulator: {what} {}: {error}", path.display())
}

/// Opens a file for everybody, creating it if it is not there.
///
/// # Errors
/// The system's.
pub fn open_shared(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o666)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)?;
    let mode = file.metadata()?.mode();
    if mode & 0o666 != 0o666 {
        // Only the owner may; the umask took something away.
        let _ = file.set_permissions(Permissions::from_mode(0o666));
    }
    Ok(file)
}

/// Maps the first `length` bytes, shared, for the life of the process.
///
/// # Errors
/// The system's.
pub fn map(file: &File, length: usize) -> io::Result<*mut u8> {
    // SAFETY: a fresh shared mapping of a file of at least `length` bytes, at no fixed address.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if base == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(base.cast())
    }
}

fn record_lock(kind: i32, byte: usize) -> libc::flock {
    // SAFETY: flock is plain data for which zero is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte as libc::off_t;
    lock.l_len = 1;
    lock
}

/// Takes a lock on one byte, unless another holds it.
#[must_use]
pub fn try_lock(fd: RawFd, command: i32, kind: i32, byte: usize) -> bool {
    let lock = record_lock(kind, byte);
    // SAFETY: `lock` is a valid request for the duration of the call.
    unsafe { libc::fcntl(fd, command, &raw const lock) == 0 }
}

/// Who holds the byte, as this process's pid namespace numbers it; `None` if nobody does.
#[must_use]
pub fn holder(fd: RawFd, command: i32, byte: usize) -> Option<i32> {
    let mut lock = record_lock(libc::F_WRLCK, byte);
    // SAFETY: `lock` is a valid request that the call fills in.
    let done = unsafe { libc::fcntl(fd, command, &raw mut lock) };
    (done != 0 || lock.l_type != libc::F_UNLCK as libc::c_short).then_some(lock.l_pid)
}

/// A number that tells this process's pid namespace from others; 0 if it cannot be known.
#[must_use]
pub fn pid_namespace() -> u64 {
    std::fs::metadata("/proc/self/ns/pid")
        .map(|m| m.ino())
        .unwrap_or(0)
}

/// Opens a file that is there.
///
/// # Errors
/// The system's.
pub fn open_shared_existing(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
}
