//! Programs that do not use CUDA, under a global preload: same output, no thread, no socket, nothing said.

mod support;

use std::process::{Command, Output};
use support::{have, library};

const PROGRAMS: &[(&str, &[&str])] = &[
    (
        "bash",
        &["-c", "echo $((6 * 7)); echo error >&2; ls -d / | cat"],
    ),
    (
        "python3",
        &[
            "-c",
            "import ctypes, json, ssl, socket; print(json.dumps([1]), ctypes.CDLL(None).abs(-3))",
        ],
    ),
    ("git", &["--version"]),
    ("ls", &["-d", "/"]),
];

fn run(program: &str, arguments: &[&str], preload: bool) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).env_remove("LD_PRELOAD");
    if preload {
        command.env("LD_PRELOAD", library());
    }
    command.output().expect("it runs")
}

#[test]
fn bystanders_notice_nothing() {
    for (program, arguments) in PROGRAMS {
        if !have(program, "bystanders") {
            continue;
        }
        let (bare, ours) = (
            run(program, arguments, false),
            run(program, arguments, true),
        );
        assert_eq!(bare, ours, "{program}");
    }
}

/// One look from inside at what /proc says of the process, after some work.
#[test]
fn no_thread_and_no_socket_appears() {
    if !have("python3", "threads and sockets") {
        return;
    }
    let look = "
import os, json, subprocess
subprocess.run(['ls', '/'], stdout=subprocess.DEVNULL)
fds = [os.readlink('/proc/self/fd/%s' % fd) for fd in os.listdir('/proc/self/fd') if os.path.islink('/proc/self/fd/%s' % fd)]
print(len(os.listdir('/proc/self/task')), sorted(f for f in fds if 'socket' in f or 'memfd' in f or 'eventfd' in f))
print('libspillway.so' in open('/proc/self/maps').read(), 'libcuda' in open('/proc/self/maps').read())
";
    let text = |output: Output| String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(
        text(run("python3", &["-c", look], false)),
        "1 []\nFalse False\n"
    );
    assert_eq!(
        text(run("python3", &["-c", look], true)),
        "1 []\nTrue False\n"
    );
}

/// System calls that start threads, open sockets or look at settings: none more than without us.
#[test]
fn no_system_call_of_ours() {
    if !have("strace", "system calls") {
        return;
    }
    for (program, arguments) in PROGRAMS {
        if !have(program, "system calls") {
            continue;
        }
        let calls = |preload: bool| {
            let mut command = Command::new("strace");
            command.args([
                "-f",
                "-qq",
                "-e",
                "trace=socket,connect,clone,clone3,memfd_create,eventfd2,membarrier,futex,write",
            ]);
            if preload {
                command
                    .arg("-E")
                    .arg(format!("LD_PRELOAD={}", library().display()));
            }
            let output = command
                .arg(program)
                .args(*arguments)
                .env_remove("LD_PRELOAD")
                .output()
                .expect("strace runs");
            if !output.status.success() {
                return None;
            }
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let mut names: Vec<String> = text
                .lines()
                .filter_map(|line| line.split('(').next())
                .filter_map(|name| name.split_whitespace().last())
                .filter(|name| {
                    matches!(
                        *name,
                        "socket"
                            | "connect"
                            | "clone"
                            | "clone3"
                            | "memfd_create"
                            | "eventfd2"
                            | "membarrier"
                            | "write"
                    )
                })
                .map(str::to_owned)
                .collect();
            names.sort();
            Some(names)
        };
        let (Some(bare), Some(ours)) = (calls(false), calls(true)) else {
            eprintln!("skipped: system calls: strace may not trace here");
            return;
        };
        assert_eq!(bare, ours, "{program}");
    }
}
