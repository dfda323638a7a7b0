//! `tests/conformance`, case by case, under one of our libraries.

use std::path::PathBuf;
use std::time::Duration;

use spillway_tests::{Place, artifact};

/// Rules that programs see otherwise under Spillway, with the reason. A case that is listed and
/// passes fails the test, so the list stays true.
const OTHERWISE: [(&str, &str); 9] = [
    (
        "processes.memory_is_shared_out_among_processes",
        "a program is told of its own workload's memory only, not of its neighbours'",
    ),
    (
        "pointer.sync_memops_can_be_set",
        "memory that can be swapped is cuMemMap's, for which the driver does not have it",
    ),
    (
        "errors.a_fault_sticks",
        "up to 1 MiB is allocated from memory that is there already, with no call of the driver that could tell of the fault",
    ),
    ("managed.an_allocation_takes_no_device_memory", MANAGED),
    ("managed.no_process_is_listed_with_it", MANAGED),
    ("managed.prefetches_bring_pages_and_take_them_away", MANAGED),
    ("managed.advice_keeps_pages_on_the_host", MANAGED),
    ("managed.it_leaves_for_allocations", MANAGED),
    ("managed.locations_of_the_second_version", MANAGED),
];

const MANAGED: &str =
    "managed memory is charged whole from its allocation on, since nobody can see its pages move";

/// Runs all cases in a place of that name with `library` preloaded, a coordinator, and memory that is
/// Spillway's to move.
///
/// # Panics
/// A case fails that is not listed, or passes though it is.
pub fn hold(name: &str, library: impl Fn(&Place) -> PathBuf) {
    let place = Place::new(name)
        .memory("4GiB")
        .time(Duration::from_secs(280))
        .build();
    let _daemon = place.daemon(&[]);
    let mut command = place.command(artifact("spillway-conformance"));
    command.arg("all").env("LD_PRELOAD", library(&place));
    let shot = place.run(command);
    let verdicts: Vec<(&str, &str, &str)> = shot
        .stdout
        .lines()
        .filter_map(|line| {
            let mut words = line.splitn(3, ' ');
            let (name, verdict) = (words.next()?, words.next()?);
            matches!(verdict, "ok" | "FAIL" | "skipped")
                .then(|| (name, verdict, words.next().unwrap_or("")))
        })
        .collect();
    assert!(verdicts.len() > 200, "few cases ran:\n{}", shot.stdout);
    let mut wrong = Vec::new();
    for (name, verdict, text) in verdicts {
        let otherwise = OTHERWISE.iter().any(|(listed, _)| *listed == name);
        match (verdict, otherwise) {
            ("FAIL", false) => wrong.push(format!("{name}: {text}")),
            ("ok", true) => wrong.push(format!("{name}: passes, take it off the list")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
