//! What `/proc/PID` tells about a process.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A process seen from outside.
#[derive(Debug)]
pub struct Proc {
    pid: i32,
    /// The files mapped, as `/proc/PID/maps` names them: paths in the process's own file system.
    maps: Vec<String>,
    /// The environment that the program was started with.
    environ: Vec<OsString>,
}

impl Proc {
    /// Reads what is needed.
    ///
    /// # Errors
    /// No such process, or it belongs to somebody else.
    pub fn read(pid: i32) -> io::Result<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let maps = std::fs::read(dir.join("maps"))?;
        let environ = std::fs::read(dir.join("environ"))?;
        Ok(Self {
            pid,
            maps: mapped_files(&String::from_utf8_lossy(&maps)),
            environ: environ
                .split(|b| *b == 0)
                .filter(|entry| !entry.is_empty())
                .map(|entry| OsStr::from_bytes(entry).to_owned())
                .collect(),
        })
    }

    /// The program's name.
    pub fn name(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/comm", self.pid))
            .map_or_else(|_| "?".to_owned(), |name| name.trim().to_owned())
    }

    /// Its program file, readable even if the path is in another file system.
    pub fn exe(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/exe", self.pid))
    }

    /// A mapped file whose name starts so.
    pub fn mapping(&self, file_name: &str) -> Option<&str> {
        let same = |path: &&String| {
            let name = path.rsplit('/').next().unwrap_or_default();
            name.starts_with(file_name)
        };
        self.maps.iter().find(same).map(String::as_str)
    }

    /// A variable of its environment at its start.
    pub fn var(&self, name: &str) -> Option<&OsStr> {
        let value = |entry: &'_ OsString| -> Option<usize> {
            let rest = entry.as_bytes().strip_prefix(name.as_bytes())?;
            rest.first()
                .is_some_and(|b| *b == b'=')
                .then_some(name.len() + 1)
        };
        let entry = self.environ.iter().find(|entry| value(entry).is_some())?;
        Some(OsStr::from_bytes(&entry.as_bytes()[name.len() + 1..]))
    }

    /// The same as text, if it is set and not empty.
    pub fn text(&self, name: &str) -> Option<String> {
        let value = self.var(name)?.to_string_lossy().into_owned();
        (!value.is_empty()).then_some(value)
    }

    /// A path of the process's file system as a path of ours.
    pub fn path(&self, inside: &Path) -> PathBuf {
        let relative = inside.strip_prefix("/").unwrap_or(inside);
        let base = if inside.is_absolute() { "root" } else { "cwd" };
        Path::new(&format!("/proc/{}/{base}", self.pid)).join(relative)
    }

    /// The kernel started it in secure mode (set-uid, file capabilities): the loader then ignores
    /// `LD_PRELOAD` paths. `None`: it does not say.
    pub fn secure(&self) -> Option<bool> {
        const AT_SECURE: u64 = 23;
        let auxv = std::fs::read(format!("/proc/{}/auxv", self.pid)).ok()?;
        let word = |at: &[u8]| at.try_into().map(u64::from_ne_bytes).ok();
        let mut pairs = auxv.chunks_exact(16);
        let pair = pairs.find(|pair| word(&pair[..8]) == Some(AT_SECURE))?;
        Some(word(&pair[8..])? != 0)
    }
}

fn mapped_files(maps: &str) -> Vec<String> {
    let mut files: Vec<String> = maps
        .lines()
        .filter_map(|line| Some(line[line.find('/')?..].to_owned()))
        .collect();
    files.dedup();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_lines_give_paths() {
        let maps = "\
7f00-7f01 r--p 00000000 08:01 12    /usr/lib/libspillway.so
7f01-7f02 r-xp 00001000 08:01 12    /usr/lib/libspillway.so
7f03-7f04 rw-p 00000000 00:00 0
7f05-7f06 r-xp 00000000 08:01 13    /usr/lib/lib with space.so (deleted)
7ffd-7ffe rw-p 00000000 00:00 0     [stack]
";
        assert_eq!(
            mapped_files(maps),
            [
                "/usr/lib/libspillway.so",
                "/usr/lib/lib with space.so (deleted)"
            ]
        );
    }

    #[test]
    fn reads_this_process() {
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let this = Proc::read(pid).expect("own process");
        assert!(this.mapping("libc.so").is_some());
        assert_eq!(this.mapping("libspillway-is-not-here"), None);
        assert!(this.text("PATH").is_some());
        assert_eq!(this.text("PAT"), None);
        assert_eq!(this.secure(), Some(false));
        assert!(this.path(Path::new("/proc/self/exe")).exists());
        assert!(Proc::read(i32::MAX).is_err());
    }
}
