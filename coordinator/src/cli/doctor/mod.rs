//! `spillway doctor`: a line per question, `ok`, `warn` or `FAIL`, each problem with its remedy.
//!
//! A check that cannot be made says so and is never counted as passed. Exit code 1 if anything
//! failed; warnings alone are 0.

mod node;
mod proc;
mod process;

use serde::Serialize;

use super::EXIT_FAILED;
use super::args::{DoctorArgs, Place};
use super::out::{Failure, clean, print};

/// How a question was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

/// One question's answer.
#[derive(Clone, Debug, Serialize)]
struct Check {
    level: Level,
    /// Which question: one word, the same in every release.
    check: &'static str,
    text: String,
    remedy: Option<String>,
}

/// All answers so far.
#[derive(Debug, Default)]
struct Report(Vec<Check>);

impl Report {
    fn ok(&mut self, check: &'static str, text: impl Into<String>) {
        self.add(Level::Ok, check, text.into(), None);
    }

    fn warn(&mut self, check: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.add(Level::Warn, check, text.into(), Some(remedy.into()));
    }

    fn fail(&mut self, check: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.add(Level::Fail, check, text.into(), Some(remedy.into()));
    }

    fn add(&mut self, level: Level, check: &'static str, text: String, remedy: Option<String>) {
        self.0.push(Check {
            level,
            check,
            text,
            remedy,
        });
    }

    fn good(&self) -> bool {
        self.0.iter().all(|check| check.level != Level::Fail)
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for check in &self.0 {
            let level = match check.level {
                Level::Ok => "ok  ",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            text.push_str(level);
            text.push_str("  ");
            text.push_str(&clean(&check.text));
            if let Some(remedy) = &check.remedy {
                text.push_str("  -> ");
                text.push_str(&clean(remedy));
            }
            text.push('\n');
        }
        text
    }

    fn json(&self) -> String {
        let value = serde_json::json!({ "ok": self.good(), "checks": self.0 });
        format!("{value}\n")
    }
}

/// Asks all questions, prints the answers; fails if any is bad.
pub fn run(place: &Place, args: &DoctorArgs) -> Result<(), Failure> {
    let mut report = Report::default();
    match args.pid {
        Some(pid) => process::examine(&mut report, place, pid),
        None => node::examine(&mut report, place),
    }
    print(&if args.json {
        report.json()
    } else {
        report.text()
    })?;
    if report.good() {
        Ok(())
    } else {
        Err(Failure::silent(EXIT_FAILED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_a_level_a_text_and_a_remedy() {
        let mut report = Report::default();
        report.ok("a", "fine");
        report.warn("b", "odd\x1b", "look");
        assert!(report.good());
        report.fail("c", "broken", "mend it");
        assert!(!report.good());
        assert_eq!(
            report.text(),
            "ok    fine\nwarn  odd?  -> look\nFAIL  broken  -> mend it\n"
        );
        let json: serde_json::Value = serde_json::from_str(&report.json()).expect("JSON");
        assert_eq!(json["ok"], false);
        assert_eq!(json["checks"][2]["level"], "fail");
        assert_eq!(json["checks"][2]["check"], "c");
    }
}
