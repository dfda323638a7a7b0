//! Whether a library that was to be preloaded is there: the loader leaves out what it cannot load, says so, and
//! goes on, and a measurement of nothing would look like one of a library that adds nothing.

use std::path::Path;

use anyhow::{Result, bail};

/// Fails if `maps`, as `/proc/PID/maps` shows it, has no mapping of this file.
///
/// # Errors
/// The line that the user has to see.
pub fn check_mapped(maps: &str, library: &Path) -> Result<()> {
    let real = library
        .canonicalize()
        .unwrap_or_else(|_| library.to_path_buf());
    let real = real.to_string_lossy();
    // Without a folder the loader has looked for the name in its own.
    let ending = if real.contains('/') {
        real.into_owned()
    } else {
        format!("/{real}")
    };
    // Address, access, offset, device and inode stand before the path.
    let mapped = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]))
        .any(|path| path == ending || !library.is_absolute() && path.ends_with(&ending));
    if mapped {
        return Ok(());
    }
    bail!(
        "{} is not loaded into the measured program: nothing would be measured; give a shared library for this machine",
        library.display()
    )
}

/// Fails if this process was to have a library preloaded and does not have it.
///
/// # Errors
/// As [`check_mapped`].
pub fn check() -> Result<()> {
    let wanted = std::env::var("LD_PRELOAD").unwrap_or_default();
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    // What the loader puts in place of `$LIB` and the like is its own business.
    for name in wanted.split([' ', ':']) {
        if !name.is_empty() && !name.contains('$') {
            check_mapped(&maps, Path::new(name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_mapped;
    use std::path::Path;

    #[test]
    fn a_file_that_is_not_mapped_is_seen() {
        let maps =
            "7f00-7f01 r-xp 0000 08:01 12 /opt/a b/libx.so\n7f02-7f03 rw-p 0000 00:00 0 [heap]\n";
        assert!(check_mapped(maps, Path::new("/opt/a b/libx.so")).is_ok());
        assert!(check_mapped(maps, Path::new("libx.so")).is_ok());
        for other in ["/opt/libx.so", "b/libx", "/proc/self/status"] {
            assert!(check_mapped(maps, Path::new(other)).is_err(), "{other}");
        }
    }
}
