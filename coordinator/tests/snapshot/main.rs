//! A C program that includes `include/spillway.h` reads the snapshot of a live daemon, and of a dead
//! one.

#[path = "../sessions/client.rs"]
#[allow(dead_code, reason = "shared with the session tests")]
mod client;
#[path = "../sessions/host.rs"]
#[allow(dead_code, reason = "shared with the session tests")]
mod host;

use std::path::Path;
use std::process::{Command, Stdio};

use client::{GIB, MIB, Process, register};
use host::Daemon;

/// Compiles the reader; `None`: there is no C compiler.
fn reader(dir: &Path) -> Option<std::path::PathBuf> {
    let quiet = Command::new("cc")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !quiet.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no C compiler (cc)");
        return None;
    }
    let program = dir.join("read_snapshot");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("cc")
        .args([
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-O1",
            "-I",
        ])
        .arg(root.join("../include"))
        .arg(root.join("tests/snapshot/read_snapshot.c"))
        .arg("-o")
        .arg(&program)
        .arg("-lrt")
        .output()
        .expect("cc runs");
    assert!(
        output.status.success(),
        "the header does not compile: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(program)
}

fn read(program: &Path, run_dir: &Path) -> Result<String, String> {
    let output = Command::new(program).arg(run_dir).output().expect("runs");
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
fn a_c_program_reads_the_live_snapshot_and_the_one_of_a_dead_daemon() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(program) = reader(dir.path()) else {
        return;
    };
    let mut daemon = Daemon::usual();
    let mut process = Process::start(&daemon.dir, register("seen-from-c", GIB, 2 * GIB));
    process.allocate(256 * MIB);
    let workload = format!(
        "workload seen-from-c state 0 used {} limit {} processes 1",
        256 * MIB,
        2 * GIB
    );
    daemon.until("it is published", |d| {
        read(&program, &d.dir).is_ok_and(|text| text.contains(&workload))
    });
    let text = read(&program, &daemon.dir).expect("readable");
    assert!(text.contains("mode 600"), "{text}");
    assert!(text.contains(&format!("pid {}", daemon.pid())), "{text}");
    assert!(
        text.contains(&format!("device fake device room {} granted ", 4 * GIB)),
        "{text}"
    );
    assert!(text.contains("decision coordinator_started"), "{text}");
    assert!(text.contains("decision registered seen-from-c"), "{text}");
    // It is there after a crash, and a reader does not wait for the dead writer.
    daemon.crash();
    assert!(
        read(&program, &daemon.dir)
            .expect("still there")
            .contains(&workload)
    );
    // The next daemon starts afresh.
    daemon.crash_and_restart();
    daemon.until("the new one's", |d| {
        read(&program, &d.dir).is_ok_and(|text| {
            text.contains(&format!("pid {}", d.pid())) && !text.contains("seen-from-c")
        })
    });
    // And a clean end takes it away.
    assert!(daemon.end().success());
    read(&program, &daemon.dir).expect_err("gone");
}

#[test]
fn what_another_put_under_the_name_is_not_used() {
    use nix::fcntl::OFlag;
    use nix::sys::mman::shm_open;
    use nix::sys::stat::{Mode, fstat};
    let mut daemon = Daemon::usual();
    let name = spillway_coordinator::snapshot::name(&daemon.dir);
    assert!(daemon.end().success());
    let open = |flags| shm_open(name.as_str(), flags, Mode::from_bits_truncate(0o666));
    let foreign = open(OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR).expect("made");
    let before = fstat(&foreign).expect("examined").st_ino;
    daemon.restart();
    let ours = open(OFlag::O_RDWR).expect("there");
    let stat = fstat(&ours).expect("examined");
    assert_ne!(stat.st_ino, before);
    assert_eq!(stat.st_mode & 0o777, 0o600);
    // Nobody can take its memory away from under the daemon by cutting the other one.
    assert_eq!(fstat(&foreign).expect("examined").st_size, 0);
}
