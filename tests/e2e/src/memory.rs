//! Where the simulated GPUs' memory lies: in memory, where there is enough. On a disk the kernel
//! writes all of it back, again and again, and a busy disk then stops programs for seconds.

use std::fs::File;
use std::mem::MaybeUninit;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::GIB;

const BASE: &str = "/dev/shm";
const PREFIX: &str = "spillway-test.";
/// Two tests at a time, each with the largest GPU.
const ENOUGH: u64 = 5 * GIB;

/// A folder in memory, and the lock that says that its test lives.
pub(crate) struct MemoryDir {
    dir: TempDir,
    _lock: File,
}

impl MemoryDir {
    /// `None`: there is no such file system, or it is too small.
    pub(crate) fn new() -> Option<Self> {
        if free_in_memory(BASE)? < ENOUGH {
            return None;
        }
        remove_left_over();
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(BASE)
            .ok()?;
        let lock = File::create(dir.path().join("lock")).ok()?;
        lock.try_lock().ok()?;
        std::fs::create_dir(dir.path().join("sim")).ok()?;
        Some(Self { dir, _lock: lock })
    }

    /// An empty folder for the simulator.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("sim")
    }

    /// Other users may get there.
    pub(crate) fn open_to_all(&self) {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(self.dir.path(), mode).expect("a mode");
    }
}

/// Free bytes of a file system that lies in memory.
fn free_in_memory(path: &str) -> Option<u64> {
    let path = std::ffi::CString::new(path).ok()?;
    let mut stat = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: a C string, and a structure that the kernel fills.
    if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: zeroed, then filled.
    let stat = unsafe { stat.assume_init() };
    let block = u64::try_from(stat.f_bsize).ok()?;
    (stat.f_type == libc::TMPFS_MAGIC).then(|| stat.f_bavail.saturating_mul(block))
}

/// Folders of tests that were killed: nobody holds their locks any more.
fn remove_left_over() {
    for entry in std::fs::read_dir(BASE).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let lock = File::open(entry.path().join("lock"));
        if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_holds_is_removed() {
        let (Some(held), Some(left)) = (MemoryDir::new(), MemoryDir::new()) else {
            println!("skipped: {BASE} is not in memory, or too small");
            return;
        };
        let path = left.dir.keep();
        drop(left._lock);
        remove_left_over();
        assert!(held.path().exists());
        assert!(!path.exists());
    }
}
