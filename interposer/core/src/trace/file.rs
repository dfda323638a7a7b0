//! The file of a trace: opened at the first recorded call, written by one system call per line, given up at
//! the first failure.

use super::{VERSION, line::Line, wanted};
use crate::descriptor::Descriptor;
use crate::runtime::monotonic_ns;
use crate::say;
use core::fmt::Arguments;
use core::sync::atomic::{
    AtomicI32, AtomicPtr, AtomicU8, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;

/// A trace ends before its file is larger than this, or than the process may write: the kernel ends one that
/// tries.
const BYTES_MAX: u64 = 1 << 30;
static LIMIT: AtomicU64 = AtomicU64::new(BYTES_MAX);

const NEW: u8 = 0;
const OPENING: u8 = 1;
const OPEN: u8 = 2;
const ENDED: u8 = 3;

static STATE: AtomicU8 = AtomicU8::new(NEW);
static FILE: AtomicPtr<Descriptor> = AtomicPtr::new(core::ptr::null_mut());
/// The process that opened it: a forked child is another one, and is not recorded.
static PROCESS: AtomicI32 = AtomicI32::new(0);
static BEGAN: AtomicU64 = AtomicU64::new(0);
static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// Nanoseconds since the trace began; `None`: nothing is recorded any more, or not in this process. Opens the
/// file if this is the first call of all.
pub(super) fn now() -> Option<u64> {
    loop {
        match STATE.load(Acquire) {
            OPEN => break,
            ENDED => return None,
            NEW => {
                if STATE
                    .compare_exchange(NEW, OPENING, Acquire, Relaxed)
                    .is_ok()
                {
                    // A panic must not leave the others waiting.
                    let opened = std::panic::catch_unwind(open).unwrap_or(false);
                    STATE.store(if opened { OPEN } else { ENDED }, Release);
                }
            }
            // Another thread opens it, which takes microseconds. Not in a child that was forked meanwhile.
            _ if PROCESS.load(Relaxed) != process() => return None,
            _ => std::thread::yield_now(),
        }
    }
    if PROCESS.load(Relaxed) != process() {
        return None;
    }
    Some(monotonic_ns().saturating_sub(BEGAN.load(Relaxed)))
}

fn process() -> i32 {
    // SAFETY: a plain question to the kernel.
    unsafe { libc::getpid() }
}

fn open() -> bool {
    PROCESS.store(process(), Relaxed);
    BEGAN.store(monotonic_ns(), Relaxed);
    let Some(wanted) = wanted() else {
        return false;
    };
    say::set_level_from_environment();
    let path = path(wanted);
    let file = match create(&path).and_then(Descriptor::keep) {
        Ok(file) => file,
        Err(why) => {
            let hint = if why.kind() == io::ErrorKind::AlreadyExists {
                "; a trace is never written over: remove it, or write %p for the process id"
            } else {
                ""
            };
            end(format_args!(
                "{}: {why}{hint}",
                OsStr::from_bytes(&path).display()
            ));
            return false;
        }
    };
    LIMIT.store(allowed().min(BYTES_MAX), Relaxed);
    FILE.store(Box::into_raw(Box::new(file)), Release);
    let mut line = Line::new();
    line.head(VERSION, process());
    write(line.bytes())
}

/// How large a file of this process may be.
fn allowed() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel fills one structure.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) };
    if got == 0 { limit.rlim_cur } else { BYTES_MAX }
}

fn create(path: &[u8]) -> io::Result<OwnedFd> {
    std::fs::OpenOptions::new()
        .append(true)
        .create_new(true)
        .mode(0o600)
        .open(OsStr::from_bytes(path))
        .map(OwnedFd::from)
}

/// The name with each `%p` replaced by the process id.
fn path(wanted: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(wanted.len() + 8);
    let mut rest = wanted;
    while let Some((&first, after)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(b"%p") {
            path.extend_from_slice(process().to_string().as_bytes());
            rest = after;
        } else {
            path.push(first);
            rest = after;
        }
    }
    path
}

/// Writes one line; `false`: the trace has ended.
pub(super) fn write(line: &[u8]) -> bool {
    // SAFETY: null, or a box that is never freed.
    let Some(file) = (unsafe { FILE.load(Acquire).as_ref() }) else {
        return false;
    };
    let length = line.len() as u64;
    let limit = LIMIT.load(Relaxed);
    if WRITTEN.fetch_add(length, Relaxed) + length > limit {
        end(format_args!(
            "the file may not be larger than {limit} bytes"
        ));
        return false;
    }
    let written = file.get().and_then(|file| {
        // SAFETY: an open descriptor and a valid buffer. Appended whole, or not at all but for a full disk.
        let written = unsafe { libc::write(file.as_raw_fd(), line.as_ptr().cast(), line.len()) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    });
    match written {
        Ok(written) if written == line.len() => true,
        Ok(_) => {
            end(format_args!("a line could only be written in part"));
            false
        }
        Err(why) => {
            end(format_args!("{why}"));
            false
        }
    }
}

/// Ends the trace and says so, once.
#[cold]
pub(super) fn end(why: Arguments<'_>) {
    if STATE.swap(ENDED, Release) != ENDED {
        say::warning!(
            "{}: {why}; calls are not recorded from here on",
            spillway_protocol::names::ENV_TRACE
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_stands_for_each_p() {
        let pid = process();
        assert_eq!(path(b"/tmp/a.jsonl"), b"/tmp/a.jsonl");
        assert_eq!(
            path(b"/tmp/%p/a-%p"),
            format!("/tmp/{pid}/a-{pid}").as_bytes()
        );
        assert_eq!(path(b"%"), b"%");
    }
}
