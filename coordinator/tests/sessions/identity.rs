//! Processes of other users and control groups: they are real ones, this program started again.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};

use crate::client::{GIB, Process, register};
use crate::host::Daemon;

const TASK: &str = "SPILLWAY_TEST_TASK";
const RUN_DIR: &str = "SPILLWAY_TEST_RUN_DIR";

/// This program, doing one of [`a_task_for_another_process`].
pub struct Child {
    child: std::process::Child,
    lines: BufReader<ChildStdout>,
    seen: Vec<String>,
    _copy: tempfile::TempDir,
}

impl Child {
    pub fn start(daemon: &Daemon, task: &str, change: &dyn Fn(&mut Command)) -> Self {
        // Other users cannot get at the build folder: give them a copy.
        let copy = tempfile::Builder::new()
            .prefix("spw")
            .tempdir_in("/tmp")
            .expect("a directory");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(copy.path(), mode).expect("a mode");
        let program = copy.path().join("program");
        std::fs::copy(std::env::current_exe().expect("known"), &program).expect("copied");
        let mut command = Command::new(program);
        command
            .args([
                "--exact",
                "identity::a_task_for_another_process",
                "--nocapture",
            ])
            .env(TASK, task)
            .env(RUN_DIR, &daemon.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().expect("starts");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        Self {
            child,
            lines,
            seen: Vec::new(),
            _copy: copy,
        }
    }

    /// Reads on until a line contains this.
    pub fn wait_for(&mut self, text: &str) -> String {
        loop {
            if let Some(line) = self.seen.iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            let mut line = String::new();
            let read = self.lines.read_line(&mut line).expect("text");
            assert!(read > 0, "ended without {text:?}: {:?}", self.seen);
            self.seen.push(line);
        }
    }

    pub fn number(&mut self, name: &str) -> i32 {
        let line = self.wait_for(name);
        let after = line.split(name).nth(1).expect("contains it");
        after.trim().parse().expect("a number")
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("waited for");
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Does nothing by itself: other tests start this program again with a task for it.
#[test]
fn a_task_for_another_process() {
    let Ok(task) = std::env::var(TASK) else {
        return;
    };
    let run_dir = PathBuf::from(std::env::var(RUN_DIR).expect("set"));
    match task.as_str() {
        "hold-and-fork" => crate::death::hold_and_fork(&run_dir),
        "join" => join(&run_dir),
        other => panic!("no task {other}"),
    }
}

fn join(run_dir: &Path) {
    match Process::try_start(run_dir, register("mine", 0, 0)) {
        Ok(_) => println!("JOINED"),
        Err(text) => println!("REFUSED {text}"),
    }
    match Process::try_start(run_dir, register("own", 0, 0)) {
        Ok(_) => println!("OWN"),
        Err(text) => println!("NOT EVEN {text}"),
    }
}

#[test]
fn another_user_cannot_join_a_workload() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can start processes of other users");
        return;
    }
    let daemon = Daemon::usual();
    let _mine = Process::start(&daemon.dir, register("mine", GIB, 2 * GIB));
    let mut child = Child::start(&daemon, "join", &|command| {
        command.uid(65534).gid(65534);
    });
    let text = child.wait_for("REFUSED");
    assert!(
        text.contains("belongs to user 0") && text.contains("65534"),
        "{text}"
    );
    child.wait_for("OWN");
}

#[test]
fn another_control_group_cannot_join_a_workload() {
    let group = ["unified", "pids", "."]
        .iter()
        .map(|hierarchy| {
            let name = format!("spillway-test-{}", std::process::id());
            Path::new("/sys/fs/cgroup").join(hierarchy).join(name)
        })
        .find(|path| std::fs::create_dir(path).is_ok() && path.join("cgroup.procs").exists());
    let Some(group) = group else {
        eprintln!("skipped: cannot make a control group here");
        return;
    };
    let daemon = Daemon::usual();
    let _mine = Process::start(&daemon.dir, register("mine", GIB, 2 * GIB));
    let procs = group.join("cgroup.procs");
    let mut child = Child::start(&daemon, "join", &|command| {
        let procs = procs.clone();
        let join = move || std::fs::write(&procs, "0");
        // SAFETY: writes one file; between fork and exec of a child that nobody else waits for.
        unsafe { command.pre_exec(join) };
    });
    let text = child.wait_for("REFUSED");
    assert!(
        text.contains("another container or control group"),
        "{text}"
    );
    child.wait_for("OWN");
    drop(child);
    let _ = std::fs::remove_dir(&group);
}
