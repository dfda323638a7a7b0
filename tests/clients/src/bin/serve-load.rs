//! Clients of a model server: so many at a time, each asks again as soon as it is answered.
//!
//!     serve-load --connect SOCKET --concurrency 64 [--passes 4] [--steps 4]
//!
//! Every client asks `--passes` times. The first time of each is not counted: the queue builds up in it. Prints one
//! line of JSON: `throughput` (requests per second), `p50`, `p99`, `first_p50`, `first_p99` (seconds, as the client
//! sees the whole answer and as the server says of the first), `batch_max`, `requests`, `wall` (seconds from the
//! first question to the last answer, all passes), `failures`, `error`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use clap::Parser;
use serde_json::{Value, json};

#[derive(Parser)]
struct Args {
    /// The server's unix socket
    #[arg(long)]
    connect: PathBuf,
    /// How many clients
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,
    /// How often each asks, the first not counted
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..))]
    passes: u32,
    /// Steps of each request
    #[arg(long, default_value_t = 4)]
    steps: u32,
}

/// One answered request.
struct Answered {
    at: Instant,
    took: f64,
    first: f64,
    batch: u64,
}

/// Every client's answers, in order.
type Answers = Vec<Answered>;

fn client(args: &Args, start: &Barrier) -> anyhow::Result<Answers> {
    let connected = UnixStream::connect(&args.connect)
        .with_context(|| format!("cannot connect to {}", args.connect.display()));
    start.wait();
    let connection = connected?;
    connection.set_read_timeout(Some(Duration::from_secs(120)))?;
    let mut lines = BufReader::new(&connection).lines();
    let question = format!("{}\n", json!({"op": "generate", "steps": args.steps}));
    let mut answers = Vec::new();
    for _ in 0..args.passes {
        let asked = Instant::now();
        (&connection).write_all(question.as_bytes())?;
        let line = lines.next().context("the server is gone")??;
        let at = Instant::now();
        let answer: Value = serde_json::from_str(&line)?;
        if answer["ok"] != true {
            return Err(anyhow!("{line}"));
        }
        answers.push(Answered {
            at,
            took: at.duration_since(asked).as_secs_f64(),
            first: answer["first_seconds"].as_f64().unwrap_or(f64::NAN),
            batch: answer["batch"].as_u64().unwrap_or(0),
        });
    }
    Ok(answers)
}

/// The value below which a share of the sorted sample is; the higher neighbour where it falls between two.
fn percentile(sorted: &[f64], per_cent: usize) -> Option<f64> {
    sorted
        .get((sorted.len() * per_cent).div_ceil(100).max(1) - 1)
        .copied()
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Over all answers but each client's first. A client's rate is counted from the end of its first answer to the end
/// of its last, and the rates are added: batches that end together are never counted in part, as in one window for
/// all.
fn report(clients: &[Answers]) -> Value {
    #[expect(clippy::cast_precision_loss, reason = "few")]
    let rate = |answers: &Answers| -> Option<f64> {
        let (first, last) = (answers.first()?, answers.last()?);
        Some((answers.len() - 1) as f64 / last.at.duration_since(first.at).as_secs_f64())
    };
    let counted: Vec<&Answered> = clients.iter().flat_map(|one| one.iter().skip(1)).collect();
    let took = sorted(counted.iter().map(|one| one.took));
    let first = sorted(counted.iter().map(|one| one.first));
    let all = || clients.iter().flatten();
    let end = all().map(|one| one.at).max();
    let begin = all()
        .map(|one| one.at - Duration::from_secs_f64(one.took))
        .min();
    json!({
        "requests": counted.len(), "throughput": clients.iter().filter_map(rate).sum::<f64>(),
        "p50": percentile(&took, 50), "p99": percentile(&took, 99),
        "first_p50": percentile(&first, 50), "first_p99": percentile(&first, 99),
        "batch_max": all().map(|one| one.batch).max(),
        "wall": end.zip(begin).map(|(end, begin)| end.duration_since(begin).as_secs_f64()),
    })
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let clients = usize::try_from(args.concurrency)?;
    let start = Arc::new(Barrier::new(clients));
    let results: Vec<anyhow::Result<Answers>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients)
            .map(|_| {
                let (args, start) = (&args, start.clone());
                // There may be hundreds, and none needs much.
                std::thread::Builder::new()
                    .stack_size(256 << 10)
                    .spawn_scoped(scope, move || client(args, &start))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| match thread {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a client panicked"))),
                Err(why) => Err(why.into()),
            })
            .collect()
    });
    let failures: Vec<String> = results
        .iter()
        .filter_map(|result| result.as_ref().err().map(|why| format!("{why:#}")))
        .collect();
    let clients: Vec<Answers> = results.into_iter().flatten().collect();
    let mut line = report(&clients);
    line["failures"] = json!(failures.len());
    line["error"] = json!(failures.first());
    println!("{line}");
    std::process::exit(i32::from(!failures.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_of_the_sample() {
        let sample = sorted((1..=200).rev().map(f64::from));
        assert_eq!(percentile(&sample, 50), Some(100.0));
        assert_eq!(percentile(&sample, 99), Some(198.0));
        assert_eq!(percentile(&[7.0], 50), Some(7.0));
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn throughput_is_that_of_whole_batches() {
        // Four clients, two in each batch of 100 ms: each is answered every 200 ms.
        let begin = Instant::now();
        let client = |offset: u64| -> Answers {
            (1..=5)
                .map(|pass| Answered {
                    at: begin + Duration::from_millis(200 * pass - offset),
                    took: 0.2,
                    first: 0.15,
                    batch: 2,
                })
                .collect()
        };
        let report = report(&[client(0), client(0), client(100), client(100)]);
        assert_eq!(report["requests"], 16);
        let throughput = report["throughput"].as_f64().expect("a number");
        assert!((throughput - 20.0).abs() < 1e-6, "{throughput}");
        let wall = report["wall"].as_f64().expect("a number");
        assert!((wall - 1.1).abs() < 1e-6, "{wall}");
    }
}
