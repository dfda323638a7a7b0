//! Nothing escapes: programs that try to get more device memory than their limit, by every family of ways there
//! is, on all driver versions, with a coordinator and without. `scripts/bench escape` prints the same as a table.

use std::process::Command;

use serde_json::Value;
use spillway_tests::artifact;

/// Runs adversaries and judges every row: nothing beyond the limit, nothing refused that fits, the driver's own
/// codes, all of it back after freeing.
fn nothing_escapes(arguments: &[&str]) {
    let output = Command::new(artifact("adversaries"))
        .arg("run")
        .arg("--rows")
        .args(arguments)
        .output()
        .expect("the adversaries run");
    let text = String::from_utf8_lossy(&output.stdout);
    let rows: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|why| panic!("{why}: {line}")))
        .collect();
    let bad: Vec<&str> = text
        .lines()
        .zip(&rows)
        .filter(|(_, row)| row["verdict"] != "ok" && row["verdict"] != "skipped")
        .map(|(line, _)| line)
        .collect();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(bad.is_empty(), "{}\n{stderr}", bad.join("\n"));
    assert!(output.status.success(), "{:?}\n{stderr}", output.status);
    // Some of it was tried, and came near the limit.
    let near = |row: &&Value| {
        let figure = |name: &str| row[name].as_u64().unwrap_or(0);
        figure("reached") >= figure("limit") - (4 << 20)
    };
    assert!(rows.iter().filter(near).count() >= rows.len() / 4, "{text}");
}

#[test]
fn nothing_escapes_a_coordinator() {
    nothing_escapes(&["--drivers", "12.8", "--modes", "auto"]);
}

#[test]
fn nothing_escapes_a_workload_that_stays() {
    nothing_escapes(&["--drivers", "13.0", "--modes", "never"]);
}

#[test]
fn nothing_escapes_without_a_coordinator() {
    nothing_escapes(&["--drivers", "12.4", "--modes", "alone"]);
}
