//! Programs that try to get more device memory than their limit, one family each, and who watches them.
//!
//! | file | idea |
//! | --- | --- |
//! | `family/` | the adversaries: a file per family of ways to get memory |
//! | `stage` | what an adversary is given; cases, watched one by one |
//! | `child` | a second process of an adversary |
//! | `way` | what is tried with every way to get memory |
//! | `driver`, `types` | the driver's functions and structures |
//! | `witness` | a process outside Spillway that samples NVML |
//! | `run` | starts machines, coordinators, adversaries; collects rows |
//! | `report` | the verdicts, as a table or as JSON |
//!
//! **Promises.** What is judged is what NVML shows from outside, not what a program or the library counts.
//! Every row says how it was got: driver version and mode. What could not be tried says so by name.

#![allow(dead_code, reason = "families share a stage; not each uses all of it")]
#![allow(clippy::cast_possible_truncation, reason = "sizes on 64-bit machines")]

mod child;
mod driver;
mod family;
mod report;
mod run;
mod stage;
mod types;
mod way;
mod witness;

use clap::{Parser, Subcommand};

/// Tries to get more device memory than a limit allows, in every way there is.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs adversaries on simulated machines of their own and judges them.
    Run(run::Options),
    /// Names the families.
    List,
    /// Is one adversary; what `run` starts under Spillway.
    Family {
        name: String,
        /// There is no coordinator.
        #[arg(long)]
        alone: bool,
    },
    /// Is a second process of an adversary.
    #[command(hide = true)]
    Child {
        #[arg(trailing_var_arg = true)]
        arguments: Vec<String>,
    },
    /// Samples NVML; what `run` starts beside an adversary.
    Witness,
}

fn main() {
    let code = match Arguments::parse().command {
        Command::Run(options) => run::run(&options),
        Command::List => {
            for family in family::ALL {
                println!("{:<16} {}", family.name, family.what);
            }
            0
        }
        Command::Family { name, alone } => family::run(&name, alone),
        Command::Child { arguments } => child::run(&arguments),
        Command::Witness => match witness::run() {
            Ok(()) => 0,
            Err(why) => {
                eprintln!("adversaries: {why}");
                1
            }
        },
    };
    std::process::exit(code);
}
