//! Rows and verdicts.

use std::fmt::Write;

use serde_json::{Value, json};

/// One case of one adversary on one driver in one mode.
#[derive(Clone, Debug)]
pub struct Row {
    pub family: String,
    pub case: String,
    pub driver: String,
    pub mode: String,
    /// What all processes together may have.
    pub limit: u64,
    /// The most that NVML showed.
    pub reached: u64,
    pub over: u64,
    /// What the adversary says that it held.
    pub held: u64,
    pub refused: Vec<String>,
    pub wrong: Vec<String>,
    pub leak: Vec<String>,
    pub broken: Option<String>,
    pub skipped: Option<String>,
}

impl Row {
    /// Nothing to complain of; what was skipped is neither.
    pub fn is_bad(&self) -> bool {
        self.skipped.is_none() && self.verdict() != "ok"
    }

    /// `ok`, `skipped`, or what is wrong.
    pub fn verdict(&self) -> String {
        if self.skipped.is_some() {
            return "skipped".to_owned();
        }
        let faults = [
            ("OVER", self.over > 0),
            ("REFUSED", !self.refused.is_empty()),
            ("CODE", !self.wrong.is_empty()),
            ("LEAK", !self.leak.is_empty()),
            ("BROKEN", self.broken.is_some()),
        ];
        let found: Vec<&str> = faults.iter().filter(|f| f.1).map(|f| f.0).collect();
        if found.is_empty() {
            "ok".to_owned()
        } else {
            found.join("+")
        }
    }

    /// The words that go with the verdict.
    pub fn why(&self) -> String {
        let mut words: Vec<&str> = Vec::new();
        words.extend(self.skipped.as_deref());
        words.extend(self.broken.as_deref());
        for list in [&self.refused, &self.wrong, &self.leak] {
            words.extend(list.iter().map(String::as_str));
        }
        words.join("; ")
    }

    /// All of it.
    pub fn json(&self) -> Value {
        json!({
            "family": self.family, "case": self.case, "driver": self.driver, "mode": self.mode,
            "limit": self.limit, "reached": self.reached, "over": self.over, "held": self.held,
            "verdict": self.verdict(), "why": self.why(),
        })
    }

    /// How bad: first bytes over, then other faults.
    fn rank(&self) -> (bool, u64, bool, u64) {
        (
            self.skipped.is_none(),
            self.over,
            self.is_bad(),
            self.reached,
        )
    }
}

/// The worst row of every family, in the order of their first rows.
pub fn worst(rows: &[Row]) -> Vec<(&Row, Vec<&Row>)> {
    let mut families: Vec<&str> = rows.iter().map(|row| row.family.as_str()).collect();
    families.dedup();
    let mut seen = Vec::new();
    families.retain(|name| {
        let new = !seen.contains(name);
        seen.push(*name);
        new
    });
    let of = |name: &str| -> Vec<&Row> { rows.iter().filter(|row| row.family == name).collect() };
    families
        .into_iter()
        .filter_map(|name| {
            let all = of(name);
            let worst = all.iter().copied().max_by_key(|row| row.rank())?;
            Some((worst, all))
        })
        .collect()
}

/// One figure per family.
pub fn figures(rows: &[Row]) -> Vec<Value> {
    let figure = |(worst, all): (&Row, Vec<&Row>)| {
        let line = |row: &&Row| {
            format!(
                "{} [{}, {}]: {} {}",
                row.case,
                row.driver,
                row.mode,
                row.verdict(),
                row.why()
            )
        };
        let bad: Vec<String> = all.iter().filter(|row| row.is_bad()).map(line).collect();
        let skipped: Vec<String> = all
            .iter()
            .filter(|row| row.skipped.is_some())
            .map(line)
            .collect();
        let tried = all.len() - skipped.len();
        let mut verdicts: Vec<String> = all
            .iter()
            .filter(|row| row.is_bad())
            .flat_map(|row| {
                row.verdict()
                    .split('+')
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect();
        verdicts.sort();
        verdicts.dedup();
        let verdict = match (tried, verdicts.is_empty()) {
            (0, _) => "skipped".to_owned(),
            (_, true) => "ok".to_owned(),
            _ => verdicts.join("+"),
        };
        json!({
            "bench": "escape", "case": worst.family, "metric": "bytes_over", "value": worst.over, "unit": "B",
            "limit": worst.limit, "reached": worst.reached, "driver": worst.driver, "mode": worst.mode,
            "worst": worst.case, "verdict": verdict, "tried": tried, "bad": bad, "skipped": skipped,
        })
    };
    worst(rows).into_iter().map(figure).collect()
}

fn mib(bytes: u64) -> String {
    let tenths = bytes * 10 / (1 << 20);
    if tenths.is_multiple_of(10) {
        format!("{} MiB", tenths / 10)
    } else {
        format!("{}.{} MiB", tenths / 10, tenths % 10)
    }
}

/// A table: the worst row of every family and driver, and what is wrong, case by case.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<18} {:<7} {:>10} {:>10} {:>10}  {:<16} worst case",
        "family", "driver", "limit", "reached", "over", "verdict"
    );
    for (_, all) in worst(rows) {
        let mut drivers: Vec<&str> = all.iter().map(|row| row.driver.as_str()).collect();
        drivers.dedup();
        for driver in drivers {
            let of: Vec<Row> = all
                .iter()
                .filter(|row| row.driver == driver)
                .map(|row| (*row).clone())
                .collect();
            let figure = figures(&of).remove(0);
            let Some((row, _)) = worst(&of).pop() else {
                continue;
            };
            let verdict = figure["verdict"].as_str().unwrap_or_default();
            let more = if verdict == "skipped" {
                row.why()
            } else {
                format!("{} ({})", row.case, row.mode)
            };
            let _ = writeln!(
                text,
                "{:<18} {:<7} {:>10} {:>10} {:>10}  {:<16} {}",
                row.family,
                row.driver,
                mib(row.limit),
                mib(row.reached),
                mib(row.over),
                verdict,
                more
            );
        }
    }
    for row in rows.iter().filter(|row| row.is_bad()) {
        let _ = writeln!(
            text,
            "{} {} [{}, {}]: {} {}",
            row.family,
            row.case,
            row.driver,
            row.mode,
            row.verdict(),
            if row.over > 0 {
                format!("by {} {}", mib(row.over), row.why())
            } else {
                row.why()
            }
        );
    }
    let skipped: Vec<&Row> = rows.iter().filter(|row| row.skipped.is_some()).collect();
    let mut said: Vec<String> = Vec::new();
    for row in skipped {
        let line = format!(
            "skipped: {} {} [{}]: {}",
            row.family,
            row.case,
            row.driver,
            row.why()
        );
        if !said.contains(&line) {
            let _ = writeln!(text, "{line}");
            said.push(line);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(family: &str, over: u64) -> Row {
        Row {
            family: family.to_owned(),
            case: "plain".to_owned(),
            driver: "12.8".to_owned(),
            mode: "auto".to_owned(),
            limit: 100,
            reached: 100 + over,
            over,
            held: 100,
            refused: Vec::new(),
            wrong: Vec::new(),
            leak: Vec::new(),
            broken: None,
            skipped: None,
        }
    }

    #[test]
    fn a_family_is_as_good_as_its_worst_row() {
        let mut refused = row("a", 0);
        refused.refused.push("x".to_owned());
        let mut skipped = row("b", 0);
        skipped.skipped = Some("not there".to_owned());
        let rows = [row("a", 0), row("a", 7), refused, skipped, row("c", 0)];
        let figures = figures(&rows);
        let short: Vec<(&str, u64, &str)> = figures
            .iter()
            .map(|f| {
                (
                    f["case"].as_str().expect("a name"),
                    f["value"].as_u64().expect("a figure"),
                    f["verdict"].as_str().expect("a verdict"),
                )
            })
            .collect();
        assert_eq!(
            short,
            [
                ("a", 7, "OVER+REFUSED"),
                ("b", 0, "skipped"),
                ("c", 0, "ok")
            ]
        );
    }

    #[test]
    fn what_was_skipped_is_not_bad_and_not_ok() {
        let mut one = row("a", 0);
        one.skipped = Some("why".to_owned());
        assert!(!one.is_bad());
        assert_eq!(one.verdict(), "skipped");
        assert!(table(&[one]).contains("why"));
    }
}
