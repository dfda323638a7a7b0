//! `SPILLWAY_TRACE`: what is recorded, against a fake driver, and that the program never notices.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use support::{Preload, command, output, outputs, programs};

/// A name for a trace of this test, and nothing there.
fn trace(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(format!("{name}.jsonl"));
    let _ = std::fs::remove_file(&path);
    path
}

fn recorded(folder: &Path, program: &str, preload: Preload, file: &Path) -> Command {
    let mut command = command(&folder.join(program), folder, preload);
    command.env("SPILLWAY_TRACE", file);
    command
}

fn lines(file: &Path) -> Vec<String> {
    let text =
        std::fs::read_to_string(file).unwrap_or_else(|why| panic!("{}: {why}", file.display()));
    assert!(text.ends_with('\n'), "{text}");
    text.lines().map(str::to_owned).collect()
}

#[test]
fn arguments_arrive_whole_and_are_recorded() {
    let Some(folder) = programs("trace") else {
        return;
    };
    for (preload, name) in [(Preload::Plain, "whole"), (Preload::Strict, "whole-strict")] {
        let file = trace(folder, name);
        let bare = output(
            &mut command(&folder.join("calls"), folder, Preload::Nothing),
            0,
        );
        let (printed, said) = outputs(&mut recorded(folder, "calls", preload, &file), 0);
        assert_eq!((printed, said.as_str()), (bare, ""), "{preload:?}");
        let lines = lines(&file);
        assert_eq!(lines.len(), 1 + 9 * 3, "{lines:?}");
        assert!(
            lines[0].starts_with("{\"spillway_trace\":1,"),
            "{}",
            lines[0]
        );
        let has = |text: &str| {
            let count = lines.iter().filter(|line| line.contains(text)).count();
            assert_eq!(count, 3, "{text} in {lines:?}");
        };
        has(
            "\"call\":\"cuLaunchKernel\",\"r\":4011,\"a\":[1,2,3,4,5,6,7,8,38654705673,42949672970,47244640267]}",
        );
        has("\"call\":\"cuMemcpyHtoD_v2_ptds\",\"r\":4002,\"a\":[11,22,33]}");
        // What another process's handle says is not recorded, only its address and the flags.
        has("\"call\":\"cuIpcOpenMemHandle_v2\",\"r\":4064,\"a\":[");
        has(",0,5]}");
        has("\"call\":\"cuMemPrefetchAsync_v2\",\"r\":4008,\"a\":[1,2,18446744056529682435,5,6]}");
        has("\"call\":\"cuTexRefSetMipmapLevelBias\",\"r\":4003,\"a\":[1,1075838976]}");
        // Not hooked: the driver's own, recorded all the same.
        has("\"call\":\"cuStreamGetCaptureInfo_v3\",\"r\":4007,\"a\":[1,2,3,4,5,6,30064771079]}");
    }
}

#[test]
fn what_get_proc_address_hands_out_is_recorded() {
    let Some(folder) = programs("trace") else {
        return;
    };
    let file = trace(folder, "proc-address");
    let printed = output(
        &mut recorded(folder, "proc_address", Preload::Plain, &file),
        0,
    );
    assert!(printed.contains("copy 4002"), "{printed}");
    let lines = lines(&file);
    assert_eq!(lines.len(), 2, "look-ups are not recorded: {lines:?}");
    assert!(
        lines[1].contains("\"cuMemcpyHtoD_v2_ptds\",\"r\":4002"),
        "{lines:?}"
    );
}

#[test]
fn programs_do_what_they_do_while_they_are_recorded() {
    let Some(folder) = programs("trace") else {
        return;
    };
    for what in ["fork", "longjmp", "pthread_exit", "late", "dlclose"] {
        let file = trace(folder, &format!("host-{what}"));
        let bare = output(
            command(&folder.join("host"), folder, Preload::Nothing).arg(what),
            0,
        );
        let printed = output(recorded(folder, "host", Preload::Plain, &file).arg(what), 0);
        assert_eq!(printed, bare, "{what}");
        let lines = lines(&file);
        let thread_is = |line: &String| line.contains("\"th\":");
        assert!(lines[1..].iter().all(thread_is), "{what}: {lines:?}");
    }
}

#[test]
fn a_file_that_cannot_be_made_is_said_once_and_disturbs_nothing() {
    let Some(folder) = programs("trace") else {
        return;
    };
    let bare = output(
        &mut command(&folder.join("calls"), folder, Preload::Nothing),
        0,
    );
    let kept = trace(folder, "kept");
    std::fs::write(&kept, "not a trace\n").expect("a file");
    for (file, why) in [
        (kept.clone(), "never written over"),
        (folder.join("no-such-folder/x.jsonl"), "No such file"),
    ] {
        let (printed, said) = outputs(&mut recorded(folder, "calls", Preload::Plain, &file), 0);
        assert_eq!(printed, bare);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(
            said.contains("SPILLWAY_TRACE") && said.contains(why),
            "{said}"
        );
    }
    assert_eq!(
        std::fs::read_to_string(&kept).expect("there"),
        "not a trace\n"
    );
}

#[test]
fn a_file_that_may_not_grow_ends_the_trace() {
    let Some(folder) = programs("trace") else {
        return;
    };
    let bare = output(
        &mut command(&folder.join("calls"), folder, Preload::Nothing),
        0,
    );
    let file = trace(folder, "small");
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "ulimit -f 1; exec \"$0\""])
        .arg(folder.join("calls"))
        .env("LD_LIBRARY_PATH", folder)
        .env("SPILLWAY_TRACE", &file);
    // In the shell itself the library has nothing to do.
    limited.env("LD_PRELOAD", support::library());
    let (printed, said) = outputs(&mut limited, 0);
    assert_eq!(printed, bare);
    assert_eq!(said.lines().count(), 1, "{said}");
    let lines = lines(&file);
    assert!(lines.len() > 1 && lines.len() < 20, "{lines:?}");
}

#[test]
fn there_is_no_file_where_nothing_is_to_be_recorded() {
    let Some(folder) = programs("trace") else {
        return;
    };
    let file = trace(folder, "none");
    let _ = output(&mut recorded(folder, "calls", Preload::Nothing, &file), 0);
    // Without CUDA.
    let mut without = Command::new("true");
    without
        .env("LD_PRELOAD", support::library())
        .env("SPILLWAY_TRACE", &file);
    let _ = output(&mut without, 0);
    // Turned off, and linked to the driver.
    let _ = output(
        recorded(folder, "calls", Preload::Plain, &file).env("SPILLWAY_DISABLE", "1"),
        0,
    );
    let _ = output(
        &mut recorded(folder, "calls_direct", Preload::Plain, &file),
        0,
    );
    assert!(!file.exists());
    let _ = output(
        &mut recorded(folder, "calls", Preload::Plain, &folder.join("p-%p.jsonl")),
        0,
    );
    let made = std::fs::read_dir(folder).expect("a folder").flatten();
    let made = made.filter(|entry| entry.file_name().to_string_lossy().starts_with("p-"));
    let made: Vec<PathBuf> = made.map(|entry| entry.path()).collect();
    let [made] = &made[..] else {
        panic!("{made:?}")
    };
    let process = made.file_stem().expect("a name").to_string_lossy()[2..].to_owned();
    assert!(
        lines(made)[0].contains(&format!("\"process\":{process}")),
        "{made:?}"
    );
}
