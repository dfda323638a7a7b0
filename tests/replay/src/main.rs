//! `trace-replay`: plays a trace of driver calls. `scripts/bench replay` runs it.
//!
//!     trace-replay run [--json] [--evictions N] FILE...
//!     trace-replay play [--pauses N] FILE
//!
//! `run` plays each trace on a simulated machine of its own, without Spillway and under it while it is evicted
//! about N times, and says what differs. Exit code: 0 if nothing does, 1 if something does or a trace cannot be
//! played. `play` is one run, on whatever driver the process finds.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use serde_json::json;
use spillway_replay::compare::{Report, compare};
use spillway_replay::{player, trace};

#[derive(Parser)]
#[command(about = "Plays traces of driver calls, with and without Spillway")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Plays traces with and without Spillway, and compares
    Run {
        /// One JSON object per figure
        #[arg(long)]
        json: bool,
        /// About how often the program is evicted, evenly over its calls
        #[arg(long, default_value_t = 40, value_parser = some)]
        evictions: usize,
        /// Traces, as SPILLWAY_TRACE makes them
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// One run; prints a line for each call
    Play {
        /// Stops about so often, prints `#pause`, and waits for a line
        #[arg(long, default_value_t = 0)]
        pauses: usize,
        /// A trace
        file: PathBuf,
    },
}

/// Without evictions nothing of what this is for would be compared.
fn some(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err(
            "without evictions memory is never moved, which is what is compared; at least 1"
                .to_owned(),
        ),
        Ok(count) => Ok(count),
        Err(_) => Err("a number, at least 1".to_owned()),
    }
}

fn main() -> ExitCode {
    match work(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("trace-replay: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(args: Args) -> Result<bool> {
    match args.what {
        What::Play { pauses, file } => player::play(trace::read(&file)?, pauses).map(|()| true),
        What::Run {
            json,
            evictions,
            files,
        } => {
            let mut good = true;
            for file in files {
                let report = compare(&file, evictions)?;
                good &= report.is_same() && report.compared > 0;
                let name = file.display();
                if report.compared == 0 {
                    eprintln!(
                        "trace-replay: {name}: nothing is compared: no call of it that can be played gives a result"
                    );
                }
                if report.evictions == 0 {
                    eprintln!(
                        "trace-replay: {name}: never evicted with memory: only calls under Spillway are compared"
                    );
                }
                if report.cut_off {
                    eprintln!(
                        "trace-replay: {name}: the trace is cut off; what comes before was played"
                    );
                }
                if json {
                    as_json(&file, &report);
                } else {
                    as_text(&file, &report);
                }
            }
            Ok(good)
        }
    }
}

fn left_out(report: &Report) -> usize {
    report.left_out.values().map(|(count, _)| count).sum()
}

fn as_json(file: &Path, report: &Report) {
    let case = file.file_stem().unwrap_or_default().to_string_lossy();
    let names: Vec<_> = report
        .left_out
        .iter()
        .map(|(name, (count, why))| json!({"name": name, "count": count, "why": why}))
        .collect();
    for (metric, value, unit, more) in [
        ("calls", json!(report.calls), "calls", json!(null)),
        ("played", json!(report.played), "calls", json!(null)),
        ("left_out", json!(left_out(report)), "calls", json!(names)),
        (
            "results_compared",
            json!(report.compared),
            "results",
            json!(null),
        ),
        (
            "other_than_recorded",
            json!(report.other_than_recorded.len()),
            "calls",
            json!(report.other_than_recorded),
        ),
        (
            "different",
            json!(report.differences.len()),
            "calls",
            json!(report.differences),
        ),
        (
            "evictions",
            json!(report.evictions),
            "evictions",
            json!(null),
        ),
        ("moved", json!(report.bytes_moved), "bytes", json!(null)),
        (
            "without_spillway",
            json!(report.seconds[0]),
            "s",
            json!(null),
        ),
        ("with_spillway", json!(report.seconds[1]), "s", json!(null)),
    ] {
        let mut line = json!({"bench": "replay", "case": case, "metric": metric, "value": value, "unit": unit});
        if report.cut_off {
            line["cut_off"] = json!(true);
        }
        if !more.is_null() {
            line["list"] = more;
        }
        println!("{line}");
    }
}

fn as_text(file: &Path, report: &Report) {
    println!(
        "{}: {} calls, {} played, {} left out; {} results compared, {} evictions moved {} MiB; {} different",
        file.display(),
        report.calls,
        report.played,
        left_out(report),
        report.compared,
        report.evictions,
        report.bytes_moved >> 20,
        report.differences.len()
    );
    for (name, (count, why)) in &report.left_out {
        println!("  left out: {name} ({count}): {why}");
    }
    for line in report.other_than_recorded.iter().take(20) {
        println!("  other than recorded: {line}");
    }
    for line in report.differences.iter().take(20) {
        println!("  different: {line}");
    }
}
