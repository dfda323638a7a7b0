//! Faults by name and count: `SPILLWAY_SIM_FAULTS=name:count:action[,...]`.
//!
//! `name` is an exported symbol or its base name; `count` is `3` (the third call), `3+` (from the
//! third on) or `*`; `action` is `oom`, `error=N` (a CUresult), `delay=500ms` (then the call goes
//! on) or `kill` (SIGKILL of the process). Calls are counted per process and rule.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

enum Action {
    Error(u32),
    Delay(Duration),
    Kill,
}

struct Rule {
    name: String,
    first: u64,
    last: u64,
    action: Action,
    calls: AtomicU64,
}

/// The faults that were asked for.
pub struct Faults(Vec<Rule>);

fn rule(text: &str) -> Option<Rule> {
    let mut parts = text.trim().splitn(3, ':');
    let (name, count, action) = (parts.next()?, parts.next()?.trim(), parts.next()?.trim());
    let (first, last) = if count == "*" {
        (1, u64::MAX)
    } else if let Some(from) = count.strip_suffix('+') {
        (from.parse().ok()?, u64::MAX)
    } else {
        let n = count.parse().ok()?;
        (n, n)
    };
    let action = match action.split_once('=') {
        None if action == "oom" => Action::Error(crate::code::OUT_OF_MEMORY),
        None if action == "kill" => Action::Kill,
        Some(("error", code)) => Action::Error(code.parse().ok().filter(|c| *c != 0)?),
        Some(("delay", time)) => {
            let (number, scale) = match time.strip_suffix("us") {
                Some(number) => (number, 1e-6),
                None => match time.strip_suffix("ms") {
                    Some(number) => (number, 1e-3),
                    None => (time.strip_suffix('s')?, 1.0),
                },
            };
            Action::Delay(Duration::try_from_secs_f64(number.parse::<f64>().ok()? * scale).ok()?)
        }
        _ => return None,
    };
    Some(Rule {
        name: name.trim().to_owned(),
        first,
        last,
        action,
        calls: AtomicU64::new(0),
    })
}

/// The name without `_ptsz`, `_ptds` and version suffix.
#[must_use]
pub fn base(symbol: &str) -> &str {
    let plain = symbol
        .strip_suffix("_ptsz")
        .or_else(|| symbol.strip_suffix("_ptds"))
        .unwrap_or(symbol);
    match plain.rsplit_once("_v") {
        Some((base, digits))
            if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) =>
        {
            base
        }
        _ => plain,
    }
}

impl Faults {
    /// Reads the rules.
    ///
    /// # Errors
    /// The rule that cannot be read.
    pub fn parse(text: &str) -> Result<Self, String> {
        text.split(',')
            .filter(|t| !t.trim().is_empty())
            .map(|t| {
                rule(t)
                    .ok_or_else(|| format!("SPILLWAY_SIM_FAULTS: {t:?} is not name:count:action"))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// What the rules do to this call.
    ///
    /// # Errors
    /// The code that the call is to answer.
    pub fn strike(&self, symbol: &str) -> crate::code::R {
        for rule in &self.0 {
            if rule.name != symbol && rule.name != base(symbol) {
                continue;
            }
            let call = rule.calls.fetch_add(1, Ordering::Relaxed) + 1;
            if !(rule.first..=rule.last).contains(&call) {
                continue;
            }
            match rule.action {
                Action::Error(code) => return Err(code),
                Action::Delay(time) => std::thread::sleep(time),
                Action::Kill => {
                    // SAFETY: ends this process, as asked.
                    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::OUT_OF_MEMORY;

    #[test]
    fn the_third_call_fails() {
        let faults = Faults::parse("cuMemCreate:3:oom").unwrap();
        let answers: Vec<_> = (0..4).map(|_| faults.strike("cuMemCreate")).collect();
        assert_eq!(answers, [Ok(()), Ok(()), Err(OUT_OF_MEMORY), Ok(())]);
    }

    #[test]
    fn base_names_and_open_counts() {
        let faults = Faults::parse("cuMemcpyDtoHAsync:2+:error=700, cuX:*:delay=1us").unwrap();
        assert_eq!(faults.strike("cuMemcpyDtoHAsync_v2_ptsz"), Ok(()));
        assert_eq!(faults.strike("cuMemcpyDtoHAsync_v2"), Err(700));
        assert_eq!(faults.strike("cuMemcpyDtoH_v2"), Ok(()));
        assert_eq!(faults.strike("cuX"), Ok(()));
    }

    #[test]
    fn unreadable_rules_are_named() {
        assert!(Faults::parse("cuMemCreate:x:oom").is_err());
        assert!(Faults::parse("cuMemCreate:1:explode").is_err());
        assert!(Faults::parse("").is_ok());
    }
}
