//! Makes a weights file: `make-weights FILE SIZE SEED`. The same arguments make the same file.
//!
//! Prints `{"file","bytes","tensors","checksum"}`; the checksum is what a model server answers for these weights.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use spillway_clients::{sizes, weights};

#[derive(Parser)]
struct Args {
    /// The file to make or overwrite
    file: PathBuf,
    /// Its size, such as 1GiB: a multiple of 4 bytes
    #[arg(value_parser = sizes::parse_bytes)]
    size: u64,
    /// Which contents
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    anyhow::ensure!(args.size % 4 == 0, "SIZE must be a multiple of 4 bytes");
    let checksum = weights::write(&args.file, args.size, args.seed)
        .with_context(|| format!("cannot write {}", args.file.display()))?;
    let tensors = weights::tensors(args.size).len();
    println!(
        "{}",
        serde_json::json!({
            "file": args.file, "bytes": args.size, "tensors": tensors, "checksum": format!("{checksum:016x}"),
        })
    );
    Ok(())
}
