//! The library's voice: lines on stderr, each with one `write`, from a buffer on the stack.
//!
//! `SPILLWAY_LOG` = `off`, `error`, `warn` (default), `info` or `debug`. Nothing is written before
//! CUDA is used.

use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// How loud a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Something is not enforced or not done.
    Error = 1,
    /// Something is thinner than asked.
    Warn = 2,
    /// What happened.
    Info = 3,
    /// Why it happened.
    Debug = 4,
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Warn as u8);

/// Sets the level from the variable's text; an unknown text is the default.
pub fn set_level(text: Option<&str>) {
    let level = match text {
        Some("off") => 0,
        Some("error") => 1,
        Some("info") => 3,
        Some("debug" | "trace") => 4,
        _ => 2,
    };
    LEVEL.store(level, Relaxed);
}

/// Sets the level before anything has started, without allocating.
pub fn set_level_from_environment() {
    let level = crate::driver::variable(spillway_protocol::names::ENV_LOG);
    set_level(level.and_then(|level| std::str::from_utf8(level).ok()));
}

/// One line of at most 1 KiB; longer ones are cut.
struct Line {
    buffer: [u8; 1024],
    len: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.buffer.len() - 1 - self.len;
        let take = text.len().min(room);
        self.buffer[self.len..self.len + take].copy_from_slice(&text.as_bytes()[..take]);
        self.len += take;
        Ok(())
    }
}

/// Writes `spillway[PID]: text`.
pub fn say(level: Level, text: fmt::Arguments<'_>) {
    if level as u8 > LEVEL.load(Relaxed) {
        return;
    }
    let mut line = Line {
        buffer: [0; 1024],
        len: 0,
    };
    let _ = write!(line, "spillway[{}]: {text}", std::process::id());
    line.buffer[line.len] = b'\n';
    // SAFETY: the buffer is valid for len + 1 bytes. A failing write is nobody's concern here.
    let _ = unsafe { libc::write(2, line.buffer.as_ptr().cast(), line.len + 1) };
}

macro_rules! error { ($($t:tt)*) => { $crate::say::say($crate::say::Level::Error, format_args!($($t)*)) } }
macro_rules! warning { ($($t:tt)*) => { $crate::say::say($crate::say::Level::Warn, format_args!($($t)*)) } }
macro_rules! info { ($($t:tt)*) => { $crate::say::say($crate::say::Level::Info, format_args!($($t)*)) } }
macro_rules! debug { ($($t:tt)*) => { $crate::say::say($crate::say::Level::Debug, format_args!($($t)*)) } }
pub(crate) use {debug, error, info, warning};
