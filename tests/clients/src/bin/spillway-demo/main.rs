//! What `scripts/demo` runs once a coordinator is there: three models that do not fit together, asked in turn.
//!
//!     spillway-demo probe --gpu-hold PROGRAM   what GPU is there, and what a context on it costs
//!     spillway-demo show ...                   the demo itself
//!
//! Every answer's checksum is compared with that of the weights file; a wrong byte, a moved allocation, an
//! answer that does not come, or a model that was never swapped fails the demo.

mod coordinator;
mod model;
mod probe;
mod report;
mod view;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};
use spillway_clients::sizes::{parse_bytes, show};
use spillway_clients::weights;

use coordinator::Coordinator;
use model::Model;
use view::View;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print {"name","total_bytes","overhead_bytes","simulated"} of device 0, or fail if there is none
    Probe {
        #[arg(long)]
        gpu_hold: PathBuf,
    },
    Show(Show),
}

#[derive(clap::Args)]
struct Show {
    /// The coordinator's api.sock
    #[arg(long)]
    api: PathBuf,
    /// The `spillway` command
    #[arg(long)]
    spillway: PathBuf,
    /// The model server
    #[arg(long)]
    server: PathBuf,
    /// A folder for weights, sockets and logs
    #[arg(long)]
    folder: PathBuf,
    #[arg(long, default_value_t = 3)]
    models: usize,
    /// Bytes of each model's weights
    #[arg(long, value_parser = parse_bytes, default_value = "1GiB")]
    weights: u64,
    /// Bytes of a request's KV cache
    #[arg(long, value_parser = parse_bytes, default_value = "64MiB")]
    kv: u64,
    /// Each model's request and limit
    #[arg(long, value_parser = parse_bytes, default_value = "512MiB")]
    request: u64,
    #[arg(long, value_parser = parse_bytes, default_value = "1536MiB")]
    limit: u64,
    /// How often each model has its turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// What the GPU is, for the headline
    #[arg(long, default_value = "a GPU")]
    device: String,
    /// End with one line of JSON
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Probe { gpu_hold } => probe::run(&gpu_hold),
        Command::Show(show) => run(&show),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(show_: &Show) -> anyhow::Result<()> {
    let begun = Instant::now();
    let coordinator = Coordinator::new(&show_.api);
    println!(
        "{} models of {} on {}; each may always have {} and at most {}",
        show_.models,
        show(show_.weights),
        show_.device,
        show(show_.request),
        show(show_.limit)
    );
    let names: Vec<String> = ('a'..='z')
        .take(show_.models)
        .map(|c| format!("model-{c}"))
        .collect();
    let view = View::start(coordinator.clone(), &names);
    let mut models = Vec::new();
    let made = make_weights(show_, &names);
    for name in &names {
        view.note(&format!("{name}: waiting for its weights to be made"));
        let (file, checksum) = made.recv().context("making weights ended early")??;
        view.note(&format!(
            "{name}: starting, loading {}",
            show(show_.weights)
        ));
        let mut model = Model::start(show_, name, &file, checksum)?;
        model.wait_ready(Duration::from_secs(90))?;
        models.push(model);
    }
    for round in 1..=show_.rounds {
        for model in &mut models {
            // The second request finds the model where the first brought it.
            for warm in [false, true] {
                view.note(&format!("round {round}: asking {}", model.name));
                let seconds = model.infer(warm)?;
                let how = if warm { "again" } else { "first answer" };
                view.note(&format!(
                    "round {round}: {} {how} after {seconds:.2} s, checksum right",
                    model.name
                ));
            }
        }
    }
    view.stop();
    let report = report::Report::collect(&coordinator, &models, show_, begun.elapsed())?;
    for model in &mut models {
        model.quit()?;
    }
    print!("{}", report.table());
    for one in &report.models {
        ensure!(
            one.swaps_out > 0 && one.swaps_in > 0,
            "{} was never swapped: {} out, {} in",
            one.name,
            one.swaps_out,
            one.swaps_in
        );
    }
    if show_.json {
        println!("{}", report.json());
    }
    Ok(())
}

/// Makes the files one after another on a thread of its own, so that the next is made while one is loaded.
fn make_weights(show_: &Show, names: &[String]) -> mpsc::Receiver<anyhow::Result<(PathBuf, u64)>> {
    let (done, made) = mpsc::channel();
    let (names, folder, bytes) = (names.to_vec(), show_.folder.clone(), show_.weights);
    std::thread::spawn(move || {
        for (number, name) in names.iter().enumerate() {
            let file = folder.join(format!("{name}.weights"));
            let written = weights::write(&file, bytes, number as u64 + 1);
            let written = written.with_context(|| format!("cannot write {}", file.display()));
            // Nobody listens any more when the demo has failed.
            if done.send(written.map(|checksum| (file, checksum))).is_err() {
                break;
            }
        }
    });
    made
}
