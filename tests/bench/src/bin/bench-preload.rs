//! What loading a library costs programs that do not use CUDA: time from start to end, and files, threads and
//! sockets that are not there without it. The library itself is not counted; others that it needs are, apart.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::{Map, json};
use spillway_bench::calls::{self, Seen};
use spillway_bench::figures::{Figure, Report, Summary, end};
use spillway_bench::options::Options;
use spillway_bench::preloaded;

#[derive(Parser)]
#[command(about = "What loading a library costs programs that do not use CUDA")]
struct Arguments {
    #[command(flatten)]
    options: Options,
    /// The library to preload.
    #[arg(long)]
    library: PathBuf,
    /// Set for the programs, with the library and without it.
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
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

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let measured = run_all(&arguments);
    end("bench-preload", &arguments.options.only, measured)
}

/// How many cases failed.
fn run_all(arguments: &Arguments) -> Result<i32> {
    let library = std::path::absolute(&arguments.library)?;
    let shown = library.to_string_lossy();
    ensure!(
        !shown.contains([' ', ':']),
        "{shown}: LD_PRELOAD ends a name at a space and at a colon; give a link to the file, without them"
    );
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
        check_loaded(case, &words, &arguments.env, &library)?;
        if let Err(why) = measure(&report, arguments, case, &words, &library) {
            failed += i32::from(report.failed(case, &why));
        }
    }
    Ok(failed)
}

/// The loader goes on without what it cannot load, so a program of the same kind shows what it has mapped.
fn check_loaded(case: &str, words: &[String], env: &[String], library: &Path) -> Result<()> {
    let show = "print(open('/proc/self/maps').read())";
    let words = match case {
        "python" => [&words[0], "-c", show].map(str::to_owned).to_vec(),
        _ => ["/bin/cat", "/proc/self/maps"].map(str::to_owned).to_vec(),
    };
    let mut command = command(&words, env, Some(library));
    let output = command.stdout(Stdio::piped()).output();
    let output = output.with_context(|| words[0].clone())?;
    preloaded::check_mapped(&String::from_utf8_lossy(&output.stdout), library)
}

fn command(words: &[String], env: &[String], library: Option<&Path>) -> Command {
    let mut command = Command::new(&words[0]);
    command.envs(env.iter().filter_map(|one| one.split_once('=')));
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
fn run(words: &[String], env: &[String], library: Option<&Path>) -> Result<f64> {
    let mut command = command(words, env, library);
    let start = Instant::now();
    let status = command.status().with_context(|| words[0].clone())?;
    let took = start.elapsed().as_secs_f64() * 1e3;
    ensure!(status.success(), "{} ends with {status}", words[0]);
    Ok(took)
}

fn measure(
    report: &Report,
    arguments: &Arguments,
    case: &str,
    words: &[String],
    library: &Path,
) -> Result<()> {
    let (options, env) = (&arguments.options, &arguments.env[..]);
    for _ in 0..3 {
        run(words, env, None)?;
        run(words, env, Some(library))?;
    }
    let (mut bare, mut loaded) = (Vec::new(), Vec::new());
    let began = Instant::now();
    while bare.len() < 2000 && (bare.len() < 20 || began.elapsed() < options.budget() * 3) {
        if bare.len() % 2 == 0 {
            bare.push(run(words, env, None)?);
            loaded.push(run(words, env, Some(library))?);
        } else {
            let with = run(words, env, Some(library))?;
            bare.push(run(words, env, None)?);
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
    let seen = calls::watch(&mut command(words, env, None))
        .and_then(|bare| Ok((bare, calls::watch(&mut command(words, env, Some(library)))?)));
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

/// Whether a file's name ends as a shared library's does: `.so`, or `.so` and a version.
fn is_library(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let version = |rest: &str| {
        rest.bytes()
            .all(|byte| byte == b'.' || byte.is_ascii_digit())
    };
    name.rsplit_once(".so")
        .is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with('.') && version(rest))
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
        extra.into_iter().partition(|path| is_library(path));
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

#[cfg(test)]
mod tests {
    use super::is_library;

    #[test]
    fn libraries_are_told_by_the_end_of_their_name() {
        for path in ["/lib/libgcc_s.so.1", "/a/libx.so", "/a/libstdc++.so.6.0.30"] {
            assert!(is_library(path), "{path}");
        }
        for path in [
            "/etc/ld.so.cache",
            "/etc/app.sock",
            "/x.so.d/file",
            "/a/b.so.conf",
        ] {
            assert!(!is_library(path), "{path}");
        }
    }
}
