//! `libspillway.so` goes into other people's processes: what it is made of stays short, and it runs
//! where they run.
//!
//! Its exports (the hook table and `dlsym`, nothing else), what it needs of the loader and its
//! relocations are held by `interposer/tests/exports.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use spillway_tests::{artifact, repository};

/// The files, one for each of the crates below.
const LIBRARIES: [&str; 2] = ["libspillway.so", "libspillway_strict.so"];
/// What the library may depend on.
const DIRECT: [&str; 6] = [
    "cudarc",
    "libc",
    "nix",
    "once_cell",
    "spillway-protocol",
    "tracing",
];
/// What those bring along. A new name here is a decision, not an accident.
const BROUGHT_ALONG: [&str; 7] = [
    "bitflags",
    "cfg-if",
    "libloading",
    "memoffset",
    "pin-project-lite",
    "tracing-core",
    "valuable",
];
const OWN: [&str; 3] = [
    "spillway-interposer",
    "spillway-interposer-core",
    "spillway-interposer-strict",
];
/// The two libraries' crates.
const CRATES: [&str; 2] = ["spillway-interposer", "spillway-interposer-strict"];

/// The newest C library that a release build may need: RHEL 8, Debian 10, Ubuntu 20.04 have it.
const RELEASE_GLIBC: [u32; 2] = [2, 28];
/// The newest that any build may need. A plain build takes the versions of the machine that it is
/// made on; 2.34 is where the C library's parts were joined, and no symbol that the library uses has
/// changed since. A larger number means that a new call came in.
const LOCAL_GLIBC: [u32; 2] = [2, 34];

fn tree(package: &str, arguments: &[&str]) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--prefix", "none", "--format", "{p}"])
        .args(["-p", package, "-e", "normal"])
        .args(arguments)
        .current_dir(repository())
        .output()
        .expect("cargo runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && !text.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let names = text.lines().filter_map(|line| line.split(' ').next());
    names
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn its_dependencies_are_the_listed_ones() {
    let targets = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];
    for (package, target) in CRATES.iter().flat_map(|p| targets.map(|t| (*p, t))) {
        let all = tree(package, &["--target", target]);
        let unexpected: Vec<_> = all
            .iter()
            .filter(|name| {
                let name = name.as_str();
                ![&DIRECT[..], &BROUGHT_ALONG[..], &OWN[..]]
                    .iter()
                    .any(|list| list.contains(&name))
            })
            .collect();
        assert!(unexpected.is_empty(), "{package}, {target}: {unexpected:?}");
        // The list is read, not empty: these are there in any case.
        assert!(
            all.contains("libc") && all.contains("spillway-protocol"),
            "{all:?}"
        );
    }
    // Not even by way of a feature that some other crate of the workspace turns on.
    let direct = CRATES.map(|package| tree(package, &["--depth", "2"]));
    let strange: Vec<_> = direct
        .iter()
        .flatten()
        .filter(|name| !DIRECT.contains(&name.as_str()) && !OWN.contains(&name.as_str()))
        .collect();
    assert!(strange.is_empty(), "direct dependencies: {strange:?}");
}

/// The highest `GLIBC_` version of the symbols that a library takes from elsewhere.
fn highest_glibc(library: &Path) -> Option<Vec<u32>> {
    let Ok(output) = Command::new("readelf").args(["-VW"]).arg(library).output() else {
        eprintln!("skipped: glibc versions: readelf is not installed");
        return None;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let versions = text.split("GLIBC_").skip(1).filter_map(|rest| {
        let end = rest
            .find(|c: char| !(c.is_ascii_digit() || c == '.'))
            .unwrap_or(rest.len());
        let parts = rest[..end].split('.').map(|part| part.parse().ok());
        parts.collect::<Option<Vec<u32>>>()
    });
    let highest = versions.max();
    assert!(
        highest.is_some(),
        "{}: no versions: {text}",
        library.display()
    );
    highest
}

#[test]
fn this_build_needs_no_newer_c_library_than_listed() {
    for name in LIBRARIES {
        if let Some(highest) = highest_glibc(&artifact(name)) {
            assert!(
                highest <= LOCAL_GLIBC.to_vec(),
                "{name} needs glibc {highest:?}"
            );
        }
    }
}

/// The strict bound is for what `scripts/release` makes; it is checked on what lies in `dist`.
#[test]
fn a_release_runs_on_old_machines() {
    let dist = repository().join("dist");
    let mut libraries = Vec::new();
    let unpacked = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(&dist).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.to_string_lossy().ends_with(".tar.gz") {
            let into = unpacked.path().join(entry.file_name());
            std::fs::create_dir(&into).expect("a folder");
            let status = Command::new("tar")
                .arg("-xzf")
                .arg(&path)
                .arg("-C")
                .arg(&into)
                .status();
            assert!(
                status.is_ok_and(|status| status.success()),
                "{}",
                path.display()
            );
        }
    }
    find(unpacked.path(), &mut libraries);
    if libraries.is_empty() {
        eprintln!("skipped: a release's glibc: dist is empty; scripts/release fills it");
        return;
    }
    for library in libraries {
        if let Some(highest) = highest_glibc(&library) {
            let name = library.display();
            assert!(
                highest <= RELEASE_GLIBC.to_vec(),
                "{name} needs glibc {highest:?}"
            );
        }
    }
}

fn find(folder: &Path, libraries: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            find(&path, libraries);
        } else if path
            .file_name()
            .is_some_and(|name| LIBRARIES.iter().any(|library| name == *library))
        {
            libraries.push(path);
        }
    }
}
