//! One program per rule of the CUDA driver: it keeps the simulator honest, on a GPU and on the simulator alike.
//!
//! Runs without Spillway. Every case runs in a process of its own, so that a sticky error, a crash or a hang is
//! one failed case. Asserted is what is documented or generally known of drivers 12.x and later; where real
//! drivers may differ a case prints `observed: ...` and does not judge.
//!
//!     spillway-conformance list
//!     spillway-conformance run memory.alloc_of_zero_bytes_is_refused
//!     spillway-conformance all [--json FILE] [--only PART]... [--jobs N]
//!
//! `all` prints `NAME ok`, `NAME FAIL reason` or `NAME skipped reason` per case and ends with
//! `N passed, M failed, K skipped`; it exits with 1 if any failed, or if no case passed.

mod api;
mod cases;
mod gpu;
mod harness;
mod helpers;
mod runner;

use std::process::ExitCode;

const USAGE: &str =
    "usage: spillway-conformance list | run NAME | all [--json FILE] [--only PART]... [--jobs N]";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["list"] => {
            for case in cases::all() {
                println!("{}", case.full_name());
            }
            ExitCode::SUCCESS
        }
        ["run", name] => runner::run_one(name),
        ["helper", name, rest @ ..] => helpers::run(name, rest),
        ["all", options @ ..] => match runner::Options::parse(options) {
            Ok(options) => runner::run_all(&options),
            Err(text) => {
                eprintln!("spillway-conformance: {text}\n{USAGE}");
                ExitCode::from(2)
            }
        },
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
