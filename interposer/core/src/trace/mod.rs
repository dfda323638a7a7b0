//! `SPILLWAY_TRACE=FILE`: the process's driver calls, one line each, in the format of `docs/trace.md`.
//!
//! Off, it costs a look-up of a name one comparison and a call nothing: a call is recorded by a wrapper
//! that a program gets from `dlsym` or `cuGetProcAddress` *in the place of* the export or of the driver's own
//! function (see [`wrapper`]). So a program that is linked to the driver, and what the driver's own libraries
//! call, is not recorded; [`is_bypassed`] tells the first.
//!
//! What is recorded of a call follows from its signature in the table (see [`shape`]): names, sizes, handles,
//! addresses, the calling thread and times. Never what memory holds, images of code, or parameters of kernels.
//!
//! A line is formatted on the stack and written by one system call after the driver has returned: nothing is
//! allocated, nothing is locked, nothing is left to be written at exit. If a line cannot be written, that is
//! said once, and the trace ends there.

mod file;
mod line;
mod shape;
mod wrappers;

pub use shape::{Kind, Shape};
pub use wrappers::wrapper;

use crate::driver::{Status, call, variable};
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use spillway_protocol::names;

/// The version of the format, in the first line of a trace.
pub const VERSION: u32 = 1;

/// Whether this process's calls are to be recorded. Reads the environment once, as `getenv` would, and
/// neither allocates nor calls it: `dlsym` asks.
#[inline]
pub fn is_on() -> bool {
    static MODE: AtomicU8 = AtomicU8::new(0);
    match MODE.load(Relaxed) {
        1 => false,
        2 => true,
        _ => {
            let on = wanted().is_some();
            if crate::driver::has_environment() {
                MODE.store(if on { 2 } else { 1 }, Relaxed);
            }
            on
        }
    }
}

/// The file's name as it was set; `None`: not set, or turned off, or not for the environment to say.
#[cold]
fn wanted() -> Option<&'static [u8]> {
    // SAFETY: a plain question to the C library.
    let trusted = unsafe { libc::getauxval(libc::AT_SECURE) } == 0;
    let off = variable(names::ENV_DISABLE) == Some(b"1");
    variable(names::ENV_TRACE).filter(|path| trusted && !off && !path.is_empty())
}

/// The recorded `cuInit` has been called.
static CALLED: AtomicBool = AtomicBool::new(false);

/// Whether a trace is wanted and `cuInit` came without passing the recorder: the program is linked to the
/// driver.
#[must_use]
pub fn is_bypassed() -> bool {
    is_on() && !CALLED.load(Relaxed)
}

/// Says so, once.
#[cold]
pub fn say_bypassed() {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Relaxed) {
        crate::say::set_level_from_environment();
        crate::say::warning!(
            "{}: this program is linked to the driver; only calls of what it looks up by dlsym or \
             cuGetProcAddress are recorded",
            names::ENV_TRACE
        );
    }
}

/// What is known of a call before it is made.
#[derive(Clone, Copy)]
#[repr(C)]
struct Begun {
    /// Nanoseconds since the trace began; `u64::MAX`: not recorded.
    at: u64,
    /// What an argument that is read and written held.
    input: u32,
}

/// Before the call. "C", as everything that a wrapper calls: no landing pad is needed, and a thread that is
/// ended inside the driver passes the wrapper's frame.
#[expect(improper_ctypes_definitions, reason = "called from here alone")]
extern "C" fn begin(name: &str, shape: &Shape, words: &[u64]) -> Begun {
    if name == "cuInit" {
        CALLED.store(true, Relaxed);
    }
    let begun = shielded(|| {
        let at = file::now()?;
        let input = shape.read_and_written(words);
        Some(Begun { at, input })
    });
    begun.unwrap_or(Begun {
        at: u64::MAX,
        input: 0,
    })
}

/// After the call.
#[expect(improper_ctypes_definitions, reason = "as above")]
extern "C" fn end(begun: Begun, name: &str, shape: &Shape, words: &[u64], status: Status) {
    if begun.at == u64::MAX {
        return;
    }
    let _ = shielded(|| {
        let took = file::now()?.saturating_sub(begun.at);
        let mut line = line::Line::new();
        line.call(name, begun.at, took, thread(), status.0);
        line.words(words);
        shape.rest(name, words, status, begun.input, &mut line);
        line.end();
        file::write(line.bytes());
        if name == "cuInit" && status.is_success() {
            devices();
        }
        Some(())
    });
}

/// Runs what records. A panic there ends the trace, and nothing else.
fn shielded<T>(record: impl FnOnce() -> Option<T>) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(record)).unwrap_or_else(|_| {
        file::end(format_args!("an error of the library's own"));
        None
    })
}

/// One line on the machine, once.
fn devices() {
    static SAID: AtomicBool = AtomicBool::new(false);
    if SAID.swap(true, Relaxed) {
        return;
    }
    let (mut version, mut count) = (0, 0);
    // SAFETY: the driver fills one integer each.
    let got = unsafe {
        let _ = call::cuDriverGetVersion(&raw mut version);
        call::cuDeviceGetCount(&raw mut count)
    };
    let mut line = line::Line::new();
    line.machine(version);
    for index in 0..count.clamp(0, 16) {
        let (mut device, mut bytes) = (0, 0_usize);
        // SAFETY: as above.
        let known = got.is_success()
            && unsafe {
                call::cuDeviceGet(&raw mut device, index).is_success()
                    && call::cuDeviceTotalMem_v2(&raw mut bytes, device).is_success()
            };
        line.device(index > 0, if known { bytes as u64 } else { 0 });
    }
    line.end_list();
    file::write(line.bytes());
}

/// The kernel's number of the calling thread.
fn thread() -> i64 {
    // SAFETY: a plain question to the kernel.
    unsafe { libc::syscall(libc::SYS_gettid) }
}
