//! Opening the driver where its name means this library.
//!
//! A program that asks the loader for `libcuda.so.1` in strict mode gets us, and so would we. So the file
//! is opened by its path: the one that `SPILLWAY_DRIVER_LIBRARY` names, else the first that can be opened
//! where a loader would look. A variable that names something else is never replaced by a guess.

use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, Ordering};
use spillway_protocol::{driver_file, names};
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Opens the driver's file; null if there is none, which is said once. Loads what it finds: for a program
/// that uses CUDA.
#[cold]
pub fn open() -> *mut c_void {
    // A panic must not unwind into a call of the program's.
    std::panic::catch_unwind(search).unwrap_or(null_mut())
}

fn search() -> *mut c_void {
    // SAFETY: a plain question to the C library.
    let trusted = unsafe { libc::getauxval(libc::AT_SECURE) } == 0;
    // In a program with more rights than its user the environment says nothing about what to load.
    let variable = |name| std::env::var_os(name).filter(|value| trusted && !value.is_empty());
    if let Some(path) = variable(names::ENV_DRIVER_LIBRARY).map(PathBuf::from) {
        return match driver_file::check(&path).and_then(|()| open_at(&path)) {
            Ok(handle) => handle,
            Err(why) => {
                let path = path.display();
                complain(format_args!("{}={path} {why}", names::ENV_DRIVER_LIBRARY));
                null_mut()
            }
        };
    }
    let cache = std::fs::read(driver_file::CACHE).unwrap_or_default();
    let folders = variable("LD_LIBRARY_PATH");
    let places = driver_file::candidates(folders.as_deref(), &cache);
    let good = places
        .iter()
        .filter(|path| driver_file::check(path).is_ok());
    for path in good {
        if let Ok(handle) = open_at(path) {
            return handle;
        }
    }
    complain(format_args!(
        "no driver: no {} in LD_LIBRARY_PATH, in {} or in the usual folders. Name its file with {}",
        driver_file::SONAME,
        driver_file::CACHE,
        names::ENV_DRIVER_LIBRARY
    ));
    null_mut()
}

fn open_at(path: &Path) -> Result<*mut c_void, String> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|why| why.to_string())?;
    // SAFETY: a C string; the program called a function of the driver, so it wants it loaded.
    let opened = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) };
    if opened.is_null() {
        return Err("cannot be loaded".into());
    }
    Ok(opened)
}

fn complain(text: core::fmt::Arguments<'_>) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        crate::say::error!("{text}; CUDA finds no device in this process");
    }
}
