//! The `spillway` command against the fake coordinator: what it prints, its errors, its exit codes.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::fake::Node;

/// The command with an environment of its own.
pub fn spillway(run_dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spillway"));
    for (name, _) in std::env::vars() {
        if name.starts_with("SPILLWAY_") || name == "LD_PRELOAD" || name == "XDG_RUNTIME_DIR" {
            command.env_remove(name);
        }
    }
    command.arg("--run-dir").arg(run_dir).args(arguments);
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn run(run_dir: &Path, arguments: &[&str]) -> Output {
    spillway(run_dir, arguments)
        .output()
        .expect("spillway runs")
}

/// Runs, expects this exit code and this text on standard error, and one line there.
fn fails(run_dir: &Path, arguments: &[&str], code: i32, says: &str) {
    let output = run(run_dir, arguments);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
    assert!(error.contains(says), "{arguments:?}: {error}");
    assert!(!error.contains("panicked"), "{error}");
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
}

#[test]
fn status_shows_the_node_and_one_workload() {
    let node = Node::start();
    let all = text(&run(node.path(), &["status"]).stdout);
    assert!(all.contains("WORKLOAD") && all.contains("a/b:1"), "{all}");
    let one = text(&run(node.path(), &["status", "a/b:1"]).stdout);
    assert!(one.starts_with("workload              a/b:1\n"), "{one}");
    for arguments in [&["status", "--json"][..], &["status", "--json", "a/b:1"]] {
        let json = run(node.path(), arguments).stdout;
        let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
        assert!(
            json["instance"] == "ab12" || json["name"] == "a/b:1",
            "{json}"
        );
    }
    fails(
        node.path(),
        &["status", "none"],
        1,
        "no workload is named \"none\"",
    );
}

#[test]
fn evict_and_restore_say_what_happened() {
    let node = Node::start();
    let path = node.path();
    let output = run(path, &["evict", "a/b:1"]);
    assert_eq!(
        text(&output.stdout),
        "a/b:1: evicted, 1 GiB in 0.500 s, 2.15 GB/s\n"
    );
    let json = run(path, &["restore", "a/b:1", "--json"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(json["bytes"], 1 << 30);
    fails(path, &["evict", "busy"], 1, "busy: a kernel runs");
    fails(path, &["evict", "none"], 1, "no workload none");
    fails(
        path,
        &["restore", "slow", "--timeout", "0.05"],
        1,
        "not done in 50ms",
    );
    fails(path, &["restore", "x", "--timeout=-1"], 2, "above 0");
    fails(path, &["evict", "panics"], 1, "internal error of spillwayd");
}

#[test]
fn events_end_when_asked_to() {
    let node = Node::start();
    let lines = text(&run(node.path(), &["events", "--no-follow"]).stdout);
    let first = lines.lines().next().unwrap_or_default();
    assert!(
        first.starts_with("1970-01-01T00:00:01.500Z  note  "),
        "{lines}"
    );
    assert!(first.ends_with("a/b:1                 first"), "{first}");
    let json = text(&run(node.path(), &["events", "--no-follow", "--json"]).stdout);
    let all: Vec<serde_json::Value> = json
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!((all.len(), &all[1]["n"]), (2, &2.into()));
}

#[test]
fn a_socket_that_is_missing_or_not_ours_is_named_with_a_remedy() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (path, api) = (dir.path(), dir.path().join("api.sock"));
    let shown = api.display().to_string();
    for arguments in [
        &["status"][..],
        &["evict", "x"],
        &["restore", "x"],
        &["events"],
    ] {
        fails(
            path,
            arguments,
            1,
            &format!("no socket at {shown}: start spillwayd"),
        );
    }
    std::fs::write(&api, "not a socket").expect("writable");
    fails(path, &["status"], 1, &format!("{shown} is not a socket"));
    std::fs::remove_file(&api).expect("removed");
    drop(UnixListener::bind(&api).expect("bind"));
    fails(path, &["status"], 1, &format!("nobody listens on {shown}"));
    let long = path.join("x".repeat(200));
    fails(&long, &["status"], 1, &"x".repeat(200));
}

/// Others' servers, each of which says something else.
#[test]
fn another_programs_socket_is_recognised() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        "HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n<html>no!",
        "SSH-2.0-OpenSSH_9.2\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let listener = UnixListener::bind(dir.path().join("api.sock")).expect("bind");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = stream.write_all(answer.as_bytes());
            let _ = stream.read(&mut [0u8; 4096]);
        });
        fails(
            dir.path(),
            &["status"],
            1,
            "does not answer as spillwayd does",
        );
        server.join().expect("served");
    }
}

/// A daemon that dies in the middle of an answer.
#[test]
fn an_answer_cut_short_is_an_error() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let listener = UnixListener::bind(dir.path().join("api.sock")).expect("bind");
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().expect("a client");
            let _ = stream.read(&mut [0u8; 4096]);
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
            let _ = stream.write_all(format!("{head}5\r\n{{\"a\":").as_bytes());
        }
    });
    fails(dir.path(), &["status"], 1, "closed the connection");
    fails(dir.path(), &["events"], 1, "closed the connection");
    server.join().expect("served");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let node = Node::start();
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["events"],
        &["--help"],
        &["doctor"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = spillway(node.path(), arguments)
            .stdout(Stdio::from(writer))
            .output()
            .expect("spillway runs");
        assert_eq!(text(&output.stderr), "", "{arguments:?}");
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
    }
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .expect("/dev/full");
    let output = spillway(node.path(), &["status"])
        .stdout(full)
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("standard output"),
        "{output:?}"
    );
}

#[test]
fn usage_errors_and_help() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fails(dir.path(), &["fly"], 2, "fly");
    fails(dir.path(), &["status", "--nope"], 2, "--nope");
    fails(dir.path(), &["run", "--nope", "--", "true"], 125, "--nope");
    fails(dir.path(), &["run"], 125, "PROGRAM");
    let help = text(&run(dir.path(), &["--help"]).stdout);
    for word in [
        "run", "status", "evict", "restore", "events", "doctor", "125", "126", "127",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
}
