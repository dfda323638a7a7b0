//! The repository's own rules, where a machine can check them.

use std::path::{Path, PathBuf};

use spillway_tests::repository;

/// Longer than this a source file holds more than one idea.
const LINES_MAX: usize = 600;
/// Tables, and scenarios one after the other: long because there are many of a kind.
const MAY_BE_LONG: [&str; 3] = [
    "coordinator/arbiter/tests/residency.rs",
    "interposer/core/src/table/rows.rs",
    // Declarations, one per call of the driver.
    "tests/conformance/src/api.rs",
];

fn files(ending: &str) -> Vec<(PathBuf, String)> {
    let root = repository();
    let mut found = Vec::new();
    walk(&root, &root, ending, &mut found);
    assert!(!found.is_empty(), "no file ends with {ending}");
    found
}

fn walk(root: &Path, folder: &Path, ending: &str, found: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            if name != "target" && name != "dist" && !name.starts_with('.') {
                walk(root, &path, ending, found);
            }
        } else if name.ends_with(ending) {
            let text = std::fs::read_to_string(&path).expect("text");
            let short = path.strip_prefix(root).expect("below the root").to_owned();
            found.push((short, text));
        }
    }
}

fn read(name: &str) -> String {
    std::fs::read_to_string(repository().join(name)).unwrap_or_else(|why| panic!("{name}: {why}"))
}

#[test]
fn source_files_are_short() {
    for (path, text) in files(".rs") {
        let listed = MAY_BE_LONG.iter().any(|name| path == Path::new(name));
        let lines = text.lines().count();
        assert!(
            lines <= LINES_MAX || listed,
            "{}: {lines} lines: split it by ideas",
            path.display()
        );
        assert!(
            lines > LINES_MAX || !listed,
            "{} is short now: take it off the list",
            path.display()
        );
    }
}

#[test]
fn every_module_says_what_it_is() {
    for (path, text) in files(".rs") {
        if path.ends_with("tests.rs") {
            // Of the module beside it.
            continue;
        }
        let first = text
            .lines()
            .find(|line| !line.starts_with("#!"))
            .unwrap_or_default();
        assert!(
            first.starts_with("//!"),
            "{} begins without a module doc",
            path.display()
        );
    }
}

/// Names of the `[workspace.dependencies]` of others' crates.
fn dependencies() -> Vec<String> {
    let manifest = read("Cargo.toml");
    let section = manifest
        .split("[workspace.dependencies]")
        .nth(1)
        .and_then(|rest| rest.split("\n[").next())
        .expect("the section");
    let lines = section.lines().filter(|line| !line.starts_with('#'));
    let names: Vec<String> = lines
        .filter(|line| !line.contains("path ="))
        .filter_map(|line| Some(line.split_once('=')?.0.trim().to_owned()))
        .collect();
    assert!(names.len() > 10, "{names:?}");
    names
}

#[test]
fn every_dependency_has_its_reason() {
    let text = read("ARCHITECTURE.md");
    let reasons = text
        .split("## Dependencies")
        .nth(1)
        .expect("a section on dependencies");
    let listed: Vec<&str> = reasons
        .lines()
        .filter(|line| line.starts_with('|'))
        .filter_map(|line| line.split('|').nth(1))
        .flat_map(|cell| cell.split(','))
        .map(|name| name.trim().trim_matches('`'))
        .collect();
    let manifests: String = files("Cargo.toml")
        .into_iter()
        .map(|(_, text)| text)
        .collect();
    for name in dependencies() {
        let used = manifests.contains(&format!("\n{name}.workspace"))
            || manifests.contains(&format!("\n{name} = {{ workspace"));
        assert!(
            !used || listed.contains(&name.as_str()),
            "{name} has no line in ARCHITECTURE.md, Dependencies"
        );
    }
}

#[test]
fn crates_take_versions_from_the_workspace_alone() {
    for (path, text) in files("Cargo.toml") {
        if path == Path::new("Cargo.toml") {
            continue;
        }
        let mut section = "";
        for line in text.lines() {
            if line.starts_with('[') {
                section = line;
            }
            if section.contains("dependencies") && line.contains('=') && !line.starts_with('#') {
                assert!(
                    line.contains("workspace = true") || line.contains("path ="),
                    "{}: {line}: versions stand in the workspace's Cargo.toml",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let manifest = read("Cargo.toml");
    assert!(manifest.contains("undocumented_unsafe_blocks = \"deny\""));
    for (path, text) in files("Cargo.toml") {
        if path != Path::new("Cargo.toml") {
            let inherits = text.contains("[lints]\nworkspace = true");
            assert!(inherits, "{} does not take the lints", path.display());
        }
    }
}

/// The first things that a newcomer types are the ones that exist.
#[test]
fn the_readme_names_the_scripts() {
    let readme = read("README.md");
    for script in ["scripts/demo", "scripts/playground", "scripts/test"] {
        assert!(readme.contains(script), "README.md does not name {script}");
    }
    for word in readme.split(|c: char| !(c.is_ascii_alphanumeric() || "/-_.".contains(c))) {
        let word = word.trim_end_matches('.');
        if word.starts_with("scripts/") && word.len() > "scripts/".len() {
            let there = repository().join(word).exists();
            assert!(there, "README.md names {word}, which is not there");
        }
    }
}
