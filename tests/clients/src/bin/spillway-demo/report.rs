//! The table at the end, for people and for programs.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use spillway_clients::sizes::show;

use crate::Show;
use crate::coordinator::Coordinator;
use crate::model::Model;

pub struct One {
    pub name: String,
    pub requests: usize,
    pub swaps_out: u64,
    pub swaps_in: u64,
    bytes_out: u64,
    bytes_in: u64,
    rate_out: f64,
    rate_in: f64,
    median: f64,
    worst: f64,
    warm: f64,
    checksum: String,
}

pub struct Report {
    pub models: Vec<One>,
    device: String,
    elapsed: Duration,
}

/// The middle one, or the mean of the middle two; 0 of none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, middle) if n.is_multiple_of(2) => f64::midpoint(sorted[middle - 1], sorted[middle]),
        (_, middle) => sorted[middle],
    }
}

/// GB/s, 10^9 bytes; 0 where nothing was measured.
#[expect(clippy::cast_precision_loss, reason = "a rate to be read by people")]
fn rate(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        bytes as f64 / seconds / 1e9
    } else {
        0.0
    }
}

impl Report {
    pub fn collect(
        coordinator: &Coordinator,
        models: &[Model],
        show: &Show,
        elapsed: Duration,
    ) -> anyhow::Result<Report> {
        let workloads = coordinator.workloads()?;
        let mut all = Vec::new();
        for model in models {
            let found = workloads.iter().find(|(name, _)| *name == model.name);
            let (_, workload) =
                found.with_context(|| format!("the coordinator does not know {}", model.name))?;
            let (out, back) = coordinator.swap_seconds(&model.name)?;
            let worst = model
                .first_answers
                .iter()
                .chain(&model.warm_answers)
                .copied()
                .fold(0.0, f64::max);
            all.push(One {
                name: model.name.clone(),
                requests: model.first_answers.len() + model.warm_answers.len(),
                swaps_out: workload.swaps_out,
                swaps_in: workload.swaps_in,
                bytes_out: workload.bytes_out,
                bytes_in: workload.bytes_in,
                rate_out: rate(workload.bytes_out, out),
                rate_in: rate(workload.bytes_in, back),
                median: median(&model.first_answers),
                worst,
                warm: median(&model.warm_answers),
                checksum: model.checksum.clone(),
            });
        }
        Ok(Report {
            models: all,
            device: show.device.clone(),
            elapsed,
        })
    }

    pub fn table(&self) -> String {
        let mut out = String::from(
            "\n           requests   swapped out       swapped in        GB/s      first answer, seconds\n\
             model                 times     bytes   times     bytes   out   in    median  worst   again\n",
        );
        for m in &self.models {
            let _ = writeln!(
                out,
                "{:<10} {:>8} {:>7} {:>9} {:>7} {:>9} {:>5.1} {:>4.1} {:>9.2} {:>6.2} {:>7.2}",
                m.name,
                m.requests,
                m.swaps_out,
                show(m.bytes_out),
                m.swaps_in,
                show(m.bytes_in),
                m.rate_out,
                m.rate_in,
                m.median,
                m.worst,
                m.warm
            );
        }
        let _ = writeln!(
            out,
            "median: of requests that found the model on the host; again: of those right after. Checksums: all right."
        );
        if self.device.contains("simulated") {
            let _ = writeln!(
                out,
                "A simulated GPU shows that it works; its GB/s and seconds say nothing about a real one."
            );
        }
        out
    }

    pub fn json(&self) -> Value {
        let models: Vec<Value> = self
            .models
            .iter()
            .map(|m| {
                json!({
                    "name": m.name, "requests": m.requests, "swaps_out": m.swaps_out, "swaps_in": m.swaps_in,
                    "bytes_out": m.bytes_out, "bytes_in": m.bytes_in,
                    "gb_per_s_out": m.rate_out, "gb_per_s_in": m.rate_in,
                    "first_answer_median_seconds": m.median, "first_answer_worst_seconds": m.worst,
                    "warm_answer_median_seconds": m.warm, "checksum": m.checksum, "checksums_right": true,
                })
            })
            .collect();
        json!({
            "ok": true, "device": self.device, "seconds": self.elapsed.as_secs_f64(), "models": models,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert!(median(&[]).abs() < 1e-9);
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn nothing_measured_is_no_rate() {
        assert!(rate(1 << 30, 0.0).abs() < 1e-9);
        assert!((rate(2_000_000_000, 1.0) - 2.0).abs() < 1e-9);
    }
}
