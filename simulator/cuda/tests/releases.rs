//! Each release of the driver shows its own names, and no later ones: to `dlsym` and to
//! `cuGetProcAddress`; and it says its own version.
//!
//! Each test starts processes of this same binary, one per release.

use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::process::Command;

const TABLE: &str = include_str!("../driver_api.csv");
const RELEASES: [(&str, u32); 3] = [("12.4", 12_040), ("12.8", 12_080), ("13.0", 13_000)];

fn library() -> PathBuf {
    let me = std::env::current_exe().expect("current_exe");
    let deps = me.parent().expect("deps");
    let found = [deps, deps.parent().expect("target")]
        .into_iter()
        .map(|dir| dir.join("libcuda.so"))
        .find(|path| path.exists());
    found.expect("no libcuda.so: cargo build -p spillway-simulator-cuda first")
}

fn open() -> *mut c_void {
    let library = CString::new(library().as_os_str().as_encoded_bytes()).expect("path");
    // SAFETY: the simulated driver, whose constructor only edits its own symbol table.
    let handle = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_NOW) };
    assert!(!handle.is_null(), "dlopen");
    handle
}

fn symbol(handle: *mut c_void, name: &str) -> *mut c_void {
    let name = CString::new(name).expect("name");
    // SAFETY: a handle of dlopen and a C string.
    unsafe { libc::dlsym(handle, name.as_ptr()) }
}

fn version(handle: *mut c_void) -> u32 {
    let address = symbol(handle, "cuDriverGetVersion");
    let mut version = 0_i32;
    // SAFETY: the exported function has this signature.
    let code = unsafe {
        let function: extern "C" fn(*mut i32) -> u32 = std::mem::transmute(address);
        function(&raw mut version)
    };
    assert_eq!(code, 0);
    u32::try_from(version).expect("a version")
}

/// `(code, address, status)` of `cuGetProcAddress_v2`.
fn ask(handle: *mut c_void, name: &str, version: i32, flags: u64) -> (u32, usize, u32) {
    type Function = extern "C" fn(*const i8, *mut usize, i32, u64, *mut u32) -> u32;
    let address = symbol(handle, "cuGetProcAddress_v2");
    let name = CString::new(name).expect("name");
    let (mut found, mut status) = (0, u32::MAX);
    // SAFETY: the exported function has this signature.
    let code = unsafe {
        let function: Function = std::mem::transmute(address);
        function(
            name.as_ptr().cast(),
            &raw mut found,
            version,
            flags,
            &raw mut status,
        )
    };
    (code, found, status)
}

fn part(name: &str, driver: &str) {
    let place = tempfile::tempdir().expect("a folder");
    let output = Command::new(std::env::current_exe().expect("current_exe"))
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env("SPILLWAY_SIM_DIR", place.path().join("sim"))
        .env("SPILLWAY_SIM_DRIVER", driver)
        .output()
        .expect("spawn");
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{driver}: {said}");
    assert!(said.contains("1 passed"), "{driver}: {said}");
}

fn own_version() -> u32 {
    let name = std::env::var("SPILLWAY_SIM_DRIVER").expect("a release");
    RELEASES
        .iter()
        .find(|r| r.0 == name)
        .expect("a known one")
        .1
}

#[test]
#[ignore = "run by another test"]
fn part_names() {
    let handle = open();
    let driver = own_version();
    assert_eq!(version(handle), driver);
    let mut shown = 0;
    for line in TABLE.lines().skip(1) {
        let columns: Vec<&str> = line.split(',').collect();
        let since: u32 = columns[2].parse().expect("a version");
        let there = !symbol(handle, columns[0]).is_null();
        assert_eq!(there, since <= driver, "{}", columns[0]);
        shown += u32::from(there);
        let per_thread = if columns[3].is_empty() { 0 } else { 2 };
        let (code, address, status) = ask(
            handle,
            columns[1],
            i32::try_from(since).expect("a version"),
            per_thread,
        );
        if since <= driver {
            assert_eq!((code, status), (0, 0), "{}", columns[0]);
            // One name leads elsewhere from a version on: `cuGraphInstantiate`.
            assert_ne!(address, 0, "{}", columns[0]);
        } else {
            // An older form of the same function, or nothing.
            let older = TABLE
                .lines()
                .filter_map(|line| line.split_once(','))
                .filter(|(_, rest)| rest.split(',').next() == Some(columns[1]))
                .any(|(exported, _)| symbol(handle, exported) as usize == address);
            assert!(address == 0 || older, "{}", columns[0]);
        }
    }
    assert!(shown > 550, "{shown} names");
}

#[test]
fn each_release_shows_its_own_names() {
    for (name, _) in RELEASES {
        part("part_names", name);
    }
}

#[test]
#[ignore = "run by another test"]
fn part_later_version() {
    let handle = open();
    let later = i32::try_from(own_version() + 10).expect("a version");
    let (code, address, _) = ask(handle, "cuMemAlloc", later, 0);
    if own_version() >= 13_000 {
        assert_eq!((code, address), (1, 0));
    } else {
        assert_eq!(code, 0);
        assert_eq!(address, symbol(handle, "cuMemAlloc_v2") as usize);
    }
}

/// Source: the description of `cuGetProcAddress` in cuda.h of 13.0, and that before.
#[test]
fn a_version_later_than_the_drivers_is_refused_from_13_0_on() {
    for (name, _) in RELEASES {
        part("part_later_version", name);
    }
}
