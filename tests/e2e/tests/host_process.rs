//! What a host process may do, on the simulator with a coordinator: every program here behaves, and
//! prints, the same with and without us, and is swapped in between.
//!
//! The way in itself (`RTLD_NEXT` from plugins, `longjmp` and `pthread_exit` out of a callback, and
//! more) is tested against a fake driver in `interposer/tests`.

#[path = "support/programs.rs"]
mod programs;

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use programs::{compile, have};
use spillway_tests::{Client, Daemon, Place, until};

const LONG: Duration = Duration::from_secs(30);

/// Reads the lines up to the one that waits for an answer.
fn lines_to(client: &mut Client, last: &str) -> Vec<String> {
    let mut lines = Vec::new();
    loop {
        let line = client.line();
        if line == last {
            return lines;
        }
        lines.push(line);
    }
}

/// What a program prints and its exit code, bare and under Spillway.
fn both(place: &Place, arguments: &str, code: i32) -> String {
    let host = place.dir().join("host");
    let run = |bare: bool| {
        let launch = place.program(&host).args(arguments).workload("host");
        let launch = if bare { launch.bare() } else { launch };
        let mut client = launch.start();
        // Answers every question at once.
        for _ in 0..4 {
            client.send("");
        }
        client.close_stdin();
        let ended = client.wait(LONG);
        let mut lines = Vec::new();
        while let Some(line) = client.try_line(Duration::from_secs(5)) {
            lines.push(line);
        }
        (ended, lines.join("\n"), client.stderr())
    };
    let (bare, ours) = (run(true), run(false));
    assert_eq!(bare.0, Some(code), "bare {arguments}: {bare:?}");
    assert_eq!(bare, ours, "{arguments}");
    ours.1
}

fn place(name: &str) -> Option<Place> {
    if !have("cc", name) {
        return None;
    }
    let place = Place::new(name).build();
    compile(&place, "host.c", "host", &[]);
    Some(place)
}

fn start(place: &Place, arguments: &str) -> Client {
    let host = place.dir().join("host");
    let launch = place.program(host).args(arguments);
    launch.workload("host").limit("512MiB").start()
}

fn evict(daemon: &Daemon<'_>) {
    let done = daemon.evict_when_idle("host");
    assert!(done.bytes > 0, "nothing was moved");
}

#[test]
fn forks_and_other_programs_start_as_they_would() {
    let Some(place) = place("forks") else { return };
    let daemon = place.daemon(&[]);
    for (arguments, code) in [
        ("fork-before", 0),
        ("fork-after", 0),
        ("spawn", 0),
        ("exec", 0),
        ("reopens", 0),
    ] {
        let printed = both(&place, arguments, code);
        assert!(!printed.contains("WRONG"), "{printed}");
        daemon.await_gone("host");
    }
}

/// The children have ended in three ways; the parent is swapped and goes on.
#[test]
fn a_childs_end_is_not_its_parents() {
    let Some(place) = place("a child's end") else {
        return;
    };
    let daemon = place.daemon(&[]);
    let mut client = start(&place, "fork-after");
    let lines = lines_to(&mut client, "parent goes on?");
    assert_eq!(
        lines,
        [
            "child: init 3, alloc 3, copy 3, info 3, free 3",
            "child ended with 4",
            "child: init 3, alloc 3, copy 3, info 3, free 3",
            "child ended with 5",
            "child: init 3, alloc 3, copy 3, info 3, free 3",
            "child ended with 134",
        ]
    );
    let workload = daemon.workload("host");
    assert_eq!(workload["processes"].as_array().map(Vec::len), Some(1));
    evict(&daemon);
    assert_eq!(client.ask("on"), "bytes right");
    assert_eq!(client.line(), "more right");
    assert_eq!(client.wait(LONG), Some(0));
    daemon.await_gone("host");
}

/// A forked child holds copies of its parent's sockets; that does not keep the parent's share.
#[test]
fn a_child_that_outlives_its_parent_holds_nothing() {
    let Some(place) = place("a lingering child") else {
        return;
    };
    let daemon = place.daemon(&[]);
    let mut client = start(&place, "fork-lingers");
    let child = client.line();
    let pid = child.strip_prefix("child ").expect("a pid").to_owned();
    assert_eq!(client.wait(LONG), Some(0));
    daemon.await_gone("host");
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the child lives");
    assert!(!state.contains(") Z "), "{state}");
    until("its memory is free", || {
        let device = &daemon.status()["devices"][0];
        (device["granted_bytes"] == 0).then_some(())
    });
}

#[test]
fn a_process_ends_promptly_while_evicted_and_keeps_its_exit_code() {
    let Some(place) = place("ends") else { return };
    let daemon = place.daemon(&[]);
    for (how, code) in [
        ("return", Some(11)),
        ("exit", Some(11)),
        ("_exit", Some(11)),
        ("quick_exit", Some(11)),
        ("thread", Some(11)),
        ("kill", None),
        ("abort", None),
    ] {
        let mut client = start(&place, &format!("ends {how}"));
        assert_eq!(client.line(), "ready?");
        evict(&daemon);
        assert_eq!(daemon.state("host"), "evicted");
        client.send("end");
        let begun = Instant::now();
        assert_eq!(client.wait(LONG), code, "{how}");
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "{how} took {took:?}");
        daemon.await_gone("host");
    }
}

/// The same with nobody there who could bring it back.
#[test]
fn a_process_ends_promptly_while_evicted_without_a_coordinator() {
    let Some(place) = place("ends alone") else {
        return;
    };
    for how in ["return", "_exit", "thread"] {
        let daemon = place.daemon(&[]);
        let mut client = start(&place, &format!("ends {how}"));
        assert_eq!(client.line(), "ready?");
        evict(&daemon);
        daemon.kill();
        client.send("end");
        let begun = Instant::now();
        assert_eq!(client.wait(LONG), Some(11), "{how}");
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(3), "{how} took {took:?}");
    }
}

/// Handlers that read and free device memory at exit get what they would get without us.
#[test]
fn exit_handlers_find_their_memory() {
    let Some(place) = place("exit handlers") else {
        return;
    };
    let daemon = place.daemon(&[]);
    let expected = both(&place, "at-exit", 12);
    daemon.await_gone("host");
    let mut client = start(&place, "at-exit");
    assert_eq!(client.line(), "ready?");
    evict(&daemon);
    let last = client.ask("end");
    assert_eq!(expected, format!("ready?\n{last}"));
    assert_eq!(client.wait(LONG), Some(12));
}

#[test]
fn a_signal_handler_may_jump_out_of_a_waiting_call() {
    let Some(place) = place("longjmp") else {
        return;
    };
    let daemon = place.daemon(&[]);
    let mut client = start(&place, "jumps");
    assert_eq!(client.line(), "ready?");
    evict(&daemon);
    // Nobody restores while the coordinator is stopped: the call waits until the signal.
    daemon.signal(Signal::SIGSTOP);
    assert_eq!(client.ask("go"), "left the call");
    daemon.signal(Signal::SIGCONT);
    assert_eq!(client.line(), "go on?");
    assert_eq!(client.ask("on"), "bytes right");
    assert_eq!(client.line(), "again?");
    // What the jump left behind must not count as a call that is still inside.
    evict(&daemon);
    assert_eq!(client.ask("again"), "bytes right");
    assert_eq!(client.wait(LONG), Some(0));
}

#[test]
fn a_cancelled_thread_leaves_nothing_locked() {
    let Some(place) = place("cancel") else { return };
    let daemon = place.daemon(&[]);
    let mut client = start(&place, "cancels");
    assert_eq!(client.line(), "allocating: cancelled");
    assert_eq!(client.line(), "ready?");
    evict(&daemon);
    daemon.signal(Signal::SIGSTOP);
    assert_eq!(client.ask("go"), "waiting?");
    daemon.signal(Signal::SIGCONT);
    assert_eq!(client.ask("on"), "reading: cancelled");
    assert_eq!(client.line(), "again?");
    evict(&daemon);
    assert_eq!(client.ask("again"), "bytes right");
    assert_eq!(client.wait(LONG), Some(0));
}

#[test]
fn without_standard_descriptors_none_of_ours_takes_their_place() {
    let Some(place) = place("no standard descriptors") else {
        return;
    };
    let daemon = place.daemon(&[]);
    let report = place.dir().join("report");
    let mut command = place.command("/bin/sh");
    command
        .args(["-c", "exec \"$0\" no-standard \"$1\" <&- >&- 2>&-"])
        .arg(place.dir().join("host"))
        .arg(&report)
        .env("LD_PRELOAD", place.library())
        .env("SPILLWAY_LOG", "debug")
        .env("SPILLWAY_WORKLOAD", "host");
    let mut child = command.spawn().expect("starts");
    until("the program is ready", || {
        if let Some(status) = child.try_wait().expect("a child") {
            panic!("ended: {status}");
        }
        (std::fs::read_to_string(&report).ok()? == "ready\n").then_some(())
    });
    // What it wrote to descriptors 0 to 2 did not reach the session.
    evict(&daemon);
    std::fs::remove_file(&report).expect("told to go on");
    let status = child.wait().expect("ends");
    assert_eq!((status.code(), status.signal()), (Some(13), None));
}

/// Closing everything above 2 takes the session from us. The program goes on, and its own
/// descriptors, which get our numbers, are left alone.
#[test]
fn a_program_that_closes_all_descriptors_goes_on() {
    let Some(place) = place("daemonises") else {
        return;
    };
    let daemon = place.daemon(&[]);
    let mut client = start(&place, "daemonises");
    assert_eq!(client.line(), "bytes right");
    assert_eq!(client.line(), "alloc answered");
    assert_eq!(client.line(), "closed?");
    // Whatever the coordinator wants of it meanwhile.
    let _ = daemon.request("POST", "/v1/workloads/host/evict?timeout=2");
    assert_eq!(client.ask("on"), "bytes right");
    assert_eq!(client.line(), "own descriptors untouched");
    assert_eq!(client.wait(LONG), Some(15));
    daemon.await_gone("host");
    // Others are served as before.
    let mut other = start(&place, "ends return");
    assert_eq!(other.line(), "ready?");
    other.send("end");
    assert_eq!(other.wait(LONG), Some(11));
}

#[test]
fn disabled_is_a_pure_pass_through_said_once() {
    let Some(place) = place("disabled") else {
        return;
    };
    let daemon = place.daemon(&[]);
    let host = place.dir().join("host");
    let bare = place.program(&host).args("works").bare().finish(LONG);
    // 4 MiB would not fit this limit.
    let (code, stdout, stderr) = place
        .program(&host)
        .args("works")
        .var("SPILLWAY_DISABLE", "1")
        .limit("2MiB")
        .finish(LONG);
    assert_eq!((code, &stdout), (bare.0, &bare.1));
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("SPILLWAY_DISABLE=1"), "{stderr}");
    let events = daemon.events();
    assert!(
        events.iter().all(|event| event["kind"] != "registered"),
        "{events:?}"
    );
}

/// A profiler's library that defines the driver's calls itself and passes on by `RTLD_NEXT`.
#[test]
fn another_interposer_counts_the_same_with_and_without_us() {
    if !have("cc", "RTLD_NEXT") {
        return;
    }
    let place = Place::new("RTLD_NEXT").build();
    let _daemon = place.daemon(&[]);
    compile(&place, "counter.c", "libcounter.so", &["-shared", "-fPIC"]);
    let driver = place.dir().join("lib/libcuda.so.1");
    compile(
        &place,
        "linked.c",
        "linked",
        &[driver.to_str().expect("a path")],
    );
    let run = |preload: &str| {
        let mut command = place.command(place.dir().join("linked"));
        command.env("LD_PRELOAD", preload);
        place.run(command)
    };
    let counter = place.dir().join("libcounter.so").display().to_string();
    let ours = place.library().display().to_string();
    let bare = run(&counter);
    assert_eq!(bare.code, Some(0), "{bare:?}");
    assert_eq!(bare.stdout, "all right\ncounted 3 allocations, 3 frees\n");
    let behind = run(&format!("{counter}:{ours}"));
    assert_eq!(
        (behind.code, &behind.stdout, behind.stderr.as_str()),
        (Some(0), &bare.stdout, ""),
    );
    // In front of it, we are what the program calls; it need not see what we ask of the driver.
    let before = run(&format!("{ours}:{counter}"));
    assert_eq!(before.code, Some(0), "{before:?}");
    assert!(before.stdout.starts_with("all right\n"), "{before:?}");
    assert_eq!(before.stderr, "");
}

/// A whole session of shells and tools under a global preload, with settings for CUDA in the
/// environment that nobody uses: nothing is said and nobody connects.
#[test]
fn shells_and_tools_never_reach_the_coordinator() {
    let place = Place::new("shells").build();
    let daemon = place.daemon(&[]);
    let python = if have("python3", "python3 under a global preload") {
        "python3 -c 'import threading, subprocess, ctypes
t = threading.Thread(target=print, args=(1,)); t.start(); t.join()
print(subprocess.check_output([\"ls\", \"-d\", \"/\"]))'"
    } else {
        ":"
    };
    let git = if have("git", "git under a global preload") {
        "git init -q . && echo text >file && git add file && git -c user.name=a -c user.email=a@b commit -q -m text && git log --format=%s | cat"
    } else {
        ":"
    };
    let script = format!(
        "set -e; ls -d / | cat; x=$(bash -c 'echo in a shell'); echo \"$x\" | tr a-z A-Z; {git}; {python}; (sleep 0.01 & wait); ls missing 2>&1 || true"
    );
    let run = |preload: bool| {
        let folder = place.dir().join(if preload { "ours" } else { "bare" });
        std::fs::create_dir(&folder).expect("a folder");
        let mut command: Command = place.command("/bin/bash");
        command
            .args(["-c", &script])
            .current_dir(&folder)
            .env("HOME", &folder)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("LC_ALL", "C")
            .env("SPILLWAY_LIMIT", "not a size")
            .env("SPILLWAY_LOG", "debug");
        if preload {
            command.env("LD_PRELOAD", place.library());
        }
        let shot = place.run(command);
        (shot.code, shot.stdout, shot.stderr)
    };
    let bare = run(false);
    assert_eq!(bare.0, Some(0), "{bare:?}");
    assert_eq!(run(true), bare);
    let came: Vec<_> = daemon
        .events()
        .into_iter()
        .filter(|event| event["kind"] == "registered" || event["kind"] == "refused")
        .collect();
    assert!(came.is_empty(), "{came:?}");
}
