//! Medians, quartiles, and how figures are printed.

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Map, Value, json};

/// Figures that were printed, and cases that were said to have none.
static PRINTED: AtomicUsize = AtomicUsize::new(0);
static SKIPPED: AtomicUsize = AtomicUsize::new(0);

/// How a bench program ends, which has `failed` cases: what was measured decides, so that nothing measured is no
/// success.
#[must_use]
pub fn end(program: &str, only: &[String], failed: anyhow::Result<i32>) -> ExitCode {
    match failed {
        Err(why) => eprintln!("{program}: {why:#}"),
        Ok(failed) if PRINTED.load(Ordering::Relaxed) > 0 => {
            return ExitCode::from(u8::from(failed > 0));
        }
        Ok(_) if SKIPPED.load(Ordering::Relaxed) > 0 => {
            eprintln!("{program}: nothing was measured; each case says why");
        }
        Ok(_) => {
            eprintln!(
                "{program}: nothing was measured: no case's name contains {}",
                only.join(" or ")
            );
            return ExitCode::from(2);
        }
    }
    ExitCode::FAILURE
}

/// A sample in short.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Half of the sample is below.
    pub median: f64,
    /// A quarter is below.
    pub low: f64,
    /// A quarter is above.
    pub high: f64,
}

impl Summary {
    /// Of a sample with at least one value.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        // Between two values of the sample: so the median of an even number is the mean of the middle two.
        let at = |part: usize| {
            let place = values.len().max(1) - 1;
            let (below, rest) = (place * part / 4, place * part % 4);
            let of = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
            match rest {
                0 => of(below),
                #[allow(clippy::cast_precision_loss)]
                rest => of(below) + (of(below + 1) - of(below)) * rest as f64 / 4.0,
            }
        };
        Self {
            median: at(2),
            low: at(1),
            high: at(3),
        }
    }
}

/// What is the same for all figures of a run.
#[derive(Clone)]
pub struct Report {
    /// `hooks`, `alloc`, `preload`
    pub bench: &'static str,
    /// One JSON object a line; else a table.
    pub json: bool,
    /// Before each case's name.
    pub prefix: String,
    /// In each object: the driver, the device.
    pub common: Map<String, Value>,
}

/// One figure and what explains it.
pub struct Figure<'a> {
    /// Of the case, without prefix.
    pub case: &'a str,
    /// What was measured.
    pub metric: &'a str,
    /// `ns`, `ratio`, `instructions` ...
    pub unit: &'a str,
    /// The figure itself.
    pub value: f64,
    /// What it is to be seen beside.
    pub baseline: Option<f64>,
    /// Its quartiles.
    pub quartiles: Option<(f64, f64)>,
    /// More that explains it.
    pub more: Value,
}

impl Report {
    /// Prints a figure.
    #[allow(clippy::print_stdout)]
    pub fn print(&self, figure: &Figure) {
        PRINTED.fetch_add(1, Ordering::Relaxed);
        let case = format!("{}{}", self.prefix, figure.case);
        if !self.json {
            let spread = figure.quartiles.map_or(String::new(), |(low, high)| {
                format!(" ({} to {})", short(low), short(high))
            });
            let baseline = figure
                .baseline
                .map_or(String::new(), |value| format!(", beside {}", short(value)));
            println!(
                "{case:<24} {:<22} {} {}{spread}{baseline}",
                figure.metric,
                short(figure.value),
                figure.unit
            );
            return;
        }
        let mut line = Map::new();
        line.insert("bench".into(), json!(self.bench));
        line.insert("case".into(), json!(case));
        line.insert("metric".into(), json!(figure.metric));
        line.insert("value".into(), number(figure.value));
        line.insert("unit".into(), json!(figure.unit));
        if let Some(baseline) = figure.baseline {
            line.insert("baseline".into(), number(baseline));
        }
        if let Some((low, high)) = figure.quartiles {
            line.insert("spread".into(), number(high - low));
            line.insert("quartiles".into(), json!([number(low), number(high)]));
        }
        if let Value::Object(more) = &figure.more {
            line.extend(more.clone());
        }
        line.extend(self.common.clone());
        println!("{}", Value::Object(line));
    }

    /// Says why a case has failed, or that it could not be measured now; `true`: it failed.
    #[must_use]
    pub fn failed(&self, case: &str, why: &anyhow::Error) -> bool {
        let busy = why.is::<crate::rounds::Busy>();
        self.skipped(
            case,
            &format!("{}{why:#}", if busy { "" } else { "failed: " }),
        );
        !busy
    }

    /// Says why a case has no figure.
    #[allow(clippy::print_stdout)]
    pub fn skipped(&self, case: &str, why: &str) {
        SKIPPED.fetch_add(1, Ordering::Relaxed);
        if self.json {
            let case = format!("{}{case}", self.prefix);
            println!(
                "{}",
                json!({ "bench": self.bench, "case": case, "skipped": why })
            );
        } else {
            println!("{:<24} skipped: {why}", format!("{}{case}", self.prefix));
        }
    }
}

/// Four figures are enough for everything here.
fn number(value: f64) -> Value {
    if !value.is_finite() {
        return Value::Null;
    }
    let digits = if value.abs() < 100.0 { 1e3 } else { 10.0 };
    json!((value * digits).round() / digits)
}

fn short(value: f64) -> String {
    if value.abs() < 10.0 {
        format!("{value:.2}")
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::Summary;

    #[test]
    fn quartiles_are_of_the_sorted_sample() {
        let sample = (0..101).rev().map(f64::from).collect();
        assert_eq!(
            Summary::of(sample),
            Summary {
                median: 50.0,
                low: 25.0,
                high: 75.0
            }
        );
        assert_eq!(Summary::of(vec![7.0]).median, 7.0);
        let even = Summary::of(vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!((even.low, even.median, even.high), (1.75, 2.5, 3.25));
    }
}
