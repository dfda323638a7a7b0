//! Finds out what GPU is there and what a context with the kernels loaded takes of it.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, ensure};

/// A `gpu-hold` that is told what to do.
struct Holder {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Holder {
    fn start(program: &Path) -> anyhow::Result<Holder> {
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let input = child.stdin.take().context("no pipe")?;
        let output = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut holder = Holder {
            child,
            input,
            output,
        };
        ensure!(
            holder.line()?.starts_with("held "),
            "there is no CUDA driver, or no device"
        );
        // The first launch loads what is loaded lazily.
        ensure!(
            holder.ask("alloc 2MiB")? == "ok" && holder.ask("launch")?.starts_with("ok"),
            "cannot launch"
        );
        Ok(holder)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim().to_string())
    }

    fn ask(&mut self, what: &str) -> anyhow::Result<String> {
        writeln!(self.input, "{what}")?;
        self.line()
    }

    /// (free, total)
    fn info(&mut self) -> anyhow::Result<(u64, u64)> {
        let line = self.ask("info")?;
        let mut numbers = line.split_whitespace().filter_map(|w| w.parse().ok());
        Ok((
            numbers.next().context("no figure")?,
            numbers.next().context("no figure")?,
        ))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn run(gpu_hold: &Path) -> anyhow::Result<()> {
    let mut first = Holder::start(gpu_hold)?;
    let name = first.ask("name")?;
    let (before, total) = first.info()?;
    let _second = Holder::start(gpu_hold)?;
    let (after, _) = first.info()?;
    let overhead = before.saturating_sub(after).saturating_sub(2 << 20);
    println!(
        "{}",
        serde_json::json!({
            "name": name, "total_bytes": total, "overhead_bytes": overhead,
            "simulated": name.contains("Simulated"),
        })
    );
    Ok(())
}
