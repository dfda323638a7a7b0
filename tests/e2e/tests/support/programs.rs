//! The C programs of `tests/e2e/programs`, compiled by the test that runs them.

use std::path::Path;
use std::process::Command;

use spillway_tests::Place;

/// Whether a tool is installed; if not, says that the test is skipped.
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

/// Compiles one into the place's folder.
pub fn compile(place: &Place, source: &str, to: &str, more: &[&str]) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let output = Command::new("cc")
        .args(["-O1", "-Wall", "-Werror", "-pthread", "-o"])
        .arg(place.dir().join(to))
        .arg(sources.join(source))
        .args(more)
        .arg("-ldl")
        .output()
        .expect("cc runs");
    assert!(
        output.status.success(),
        "{source}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
