//! The command line of `spillwayd`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use spillway_protocol::{Amount, parse_amount};

/// What to do with a process that does not drain while others wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnStuck {
    /// Say so in the events and in `status`.
    Report,
    /// End it.
    Kill,
}

/// What to do about an escape: a process that uses a GPU without Spillway, or a workload that passes
/// its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnEscape {
    /// Say so in the events, in `status` and in the metrics.
    Report,
    /// End the process, too.
    Kill,
}

/// The coordinator of one node: shares its GPUs' memory out among the processes that
/// `libspillway.so` connects to it.
#[derive(Clone, Debug, Parser)]
#[command(name = "spillwayd", version)]
pub struct Options {
    /// Directory of the sockets [default: /run/spillway, or $XDG_RUNTIME_DIR/spillway if not root]
    #[arg(long, env = "SPILLWAY_RUN_DIR")]
    pub run_dir: Option<PathBuf>,
    /// Share out this much of each device instead of all: 2GiB, 50%
    #[arg(long, value_parser = amount)]
    pub capacity: Option<Amount>,
    /// The part of the capacity that is never granted [default: 2GiB or 3%, whichever is less]
    #[arg(long, value_parser = amount_or_zero)]
    pub reserve: Option<Size>,
    /// A process without work for this long is idle
    #[arg(long, default_value = "200ms", value_parser = duration)]
    pub idle_after: Duration,
    /// How long an active borrower is safe from others who borrow
    #[arg(long, default_value = "2s", value_parser = duration)]
    pub turn: Duration,
    /// How long growth above the request waits for space before it is out of memory
    #[arg(long, default_value = "10s", value_parser = duration)]
    pub growth_wait: Duration,
    /// How long a process may take to become idle before its eviction is given up
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub drain_deadline: Duration,
    /// The sum of requests on a device may be this many times its room
    #[arg(long, default_value = "1.0", value_parser = factor)]
    pub oversubscription: f64,
    /// Host memory for what is swapped out [default: grows until 2GiB of the host stay free]
    #[arg(long, value_parser = bytes)]
    pub pool: Option<u64>,
    /// What to do with a process that does not become idle while others wait for its space
    #[arg(long, value_enum, default_value = "report")]
    pub on_stuck: OnStuck,
    /// What to do about a process that uses a GPU without Spillway, or passes its limit all the same
    #[arg(long, value_enum, default_value = "report")]
    pub on_escape: OnEscape,
    /// After a restart, wait this long for the processes that the last run knew
    #[arg(long, default_value = "2s", value_parser = duration)]
    pub adoption_window: Duration,
    /// A group whose members may use api.sock, too
    #[arg(long)]
    pub api_group: Option<String>,
    /// What to log on stderr: off, error, warn, info, debug
    #[arg(long, default_value = "info")]
    pub log: String,
    /// Serve a device that does not exist, of this size (may be repeated): for tests of the
    /// coordinator without a GPU
    #[arg(long, hide = true, value_parser = bytes)]
    pub fake_device: Vec<u64>,
}

/// An amount that may be zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// Nothing.
    Zero,
    /// That much.
    Some(Amount),
}

impl Size {
    /// Bytes on a device of `total` bytes.
    #[must_use]
    pub fn of(self, total: u64) -> u64 {
        match self {
            Size::Zero => 0,
            Size::Some(amount) => amount.of(total),
        }
    }
}

fn amount(text: &str) -> Result<Amount, String> {
    parse_amount(text).map_err(|error| error.to_string())
}

fn amount_or_zero(text: &str) -> Result<Size, String> {
    if text.trim() == "0" {
        return Ok(Size::Zero);
    }
    amount(text).map(Size::Some)
}

fn bytes(text: &str) -> Result<u64, String> {
    match amount(text)? {
        Amount::Bytes(bytes) => Ok(bytes),
        Amount::Fraction(_) => Err(format!("{text:?} is a share; write a size such as 8GiB")),
    }
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (1.0..=1000.0).contains(&value) => Ok(value),
        _ => Err(format!("{text:?} is no factor from 1.0 to 1000")),
    }
}

/// `200ms`, `2s`, `1.5s`, `5m`. A bare number is refused: seconds or milliseconds?
fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let split = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = (&text[..split], text[split..].trim());
    let scale = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        _ => return Err(format!("cannot read {text:?} as a time: write 200ms or 2s")),
    };
    number
        .parse::<f64>()
        .ok()
        .and_then(|value| Duration::try_from_secs_f64(value * scale).ok())
        .ok_or_else(|| format!("cannot read {text:?} as a time: write 200ms or 2s"))
}

/// The reserve where none was set: 2 GiB or 3 % of the capacity, whichever is less.
#[must_use]
pub fn default_reserve(capacity: u64) -> u64 {
    (2 << 30).min(capacity / 100 * 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_form_is_read() {
        let options = Options::try_parse_from([
            "spillwayd",
            "--run-dir=/tmp/x",
            "--capacity=2GiB",
            "--reserve=0",
            "--idle-after=150ms",
            "--turn=1.5s",
            "--oversubscription=2",
            "--pool=8GiB",
            "--on-stuck=kill",
            "--on-escape=kill",
        ])
        .expect("reads");
        assert_eq!(options.capacity, Some(Amount::Bytes(2 << 30)));
        assert_eq!(options.reserve, Some(Size::Zero));
        assert_eq!(options.idle_after, Duration::from_millis(150));
        assert_eq!(options.turn, Duration::from_millis(1500));
        assert_eq!(options.on_stuck, OnStuck::Kill);
        assert_eq!(options.on_escape, OnEscape::Kill);
    }

    #[test]
    fn what_could_be_misread_is_refused_with_the_remedy() {
        for (flag, remedy) in [
            ("--capacity=2", "2GiB or 2%"),
            ("--turn=2", "write 200ms or 2s"),
            ("--turn=fast", "write 200ms or 2s"),
            ("--oversubscription=0.5", "factor from 1.0"),
            ("--pool=50%", "write a size such as 8GiB"),
        ] {
            let error = Options::try_parse_from(["spillwayd", flag]).expect_err(flag);
            assert!(error.to_string().contains(remedy), "{flag}: {error}");
        }
    }
}
