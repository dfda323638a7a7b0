//! `spillway doctor`: whether it finds what is wrong with real processes.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use spillway_coordinator::model::Process;

use crate::cli::{spillway, text};
use crate::fake::Node;
use crate::run::library;

/// A process that is ended with the test.
struct Running(Child);

impl Running {
    /// Starts it and waits until the program runs, so that what is seen is its own.
    fn start(command: &mut Command) -> Self {
        use std::io::Read;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let mut out = child.stdout.take().expect("piped");
        out.read_exact(&mut [0u8; 1]).expect("it runs");
        Self(child)
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).expect("a pid")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Says that it runs, then waits for its end.
const PROGRAM: [&str; 3] = ["sh", "-c", "echo; read x"];

fn plain(environment: &[(&str, &str)]) -> Running {
    let mut command = Command::new(PROGRAM[0]);
    command.args(&PROGRAM[1..]).env_remove("LD_PRELOAD");
    Running::start(command.envs(environment.iter().copied()))
}

fn doctor(node: &Node, pid: i32) -> (Option<i32>, String) {
    let output = spillway(node.path(), &["doctor", &pid.to_string()])
        .output()
        .expect("spillway runs");
    assert_eq!(text(&output.stderr), "");
    (output.status.code(), text(&output.stdout))
}

fn line<'a>(report: &'a str, part: &str) -> &'a str {
    let found = report.lines().find(|line| line.contains(part));
    found.unwrap_or_else(|| panic!("no line with {part:?} in\n{report}"))
}

#[test]
fn a_process_under_spillway_is_fine() {
    let node = Node::start().with_session();
    let mut command = spillway(node.path(), &["run", "--limit", "1GiB", "--library"]);
    let running = Running::start(command.arg(library()).args(PROGRAM));
    node.fake.change(|status| {
        status.workloads[0].processes = vec![Process {
            pid: running.pid(),
            ..Process::default()
        }];
    });
    let (code, report) = doctor(&node, running.pid());
    assert_eq!(code, Some(0), "{report}");
    for part in [
        "libspillway.so is loaded",
        "SPILLWAY_LIMIT=1GiB",
        "a coordinator answers",
        "registered as workload a/b:1",
        "request 512 MiB, limit 1 GiB",
        "it can be swapped",
    ] {
        assert!(line(&report, part).starts_with("ok    "), "{report}");
    }
    assert!(line(&report, "has not used CUDA yet").starts_with("warn  "));

    node.fake.change(|status| {
        status.workloads[0].not_swappable = Some("part is not backed by host memory".into());
        status.workloads[0].unknown_entry_points = 4;
    });
    let (code, report) = doctor(&node, running.pid());
    assert_eq!(code, Some(0), "{report}");
    assert!(line(&report, "cannot be swapped").contains("-> give the host pool more space"));
    assert!(line(&report, "does not know (4)").starts_with("warn  "));
}

#[test]
fn why_the_library_is_not_loaded() {
    let node = Node::start().with_session();
    let missing = "/no/such/dir/libspillway.so";
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bad = dir.path().join("libspillway.so");
    std::fs::write(&bad, "text").expect("writable");
    for (preload, says, remedy) in [
        (
            None,
            "LD_PRELOAD was not set",
            "start it again with spillway run",
        ),
        (
            Some("/lib/other.so"),
            "does not name it",
            "start it again with spillway run",
        ),
        (
            Some(missing),
            "is not there in the file system of the process",
            "mount the library",
        ),
        (
            bad.to_str(),
            "not an ELF file",
            "put a good libspillway.so there",
        ),
    ] {
        let environment: Vec<_> = preload.iter().map(|p| ("LD_PRELOAD", *p)).collect();
        let running = plain(&environment);
        let (code, report) = doctor(&node, running.pid());
        assert_eq!(code, Some(1), "{report}");
        let line = line(&report, "libspillway.so is not loaded");
        assert!(
            line.starts_with("FAIL  ") && line.contains(says),
            "{report}"
        );
        assert!(line.contains(&format!("-> {remedy}")), "{report}");
        assert!(report.contains("FAIL  no quota is in force"), "{report}");
    }
}

#[test]
fn settings_and_coordinator_are_checked() {
    let node = Node::start();
    let library = library().to_str().expect("UTF-8");
    let run_dir = node.path().to_str().expect("UTF-8");
    let loaded = |more: &[(&str, &str)]| {
        let mut environment = vec![("LD_PRELOAD", library), ("SPILLWAY_RUN_DIR", run_dir)];
        environment.extend(more);
        let running = plain(&environment);
        doctor(&node, running.pid())
    };
    let (code, report) = loaded(&[("SPILLWAY_LIMIT", "24"), ("SPILLWAY_SWAP", "maybe")]);
    assert_eq!(code, Some(1));
    assert!(
        line(&report, "SPILLWAY_LIMIT: \"24\"").starts_with("FAIL  "),
        "{report}"
    );
    assert!(
        line(&report, "SPILLWAY_SWAP=maybe").starts_with("FAIL  "),
        "{report}"
    );
    assert!(report.contains("FAIL  no quota is in force"), "{report}");

    let (code, report) = loaded(&[("SPILLWAY_LIMIT", "1GiB")]);
    assert_eq!(code, Some(1));
    assert!(line(&report, "there is no socket at").contains("mount the session directory"));
    assert!(
        line(&report, "does not know process").starts_with("warn  "),
        "{report}"
    );

    let (code, report) = loaded(&[("SPILLWAY_DISABLE", "1")]);
    assert_eq!(code, Some(1));
    assert!(
        line(&report, "SPILLWAY_DISABLE=1").starts_with("FAIL  "),
        "{report}"
    );

    let (code, report) = loaded(&[("SPILLWAY_NO_COORDINATOR", "1")]);
    assert_eq!(code, Some(0), "{report}");
    assert!(
        line(&report, "NO_COORDINATOR").starts_with("warn  "),
        "{report}"
    );
}

#[test]
fn no_such_process() {
    let node = Node::start();
    let (code, report) = doctor(&node, i32::MAX);
    assert_eq!(code, Some(1));
    assert!(
        report.starts_with("FAIL  cannot look into process 2147483647"),
        "{report}"
    );
}

#[test]
fn the_node_itself() {
    let node = Node::start().with_session();
    let doctor = |path: &Path| {
        let output = spillway(path, &["doctor", "--json"])
            .env("SPILLWAY_LIBRARY", library())
            .output()
            .expect("spillway runs");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        (output.status.code(), json)
    };
    let (code, json) = doctor(node.path());
    assert_eq!((code, &json["ok"]), (Some(0), &true.into()), "{json}");
    let level = |json: &serde_json::Value, check: &str| {
        let checks = json["checks"].as_array().expect("a list");
        let found = checks.iter().find(|c| c["check"] == check);
        found.map(|c| c["level"].as_str().expect("a word").to_owned())
    };
    for check in [
        "run_dir",
        "session_socket",
        "session",
        "api_socket",
        "api",
        "library",
        "devices",
        "pool",
        "huge_pages",
    ] {
        assert_eq!(
            level(&json, check).as_deref(),
            Some("ok"),
            "{check}: {json}"
        );
    }
    assert!(level(&json, "nvml").is_some());

    let nothing = tempfile::tempdir().expect("a temporary directory");
    let (code, json) = doctor(&nothing.path().join("none"));
    assert_eq!((code, &json["ok"]), (Some(1), &false.into()), "{json}");
    assert_eq!(level(&json, "run_dir").as_deref(), Some("fail"));
    assert_eq!(level(&json, "api_socket").as_deref(), Some("fail"));
}
