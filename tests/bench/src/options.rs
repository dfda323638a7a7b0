//! What the bench programs understand on the command line.

use std::time::Duration;

use clap::Args;

/// Options of all bench programs.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// One JSON object per figure and line, instead of a table.
    #[arg(long)]
    pub json: bool,
    /// Seconds that a case may take.
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = seconds)]
    pub budget: f64,
    /// Before each case's name.
    #[arg(long, default_value = "")]
    pub prefix: String,
    /// Only cases whose name contains one of these.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub only: Vec<String>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("a number of seconds above 0".to_owned()),
    }
}

impl Options {
    /// Time for a case.
    #[must_use]
    pub fn budget(&self) -> Duration {
        Duration::from_secs_f64(self.budget.clamp(0.001, 600.0))
    }

    /// Whether a case is wanted.
    #[must_use]
    pub fn wants(&self, case: &str) -> bool {
        self.only.iter().all(String::is_empty)
            || self.only.iter().any(|name| case.contains(name.as_str()))
    }
}
