//! What the environment says about a program: read by the library when the program first uses CUDA,
//! and by the command before it starts one. One set of rules for both.
//!
//! A value that cannot be read is a problem that names the variable and the value; it never becomes
//! "no limit".

use std::fmt;

use crate::names;
use crate::size::{Amount, parse_amount};

/// The settings of a program.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Pure pass-through.
    pub disabled: bool,
    /// Empty: the coordinator chooses.
    pub workload: String,
    /// `SPILLWAY_REQUEST` or its aliases.
    pub request: Option<Amount>,
    /// `SPILLWAY_LIMIT` or its aliases.
    pub limit: Option<Amount>,
    /// Limits of single devices, by ordinal, from `CUDA_DEVICE_MEMORY_LIMIT_<i>`.
    pub device_limits: Vec<(usize, Amount)>,
    /// Higher wins.
    pub priority: i32,
    /// Memory may move to the host.
    pub swap: bool,
    /// Do not look for a coordinator.
    pub no_coordinator: bool,
    /// Unknown driver entry points are refused.
    pub strict: bool,
}

/// What is wrong with a variable, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem(String);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Problem {}

/// How the environment is looked up: the real one, or a test's. What is not UTF-8 counts as not set.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Collects values and problems.
struct Reader<'a> {
    get: Lookup<'a>,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn problem(&mut self, text: String) {
        self.problems.push(Problem(text));
    }

    fn amount(&mut self, name: &str) -> Option<Amount> {
        let text = (self.get)(name)?;
        match parse_amount(&text) {
            Ok(amount) => Some(amount),
            Err(why) => {
                self.problem(format!("{name}: {why}"));
                None
            }
        }
    }

    /// Whole MiB, as Run:ai's variables have it.
    fn whole_mib(&mut self, name: &str) -> Option<Amount> {
        let text = (self.get)(name)?;
        let mib = text.trim().parse::<u64>().ok();
        match mib.and_then(|n| n.checked_mul(1 << 20)) {
            Some(bytes) if bytes > 0 => Some(Amount::Bytes(bytes)),
            _ => {
                self.problem(format!("{name}={text}: write whole MiB, for example 24576"));
                None
            }
        }
    }

    /// `1` or `0`; not set is `0`.
    fn switch(&mut self, name: &str) -> bool {
        match (self.get)(name).as_deref() {
            None | Some("" | "0") => false,
            Some("1") => true,
            Some(other) => {
                self.problem(format!("{name}={other}: write 1 or 0"));
                false
            }
        }
    }

    fn set(&self, name: &str) -> bool {
        (self.get)(name).is_some()
    }
}

impl Settings {
    /// Reads the settings.
    ///
    /// # Errors
    /// One problem for each variable that is set and cannot be read, or for a request above the limit
    /// where both are absolute or both are shares (mixed ones are compared by the coordinator, which
    /// knows the device).
    pub fn read(get: Lookup<'_>) -> Result<Self, Vec<Problem>> {
        let mut reader = Reader {
            get,
            problems: Vec::new(),
        };
        let disabled = reader.switch(names::ENV_DISABLE);
        let strict = reader.switch(names::ENV_STRICT);
        let mut request = reader.amount(names::ENV_REQUEST);
        if !reader.set(names::ENV_REQUEST) {
            request = reader.whole_mib("NVIDIA_GPU_MEMORY_REQUEST");
        }
        let mut limit = reader.amount(names::ENV_LIMIT);
        let mut device_limits = Vec::new();
        if !reader.set(names::ENV_LIMIT) {
            limit = reader.whole_mib("NVIDIA_GPU_MEMORY_LIMIT");
            if !reader.set("NVIDIA_GPU_MEMORY_LIMIT") {
                limit = reader.amount("CUDA_DEVICE_MEMORY_LIMIT");
                for device in 0..crate::MAX_DEVICES {
                    let name = format!("CUDA_DEVICE_MEMORY_LIMIT_{device}");
                    device_limits.extend(reader.amount(&name).map(|value| (device, value)));
                }
            }
        }
        let over = match (request, limit) {
            (Some(Amount::Bytes(r)), Some(Amount::Bytes(l))) => r > l,
            (Some(Amount::Fraction(r)), Some(Amount::Fraction(l))) => r > l,
            _ => false,
        };
        if let (true, Some(request), Some(limit)) = (over, request, limit) {
            let shown = |name, amount: Amount| get(name).unwrap_or_else(|| amount.to_string());
            reader.problem(format!(
                "{}={} is above {}={}: lower the request or raise the limit",
                names::ENV_REQUEST,
                shown(names::ENV_REQUEST, request),
                names::ENV_LIMIT,
                shown(names::ENV_LIMIT, limit),
            ));
        }
        let workload = get(names::ENV_WORKLOAD).unwrap_or_default();
        if !workload.is_empty() && !names::valid_workload_name(&workload) {
            reader.problem(format!(
                "{}={workload} is no workload name: 1 to {} letters, digits, or any of . _ - / : \
                 after the first",
                names::ENV_WORKLOAD,
                crate::MAX_NAME
            ));
        }
        let priority = match get(names::ENV_PRIORITY) {
            None => 0,
            Some(text) => text.trim().parse().unwrap_or_else(|_| {
                reader.problem(format!("{}={text}: write an integer", names::ENV_PRIORITY));
                0
            }),
        };
        let swap = match get(names::ENV_SWAP).as_deref() {
            None | Some("" | "auto") => true,
            Some("never") => false,
            Some(other) => {
                reader.problem(format!("{}={other}: write auto or never", names::ENV_SWAP));
                true
            }
        };
        let no_coordinator =
            get(names::ENV_NO_COORDINATOR).is_some_and(|v| !v.is_empty() && v != "0");
        if !reader.problems.is_empty() {
            return Err(reader.problems);
        }
        Ok(Self {
            disabled,
            workload,
            request,
            limit,
            device_limits,
            priority,
            swap,
            no_coordinator,
            strict,
        })
    }

    /// The limit on a device of `total` bytes, without a coordinator; `None`: no limit. Only a
    /// request means that it is the limit, too.
    #[must_use]
    pub fn limit_on(&self, device: usize, total: u64) -> Option<u64> {
        let own = self
            .device_limits
            .iter()
            .find(|(d, _)| *d == device)
            .map(|(_, l)| *l);
        let limit = own.or(self.limit).or(self.request)?;
        Some(crate::granules_down(limit.of(total)).min(total))
    }

    /// The limit to register: the coordinator keeps one for all devices, so limits of single
    /// devices count by the lowest.
    #[must_use]
    pub fn registered_limit(&self) -> Option<Amount> {
        let own = self.device_limits.iter().map(|(_, limit)| *limit);
        own.chain(self.limit)
            .min_by(|a, b| a.of(u64::MAX >> 12).cmp(&b.of(u64::MAX >> 12)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Settings, Vec<Problem>> {
        Settings::read(&|name| {
            vars.iter()
                .find(|(n, _)| *n == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn nothing_set_is_no_limit() {
        let config = read(&[]).unwrap();
        assert_eq!(
            (config.request, config.limit, config.swap),
            (None, None, true)
        );
        assert_eq!(config.limit_on(0, 1 << 30), None);
    }

    #[test]
    fn own_names_win_over_the_others() {
        let config = read(&[
            ("SPILLWAY_LIMIT", "2GiB"),
            ("NVIDIA_GPU_MEMORY_LIMIT", "1024"),
        ])
        .unwrap();
        assert_eq!(config.limit, Some(Amount::Bytes(2 << 30)));
        let config = read(&[("NVIDIA_GPU_MEMORY_LIMIT", "1024")]).unwrap();
        assert_eq!(config.limit, Some(Amount::Bytes(1 << 30)));
        let config = read(&[
            ("CUDA_DEVICE_MEMORY_LIMIT", "3g"),
            ("CUDA_DEVICE_MEMORY_LIMIT_1", "1g"),
        ])
        .unwrap();
        assert_eq!(config.limit_on(0, 8 << 30), Some(3 << 30));
        assert_eq!(config.limit_on(1, 8 << 30), Some(1 << 30));
    }

    #[test]
    fn every_bad_value_is_named() {
        for (name, value) in [
            ("SPILLWAY_REQUEST", "24"),
            ("SPILLWAY_LIMIT", "lots"),
            ("NVIDIA_GPU_MEMORY_REQUEST", "1GiB"),
            ("CUDA_DEVICE_MEMORY_LIMIT_3", "x"),
            ("SPILLWAY_PRIORITY", "high"),
            ("SPILLWAY_SWAP", "maybe"),
            ("SPILLWAY_DISABLE", "yes"),
            ("SPILLWAY_STRICT", "yes"),
            ("SPILLWAY_WORKLOAD", "two words"),
        ] {
            let problems = read(&[(name, value)]).unwrap_err();
            assert_eq!(problems.len(), 1, "{problems:?}");
            let text = problems[0].to_string();
            assert!(text.contains(name) && text.contains(value), "{text}");
        }
    }

    #[test]
    fn a_request_above_the_limit_is_refused() {
        assert!(read(&[("SPILLWAY_REQUEST", "2GiB"), ("SPILLWAY_LIMIT", "1GiB")]).is_err());
        assert!(read(&[("SPILLWAY_REQUEST", "50%"), ("SPILLWAY_LIMIT", "0.4")]).is_err());
    }
}
