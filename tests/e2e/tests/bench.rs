//! The bench programs: that they run, that what they print can be read, and what is exact about it, the
//! instructions that a call costs. Times are nobody's promise on a machine that does other things.

use std::time::Duration;

use serde_json::Value;
use spillway_tests::{Daemon, Launch, Place, artifact, repository};

const TIME: Duration = Duration::from_secs(60);

/// What a launch may cost, of 11 arguments, five of which are copied on the stack; a copy of four arguments;
/// and a query of memory, as unoptimised as the library may be built here.
const LAUNCH_MOST: f64 = 40.0;
const COPY_MOST: f64 = 20.0;

/// A place whose programs find a driver whose calls cost nothing, for the coordinator's device.
fn on_free_driver<'a>(place: &'a Place, daemon: &Daemon<'a>, program: &str) -> Launch<'a> {
    let folder = place.dir().join("free");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::copy(artifact("libcuda_free.so"), folder.join("libcuda.so.1")).expect("the driver");
    let uuid = daemon.status()["devices"][0]["uuid"]
        .as_str()
        .expect("a uuid")
        .to_owned();
    let path = format!("{}:{}", folder.display(), place.dir().join("lib").display());
    place
        .client(program)
        .request("64MiB")
        .limit("512MiB")
        .var("LD_LIBRARY_PATH", path)
        .var("FREE_DRIVER_UUID", uuid)
        .args("--json --budget 0.01")
}

/// The lines, each an object with the fields of a figure, or of a case that says why it has none.
fn figures(program: Launch<'_>, bench: &str) -> Vec<Value> {
    let (code, out, err) = program.finish(TIME);
    assert_eq!(code, Some(0), "{out}{err}");
    let lines: Vec<Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|why| panic!("{line}: {why}")))
        .collect();
    for line in &lines {
        assert!(line["bench"] == bench && line["case"].is_string(), "{line}");
        let whole =
            line["metric"].is_string() && line["value"].is_number() && line["unit"].is_string();
        assert!(whole || line["skipped"].is_string(), "{line}");
    }
    lines
}

fn value(lines: &[Value], case: &str, metric: &str) -> Option<f64> {
    let found = lines
        .iter()
        .find(|line| line["case"] == case && line["metric"] == metric);
    found.and_then(|line| line["value"].as_f64())
}

#[test]
fn a_call_costs_no_more_instructions_than_promised() {
    let place = Place::new("bench-hooks").build();
    let daemon = Daemon::start(&place, &[]);
    let lines = figures(on_free_driver(&place, &daemon, "bench-hooks"), "hooks");
    for case in [
        "launch_1",
        "launch_wc_1",
        "copy_1",
        "event_record_1",
        "mem_get_info_1",
        "pointer_attribute_1",
        "control_1",
    ] {
        assert!(
            value(&lines, case, "added_ns").is_some(),
            "{case}: {lines:?}"
        );
    }
    let launch = lines
        .iter()
        .find(|line| line["case"] == "launch_1")
        .expect("launch_1");
    assert!(
        launch["replaced"].as_u64() > Some(10),
        "nothing was preloaded: {launch}"
    );
    let Some(launch) = value(&lines, "launch_1", "added_instructions") else {
        println!("skipped: no instruction counts on this processor");
        return;
    };
    let of = |case| value(&lines, case, "added_instructions").expect("counted like the launch");
    assert_eq!(of("control_1"), 0.0, "the count itself is off");
    assert!(launch > 0.0 && launch <= LAUNCH_MOST, "a launch: {launch}");
    for case in ["copy_1", "copy_out_1"] {
        assert!(
            of(case) > 0.0 && of(case) <= COPY_MOST,
            "{case}: {}",
            of(case)
        );
    }
    // Callgrind, where it is, counts the same.
    for (case, steps) in [("launch_1", launch), ("copy_1", of("copy_1"))] {
        if let Some(counted) = value(&lines, case, "added_instructions_callgrind") {
            assert!(
                (counted - steps).abs() < 1.0,
                "{case}: {counted}, by steps {steps}"
            );
        }
    }
}

#[test]
fn allocations_are_measured_beside_the_drivers_own() {
    let place = Place::new("bench-alloc").build();
    let daemon = Daemon::start(&place, &[]);
    let mut lines = figures(on_free_driver(&place, &daemon, "bench-alloc"), "alloc");
    for case in [
        "4KiB_1",
        "1MiB_1",
        "64MiB_1",
        "near_limit_1MiB_1",
        "first_4KiB",
    ] {
        assert!(
            value(&lines, case, "added_ns").is_some(),
            "{case}: {lines:?}"
        );
    }
    assert!(value(&lines, "64MiB_1", "ratio").is_some());
    // More than the limit is not tried, and that is said.
    lines.retain(|line| line["case"] == "1GiB_1");
    assert!(
        lines.len() == 1 && lines[0]["skipped"].is_string(),
        "{lines:?}"
    );
}

#[test]
fn a_program_without_cuda_opens_the_library_and_nothing_else() {
    let place = Place::new("bench-preload").build();
    let library = place.library();
    let library = library.to_str().expect("text");
    let client = place
        .client("bench-preload")
        .bare()
        .args(&format!("--json --budget 0.05 --library {library}"));
    let lines = figures(client, "preload");
    assert!(value(&lines, "true", "added_ms").is_some(), "{lines:?}");
    if value(&lines, "true", "added_calls").is_none() {
        println!("skipped: system calls cannot be watched here: {lines:?}");
        return;
    }
    for case in ["true", "python"] {
        for metric in ["added_files", "added_threads", "added_sockets"] {
            let line = lines
                .iter()
                .find(|l| l["case"] == case && l["metric"] == metric);
            assert_eq!(
                line.and_then(|l| l["value"].as_f64()),
                Some(0.0),
                "{line:?}"
            );
        }
    }
    // What the loader maps because the library needs it is the compiler's own, and nothing else.
    for line in lines.iter().filter(|l| l["metric"] == "added_libraries") {
        for file in line["files"].as_array().expect("a list") {
            let file = file.as_str().expect("text");
            assert!(file.contains("/libgcc_s.so."), "{line}");
        }
    }
    // What was watched is the real thing: the library had to be mapped.
    assert!(
        value(&lines, "true", "added_calls") > Some(2.0),
        "{lines:?}"
    );
}

/// The loader goes on without a library that it cannot load: that is no measurement of one that adds nothing.
#[test]
fn what_is_not_loaded_or_not_there_is_not_measured() {
    let place = Place::new("bench-nothing").build();
    let daemon = Daemon::start(&place, &[]);
    let text = repository().join("README.md");
    let text = text.to_str().expect("text");
    for program in ["bench-hooks", "bench-alloc"] {
        let launch = on_free_driver(&place, &daemon, program);
        let (code, out, err) = launch.bare().var("LD_PRELOAD", text).finish(TIME);
        assert_eq!(code, Some(1), "{program}: {out}{err}");
        assert!(err.contains("README.md is not loaded"), "{program}: {err}");
    }
    let preload = |arguments: &str| {
        let client = place.client("bench-preload").bare();
        client.args(arguments).finish(TIME)
    };
    let (code, out, err) = preload(&format!("--budget 0.01 --library {text}"));
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(err.contains("README.md is not loaded"), "{err}");
    let library = place.library();
    let library = library.display();
    let (code, _, err) = preload(&format!("--only zzz --library {library}"));
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("nothing was measured"), "{err}");
    for budget in ["nan", "-1", "abc", "0"] {
        let (code, _, _) = preload(&format!("--budget={budget} --library {library}"));
        assert_eq!(code, Some(2), "{budget}");
    }
}
