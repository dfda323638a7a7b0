//! The traces in the tree, and ones that are recorded now, give the same results without Spillway and under it
//! while their memory is moved.

use std::path::{Path, PathBuf};
use std::time::Duration;

use spillway_replay::compare::{Report, compare};
use spillway_replay::trace;
use spillway_tests::{Launch, Place, artifact, repository};

const TIME: Duration = Duration::from_secs(60);

fn in_tree(name: &str) -> PathBuf {
    repository().join("tests/traces").join(name)
}

/// Nothing differs, and what was compared is worth it.
fn is_same(report: &Report, calls: usize, moved: usize) {
    assert!(report.is_same(), "{:#?}", report.differences);
    assert_eq!(
        report.other_than_recorded, [""; 0],
        "the simulator's answers are the recorded ones"
    );
    assert!(report.left_out.is_empty(), "{:?}", report.left_out);
    assert!(!report.cut_off);
    assert!(
        report.played >= calls && report.evictions >= moved && report.compared >= 5,
        "{report:?}"
    );
}

#[test]
fn a_cudarc_program() {
    is_same(
        &compare(&in_tree("cudarc.jsonl"), 40).expect("played"),
        300,
        20,
    );
}

#[test]
fn a_cudarc_program_that_captures_graphs() {
    is_same(
        &compare(&in_tree("cudarc-graphs.jsonl"), 40).expect("played"),
        200,
        20,
    );
}

#[test]
fn a_cudarc_program_that_maps_memory_itself() {
    is_same(
        &compare(&in_tree("cudarc-expandable.jsonl"), 40).expect("played"),
        200,
        20,
    );
}

#[test]
fn a_cuda_bindings_program() {
    is_same(
        &compare(&in_tree("cuda-bindings.jsonl"), 40).expect("played"),
        250,
        20,
    );
}

#[test]
fn a_numba_cuda_program() {
    is_same(
        &compare(&in_tree("numba-cuda.jsonl"), 40).expect("played"),
        140,
        10,
    );
}

#[test]
fn traces_in_the_tree_are_small() {
    let files = std::fs::read_dir(repository().join("tests/traces")).expect("traces");
    for file in files.flatten() {
        let bytes = file.metadata().expect("its size").len();
        assert!(
            bytes <= 64 << 10,
            "{}: {bytes} bytes",
            file.path().display()
        );
    }
}

/// Records a program on a machine of its own; returns where, what it printed, and the place that keeps it.
fn record(
    name: &str,
    driver: &str,
    launch: impl Fn(&Place) -> Launch<'_>,
) -> (PathBuf, String, Place) {
    let place = Place::new(name)
        .memory("512MiB")
        .var("SPILLWAY_SIM_DRIVER", driver)
        .build();
    let file = place.dir().join("trace.jsonl");
    let (code, printed, said) = launch(&place)
        .var("SPILLWAY_NO_COORDINATOR", "1")
        .var("PYTHONWARNINGS", "ignore")
        .var("SPILLWAY_TRACE", &file)
        .finish(TIME);
    assert_eq!((code, said.as_str()), (Some(0), ""), "{printed}");
    (file, printed, place)
}

#[test]
fn a_program_recorded_now_can_be_played() {
    let (file, printed, place) = record("record-cudarc", "12.8", |place| {
        place
            .client("alloc-stress")
            .args("--count 8 --bytes 12MiB --largest 4MiB --threads 2 --churn --rounds 1")
    });
    assert!(printed.contains("\"ok\":true"), "{printed}");
    let recorded = trace::read(&file).expect("a trace");
    assert_eq!(
        (recorded.driver, &recorded.devices[..]),
        (12080, &[512 << 20][..])
    );
    let threads = |call: &trace::Call| call.thread;
    let mut threads: Vec<i64> = recorded.calls.iter().map(threads).collect();
    threads.sort_unstable();
    threads.dedup();
    assert!(threads.len() > 2, "{threads:?}");
    let report = compare(&file, 30).expect("played");
    assert!(report.is_same(), "{:#?}", report.differences);
    assert!(
        report.left_out.is_empty() && report.evictions > 5,
        "{report:?}"
    );
    drop(place);
}

fn python(variable: &str, test: &str, file: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).filter(|path| !path.is_empty());
    if found.is_none() {
        eprintln!("skipped: {test}: {variable} names no python3 with tests/clients/python/{file}");
    }
    found.map(PathBuf::from)
}

fn script<'a>(place: &'a Place, python: &Path, name: &str) -> Launch<'a> {
    let folder = repository().join("tests/clients/python");
    place.program(python).arg("-B").arg(folder.join(name))
}

#[test]
fn cuda_bindings_recorded_now_can_be_played() {
    let test = "cuda_bindings_recorded_now_can_be_played";
    let Some(python) = python("SPILLWAY_TEST_PYTHON", test, "requirements.txt") else {
        return;
    };
    let _ = artifact("libspillway.so");
    let (file, _, place) = record("record-bindings", "12.8", |place| {
        script(place, &python, "driver_session.py")
            .arg(repository().join("simulator/kernels/spillway.ptx"))
    });
    is_same(&compare(&file, 40).expect("played"), 250, 20);
    drop(place);
}

#[test]
fn numba_cuda_recorded_now_can_be_played() {
    let test = "numba_cuda_recorded_now_can_be_played";
    let Some(python) = python("SPILLWAY_TEST_NUMBA_PYTHON", test, "requirements-numba.txt") else {
        return;
    };
    let (file, printed, place) = record("record-numba", "13.0", |place| {
        script(place, &python, "numba_session.py")
    });
    assert!(
        printed.ends_with("done") && !printed.contains("False"),
        "{printed}"
    );
    is_same(&compare(&file, 40).expect("played"), 140, 10);
    drop(place);
}

/// What is no trace is refused by line, before anything is played.
#[test]
fn a_bad_trace_is_refused_by_its_line() {
    let place = Place::new("bad-trace").build();
    let file = place.dir().join("bad.jsonl");
    std::fs::write(&file, "{\"spillway_trace\":1}\n{\"call\":7}\n").expect("a file");
    let mut command = place.command(artifact("trace-replay"));
    command.arg("run").arg(&file);
    let shot = place.run(command);
    assert_eq!(shot.code, Some(1), "{}", shot.stderr);
    assert!(
        shot.stderr.contains("bad.jsonl: line 2: \"call\""),
        "{}",
        shot.stderr
    );
}

#[test]
fn what_compares_nothing_is_no_success_and_a_cut_is_said() {
    let place = Place::new("nothing-compared").build();
    let run = |name: &str, trace: &str, more: &[&str]| {
        let file = place.dir().join(name);
        std::fs::write(&file, trace).expect("a file");
        let mut command = place.command(artifact("trace-replay"));
        command.args(["run", "--json"]).args(more).arg(&file);
        place.run(command)
    };
    let whole = std::fs::read_to_string(in_tree("cudarc.jsonl")).expect("a trace");
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    let shot = run("nothing.jsonl", &lines[..2].concat(), &[]);
    assert_eq!(shot.code, Some(1), "{}", shot.stderr);
    let said = "nothing.jsonl: nothing is compared";
    assert!(shot.stderr.contains(said), "{}", shot.stderr);
    let shot = run("cut.jsonl", &whole[..3000], &[]);
    assert_eq!(shot.code, Some(0), "{}", shot.stderr);
    assert!(
        shot.stderr.contains("cut.jsonl: the trace is cut off"),
        "{}",
        shot.stderr
    );
    assert!(
        shot.stdout
            .lines()
            .all(|line| line.contains("\"cut_off\":true")),
        "{}",
        shot.stdout
    );
    let shot = run("none.jsonl", &whole, &["--evictions", "0"]);
    assert_eq!(shot.code, Some(2), "{}", shot.stderr);
}
