//! Runs cases: one in this process, or all of them each in a child of its own, and reports.

use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::api;
use crate::cases;
use crate::harness::{Case, Stop};

/// Exit code of a case that does not apply here (as automake has it).
const SKIPPED: u8 = 77;
/// No case needs longer; one that hangs is killed then.
const CASE_LIMIT: Duration = Duration::from_secs(90);

/// Runs one case here. Exit code 0, 1 or 77; the reason is the last line.
pub fn run_one(name: &str) -> ExitCode {
    let Some(case) = cases::all().find(|case| case.full_name() == name) else {
        eprintln!("spillway-conformance: no case {name:?}; `list` names them");
        return ExitCode::from(2);
    };
    if !api::driver_found() {
        println!("reason: libcuda.so.1 could not be opened");
        return ExitCode::FAILURE;
    }
    let result = (case.run)();
    let _ = std::io::stdout().flush();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Fail(text)) => {
            println!("reason: {text}");
            ExitCode::FAILURE
        }
        Err(Stop::Skip(text)) => {
            println!("reason: {text}");
            ExitCode::from(SKIPPED)
        }
    }
}

/// What `all` was asked for.
pub struct Options {
    json: Option<String>,
    only: Vec<String>,
    jobs: usize,
}

impl Options {
    pub fn parse(words: &[&str]) -> Result<Options, String> {
        let mut options = Options {
            json: None,
            only: Vec::new(),
            jobs: 1,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let value = words.next().ok_or(format!("{word} needs a value"))?;
            match *word {
                "--json" => options.json = Some(value.to_string()),
                "--only" => options.only.push(value.to_string()),
                "--jobs" => {
                    options.jobs = value
                        .parse()
                        .map_err(|_| format!("--jobs {value}: not a number"))?
                }
                other => return Err(format!("unknown option {other}")),
            }
        }
        Ok(options)
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Result3 {
    Ok,
    Fail,
    Skipped,
}

struct Report {
    name: String,
    result: Result3,
    reason: String,
    observed: Vec<String>,
    seconds: f64,
}

/// Runs every wanted case in a child of its own and prints the totals.
///
/// Cases watch the device's free memory and its timing, so they run one after another unless `--jobs` says
/// otherwise.
pub fn run_all(options: &Options) -> ExitCode {
    let wanted: Vec<&Case> = cases::all()
        .filter(|case| options.wants(&case.full_name()))
        .collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let reports = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(case) = wanted.get(index) else { break };
                    let report = run_child(case);
                    print_report(&report);
                    if let Ok(mut reports) = reports.lock() {
                        reports.push((index, report));
                    }
                }
            });
        }
    });
    let mut reports = reports.into_inner().unwrap_or_default();
    reports.sort_by_key(|(index, _)| *index);
    let reports: Vec<Report> = reports.into_iter().map(|(_, report)| report).collect();
    let count = |wanted: Result3| reports.iter().filter(|r| r.result == wanted).count();
    let (passed, failed, skipped) = (
        count(Result3::Ok),
        count(Result3::Fail),
        count(Result3::Skipped),
    );
    if let Some(path) = &options.json {
        let text = to_json(&reports, passed, failed, skipped).to_string();
        if let Err(error) = std::fs::write(path, text + "\n") {
            eprintln!("spillway-conformance: cannot write {path}: {error}");
            return ExitCode::FAILURE;
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    // Nothing run is not success: a mistyped --only must not look green.
    if failed > 0 || passed == 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn run_child(case: &Case) -> Report {
    let name = case.full_name();
    let start = Instant::now();
    let outcome = child_output(&name);
    let seconds = start.elapsed().as_secs_f64();
    let (result, reason, observed) = match outcome {
        Ok((code, text)) => {
            let observed = text
                .lines()
                .filter_map(|l| l.strip_prefix("observed: "))
                .map(str::to_string)
                .collect();
            let reason = text
                .lines()
                .rev()
                .find_map(|l| l.strip_prefix("reason: "))
                .unwrap_or("")
                .to_string();
            match code {
                Some(0) => (Result3::Ok, reason, observed),
                Some(77) => (Result3::Skipped, reason, observed),
                Some(_) if !reason.is_empty() => (Result3::Fail, reason, observed),
                code => (
                    Result3::Fail,
                    format!("ended with {code:?} and no reason (crashed?)"),
                    observed,
                ),
            }
        }
        Err(text) => (Result3::Fail, text, Vec::new()),
    };
    Report {
        name,
        result,
        reason,
        observed,
        seconds,
    }
}

fn child_output(name: &str) -> Result<(Option<i32>, String), String> {
    let program = std::env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let mut child = Command::new(program)
        .args(["run", name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start: {e}"))?;
    let mut pipe = child.stdout.take().ok_or("no pipe")?;
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let start = Instant::now();
    loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => {
                let text = reader.join().unwrap_or_default();
                use std::os::unix::process::ExitStatusExt;
                if let Some(signal) = status.signal() {
                    return Err(format!(
                        "killed by signal {signal}; it printed: {}",
                        text.trim()
                    ));
                }
                return Ok((status.code(), text));
            }
            None if start.elapsed() > CASE_LIMIT => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("did not end within {} s", CASE_LIMIT.as_secs()));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn print_report(report: &Report) {
    let result = match report.result {
        Result3::Ok => "ok".to_string(),
        Result3::Fail => format!("FAIL {}", report.reason),
        Result3::Skipped => format!("skipped {}", report.reason),
    };
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{} {result}", report.name);
    for line in &report.observed {
        let _ = writeln!(out, "    observed: {line}");
    }
    let _ = out.flush();
}

fn to_json(reports: &[Report], passed: usize, failed: usize, skipped: usize) -> Value {
    let mut version = 0;
    let _ = api::cuDriverGetVersion(&mut version);
    let cases: Vec<Value> = reports
        .iter()
        .map(|r| {
            let result = match r.result {
                Result3::Ok => "ok",
                Result3::Fail => "FAIL",
                Result3::Skipped => "skipped",
            };
            json!({"name": r.name, "result": result, "reason": r.reason, "observed": r.observed, "seconds": r.seconds})
        })
        .collect();
    json!({
        "driver": api::driver_path(), "driver_version": version,
        "passed": passed, "failed": failed, "skipped": skipped, "cases": cases,
    })
}
