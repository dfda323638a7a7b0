//! A trace, played without Spillway and under it while it is evicted again and again: what differs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spillway_tests::{Client, Place, artifact};

use crate::player::PAUSE;
use crate::trace::{self, Trace};

/// How long a run may take.
const TIME: Duration = Duration::from_secs(600);
/// The simulator's drivers.
const DRIVERS: [(u32, &str); 3] = [(12040, "12.4"), (12080, "12.8"), (13000, "13.0")];
/// Free memory may differ by this: with Spillway small allocations share pages of 2 MiB.
pub const FREE_WITHIN: u64 = 8 << 20;
const WORKLOAD: &str = "replay";

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Calls of the trace.
    pub calls: usize,
    /// Those that were played.
    pub played: usize,
    /// The others, by name: how many, and why the first one.
    pub left_out: BTreeMap<String, (usize, String)>,
    /// Answers other than the recorded ones, without Spillway.
    pub other_than_recorded: Vec<String>,
    /// What differs between the two runs.
    pub differences: Vec<String>,
    /// Results that were compared: numbers and digests.
    pub compared: usize,
    /// Times that the run was evicted with memory.
    pub evictions: usize,
    /// Bytes that left the device in all of them.
    pub bytes_moved: u64,
    /// The trace ended in the middle of a line.
    pub cut_off: bool,
    /// Time of the run without Spillway and of the one under it.
    pub seconds: [f64; 2],
}

/// Plays a trace twice, with about `evictions` evictions.
///
/// # Errors
/// The trace cannot be read, or a run does not come to its end.
pub fn compare(file: &Path, evictions: usize) -> Result<Report> {
    let trace = trace::read(file)?;
    ensure!(
        !trace.calls.is_empty(),
        "{}: there are no calls in it",
        file.display()
    );
    let file = file.canonicalize().context("the trace's path")?;
    let place = place(&trace);
    let start = Instant::now();
    let (bare, _, _) = run(
        place.program(artifact("trace-replay")).bare(),
        &file,
        0,
        |_| Ok(0),
    )?;
    let first = start.elapsed().as_secs_f64();
    // All memory is to be had, so that programs are told the same.
    let daemon = place.daemon(&["--reserve", "0"]);
    let start = Instant::now();
    let client = place.program(artifact("trace-replay")).workload(WORKLOAD);
    let (under, evicted, bytes) = run(client, &file, evictions, |_| {
        Ok(daemon.evict_when_idle(WORKLOAD).bytes)
    })?;
    let second = start.elapsed().as_secs_f64();
    ensure!(
        daemon.events_of(WORKLOAD, "registered").len() == 1,
        "the second run was not under Spillway"
    );
    let mut report = Report {
        calls: trace.calls.len(),
        evictions: evicted,
        bytes_moved: bytes,
        cut_off: trace.cut_off,
        seconds: [first, second],
        ..Report::default()
    };
    report.look(&bare, &under);
    Ok(report)
}

/// A machine like the one that the trace is from.
fn place(trace: &Trace) -> Place {
    let devices = trace.devices.len().max(1);
    let bytes = trace
        .devices
        .iter()
        .copied()
        .max()
        .unwrap_or(1 << 30)
        .max(64 << 20);
    let (_, driver) = DRIVERS
        .into_iter()
        .min_by_key(|(version, _)| version.abs_diff(trace.driver))
        .unwrap_or(DRIVERS[1]);
    Place::new("replay")
        .memory(&format!("{}MiB", bytes >> 20))
        .gpus(u32::try_from(devices).unwrap_or(1))
        .var("SPILLWAY_SIM_DRIVER", driver)
        .time(TIME)
        .build()
}

/// One run: its lines, how often memory was moved at a pause, and how much.
fn run(
    launch: spillway_tests::Launch<'_>,
    file: &Path,
    pauses: usize,
    mut at_pause: impl FnMut(&mut Client) -> Result<u64>,
) -> Result<(Vec<Value>, usize, u64)> {
    let launch = launch
        .arg("play")
        .arg(file)
        .args(&format!("--pauses {pauses}"));
    let mut client = launch.start();
    let (mut lines, mut moved, mut bytes) = (Vec::new(), 0, 0);
    loop {
        let line = client.line_within(Duration::from_secs(120));
        if line == PAUSE {
            let out = at_pause(&mut client)?;
            moved += usize::from(out > 0);
            bytes += out;
            client.send("go on");
            continue;
        }
        let value: Value =
            serde_json::from_str(&line).with_context(|| format!("printed: {line}"))?;
        let last = value["call"] == crate::player::END;
        lines.push(value);
        if last {
            let code = client.wait(Duration::from_secs(60));
            ensure!(
                code == Some(0),
                "a run ended with {code:?}: {}",
                client.stderr()
            );
            return Ok((lines, moved, bytes));
        }
    }
}

impl Report {
    fn look(&mut self, bare: &[Value], under: &[Value]) {
        if bare.len() != under.len() {
            self.differences
                .push(format!("{} lines, then {}", bare.len(), under.len()));
        }
        for (one, other) in bare.iter().zip(under) {
            let name = one["call"].as_str().unwrap_or_default();
            if let Some(why) = one["left_out"].as_str() {
                let entry = self.left_out.entry(name.to_owned());
                entry.or_insert_with(|| (0, why.to_owned())).0 += 1;
            } else if name != crate::player::END {
                self.played += 1;
            }
            if one["r"] != one["recorded"] {
                self.other_than_recorded.push(format!(
                    "line {} {name}: recorded {}, here {}",
                    one["line"], one["recorded"], one["r"]
                ));
            }
            self.compared += one["told"].as_array().map_or(0, Vec::len);
            if !same(one, other) {
                self.differences
                    .push(format!("without: {one}, under: {other}"));
            }
        }
    }

    /// Whether both runs had the same results.
    #[must_use]
    pub fn is_same(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Whether two lines are the same but for memory that is free.
fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Object(a), Value::Object(b)) => match (a.get("free"), b.get("free")) {
            (Some(a), Some(b)) => {
                let (a, b) = (a.as_u64().unwrap_or(0), b.as_u64().unwrap_or(0));
                a.abs_diff(b) <= FREE_WITHIN
            }
            _ => {
                a.len() == b.len()
                    && a.iter()
                        .all(|(key, value)| b.get(key).is_some_and(|b| same(value, b)))
            }
        },
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differences_are_seen() {
        let line = |told: Value| json!({"line": 3, "call": "cuMemGetInfo_v2", "r": 0, "recorded": 0, "told": told});
        let one = line(json!([{"free": 100 << 20}, 7]));
        assert!(same(&one, &line(json!([{"free": 99 << 20}, 7]))));
        assert!(!same(&one, &line(json!([{"free": 50 << 20}, 7]))));
        assert!(!same(&one, &line(json!([{"free": 100 << 20}, 8]))));
        assert!(!same(&one, &line(json!([{"free": 100 << 20}]))));
        let mut report = Report::default();
        report.look(
            &[one.clone(), json!({"call": "cuX", "left_out": "why"})],
            &[one.clone(), json!({"call": "cuX", "left_out": "why"})],
        );
        assert!(report.is_same() && report.played == 1 && report.left_out["cuX"].0 == 1);
        report.look(std::slice::from_ref(&one), &[]);
        assert!(!report.is_same());
    }
}
