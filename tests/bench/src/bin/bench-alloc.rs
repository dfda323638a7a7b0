//! What a preloaded library makes of `cuMemAlloc` and `cuMemFree`.
//!
//! Cases: SIZE_THREADS, allocated and freed at once, again and again: up to 1 MiB beside the driver's own
//! `cuMemAlloc`, from 64 MiB on beside the driver's own steps for mapped memory. `first_SIZE`: the first of
//! its size in a process, after one of each smaller size that was freed: a driver may have given its block back
//! and need a new one where the library has kept its own, so what is added may be less than nothing.
//! `near_limit_SIZE_1`: with 4 MiB left. `refused_1`: more than is left. `live_N`: allocated and freed while N
//! others live. `churn_N`: of N, any one freed and made anew.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::{Value, json};
use spillway_bench::alloc::{BesideMapping, Crowd, GRANULE, Pair, Refused, allocate, free, told};
use spillway_bench::figures::{Figure, Report, Summary, end};
use spillway_bench::options::Options;
use spillway_bench::preloaded;
use spillway_bench::rounds::{Outcome, Plan, alternate, alternate_in_threads};
use spillway_bench::setup::Device;

#[derive(Parser)]
#[command(about = "What a preloaded library makes of cuMemAlloc and cuMemFree")]
struct Command {
    #[command(flatten)]
    options: Options,
    /// Processes that show the first allocations; 0: none.
    #[arg(long, default_value_t = 10)]
    processes: u32,
    /// Live allocations of 4 KiB in the case of many.
    #[arg(long, default_value_t = 100_000)]
    live: usize,
    /// Before the names of cases from 64 MiB on, instead of what --prefix says.
    #[arg(long, value_name = "PREFIX")]
    prefix_mapped: Option<String>,
    /// Allocates each size once, one side after the other, prints the times, and ends.
    #[arg(long, hide = true)]
    first: Option<u32>,
}

const SIZES: [(&str, usize); 4] = [
    ("4KiB", 4 << 10),
    ("1MiB", 1 << 20),
    ("64MiB", 64 << 20),
    ("1GiB", 1 << 30),
];
/// Fewer processes give no figure of first allocations.
const FIRSTS: usize = 5;
/// From this size on, the driver's own steps for mapped memory are the measure.
const MAPPED: usize = 64 << 20;

fn main() -> ExitCode {
    let command = Command::parse();
    end("bench-alloc", &command.options.only, run(&command))
}

/// How many cases failed.
fn run(command: &Command) -> Result<i32> {
    if let Some(number) = command.first {
        first(&Device::start()?, number)?;
        std::process::exit(0);
    }
    preloaded::check()?;
    // Before this process uses CUDA: some preload libraries let one at a time.
    let wanted = command.options.wants("first") && command.processes > 0;
    let firsts = wanted.then(|| firsts(command));
    let device = Device::start()?;
    let common = device.describe();
    let options = &command.options;
    let report = Report {
        bench: "alloc",
        json: options.json,
        prefix: options.prefix.clone(),
        common,
    };
    let bench = Bench {
        device: &device,
        report,
        command,
    };
    let mapped = command.prefix_mapped.clone();
    let mapped = Report {
        prefix: mapped.unwrap_or_else(|| bench.report.prefix.clone()),
        ..bench.report.clone()
    };
    let mapped = Bench {
        report: mapped,
        ..bench.clone()
    };
    let mut failed = 0;
    let mut attempt = |case: &str, run: &dyn Fn() -> Result<()>| {
        if let Err(why) = run() {
            failed += i32::from(bench.report.failed(case, &why));
        }
    };
    for (name, bytes) in SIZES {
        for threads in [1, 2] {
            let case = format!("{name}_{threads}");
            if options.wants(&case) {
                let bench = if bytes < MAPPED { &bench } else { &mapped };
                attempt(&case, &|| bench.repeated(&case, bytes, threads));
            }
        }
    }
    if options.wants("live") || options.wants("churn") {
        attempt("live", &|| bench.many_live());
    }
    if options.wants("near_limit") {
        attempt("near_limit", &|| bench.near_limit());
    }
    match firsts {
        Some(Ok(times)) => bench.print_firsts(times),
        Some(Err(why)) => attempt("first", &|| bail!("{why:#}")),
        None => {}
    }
    Ok(failed)
}

#[derive(Clone)]
struct Bench<'a> {
    device: &'a Device,
    report: Report,
    command: &'a Command,
}

impl Bench<'_> {
    fn plan(&self) -> Plan {
        Plan::new(self.command.options.budget())
    }

    fn both(&self, case: &str, beside: &str, outcome: &Outcome) {
        let more = json!({
            "with": outcome.subject.median, "beside": beside,
            "rounds": outcome.rounds, "calls": outcome.calls,
        });
        let added = outcome.added;
        self.report.print(&Figure {
            case,
            metric: "added_ns",
            unit: "ns",
            value: added.median,
            baseline: Some(outcome.baseline.median),
            quartiles: Some((added.low, added.high)),
            more: more.clone(),
        });
        let ratio = outcome.ratio;
        self.report.print(&Figure {
            case,
            metric: "ratio",
            unit: "ratio",
            value: ratio.median,
            baseline: Some(1.0),
            quartiles: Some((ratio.low, ratio.high)),
            more,
        });
    }

    fn repeated(&self, case: &str, bytes: usize, threads: usize) -> Result<()> {
        if bytes < MAPPED {
            let make = || Pair::new(self.device, bytes);
            let outcome = alternate_in_threads(self.plan(), threads, make)?;
            self.both(case, "cuMemAlloc and cuMemFree", &outcome);
            return Ok(());
        }
        let (free_now, _) = told(&self.device.both.hooked)?;
        if free_now < bytes * threads + GRANULE {
            let why = format!("{} MiB are free to the program, too few", free_now >> 20);
            self.report.skipped(case, &why);
            return Ok(());
        }
        let make = || BesideMapping::new(self.device, bytes);
        let outcome = alternate_in_threads(self.plan(), threads, make)?;
        self.both(case, "create, map, set access, unmap, release", &outcome);
        let make = || Pair::new(self.device, bytes);
        let classic = alternate_in_threads(self.plan(), threads, make)?;
        self.report.print(&Figure {
            case,
            metric: "over_mem_alloc_ratio",
            unit: "ratio",
            value: classic.ratio.median,
            baseline: Some(1.0),
            quartiles: Some((classic.ratio.low, classic.ratio.high)),
            more: json!({ "mem_alloc_ns": classic.baseline.median, "with": classic.subject.median }),
        });
        Ok(())
    }

    /// A crowd of few and one of many, by turns, on either side.
    fn many_live(&self) -> Result<()> {
        const FEW: usize = 100;
        const BYTES: usize = 4096;
        const CALLS: u32 = 200;
        let many = self.command.live;
        let (free_now, _) = told(&self.device.both.hooked)?;
        if free_now < many * BYTES * 2 + GRANULE {
            let why = format!("{} MiB are free to the program, too few", free_now >> 20);
            self.report.skipped("live", &why);
            return Ok(());
        }
        // By what is done, how many live, and side.
        let mut times: [[[Vec<f64>; 2]; 2]; 2] = Default::default();
        let both = &self.device.both;
        let mut crowds = [
            Crowd::new(&both.direct, BYTES),
            Crowd::new(&both.hooked, BYTES),
        ];
        let began = Instant::now();
        let mut turns = 0;
        while turns < 3 || turns < 20 && began.elapsed() < self.plan().budget * 3 {
            for (which, count) in [FEW, many].into_iter().enumerate() {
                for crowd in &mut crowds {
                    crowd.resize(count)?;
                    // What was just made lies in the caches.
                    ensure!(crowd.churn(2000) == 0, "a call failed");
                }
                for round in 0..100 {
                    for (side, crowd) in crowds.iter_mut().enumerate() {
                        let what = round % 2;
                        let start = Instant::now();
                        let code = if what == 0 {
                            crowd.pairs(CALLS)
                        } else {
                            crowd.churn(CALLS)
                        };
                        let took = start.elapsed().as_secs_f64() * 1e9;
                        ensure!(code == 0, "a call answers {code}");
                        times[what][which][side].push(took / f64::from(CALLS));
                    }
                }
            }
            turns += 1;
        }
        for (what, name) in ["live", "churn"].into_iter().enumerate() {
            let of = |which: usize, side: usize| Summary::of(times[what][which][side].clone());
            for (which, count) in [FEW, many].into_iter().enumerate() {
                let (direct, hooked) = (of(which, 0), of(which, 1));
                self.report.print(&Figure {
                    case: &format!("{name}_{count}"),
                    metric: "ns",
                    unit: "ns",
                    value: hooked.median,
                    baseline: Some(direct.median),
                    quartiles: Some((hooked.low, hooked.high)),
                    more: json!({ "beside": "cuMemAlloc and cuMemFree", "turns": turns }),
                });
            }
            self.report.print(&Figure {
                case: &format!("{name}_{many}"),
                metric: "ratio",
                unit: "ratio",
                value: of(1, 1).median / of(0, 1).median,
                baseline: Some(of(1, 0).median / of(0, 0).median),
                quartiles: None,
                more: json!({ "beside": format!("with {FEW}; the baseline is the driver's own ratio") }),
            });
        }
        Ok(())
    }

    fn near_limit(&self) -> Result<()> {
        const LEFT: usize = 4 << 20;
        const MORE: usize = 64 << 20;
        let hooked = &self.device.both.hooked;
        let (free_now, total) = told(hooked)?;
        let (_, driver_total) = told(&self.device.both.direct)?;
        if total >= driver_total {
            self.report.skipped(
                "near_limit",
                "the program has no limit below the device's memory",
            );
            return Ok(());
        }
        ensure!(free_now > LEFT, "only {free_now} bytes are free");
        let fill = allocate(hooked, free_now - LEFT);
        let fill = fill.map_err(|code| anyhow::anyhow!("cuMemAlloc answers {code}"))?;
        let done = (|| {
            for (name, bytes) in &SIZES[..2] {
                let outcome = alternate(self.plan(), &mut Pair::new(self.device, *bytes)?)?;
                self.both(
                    &format!("near_limit_{name}_1"),
                    "cuMemAlloc and cuMemFree",
                    &outcome,
                );
            }
            // More than is left by now: what the direct calls made the driver take and give back moves the figure.
            let (left, _) = told(hooked)?;
            let outcome = alternate(self.plan(), &mut Refused::new(self.device, left + MORE))?;
            self.both(
                "refused_1",
                "what no device has, refused by the driver",
                &outcome,
            );
            Ok(())
        })();
        free(hooked, fill);
        done
    }

    fn print_firsts(&self, times: Firsts) {
        for ((name, _), [direct, hooked]) in SIZES.iter().zip(times) {
            let case = format!("first_{name}");
            if direct.is_empty() || hooked.is_empty() {
                self.report
                    .skipped(&case, "too little is free to the program");
                continue;
            }
            let processes = hooked.len();
            if processes < FIRSTS {
                let why =
                    format!("{processes} processes are too few for a figure; at least {FIRSTS}");
                self.report.skipped(&case, &why);
                continue;
            }
            let added = direct.iter().zip(&hooked).map(|(d, h)| h - d).collect();
            let (direct, hooked, added) =
                (Summary::of(direct), Summary::of(hooked), Summary::of(added));
            self.report.print(&Figure {
                case: &case,
                metric: "added_ns",
                unit: "ns",
                value: added.median,
                baseline: Some(direct.median),
                quartiles: Some((added.low, added.high)),
                more: json!({
                    "with": hooked.median, "processes": processes,
                    "beside": "cuMemAlloc, the first of that size in a process",
                }),
            });
        }
    }
}

/// Nanoseconds of the first allocation of each size, the driver's own and the program's, of each process.
type Firsts = Vec<[Vec<f64>; 2]>;

/// In processes of their own, since there is one first.
fn firsts(command: &Command) -> Result<Firsts> {
    let mut times: Firsts = SIZES.iter().map(|_| [vec![], vec![]]).collect();
    let began = Instant::now();
    let mut processes = 0;
    // A figure needs some of them, however long they take, but not for ever.
    let least = command
        .processes
        .min(u32::try_from(FIRSTS).unwrap_or(u32::MAX));
    let time = |least| match least {
        true => Duration::from_secs(120),
        false => command.options.budget() * 4,
    };
    while processes < command.processes && began.elapsed() < time(processes < least) {
        let output = std::process::Command::new(std::env::current_exe()?)
            .args(["--first", &processes.to_string()])
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}", said.trim());
        let lines: Value = serde_json::from_slice(&output.stdout).context("its output")?;
        for (times, pair) in times.iter_mut().zip(lines.as_array().context("a list")?) {
            for (side, times) in times.iter_mut().enumerate() {
                times.extend(pair[side].as_f64());
            }
        }
        processes += 1;
    }
    Ok(times)
}

/// Prints `[[driver's own, program's], ...]` in nanoseconds per size; an empty pair where it did not fit.
#[allow(clippy::print_stdout)]
fn first(device: &Device, number: u32) -> Result<()> {
    let mut times = Vec::new();
    for (_, bytes) in SIZES {
        let mut pair = [Value::Null, Value::Null];
        let mut made = Vec::new();
        for turn in 0..2 {
            let side = (number + turn) as usize % 2;
            let driver = if side == 0 {
                &device.both.direct
            } else {
                &device.both.hooked
            };
            let start = Instant::now();
            let pointer = allocate(driver, bytes);
            let took = start.elapsed().as_secs_f64() * 1e9;
            if let Ok(pointer) = pointer {
                pair[side] = json!(took);
                made.push((driver, pointer));
            }
        }
        for (driver, pointer) in made {
            free(driver, pointer);
        }
        times.push(pair);
    }
    println!("{}", json!(times));
    Ok(())
}
