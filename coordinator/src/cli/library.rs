//! Finding `libspillway.so`, and checking it before a program is started with it: the loader
//! ignores an entry of `LD_PRELOAD` that it cannot load, and the program would run without limits.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use spillway_protocol::driver_file;
use spillway_protocol::note::Role;

/// Names the library for `spillway run`; `--library` goes before it.
pub const ENV_LIBRARY: &str = "SPILLWAY_LIBRARY";
/// The library's file name.
pub const FILE_NAME: &str = "libspillway.so";
/// The file name of the library for strict mode.
pub const STRICT_FILE_NAME: &str = "libspillway_strict.so";
/// Where packages put the library.
const SYSTEM_DIRS: [&str; 3] = [
    "/usr/lib/spillway",
    "/usr/local/lib/spillway",
    "/opt/spillway/lib",
];
/// An entry point that only a library with hooks exports.
const MARK: &[u8] = b"cuGetProcAddress_v2\0";

/// What is wrong with a library, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibraryError(String);

impl fmt::Display for LibraryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The library to preload, checked: the one named by the option, else by the environment, else the
/// first that exists beside the executable (`../lib`, `../lib/spillway`, its own directory) or in the
/// system's directories. With `strict` the library for strict mode; whoever names the other one then
/// means the one beside it.
///
/// # Errors
/// None found, or the one found cannot be preloaded; a named one is never replaced by another's.
pub fn find(option: Option<&Path>, strict: bool) -> Result<PathBuf, LibraryError> {
    if let Some(path) = option {
        return named(path, "--library", strict);
    }
    if let Some(path) = std::env::var_os(ENV_LIBRARY).filter(|p| !p.is_empty()) {
        return named(Path::new(&path), ENV_LIBRARY, strict);
    }
    let name = if strict { STRICT_FILE_NAME } else { FILE_NAME };
    let places = places(std::env::current_exe().ok().as_deref(), name);
    match places.iter().find(|place| place.exists()) {
        Some(place) => named(place, "found", strict),
        None => {
            let list: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
            Err(LibraryError(format!(
                "no {name} in any of {}: name it with --library or {ENV_LIBRARY}",
                list.join(", ")
            )))
        }
    }
}

/// One that somebody named, checked: in strict mode also that it is the right one of our two.
fn named(path: &Path, whence: &str, strict: bool) -> Result<PathBuf, LibraryError> {
    let path = check(path, whence)?;
    if !strict || driver_file::role(&path) == Some(Role::Strict) {
        return Ok(path);
    }
    let beside = path.with_file_name(STRICT_FILE_NAME);
    let path = check(&beside, &format!("--strict, beside {}", path.display()))?;
    if driver_file::role(&path) != Some(Role::Strict) {
        return Err(LibraryError(format!(
            "{} (--strict): is not the library for strict mode: install the {STRICT_FILE_NAME} of this \
             version there",
            path.display()
        )));
    }
    Ok(path)
}

fn places(executable: Option<&Path>, name: &str) -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(dir) = executable.and_then(Path::parent) {
        if let Some(prefix) = dir.parent() {
            places.push(prefix.join("lib").join(name));
            places.push(prefix.join("lib/spillway").join(name));
        }
        places.push(dir.join(name));
    }
    places.extend(SYSTEM_DIRS.map(|dir| Path::new(dir).join(name)));
    places
}

/// Checks that the loader of this machine will take this file; returns its absolute path.
///
/// # Errors
/// What the loader would have ignored in silence; `whence` says who named the path.
pub fn check(path: &Path, whence: &str) -> Result<PathBuf, LibraryError> {
    let error = |what: &str| {
        Err(LibraryError(format!(
            "{} ({whence}): {what}",
            path.display()
        )))
    };
    let absolute = match std::path::absolute(path) {
        Ok(absolute) => absolute,
        Err(e) => return error(&e.to_string()),
    };
    let Some(text) = absolute.to_str() else {
        return error("LD_PRELOAD cannot carry a path that is not UTF-8: use another path");
    };
    if text.contains([' ', ':', '\t', '\n', ';']) || text.contains('$') {
        return error(
            "LD_PRELOAD cannot carry a path with a space, ':', ';' or '$': use another path, \
             perhaps a symbolic link",
        );
    }
    match std::fs::metadata(&absolute) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return error("is not a file: name libspillway.so itself"),
        Err(e) => return error(&format!("{e}: name the libspillway.so to preload")),
    }
    let mut bytes = Vec::new();
    if let Err(e) = File::open(&absolute).and_then(|mut f| f.read_to_end(&mut bytes)) {
        return error(&format!("cannot be read: {e}"));
    }
    if let Err(what) = shared_object(&bytes) {
        return error(&what);
    }
    if !bytes.windows(MARK.len()).any(|window| window == MARK) {
        return error("is a shared object, but not libspillway.so: it has no hooks");
    }
    if no_exec(&absolute) {
        return error("lies on a file system mounted noexec: the loader cannot map it");
    }
    Ok(absolute)
}

fn no_exec(path: &Path) -> bool {
    use nix::sys::statvfs::{FsFlags, statvfs};
    statvfs(path).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_NOEXEC))
}

/// The part of an ELF header that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elf {
    /// `e_type`: 2 executable, 3 shared object or position-independent executable.
    pub kind: u16,
    /// `e_machine`.
    pub machine: u16,
    /// 64-bit, little-endian.
    pub native_class: bool,
    /// It names an interpreter, so a dynamic loader starts it.
    pub interpreted: bool,
}

#[cfg(target_arch = "x86_64")]
const MACHINE: (u16, &str) = (62, "x86-64");
#[cfg(target_arch = "aarch64")]
const MACHINE: (u16, &str) = (183, "aarch64");

impl Elf {
    /// Whether this machine's loader runs it.
    #[must_use]
    pub fn native(self) -> bool {
        self.native_class && self.machine == MACHINE.0
    }
}

/// Reads an ELF header and the program headers' types; `None`: no ELF, or cut short.
#[must_use]
pub fn read_elf(bytes: &[u8]) -> Option<Elf> {
    if bytes.len() < 20 || !bytes.starts_with(b"\x7fELF") {
        return None;
    }
    let native_class = bytes[4] == 2 && bytes[5] == 1;
    let at16 = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let mut elf = Elf {
        kind: at16(16)?,
        machine: at16(18)?,
        native_class,
        interpreted: false,
    };
    if native_class {
        let offset = u64::from_le_bytes(bytes.get(32..40)?.try_into().ok()?);
        let (size, count) = (usize::from(at16(54)?), usize::from(at16(56)?));
        let offset = usize::try_from(offset).ok()?;
        for i in 0..count {
            let at = offset.checked_add(i.checked_mul(size)?)?;
            let kind = bytes.get(at..at.checked_add(4)?)?;
            elf.interpreted |= kind == 3u32.to_le_bytes(); // PT_INTERP
        }
    }
    Some(elf)
}

fn shared_object(bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(b"\x7fELF") {
        return Err("is not an ELF file, so the loader would ignore it".into());
    }
    let Some(elf) = read_elf(bytes) else {
        return Err("is cut short: copy it again".into());
    };
    if !elf.native() {
        return Err(format!(
            "is for another machine; this one is {}: take the library built for it",
            MACHINE.1
        ));
    }
    if elf.kind != 3 {
        return Err("is not a shared object".into());
    }
    // The section headers come last: their end shows whether the file is whole.
    let at16 = |at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let sections = u64::from_le_bytes(bytes[40..48].try_into().unwrap_or_default());
    let end = sections.saturating_add(at16(58) * at16(60));
    if end > bytes.len() as u64 {
        return Err("is cut short: copy it again".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).expect("writable");
        (dir, path)
    }

    /// A shared object of this machine that is whole: the header alone, plus the mark.
    fn object() -> Vec<u8> {
        let mut bytes = vec![0u8; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16] = 3;
        bytes[18..20].copy_from_slice(&MACHINE.0.to_le_bytes());
        bytes.extend_from_slice(MARK);
        bytes
    }

    #[test]
    fn a_good_one_is_taken() {
        let (_dir, path) = temp("libspillway.so", &object());
        assert_eq!(check(&path, "test"), Ok(path));
    }

    #[test]
    fn every_kind_of_bad_one_is_named() {
        let mut other_machine = object();
        other_machine[18] ^= 1;
        let mut executable = object();
        executable[16] = 2;
        let mut cut = object();
        cut[40..48].copy_from_slice(&1_000_000u64.to_le_bytes());
        for (bytes, says) in [
            (b"#!/bin/sh\n".to_vec(), "not an ELF"),
            (b"\x7fELF".to_vec(), "cut short"),
            (object()[..40].to_vec(), "cut short"),
            (cut, "cut short"),
            (other_machine, "another machine"),
            (executable, "not a shared object"),
            (object()[..64].to_vec(), "no hooks"),
        ] {
            let (_dir, path) = temp("lib.so", &bytes);
            let text = check(&path, "test").expect_err(says).to_string();
            assert!(text.contains(says), "{says}: {text}");
            assert!(text.contains("lib.so"), "{text}");
        }
        let (dir, path) = temp("a b.so", &object());
        assert!(check(&path, "t").is_err_and(|e| e.0.contains("space")));
        assert!(check(dir.path(), "t").is_err_and(|e| e.0.contains("not a file")));
        assert!(check(Path::new("/no/such.so"), "t").is_err_and(|e| e.0.contains("/no/such.so")));
    }

    #[test]
    fn looks_beside_the_executable_first() {
        let places = places(Some(Path::new("/opt/x/bin/spillway")), FILE_NAME);
        assert_eq!(places[0], Path::new("/opt/x/lib/libspillway.so"));
        assert_eq!(places[2], Path::new("/opt/x/bin/libspillway.so"));
        assert_eq!(places[3], Path::new("/usr/lib/spillway/libspillway.so"));
    }

    #[test]
    fn strict_mode_takes_no_other_library() {
        let (dir, path) = temp(FILE_NAME, &object());
        let text = named(&path, "test", true).expect_err("none beside it").0;
        assert!(
            text.contains(STRICT_FILE_NAME) && text.contains("--strict"),
            "{text}"
        );
        std::fs::write(dir.path().join(STRICT_FILE_NAME), object()).expect("writable");
        let text = named(&path, "test", true).expect_err("no note").0;
        assert!(text.contains("not the library for strict mode"), "{text}");
        assert_eq!(named(&path, "test", false), Ok(path));
    }

    #[test]
    fn this_very_program_is_dynamic() {
        let exe = std::fs::read("/proc/self/exe").expect("readable");
        let elf = read_elf(&exe).expect("ELF");
        assert!(elf.native() && elf.interpreted);
    }
}
