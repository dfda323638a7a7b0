//! What loading a library costs programs that do not use CUDA: time from start to end, and files, threads and
//! sockets that are not there without it. The library itself is not counted; others that it needs are, apart.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::{Map, json};
use spillway_bench::calls::{self, Seen};
use spillway_bench::figures::{Figure, Report, Summary};
use spillway_bench::options::Options;

#[derive(Parser)]
#[command(about = "What loading a library costs programs that do not use CUDA")]
struct Arguments {
    #[command(flatten)]
    options: Options,
    /// The library to preload.
    #[arg(long)]
    library: PathBuf,
}

/// The cases, with the programs as they are started. A `python3` on the path may be a script that looks for
/// the real one.
fn programs() -> Vec<(&'static str, Vec<String>)> {
    let python = Command::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .env_remove("LD_PRELOAD")
        .output()
        .ok()
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map(|text| text.trim().to_owned())
        .filter(|path| !path.is_empty())
        .unwrap_or_else(|| "python3".to_owned());
    vec![
        ("true", vec!["/bin/true".to_owned()]),
        ("python", vec![python, "-c".to_owned(), "pass".to_owned()]),
    ]
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let library = arguments
        .library
        .canonicalize()
        .with_context(|| arguments.library.display().to_string())?;
    let report = Report {
        bench: "preload",
        json: arguments.options.json,
        prefix: arguments.options.prefix.clone(),
        common: Map::new(),
    };
    let mut failed = 0;
    for (case, words) in programs() {
        if !arguments.options.wants(case) {
            continue;
        }
        if let Err(why) = measure(&report, &arguments.options, case, &words, &library) {
            failed += i32::from(report.failed(case, &why));
        }
    }
    std::process::exit(i32::from(failed > 0));
}

fn command(words: &[String], library: Option<&Path>) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).env_remove("LD_PRELOAD");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(library) = library {
        command.env("LD_PRELOAD", library);
    }
    command
}

/// Milliseconds from start to end.
fn run(words: &[String], library: Option<&Path>) -> Result<f64> {
    let mut command = command(words, library);
    let start = Instant::now();
    let status = command.status().with_context(|| words[0].clone())?;
    let took = start.elapsed().as_secs_f64() * 1e3;
    ensure!(status.success(), "{} ends with {status}", words[0]);
    Ok(took)
}

fn measure(
    report: &Report,
    options: &Options,
    case: &str,
    words: &[String],
    library: &Path,
) -> Result<()> {
    for _ in 0..3 {
        run(words, None)?;
        run(words, Some(library))?;
    }
    let (mut bare, mut loaded) = (Vec::new(), Vec::new());
    let began = Instant::now();
    while bare.len() < 2000 && (bare.len() < 20 || began.elapsed() < options.budget() * 3) {
        if bare.len() % 2 == 0 {
            bare.push(run(words, None)?);
            loaded.push(run(words, Some(library))?);
        } else {
            let with = run(words, Some(library))?;
            bare.push(run(words, None)?);
            loaded.push(with);
        }
    }
    let rounds = bare.len();
    let added = Summary::of(
        bare.iter()
            .zip(&loaded)
            .map(|(bare, with)| with - bare)
            .collect(),
    );
    report.print(&Figure {
        case,
        metric: "added_ms",
        unit: "ms",
        value: added.median,
        baseline: Some(Summary::of(bare).median),
        quartiles: Some((added.low, added.high)),
        more: json!({ "with": Summary::of(loaded).median, "rounds": rounds }),
    });
    let seen = calls::watch(&mut command(words, None))
        .and_then(|bare| Ok((bare, calls::watch(&mut command(words, Some(library)))?)));
    let (bare, with) = match seen {
        Ok(seen) => seen,
        Err(why) => {
            report.skipped(case, &format!("system calls are not seen: {why:#}"));
            return Ok(());
        }
    };
    print_seen(report, case, &bare, &with, library);
    Ok(())
}

#[allow(clippy::cast_precision_loss)]
fn print_seen(report: &Report, case: &str, bare: &Seen, with: &Seen, library: &Path) {
    let own = library.to_string_lossy();
    let extra: BTreeSet<&String> = with
        .files
        .difference(&bare.files)
        .filter(|path| **path != *own)
        .collect();
    // What the loader maps because the library needs it, and what somebody opened.
    let (needed, opened): (Vec<&String>, Vec<&String>) =
        extra.into_iter().partition(|path| path.contains(".so"));
    let figures = [
        ("added_files", opened.len() as f64, bare.files.len()),
        ("added_libraries", needed.len() as f64, 0),
        (
            "added_threads",
            with.threads as f64 - bare.threads as f64,
            bare.threads,
        ),
        (
            "added_sockets",
            with.sockets as f64 - bare.sockets as f64,
            bare.sockets,
        ),
        (
            "added_calls",
            with.calls as f64 - bare.calls as f64,
            bare.calls,
        ),
    ];
    for (metric, value, baseline) in figures {
        let more = match metric {
            "added_files" => json!({ "files": opened }),
            "added_libraries" => json!({ "files": needed, "beside": own }),
            _ => json!({}),
        };
        let baseline = Some(baseline as f64);
        let unit = metric.trim_start_matches("added_");
        report.print(&Figure {
            case,
            metric,
            unit,
            value,
            baseline,
            quartiles: None,
            more,
        });
    }
}
