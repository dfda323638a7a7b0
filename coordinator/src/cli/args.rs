//! The command line: one structure per subcommand, whose comments are its help.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

const EXIT_CODES: &str = "\
Exit codes:
    0  done (doctor: nothing is wrong)
    1  failed; the text says why (doctor: something is wrong)
    2  the command line cannot be read
  125  spillway run: bad value, no library, no coordinator; nothing was started
  126  spillway run: the program cannot be executed
  127  spillway run: the program was not found
       otherwise spillway run gives the program's own exit code";

/// Shares GPUs between programs: quotas, and swapping of whole workloads to host memory.
#[derive(Debug, Parser)]
#[command(name = "spillway", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub place: Place,
    #[command(subcommand)]
    pub command: Command,
}

/// Where the daemon is.
#[derive(Debug, Args)]
pub struct Place {
    /// Run directory of spillwayd [default: $SPILLWAY_RUN_DIR, else $XDG_RUNTIME_DIR/spillway if
    /// there is one, else /run/spillway]
    #[arg(long, global = true, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a program under Spillway
    #[command(after_help = EXIT_CODES)]
    Run(RunArgs),
    /// Show devices, the host pool and the workloads
    Status(StatusArgs),
    /// Move a workload's memory to the host; its next submitted work brings it back
    Evict(SwapArgs),
    /// Bring a workload's memory back to the device
    Restore(SwapArgs),
    /// Show what happened, and what happens
    Events(EventsArgs),
    /// Find out whether Spillway is in force on this node, or for one process, and if not why
    Doctor(DoctorArgs),
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Guaranteed device memory: 24GiB, 512MiB, 24GB, 40%, 0.4 [env: SPILLWAY_REQUEST; default: the
    /// limit]
    #[arg(long, value_name = "AMOUNT")]
    pub request: Option<String>,
    /// Most device memory, same forms [env: SPILLWAY_LIMIT; default: the request]
    #[arg(long, value_name = "AMOUNT")]
    pub limit: Option<String>,
    /// Name of the workload; programs with one name share one quota [env: SPILLWAY_WORKLOAD;
    /// default: the program's name and a short id]
    #[arg(long, value_name = "NAME")]
    pub workload: Option<String>,
    /// Higher wins [env: SPILLWAY_PRIORITY; default: 0]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub priority: Option<String>,
    /// Whether its memory may be moved to the host [env: SPILLWAY_SWAP; default: auto]
    #[arg(long, value_enum)]
    pub swap: Option<Swap>,
    /// Go without spillwayd: the limit holds for each process alone, and nothing is swapped
    #[arg(long)]
    pub no_coordinator: bool,
    /// Stand in the driver's place: also plugins opened with RTLD_DEEPBIND are under the limit, and
    /// driver entry points that this version does not know are refused [env: SPILLWAY_STRICT=1]
    #[arg(long)]
    pub strict: bool,
    /// The libspillway.so to load; with --strict, the libspillway_strict.so, or the one beside it
    /// [env: SPILLWAY_LIBRARY; default: the one installed with this command]
    #[arg(long, value_name = "PATH")]
    pub library: Option<PathBuf>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "PROGRAM")]
    pub program: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Swap {
    /// When it is idle and others want the space
    Auto,
    /// Never: all of its limit is reserved
    Never,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Only this workload, with its devices and processes
    pub name: Option<String>,
    /// The coordinator's own JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SwapArgs {
    /// The workload
    pub name: String,
    /// How long to wait until it is done, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub timeout: f64,
    /// The coordinator's own JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// End after the events that the coordinator has kept
    #[arg(long)]
    pub no_follow: bool,
    /// The coordinator's own JSON, an object per line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Look into this process; without it, at the node
    pub pid: Option<i32>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}
