//! Start and end, versions, errors.

use crate::abi::{NOT_FOUND, Out, exports, put_text};
use crate::state;
use std::ffi::c_char;

const ERRORS: &[(u32, &str)] = &[
    (0, "Success\0"),
    (1, "Uninitialized\0"),
    (2, "Invalid Argument\0"),
    (3, "Not Supported\0"),
    (4, "Insufficient Permissions\0"),
    (6, "Not Found\0"),
    (7, "Insufficient Size\0"),
    (9, "Driver Not Loaded\0"),
    (13, "Function Not Found\0"),
    (25, "Argument Version Mismatch\0"),
    (999, "Unknown Error\0"),
];

#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(code: u32) -> *const c_char {
    ERRORS
        .iter()
        .find(|e| e.0 == code)
        .map_or("Unknown Error\0", |e| e.1)
        .as_ptr()
        .cast()
}

exports! {
    fn nvmlInit() {
        state::init()
    }

    fn nvmlInit_v2() {
        state::init()
    }

    fn nvmlInitWithFlags(flags: u32) {
        let _ = flags;
        state::init()
    }

    fn nvmlShutdown() {
        state::shutdown()
    }

    fn nvmlSystemGetDriverVersion(to: Out<u8>, capacity: u32) {
        put_text(to, capacity, state::shared()?.config().release().package)
    }

    fn nvmlSystemGetNVMLVersion(to: Out<u8>, capacity: u32) {
        let release = state::shared()?.config().release();
        put_text(to, capacity, &format!("{}.{}", release.cuda / 1000, release.package))
    }

    fn nvmlSystemGetCudaDriverVersion(version: Out<i32>) {
        version.set(state::shared()?.config().driver as i32)
    }

    fn nvmlSystemGetCudaDriverVersion_v2(version: Out<i32>) {
        version.set(state::shared()?.config().driver as i32)
    }

    fn nvmlSystemGetProcessName(pid: u32, to: Out<u8>, capacity: u32) {
        state::shared()?;
        let name = std::fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| NOT_FOUND)?;
        let first = name.split(|b| *b == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(first);
        let end = name.char_indices().map(|(i, c)| i + c.len_utf8()).take_while(|e| *e < capacity as usize).last();
        put_text(to, capacity, &name[..end.unwrap_or(0)])
    }

    fn nvmlUnitGetCount(count: Out<u32>) {
        state::shared()?;
        count.set(0)
    }
}
