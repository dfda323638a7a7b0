//! Strict mode: a plugin that looks past a preloaded library is under the limit, and what the library does
//! not know of the driver is refused. And what escapes without it, so that nobody has to guess.

#[path = "support/programs.rs"]
mod programs;

use std::path::Path;
use std::time::Duration;

use programs::{compile, have};
use spillway_tests::{Client, Daemon, MIB, Place, artifact, until};

/// One more than fits into the limit, and still into the device.
const PIECES: &str = "20 16";
const LIMIT: &str = "256MiB";

fn place(name: &str) -> Option<Place> {
    if !have("cc", name) {
        return None;
    }
    let place = Place::new(name).build();
    let driver = place.dir().join("lib/libcuda.so.1");
    let driver = driver.to_str().expect("a path");
    compile(&place, "deep.c", "deep", &[]);
    compile(
        &place,
        "plugin.c",
        "libplugin.so",
        &["-shared", "-fPIC", "-Wl,--no-as-needed", driver],
    );
    Some(place)
}

/// The program that opens the plugin, by `spillway run` with these flags.
fn start(place: &Place, workload: &str, flags: &str, how: &str) -> Client {
    let library = place.library();
    place
        .program(artifact("spillway"))
        .bare()
        .workload(workload)
        .limit(LIMIT)
        .var("SPILLWAY_LIBRARY", &library)
        .args("run")
        .args(flags)
        .arg("--")
        .arg(place.dir().join("deep"))
        .arg(place.dir().join("libplugin.so"))
        .args(how)
        .args(PIECES)
        .start()
}

fn used(daemon: &Daemon<'_>, workload: &str) -> u64 {
    daemon.workload(workload)["used_bytes"]
        .as_u64()
        .unwrap_or_default()
}

/// What `spillway status NAME` says of unknown entry points, once it says anything.
fn unknown(place: &Place, workload: &str) -> String {
    until("an unknown entry point in status", || {
        let shown = place.spillway(&["status", workload]).stdout;
        let line = shown.lines().find(|line| line.contains("cuSimulated"));
        line.map(str::to_owned)
    })
}

#[test]
fn a_plugin_that_looks_past_us_is_under_the_limit_in_strict_mode_only() {
    let Some(place) = place("deepbind") else {
        return;
    };
    let daemon = place.daemon(&[]);
    // The plain library: such a plugin has the driver itself, and takes all that it wants.
    let mut client = start(&place, "escapes", "", "deep linked");
    assert_eq!(client.line(), "20 then 0");
    assert_eq!(client.line(), "newcomer found");
    assert_eq!(client.line(), "newcomer found");
    assert_eq!(client.line(), "nobody missing");
    assert_eq!(client.line(), "ready");
    assert_eq!(daemon.find("escapes"), None, "nothing went through us");
    client.send("");
    assert_eq!(client.wait(Duration::from_secs(30)), Some(0));
    for (workload, flags, how) in [
        ("usual", "", "usual linked"),
        ("usual-next", "", "usual next"),
        ("strict", "--strict", "deep linked"),
        ("strict-next", "--strict", "deep next"),
        ("strict-usual", "--strict", "usual linked"),
    ] {
        let mut client = start(&place, workload, flags, how);
        let line = client.line();
        let got = line.strip_suffix(" then 2").and_then(|n| n.parse().ok());
        let got: u64 = got.unwrap_or_else(|| panic!("{workload}: {line}\n{}", client.stderr()));
        assert!((10..=16).contains(&got), "{workload}: {line}");
        for _ in 0..2 {
            let line = client.line();
            match flags {
                "" => assert_eq!(line, "newcomer found"),
                _ => assert!(
                    line.contains("undefined symbol: cuSimulatedNewcomer (refused"),
                    "{workload}: {line}"
                ),
            }
        }
        assert_eq!(client.line(), "nobody missing");
        assert_eq!(client.line(), "ready");
        assert!(used(&daemon, workload) >= got * 16 * MIB, "{workload}");
        let shown = unknown(&place, workload);
        assert!(shown.ends_with("1: cuSimulatedNewcomer"), "{shown}");
        let events = daemon.events_of(workload, "unknown_entry_point");
        assert_eq!(events.len(), 1, "{events:?}");
        client.send("");
        assert_eq!(client.wait(Duration::from_secs(30)), Some(0), "{workload}");
        let said = client.stderr();
        let refused = usize::from(!flags.is_empty());
        let lines = said.matches("cuSimulatedNewcomer is refused").count();
        assert_eq!(lines, refused, "{workload}: {said}");
        assert_eq!(said.lines().count(), refused, "{workload}: {said}");
        daemon.await_gone(workload);
    }
}

#[test]
fn run_says_what_strict_mode_lacks() {
    let place = Place::new("strict-run").build();
    let run = |driver: &Path, library: &Path| {
        let mut command = place.command(artifact("spillway"));
        command
            .env("SPILLWAY_DRIVER_LIBRARY", driver)
            .args(["run", "--strict", "--no-coordinator", "--library"])
            .arg(library)
            .args(["--", "true"]);
        place.run(command)
    };
    let driver = place.dir().join("lib/libcuda.so.1");
    let shot = run(&driver, &place.library());
    assert_eq!(shot.code, Some(0), "{shot:?}");
    assert_eq!(shot.stderr, "");
    let shot = run(&driver, &place.strict_library());
    assert_eq!(shot.code, Some(0), "{shot:?}");
    for (file, says) in [
        ("lib/no-such.so", "is not called libcuda.so"),
        ("no/libcuda.so.1", "No such file"),
    ] {
        let shot = run(&place.dir().join(file), &place.library());
        assert_eq!(shot.code, Some(125), "{shot:?}");
        let named = shot.stderr.contains("SPILLWAY_DRIVER_LIBRARY=") && shot.stderr.contains(says);
        assert!(named, "{shot:?}");
    }
    std::fs::remove_file(place.strict_library()).expect("removed");
    let shot = run(&driver, &place.library());
    assert_eq!(shot.code, Some(125), "{shot:?}");
    assert!(shot.stderr.contains("libspillway_strict.so"), "{shot:?}");
}
