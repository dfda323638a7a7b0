//! Asks the coordinator over `api.sock` what a person would ask with curl.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

#[derive(Clone)]
pub struct Coordinator {
    socket: PathBuf,
}

/// One workload, as the demo shows it.
#[derive(Clone, Debug, Default)]
pub struct Workload {
    pub state: String,
    pub used: u64,
    pub resident: u64,
    pub swaps_out: u64,
    pub swaps_in: u64,
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub waiting_for: Option<String>,
    pub not_swappable: Option<String>,
}

impl Coordinator {
    pub fn new(socket: &Path) -> Coordinator {
        Coordinator {
            socket: socket.to_owned(),
        }
    }

    fn get(&self, path: &str) -> anyhow::Result<String> {
        let mut stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("cannot reach {}", self.socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: spillway\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .with_context(|| format!("no answer to GET {path}"))?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .context("the answer has no end of its head")?;
        let status = head.lines().next().unwrap_or_default();
        if status.split_whitespace().nth(1) != Some("200") {
            bail!("GET {path}: {status}");
        }
        Ok(body.to_string())
    }

    /// A workload, or none if there is none of that name (yet, or any more).
    pub fn workloads(&self) -> anyhow::Result<Vec<(String, Workload)>> {
        let answer: Value = serde_json::from_str(&self.get("/v1/workloads")?)
            .context("/v1/workloads is no JSON")?;
        let list = answer
            .get("workloads")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        Ok(list
            .iter()
            .map(|w| (text(w, "name").unwrap_or_default(), workload(w)))
            .collect())
    }

    /// Seconds spent swapping (out, in) per workload, by the sums of the histograms in `/metrics`.
    pub fn swap_seconds(&self, name: &str) -> anyhow::Result<(f64, f64)> {
        let metrics = self.get("/metrics")?;
        let sum = |direction: &str| -> f64 {
            metrics
                .lines()
                .filter(|line| line.starts_with("spillway_swap_seconds_sum{"))
                .filter(|line| line.contains(&format!("workload=\"{name}\"")))
                .filter(|line| line.contains(&format!("direction=\"{direction}\"")))
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum()
        };
        Ok((sum("out"), sum("in")))
    }
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key).and_then(Value::as_str).map(str::to_string)
}

fn workload(value: &Value) -> Workload {
    let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
    let devices = value
        .get("devices")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    let resident = devices
        .iter()
        .filter_map(|d| d.get("resident_bytes").and_then(Value::as_u64))
        .sum();
    Workload {
        state: text(value, "state").unwrap_or_default(),
        used: number("used_bytes"),
        resident,
        swaps_out: number("swaps_out"),
        swaps_in: number("swaps_in"),
        bytes_out: number("bytes_out"),
        bytes_in: number("bytes_in"),
        waiting_for: text(value, "waiting_for"),
        not_swappable: text(value, "not_swappable"),
    }
}
