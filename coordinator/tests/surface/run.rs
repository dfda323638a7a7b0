//! `spillway run`: what the program gets, and what is refused before it starts.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::cli::{spillway, text};
use crate::fake::Node;

/// A shared object with a hook's name in it, under the name that is looked for: all that the loader
/// and the command need here.
pub fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let source = dir.join("stand_in.rs");
        let code = "#[unsafe(no_mangle)] pub extern \"C\" fn cuGetProcAddress_v2() {}";
        std::fs::write(&source, code).expect("writable");
        let built = dir.join("libspillway.so");
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let done = Command::new(rustc)
            .args([
                "--edition=2024",
                "--crate-type=cdylib",
                "-Cpanic=abort",
                "-o",
            ])
            .arg(&built)
            .arg(&source)
            .status()
            .expect("rustc runs");
        assert!(done.success());
        built
    })
}

fn run(node: &Node, options: &[&str], program: &[&str]) -> Output {
    let library = library().to_str().expect("UTF-8");
    let mut all = vec!["run", "--library", library];
    all.extend(options);
    all.push("--");
    all.extend(program);
    spillway(node.path(), &all).output().expect("spillway runs")
}

fn refused(node: &Node, options: &[&str], says: &str) {
    let output = run(node, options, &["touch", "/nonexistent/never"]);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{options:?}: {error}");
    assert!(error.contains(says), "{options:?}: {error}");
}

#[test]
fn the_program_gets_the_library_and_its_settings() {
    let node = Node::start().with_session();
    let options = [
        "--request",
        "512MiB",
        "--limit",
        "1.5GiB",
        "--priority",
        "-3",
        "--swap",
        "never",
    ];
    let output = run(
        &node,
        &options,
        &["sh", "-c", "env; cat /proc/self/maps; exit 7"],
    );
    let seen = text(&output.stdout);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    let path = library().display();
    let run_dir = node.path().display();
    for line in [
        "SPILLWAY_REQUEST=512MiB".to_owned(),
        "SPILLWAY_LIMIT=1.5GiB".to_owned(),
        "SPILLWAY_PRIORITY=-3".to_owned(),
        "SPILLWAY_SWAP=never".to_owned(),
        format!("SPILLWAY_RUN_DIR={run_dir}"),
        format!("LD_PRELOAD={path}"),
    ] {
        assert!(seen.lines().any(|l| l == line), "{line}: {seen}");
    }
    assert!(seen.contains("SPILLWAY_WORKLOAD=sh-"), "{seen}");
    assert!(
        seen.lines().any(|l| l.ends_with(&format!(" {path}"))),
        "not mapped: {seen}"
    );
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn two_runs_are_two_workloads_unless_named() {
    let node = Node::start().with_session();
    let name =
        |options: &[&str]| text(&run(&node, options, &["printenv", "SPILLWAY_WORKLOAD"]).stdout);
    assert_ne!(name(&[]), name(&[]));
    assert_eq!(name(&["--workload", "m/7:x"]), "m/7:x\n");
}

#[test]
fn the_program_replaces_the_command() {
    let node = Node::start().with_session();
    let child = spillway(node.path(), &["run", "--library"])
        .arg(library())
        .args(["sh", "-c", "echo $$; kill -9 $$"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("spillway runs");
    let pid = child.id();
    let output = child.wait_with_output().expect("waited for");
    assert_eq!(text(&output.stdout), format!("{pid}\n"));
    assert_eq!(output.status.signal(), Some(9));
}

#[test]
fn bad_values_start_nothing() {
    let node = Node::start().with_session();
    refused(
        &node,
        &["--limit", "24"],
        "--limit: \"24\" has no unit: 24GiB or 24%?",
    );
    refused(
        &node,
        &["--request", "2GiB", "--limit", "1GiB"],
        "--request 2GiB is above --limit 1GiB",
    );
    refused(&node, &["--limit", "0GiB"], "zero");
    refused(
        &node,
        &["--priority", "high"],
        "--priority high: write an integer",
    );
    refused(
        &node,
        &["--workload", "a b"],
        "--workload a b is no workload name",
    );
    refused(&node, &["--swap", "sometimes"], "sometimes");
}

#[test]
fn a_library_that_the_loader_would_ignore_starts_nothing() {
    let node = Node::start().with_session();
    let run = |library: &str| {
        let mut command = spillway(node.path(), &["run", "--library", library, "--", "true"]);
        let output = command.output().expect("spillway runs");
        assert_eq!(output.status.code(), Some(125), "{library}");
        text(&output.stderr)
    };
    assert!(run("/no/such/lib.so").contains("/no/such/lib.so"));
    assert!(run("/etc/passwd").contains("not an ELF file"));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let cut = dir.path().join("libspillway.so");
    let whole = std::fs::read(library()).expect("readable");
    std::fs::write(&cut, &whole[..whole.len() / 2]).expect("writable");
    assert!(run(cut.to_str().expect("UTF-8")).contains("cut short"));

    // The environment's is not silently replaced by another, either.
    let output = spillway(node.path(), &["run", "true"])
        .env("SPILLWAY_LIBRARY", "/no/such/env.so")
        .output()
        .expect("spillway runs");
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("SPILLWAY_LIBRARY"),
        "{output:?}"
    );
}

#[test]
fn without_a_coordinator_it_says_how_to_go_on() {
    let node = Node::start();
    refused(&node, &[], "--no-coordinator");
    refused(&node, &[], "start spillwayd");
    let output = run(
        &node,
        &["--no-coordinator"],
        &["printenv", "SPILLWAY_NO_COORDINATOR"],
    );
    assert_eq!(text(&output.stdout), "1\n");

    let session = node.path().join("session");
    std::fs::create_dir(&session).expect("mkdir");
    std::fs::write(session.join("session.sock"), "").expect("writable");
    refused(&node, &[], "is not a socket");
    std::fs::remove_file(session.join("session.sock")).expect("removed");
    let _other = std::os::unix::net::UnixListener::bind(session.join("session.sock"));
    refused(&node, &[], "does not answer as spillwayd does");
}

#[test]
fn a_program_that_cannot_start_has_the_shells_exit_codes() {
    let node = Node::start().with_session();
    let code = |program: &str| {
        let output = run(&node, &[], &[program]);
        assert!(text(&output.stderr).contains(program), "{output:?}");
        output.status.code()
    };
    assert_eq!(code("no-such-program-here"), Some(127));
    assert_eq!(code("/no/such/program"), Some(127));
    assert_eq!(code("/etc/passwd"), Some(126));
    assert_eq!(code("/etc"), Some(126));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let script = dir.path().join("script");
    std::fs::write(&script, "#!/no/such/interpreter\n").expect("writable");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&script, mode).expect("chmod");
    assert_eq!(code(script.to_str().expect("UTF-8")), Some(127));
}
