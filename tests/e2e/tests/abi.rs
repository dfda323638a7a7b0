//! The table is NVIDIA's header, and every hooked entry point gets its arguments whole.
//!
//! The header is that of the package nvidia-cuda-runtime that `tests/clients/python/requirements.txt`
//! pins. `tests/abi/` has the rest: a generator, a driver that only remembers, and a program compiled
//! against the header that calls every entry point in every way that a program has.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use spillway_tests::{artifact, repository};

/// The interpreter with the header and the parser, if there is a C compiler, too; `None`: said why, and
/// skipped.
fn python(test: &str) -> Option<PathBuf> {
    let Some(python) = std::env::var_os("SPILLWAY_TEST_PYTHON").filter(|path| !path.is_empty())
    else {
        eprintln!(
            "skipped: {test}: SPILLWAY_TEST_PYTHON names no python3 with tests/clients/python/requirements.txt"
        );
        return None;
    };
    let compiler = Command::new("cc").arg("--version").output();
    if !compiler.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: {test}: cc is not installed");
        return None;
    }
    Some(python.into())
}

fn run(command: &mut Command) -> Output {
    let output = command
        .env_remove("LD_PRELOAD")
        .output()
        .unwrap_or_else(|why| panic!("{command:?}: {why}"));
    succeeded(command, output)
}

fn succeeded(command: &Command, output: Output) -> Output {
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

#[test]
fn the_table_is_the_pinned_headers() {
    let Some(python) = python("the_table_is_the_pinned_headers") else {
        return;
    };
    let script = repository().join("scripts/check-header");
    let said = run(Command::new(python).arg(script).arg("--installed")).stdout;
    println!("{}", String::from_utf8_lossy(&said));
}

/// Generates and compiles the fake driver and its caller in `folder`.
fn build(python: &Path, folder: &Path) {
    let abi = repository().join("tests/abi");
    let generated = run(Command::new(python)
        .arg(abi.join("generate.py"))
        .arg(folder))
    .stdout;
    let header = String::from_utf8(generated).expect("a path");
    let cc = || {
        let mut cc = Command::new("cc");
        // Deprecated names are called on purpose.
        cc.args([
            "-std=gnu11",
            "-Wall",
            "-Werror",
            "-Wno-deprecated-declarations",
        ])
        .arg("-I")
        .arg(folder)
        .arg("-I")
        .arg(&abi)
        .arg("-isystem")
        .arg(header.trim());
        cc
    };
    let driver = folder.join("libcuda.so.1");
    run(cc()
        .args([
            "-shared",
            "-fPIC",
            "-Wl,-Bsymbolic-functions",
            "-Wl,-soname,libcuda.so.1",
        ])
        .arg(abi.join("driver.c"))
        .arg("-o")
        .arg(&driver));
    run(cc()
        .args(["-fPIE", "-pie"])
        .arg(abi.join("calls.c"))
        .arg("-o")
        .arg(folder.join("calls"))
        .arg(&driver)
        .arg("-ldl"));
}

#[test]
fn arguments_arrive_whole_by_every_way_into_the_library() {
    let Some(python) = python("arguments_arrive_whole_by_every_way_into_the_library") else {
        return;
    };
    let library = artifact("libspillway.so");
    let folder = tempfile::tempdir().expect("a folder");
    build(&python, folder.path());
    let calls = |name: &str| {
        let mut calls = Command::new(folder.path().join("calls"));
        calls.arg(name).env("LD_LIBRARY_PATH", folder.path());
        calls
    };
    // Without the library: that the program and the fake driver are right by themselves.
    run(&mut calls(""));
    let mut under = calls("libspillway.so");
    let output = under.env("LD_PRELOAD", library).output().expect("runs");
    let said = succeeded(&under, output).stdout;
    println!("{}", String::from_utf8_lossy(&said));
}
