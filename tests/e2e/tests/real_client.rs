//! An unmodified real client, NVIDIA's own Python bindings of the driver API, prints the same without
//! Spillway, under it, and while it is swapped between every two of its steps.

use std::path::{Path, PathBuf};
use std::time::Duration;

use spillway_tests::{Client, Daemon, Place, artifact, repository};

/// The interpreter with the bindings; `None`: said why, and skipped.
fn python(test: &str) -> Option<PathBuf> {
    match std::env::var_os("SPILLWAY_TEST_PYTHON").filter(|path| !path.is_empty()) {
        Some(path) => Some(path.into()),
        None => {
            eprintln!(
                "skipped: {test}: SPILLWAY_TEST_PYTHON names no python3 with tests/clients/python/requirements.txt"
            );
            None
        }
    }
}

fn session<'a>(place: &'a Place, python: &Path) -> spillway_tests::Launch<'a> {
    let _ = artifact("libspillway.so");
    let root = repository();
    place
        .program(python)
        .arg("-B")
        .arg(root.join("tests/clients/python/driver_session.py"))
        .arg(root.join("simulator/kernels/spillway.ptx"))
}

/// Runs the session in steps; `between` is called with each step's name.
fn stepped(mut client: Client, mut between: impl FnMut(&str)) -> (Vec<String>, usize) {
    let (mut printed, mut steps) = (Vec::new(), 0);
    loop {
        let line = client.line();
        if let Some(step) = line.strip_prefix("#step ") {
            steps += 1;
            between(step.trim());
            client.send("go on");
            continue;
        }
        let last = line.starts_with("done");
        printed.push(line);
        if last {
            assert_eq!(
                client.wait(Duration::from_secs(20)),
                Some(0),
                "{}",
                client.stderr()
            );
            assert_eq!(client.stderr(), "", "a transparent library says nothing");
            return (printed, steps);
        }
    }
}

fn bare(place: &Place, python: &Path) -> Vec<String> {
    let (code, output, errors) = session(place, python)
        .bare()
        .finish(Duration::from_secs(60));
    assert_eq!(code, Some(0), "bare: {output}\n{errors}");
    output.lines().map(str::to_owned).collect()
}

fn same(bare: &[String], under: &[String]) {
    for (number, (one, other)) in bare.iter().zip(under).enumerate() {
        assert_eq!(one, other, "line {number}: without Spillway, under it");
    }
    assert_eq!(bare.len(), under.len());
}

#[test]
fn prints_the_same_under_spillway() {
    let Some(python) = python("prints_the_same_under_spillway") else {
        return;
    };
    let place = Place::new("real-client").memory("512MiB").build();
    let expected = bare(&place, &python);
    assert!(expected.len() > 50, "{expected:?}");
    let daemon = place.daemon(&[]);
    let (code, output, errors) = session(&place, &python)
        .workload("session")
        .finish(Duration::from_secs(60));
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{output}");
    same(
        &expected,
        &output.lines().map(str::to_owned).collect::<Vec<_>>(),
    );
    let registered = daemon.events_of("session", "registered");
    assert_eq!(
        registered.len(),
        1,
        "it was under Spillway: {:?}",
        daemon.events()
    );
}

#[test]
fn prints_the_same_when_swapped_between_every_two_steps() {
    let Some(python) = python("prints_the_same_when_swapped_between_every_two_steps") else {
        return;
    };
    let place = Place::new("real-client-swapped").memory("512MiB").build();
    let expected = bare(&place, &python);
    let daemon = place.daemon(&[]);
    let client = session(&place, &python)
        .workload("session")
        .var("DRIVER_SESSION_STEPS", "1")
        .start();
    let (mut moved, mut refused) = (0, 0);
    let (printed, steps) = stepped(client, |step| {
        if step.ends_with("capturing") {
            busy(&daemon, step);
            refused += 1;
            return;
        }
        let out = daemon.evict_when_idle("session");
        assert_eq!(daemon.state("session"), "evicted", "{step}");
        let back = daemon.restore("session");
        assert_eq!(out.bytes, back.bytes, "{step}");
        moved += u64::from(out.bytes > 0);
    });
    same(&expected, &printed);
    assert!(
        steps > 30 && refused == 1,
        "{steps} steps, {refused} refused"
    );
    assert!(moved > 30, "memory was moved in {moved} of {steps} steps");
}

#[test]
fn prints_the_same_when_its_next_call_has_to_bring_it_back() {
    let Some(python) = python("prints_the_same_when_its_next_call_has_to_bring_it_back") else {
        return;
    };
    let place = Place::new("real-client-evicted").memory("512MiB").build();
    let expected = bare(&place, &python);
    let daemon = place.daemon(&[]);
    let client = session(&place, &python)
        .workload("session")
        .var("DRIVER_SESSION_STEPS", "1")
        .start();
    let mut restored = 0;
    let (printed, steps) = stepped(client, |step| {
        if step.ends_with("capturing") {
            return busy(&daemon, step);
        }
        restored = daemon.workload("session")["swaps_in"].as_u64().unwrap_or(0);
        let _ = daemon.evict_when_idle("session");
        assert_eq!(daemon.state("session"), "evicted", "{step}");
    });
    same(&expected, &printed);
    assert!(
        restored > 20,
        "its own calls brought it back in {restored} of {steps} steps"
    );
}

fn busy(daemon: &Daemon<'_>, step: &str) {
    let answer = daemon.operate("session", "evict");
    assert_eq!(answer.status, 409, "{step}: {}", answer.body);
    assert!(answer.error().contains("capture"), "{}", answer.error());
}
