//! The published snapshot: the node and the coordinator's last decisions in named shared memory, for
//! tools of the same user that want them without a socket, also after a crash of the coordinator.
//!
//! [`layout`] is the one definition; `include/spillway.h` is made from it (test
//! `header_is_current`), so that C and Rust cannot differ.
//!
//! Promises: a reader never waits for the writer, dead or alive. There are two copies; the sequence
//! number says which one is complete. A reader copies it and looks at the number again: if it has
//! changed it tries again, a few times at most, since the writer publishes some twenty times a second
//! at most.

pub mod header;
pub mod layout;

use std::path::Path;

pub use layout::{Node, Snapshot};

/// The name of the shared memory for a run directory: `/spillway-` and 16 hexadecimal digits, the
/// 64-bit FNV-1a hash of the directory's absolute path.
#[must_use]
pub fn name(run_dir: &Path) -> String {
    let absolute = std::path::absolute(run_dir).unwrap_or_else(|_| run_dir.to_path_buf());
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(absolute.as_os_str());
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("/spillway-{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_run_directory() {
        assert_eq!(
            name(Path::new("/run/spillway")),
            name(Path::new("/run/./spillway"))
        );
        assert_ne!(
            name(Path::new("/run/spillway")),
            name(Path::new("/tmp/spillway"))
        );
        assert_eq!(name(Path::new("/a")).len(), 26);
    }
}
