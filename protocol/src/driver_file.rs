//! The driver's own file: where a loader would find it, and whether a file is it.
//!
//! In strict mode the name `libcuda.so.1` means our library, so that the driver has to be opened by its
//! path. `spillway run --strict` looks for it before it starts a program, the library when nobody did.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::note::{self, Role};

/// The name that programs load the driver by.
pub const SONAME: &str = "libcuda.so.1";
/// How the file name of every driver begins.
pub const FILE_PREFIX: &str = "libcuda.so";
/// The loader's cache of libraries.
pub const CACHE: &str = "/etc/ld.so.cache";

#[cfg(target_arch = "x86_64")]
const USUAL: [&str; 6] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/lib/wsl/lib",
    "/run/opengl-driver/lib",
];
#[cfg(not(target_arch = "x86_64"))]
const USUAL: [&str; 6] = [
    "/lib/aarch64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/lib/aarch64-linux-gnu/tegra",
    "/run/opengl-driver/lib",
];

/// `e_machine` of this machine's files, and what the cache calls them.
#[cfg(target_arch = "x86_64")]
const MACHINE: (u16, u32) = (62, 0x0303);
#[cfg(not(target_arch = "x86_64"))]
const MACHINE: (u16, u32) = (183, 0x0a03);

/// Where the driver may be, in the order in which a loader looks: `library_path` (`LD_LIBRARY_PATH`),
/// the contents of its [`CACHE`], the usual folders. Absolute paths; whether they exist is not looked at.
#[must_use]
pub fn candidates(library_path: Option<&OsStr>, cache: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let listed = library_path.map_or(&b""[..], OsStr::as_bytes);
    if !listed.is_empty() {
        for folder in listed.split(|byte| matches!(byte, b':' | b';')) {
            // An empty entry is the current folder. What has a `$` is for the loader alone to expand.
            let folder = if folder.is_empty() { b"." } else { folder };
            if folder.contains(&b'$') {
                continue;
            }
            let path = Path::new(OsStr::from_bytes(folder)).join(SONAME);
            found.extend(std::path::absolute(path));
        }
    }
    found.extend(cached(cache));
    found.extend(USUAL.map(|folder| Path::new(folder).join(SONAME)));
    let mut seen = Vec::new();
    found.retain(|path| {
        let new = !seen.contains(path);
        if new {
            seen.push(path.clone());
        }
        new
    });
    found
}

/// What the loader's cache says of the driver. The format is that of glibc's `ldconfig` since 2.2; one
/// that is not understood says nothing.
fn cached(cache: &[u8]) -> Vec<PathBuf> {
    const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
    const HEADER: usize = 48;
    const ENTRY: usize = 24;
    // An older table may stand in front of it.
    let start = cache.windows(MAGIC.len()).position(|part| part == MAGIC);
    let Some(cache) = start.map(|start| &cache[start..]) else {
        return Vec::new();
    };
    let word = |at: usize| {
        let bytes = cache.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let text = |at: u32| {
        let rest = cache.get(usize::try_from(at).ok()?..)?;
        rest.split(|byte| *byte == 0).next()
    };
    let count = usize::try_from(word(20).unwrap_or(0)).unwrap_or(0);
    let entries = (0..count.min(cache.len() / ENTRY)).filter_map(|index| {
        let at = HEADER + index * ENTRY;
        let (kind, name, path) = (word(at)?, text(word(at + 4)?)?, text(word(at + 8)?)?);
        let ours = kind == MACHINE.1 && name == SONAME.as_bytes() && path.starts_with(b"/");
        ours.then(|| PathBuf::from(OsString::from_vec(path.to_vec())))
    });
    entries.collect()
}

/// Checks that a file is the driver: one that this machine loads, by its name and its soname, and none of
/// ours.
///
/// # Errors
/// What it is instead, to be put behind the path.
pub fn check(path: &Path) -> Result<(), String> {
    if !path.is_absolute() {
        return Err("is no absolute path: write the whole path of the driver's file".into());
    }
    let name = path.file_name().unwrap_or_default();
    if !name.as_bytes().starts_with(FILE_PREFIX.as_bytes()) {
        return Err(format!(
            "is not called {FILE_PREFIX}...: name the driver's own file"
        ));
    }
    let file = File::open(path).map_err(|why| why.to_string())?;
    match read(&file) {
        Err(why) => Err(format!("cannot be read: {why}")),
        Ok(None) => Err("is no shared object of this machine".into()),
        Ok(Some(Object { role: Some(_), .. })) => {
            Err("is Spillway's own library, not the driver".into())
        }
        Ok(Some(object)) if object.soname.as_deref() == Some(SONAME.as_bytes()) => Ok(()),
        Ok(Some(_)) => Err(format!("is not the driver: its soname is not {SONAME}")),
    }
}

/// Whether a file is one of our libraries, and which.
#[must_use]
pub fn role(path: &Path) -> Option<Role> {
    read(&File::open(path).ok()?).ok()??.role
}

/// What a shared object says of itself.
struct Object {
    soname: Option<Vec<u8>>,
    role: Option<Role>,
}

/// The largest part of a file that is read at once: headers, notes and tables of real files are smaller.
const PART_MAX: u64 = 64 << 10;

/// Reads the few parts that matter; `None`: no shared object that this machine loads.
fn read(file: &File) -> io::Result<Option<Object>> {
    let part = |offset: u64, bytes: u64| {
        let mut buffer = vec![0; usize::try_from(bytes.min(PART_MAX)).unwrap_or(0)];
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read_at(&mut buffer[filled..], offset + filled as u64)? {
                0 => break,
                more => filled += more,
            }
        }
        buffer.truncate(filled);
        Ok::<_, io::Error>(buffer)
    };
    let header = part(0, 64)?;
    let half = |at: usize| Some(u16::from_le_bytes(header.get(at..at + 2)?.try_into().ok()?));
    let native = header.len() == 64
        && header.starts_with(b"\x7fELF\x02\x01")
        && half(16) == Some(3)
        && half(18) == Some(MACHINE.0);
    if !native {
        return Ok(None);
    }
    let long = |bytes: &[u8], at: usize| {
        let bytes = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    let size = usize::from(half(54).unwrap_or(0)).max(56);
    let bytes = size as u64 * u64::from(half(56).unwrap_or(0));
    let table = part(long(&header, 32), bytes)?;
    let segments: Vec<(u32, u64, u64, u64)> = table
        .chunks_exact(size)
        .map(|s| {
            let kind = u32::from_le_bytes([s[0], s[1], s[2], s[3]]);
            (kind, long(s, 8), long(s, 16), long(s, 32))
        })
        .collect();
    let (mut strings, mut soname, mut role) = (None, None, None);
    for &(kind, offset, _, bytes) in &segments {
        match kind {
            // PT_NOTE
            4 => role = role.or(note::find(&part(offset, bytes)?)),
            // PT_DYNAMIC: pairs of a tag and a value. DT_STRTAB, DT_SONAME.
            2 => {
                for pair in part(offset, bytes)?.chunks_exact(16) {
                    match long(pair, 0) {
                        5 => strings = Some(long(pair, 8)),
                        14 => soname = Some(long(pair, 8)),
                        0 => break,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let mut text = None;
    if let (Some(strings), Some(soname)) = (strings, soname) {
        // The address of the table of strings, as an offset into the file: by the PT_LOAD that has it.
        let load = segments.iter().find(|&&(kind, _, address, bytes)| {
            kind == 1 && strings >= address && strings - address < bytes
        });
        if let Some(&(_, offset, address, _)) = load {
            let at = offset.saturating_add(strings - address);
            let bytes = part(at.saturating_add(soname), 256)?;
            text = bytes.split(|byte| *byte == 0).next().map(<[u8]>::to_vec);
        }
    }
    Ok(Some(Object { soname: text, role }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache with these entries: what kind, which name, where.
    fn cache(entries: &[(u32, &str, &str)]) -> Vec<u8> {
        let mut strings = Vec::new();
        let mut table = Vec::new();
        let first = 48 + 24 * entries.len();
        for (kind, name, path) in entries {
            let mut put = |text: &str| {
                let at = u32::try_from(first + strings.len()).expect("small");
                strings.extend_from_slice(text.as_bytes());
                strings.push(0);
                at
            };
            let (name, path) = (put(name), put(path));
            for word in [*kind, name, path, 0, 0, 0] {
                table.extend_from_slice(&word.to_ne_bytes());
            }
        }
        let mut bytes = b"glibc-ld.so.cache1.1".to_vec();
        let count = u32::try_from(entries.len()).expect("few");
        bytes.extend_from_slice(&count.to_ne_bytes());
        bytes.resize(48, 0);
        bytes.extend(table);
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn the_loaders_order() {
        let cache = cache(&[
            (MACHINE.1, "libc.so.6", "/usr/lib/libc.so.6"),
            (0x0003, SONAME, "/usr/lib32/libcuda.so.1"),
            (MACHINE.1, SONAME, "/opt/driver/libcuda.so.1"),
        ]);
        let found = candidates(Some(OsStr::new("/a:/b;/a:/x/$LIB")), &cache);
        let expected = [
            "/a/libcuda.so.1",
            "/b/libcuda.so.1",
            "/opt/driver/libcuda.so.1",
        ];
        for (path, expected) in found.iter().zip(expected) {
            assert_eq!(path, Path::new(expected));
        }
        assert_eq!(found.len(), expected.len() + USUAL.len());
        // Behind an older table.
        let mut both = b"ld.so-1.7.0\0\0\0\0\0".to_vec();
        both.extend(&cache);
        assert_eq!(cached(&both), [Path::new("/opt/driver/libcuda.so.1")]);
        assert_eq!(candidates(None, b"").len(), USUAL.len());
        assert_eq!(candidates(Some(OsStr::new("")), b"").len(), USUAL.len());
    }

    #[test]
    fn a_damaged_cache_says_nothing_wrong() {
        let whole = cache(&[(MACHINE.1, SONAME, "/opt/libcuda.so.1")]);
        for end in 0..whole.len() - 1 {
            for path in cached(&whole[..end]) {
                assert!(path.starts_with("/"), "{path:?}");
            }
        }
        let mut endless = whole;
        endless[20..24].fill(0xff);
        assert_eq!(cached(&endless), [Path::new("/opt/libcuda.so.1")]);
    }

    #[test]
    fn what_is_not_the_driver_is_named() {
        let dir = std::env::temp_dir().join(format!("spillway-driver-file-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        let path = dir.join(SONAME);
        std::fs::write(&path, "text").expect("writable");
        assert!(check(&path).is_err_and(|why| why.contains("no shared object")));
        std::fs::copy("/proc/self/exe", &path).expect("a copy");
        assert!(check(&path).is_err_and(|why| why.contains("soname")));
        std::fs::remove_dir_all(&dir).expect("removed");
        assert!(check(&path).is_err_and(|why| why.contains("No such file")));
        assert!(check(Path::new("libcuda.so.1")).is_err_and(|why| why.contains("absolute")));
        assert!(check(Path::new("/proc/self/exe")).is_err_and(|why| why.contains("not called")));
        assert_eq!(role(Path::new("/proc/self/exe")), None);
    }
}
