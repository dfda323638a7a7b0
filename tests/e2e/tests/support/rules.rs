//! `tests/conformance`, case by case, under one of our libraries.

use std::path::PathBuf;
use std::time::Duration;

use spillway_tests::{Place, artifact};

/// Rules that programs see otherwise under Spillway: a name and a reason per line. A case that is listed and
/// passes fails the test, so the list stays true.
const OTHERWISE: &str = include_str!("../../../conformance/otherwise.txt");

fn is_otherwise(name: &str) -> bool {
    let lines = OTHERWISE.lines().filter(|line| !line.starts_with('#'));
    let mut names = lines.filter_map(|line| Some(line.split_once("  ")?.0));
    names.any(|listed| listed == name)
}

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
        let otherwise = is_otherwise(name);
        match (verdict, otherwise) {
            ("FAIL", false) => wrong.push(format!("{name}: {text}")),
            ("ok", true) => wrong.push(format!("{name}: passes, take it off the list")),
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
