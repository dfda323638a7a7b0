//! Builds the C programs once and runs them, with and without the library.

#![allow(dead_code, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The library: what `SPILLWAY_LIBRARY` names, or built now. (A test does not make cargo build a cdylib.)
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("SPILLWAY_LIBRARY") {
            return path.into();
        }
        let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .parent()
            .expect("the target folder");
        let output = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--package",
                "spillway-interposer",
                "--package",
                "spillway-interposer-strict",
                "--target-dir",
            ])
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        target.join("debug/libspillway.so")
    })
}

/// The strict library, which lies beside the other.
pub fn strict_library() -> PathBuf {
    library().with_file_name("libspillway_strict.so")
}

/// What a program is started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preload {
    Nothing,
    Plain,
    Strict,
}

/// Whether `program` can be run here; if not, says that the test is skipped.
pub fn have(program: &str, test: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: {test}: {program} is not installed");
    }
    found
}

/// A folder with the test programs and the fake drivers; `None` without a C compiler.
pub fn programs(test: &str) -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    if !have("cc", test) {
        return None;
    }
    BUILT.get_or_init(|| Some(build())).as_deref()
}

fn cc(arguments: &[&str]) {
    let output = Command::new("cc")
        .args(["-O1", "-Wall", "-Werror", "-pthread"])
        .args(arguments)
        .output()
        .expect("cc runs");
    assert!(
        output.status.success(),
        "cc {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Takes away what earlier runs have built.
fn clean(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix("entry-")) else {
            continue;
        };
        if !Path::new("/proc").join(pid).exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn build() -> PathBuf {
    clean(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("entry-{}", std::process::id()));
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c");
    let old = out.join("old");
    std::fs::create_dir_all(&old).expect("a folder for the programs");
    let source = |name: &str| sources.join(name).display().to_string();
    let built = |name: &str| out.join(name).display().to_string();
    let shared = |from: &str, to: &str, more: &[&str]| {
        let soname = format!("-Wl,-soname,{}", to.rsplit('/').next().expect("a name"));
        let (from, to) = (source(from), built(to));
        let mut arguments = vec!["-shared", "-fPIC", &soname, "-o", &to, &from];
        arguments.extend(more);
        cc(&arguments);
    };
    // The driver's own look-ups stay within it, as in the real one.
    shared("fake_cuda.c", "libcuda.so.1", &["-Wl,-Bsymbolic"]);
    shared(
        "fake_cuda.c",
        "old/libcuda.so.1",
        &["-Wl,-Bsymbolic", "-DOLD_DRIVER"],
    );
    shared("fake_nvml.c", "libnvidia-ml.so.1", &[]);
    shared("scope_library.c", "libscope_library.so", &[]);
    let folder = format!("-L{}", out.display());
    let path = format!("-Wl,-rpath,{}", out.display());
    shared(
        "scope_plugin.c",
        "libscope_plugin.so",
        &["-Wl,--no-as-needed", &folder, &path, "-lscope_library"],
    );
    for (from, to) in [
        ("look_up.c", "look_up"),
        ("calls.c", "calls"),
        ("proc_address.c", "proc_address"),
        ("host.c", "host"),
        ("strict.c", "strict"),
        ("deep.c", "deep"),
    ] {
        cc(&["-o", &built(to), &source(from)]);
    }
    cc(&[
        "-o",
        &built("scope"),
        &source("scope.c"),
        "-fno-builtin",
        "-rdynamic",
    ]);
    let driver = built("libcuda.so.1");
    shared(
        "deep_plugin.c",
        "libdeep_plugin.so",
        &["-Wl,--no-as-needed", &driver],
    );
    cc(&[
        "-DDIRECT",
        "-o",
        &built("calls_direct"),
        &source("calls.c"),
        &driver,
    ]);
    cc(&[
        "-Wl,-z,lazy",
        "-o",
        &built("missing"),
        &source("missing.c"),
        &driver,
    ]);
    out
}

/// A command on one of the programs, finding the fake drivers of `folder`.
pub fn command(program: &Path, drivers: &Path, preload: Preload) -> Command {
    let mut command = Command::new(program);
    command
        .env("LD_LIBRARY_PATH", drivers)
        .env_remove("LD_PRELOAD");
    for name in ["SPILLWAY_STRICT", "SPILLWAY_DRIVER_LIBRARY"] {
        command.env_remove(name);
    }
    match preload {
        Preload::Nothing => {}
        Preload::Plain => {
            command.env("LD_PRELOAD", library());
        }
        Preload::Strict => {
            command.env("LD_PRELOAD", strict_library());
        }
    }
    command
}

/// Runs to the end and returns what it printed, having insisted on the exit code.
pub fn output(command: &mut Command, code: i32) -> String {
    outputs(command, code).0
}

/// The same, with what it wrote to standard error.
pub fn outputs(command: &mut Command, code: i32) -> (String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("the program runs");
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    assert_eq!(
        status.code(),
        Some(code),
        "{command:?}: {status}\n{stdout}\n{stderr}"
    );
    (stdout, stderr)
}
