//! What a preloaded library adds to single calls of the driver: nanoseconds and instructions.
//!
//! Cases: NAME_THREADS, and NAME_wc_1 where each call follows stores past the caches, as after a driver's
//! doorbell. `control` calls the driver on both sides: what it shows is this bench's own error.

use std::collections::HashMap;
use std::ffi::CString;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use serde_json::{Map, Value, json};
use spillway_bench::figures::{Figure, Report, end};
use spillway_bench::hooks::{CALLS, Call, Hooks};
use spillway_bench::options::Options;
use spillway_bench::rounds::{Case, Plan, Side, alternate_in_threads};
use spillway_bench::setup::Device;
use spillway_bench::{callgrind, preloaded, steps};

#[derive(Parser)]
#[command(about = "What a preloaded library adds to single calls of the driver")]
struct Command {
    #[command(flatten)]
    options: Options,
    /// Does not count once more by valgrind.
    #[arg(long)]
    no_valgrind: bool,
    /// Only counts, under callgrind, into parts called "CASE baseline" and "CASE subject".
    #[arg(long, hide = true)]
    callgrind: bool,
    /// Only counts, by single steps, and prints `{"CASE": [baseline, subject], ...}`.
    #[arg(long, hide = true)]
    steps: bool,
}

/// Calls of each side under callgrind; fewer than a device queues.
const CALLGRIND_CALLS: u32 = 500;

fn main() -> ExitCode {
    let command = Command::parse();
    end("bench-hooks", &command.options.only, run(&command))
}

/// How many cases failed.
fn run(command: &Command) -> Result<i32> {
    if command.callgrind || command.steps {
        let device = Device::start()?;
        let kernel = device.kernel()?;
        let counted = if command.steps {
            count_by_steps(&device, kernel, &command.options)
        } else {
            count_for_callgrind(&device, kernel, &command.options)
        };
        counted?;
        std::process::exit(0);
    }
    preloaded::check()?;
    // Before this process uses CUDA: some preload libraries let one at a time.
    let counts = counts(&command.options);
    let only = ["--callgrind", "--only", &command.options.only.join(",")].map(str::to_owned);
    let by_valgrind = (!command.no_valgrind).then(|| callgrind::run_again(&only));
    let device = Device::start()?;
    let kernel = device.kernel()?;
    let common = device.describe();
    let report = Report {
        bench: "hooks",
        json: command.options.json,
        prefix: command.options.prefix.clone(),
        common,
    };
    let mut failed = 0;
    for (call, name) in CALLS {
        for (threads, combined) in [(1, false), (2, false), (1, true)] {
            let case = match combined {
                true => format!("{name}_wc_{threads}"),
                false => format!("{name}_{threads}"),
            };
            // A query rings no doorbell.
            if !command.options.wants(&case) || combined && !call.is_queued() {
                continue;
            }
            if let Err(why) = measure(
                &device,
                kernel,
                &report,
                &command.options,
                call,
                &case,
                threads,
                combined,
            ) {
                failed += i32::from(report.failed(&case, &why));
            }
            if threads == 1 && !combined {
                print_count(&report, &case, &counts);
                if let Some(counts) = &by_valgrind {
                    print_callgrind(&report, &case, counts);
                }
            }
        }
    }
    Ok(failed)
}

#[allow(clippy::too_many_arguments)]
fn measure(
    device: &Device,
    kernel: *mut std::ffi::c_void,
    report: &Report,
    options: &Options,
    call: Call,
    case: &str,
    threads: usize,
    combined: bool,
) -> Result<()> {
    let plan = Plan::new(options.budget());
    let plan = if call.is_queued() {
        plan.queued()
    } else {
        plan
    };
    let kernel = kernel as usize;
    let make = || Hooks::new(device, kernel as *mut _, call, combined);
    let outcome = alternate_in_threads(plan, threads, make)?;
    report.print(&Figure {
        case,
        metric: "added_ns",
        unit: "ns",
        value: outcome.added.median,
        baseline: Some(outcome.baseline.median),
        quartiles: Some((outcome.added.low, outcome.added.high)),
        more: json!({
            "with": outcome.subject.median, "threads": threads,
            "rounds": outcome.rounds, "calls": outcome.calls,
        }),
    });
    Ok(())
}

/// Counts in a process of its own: a driver need not bear to be stepped through.
fn counts(options: &Options) -> Result<Value> {
    let output = std::process::Command::new(std::env::current_exe()?)
        .args(["--steps", "--only", &options.only.join(",")])
        .output()?;
    ensure!(
        output.status.success(),
        "the process that counts ends with {}",
        output.status
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn print_count(report: &Report, case: &str, counts: &Result<Value>) {
    let pair = match counts {
        Ok(counts) => &counts[case],
        Err(why) => return report.skipped(case, &format!("no instruction counts: {why:#}")),
    };
    let (Some(baseline), Some(subject)) = (pair[0].as_f64(), pair[1].as_f64()) else {
        return report.skipped(
            case,
            "no instruction counts: the processor has no trap flag here",
        );
    };
    report.print(&Figure {
        case,
        metric: "added_instructions",
        unit: "instructions",
        value: subject - baseline,
        baseline: Some(baseline),
        quartiles: None,
        more: json!({ "with": subject, "by": "single steps" }),
    });
}

fn print_callgrind(report: &Report, case: &str, counts: &Result<HashMap<String, u64>>) {
    let counts = match counts {
        Ok(counts) => counts,
        Err(why) => return report.skipped(case, &format!("not counted by callgrind: {why:#}")),
    };
    let of = |side: &str| counts.get(&format!("{case} {side}"));
    let (Some(&baseline), Some(&subject)) = (of("baseline"), of("subject")) else {
        return report.skipped(
            case,
            "not counted by callgrind: it wrote nothing for this case",
        );
    };
    #[allow(clippy::cast_precision_loss)]
    let each = |count: u64| count as f64 / f64::from(CALLGRIND_CALLS);
    report.print(&Figure {
        case,
        metric: "added_instructions_callgrind",
        unit: "instructions",
        value: each(subject) - each(baseline),
        baseline: Some(each(baseline)),
        quartiles: None,
        more: json!({ "with": each(subject), "calls": CALLGRIND_CALLS }),
    });
}

#[allow(clippy::print_stdout)]
fn count_by_steps(device: &Device, kernel: *mut std::ffi::c_void, options: &Options) -> Result<()> {
    let mut counts = Map::new();
    for (call, name) in CALLS {
        let case = format!("{name}_1");
        if !options.wants(&case) {
            continue;
        }
        let mut hooks = Hooks::new(device, kernel, call, false)?;
        let pair = instructions(&mut hooks);
        counts.insert(
            case,
            pair.map_or(Value::Null, |(direct, hooked)| json!([direct, hooked])),
        );
    }
    println!("{}", Value::Object(counts));
    Ok(())
}

/// Instructions of one call, of either side: the least of some, since a call may do now and then what it
/// does not do always.
fn instructions(hooks: &mut Hooks) -> Option<(u64, u64)> {
    let mut least = [u64::MAX; 2];
    for attempt in 0..20 {
        for (side, least) in [Side::Baseline, Side::Subject].into_iter().zip(&mut least) {
            if attempt == 0 {
                // A first call may start a thread, which would inherit the flag and not survive it.
                hooks.run(side, 10);
                hooks.settle();
                continue;
            }
            // Without the loop's own way in and out.
            let none = steps::count(|| _ = hooks.run(side, 0))?;
            let one = steps::count(|| _ = hooks.run(side, 1))?;
            hooks.settle();
            *least = (*least).min(one.saturating_sub(none));
        }
    }
    Some((least[0], least[1]))
}

fn count_for_callgrind(
    device: &Device,
    kernel: *mut std::ffi::c_void,
    options: &Options,
) -> Result<()> {
    for (call, name) in CALLS {
        let case = format!("{name}_1");
        if !options.wants(&case) {
            continue;
        }
        let mut hooks = Hooks::new(device, kernel, call, false)?;
        for (side, label) in [(Side::Baseline, "baseline"), (Side::Subject, "subject")] {
            hooks.run(side, 3);
            hooks.settle();
            let label = CString::new(format!("{case} {label}"))?;
            callgrind::counted(&label, || _ = hooks.run(side, CALLGRIND_CALLS));
            hooks.settle();
        }
    }
    Ok(())
}
