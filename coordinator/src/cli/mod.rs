//! The `spillway` command: starts programs under Spillway, shows and moves workloads, and finds out
//! why something is not in force.
//!
//! A file per subcommand; [`out`] is how all of them print and fail. Nothing here needs the daemon's
//! code: what is known about workloads comes through `api.sock`.

mod args;
mod doctor;
mod events;
pub mod library;
mod out;
mod run;
mod rundir;
mod session;
mod settings;
mod status;
mod swap;
mod table;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

/// The daemon could not be asked, or it said no.
pub const EXIT_FAILED: u8 = 1;
/// The command line cannot be read (except below `spillway run`, which says [`EXIT_RUN`]).
pub const EXIT_USAGE: u8 = 2;
/// `spillway run` itself failed: a bad value, no library, no coordinator.
pub const EXIT_RUN: u8 = 125;
/// The program of `spillway run` cannot be executed.
pub const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The program of `spillway run` was not found.
pub const EXIT_NOT_FOUND: u8 = 127;

/// Runs the command of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let result = match &cli.command {
        Command::Run(args) => run::run(&cli.place, args),
        Command::Status(args) => status::run(&cli.place, args),
        Command::Evict(args) => swap::run(&cli.place, args, "evict"),
        Command::Restore(args) => swap::run(&cli.place, args, "restore"),
        Command::Events(args) => events::run(&cli.place, args),
        Command::Doctor(args) => doctor::run(&cli.place, args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn usage(error: &clap::Error) -> ExitCode {
    // Help and version are "errors" that go to stdout; whoever closed it has seen enough.
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    let mut words = std::env::args_os().skip(1).skip_while(|word| {
        let word = word.as_encoded_bytes();
        word.starts_with(b"-") && word != b"--run-dir"
    });
    let first = words.next();
    let subcommand = match first {
        Some(word) if word == "--run-dir" => words.nth(1),
        word => word,
    };
    let running = subcommand.is_some_and(|word| word == "run");
    ExitCode::from(if running { EXIT_RUN } else { EXIT_USAGE })
}
