//! What the environment says about this process. Read once, when CUDA is first used.
//!
//! A value that cannot be read is an error that names the variable and the value; it never becomes
//! "no limit".

use spillway_protocol::names;
use spillway_protocol::{Amount, parse_amount};

/// The settings of this process.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
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
}

/// One line that names the variable, the value and the remedy.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError(pub String);

/// How the environment is looked up: the real one, or a test's.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

fn amount(get: Lookup<'_>, name: &str) -> Result<Option<Amount>, ConfigError> {
    match get(name) {
        None => Ok(None),
        Some(text) => match parse_amount(&text) {
            Ok(amount) => Ok(Some(amount)),
            Err(why) => Err(ConfigError(format!("{name}: {why}"))),
        },
    }
}

/// Whole MiB, as Run:ai's variables have it.
fn whole_mib(get: Lookup<'_>, name: &str) -> Result<Option<Amount>, ConfigError> {
    let Some(text) = get(name) else {
        return Ok(None);
    };
    match text
        .trim()
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << 20))
    {
        Some(bytes) if bytes > 0 => Ok(Some(Amount::Bytes(bytes))),
        _ => Err(ConfigError(format!(
            "{name}={text:?}: write whole MiB, for example 24576"
        ))),
    }
}

impl Config {
    /// Reads the settings.
    ///
    /// # Errors
    /// A variable that is set cannot be read, or the request is more than the limit where both are
    /// absolute (shares are compared by the coordinator, which knows the device).
    pub fn read(get: Lookup<'_>) -> Result<Self, ConfigError> {
        let disabled = match get(names::ENV_DISABLE).as_deref() {
            None | Some("" | "0") => false,
            Some("1") => true,
            Some(other) => {
                return Err(ConfigError(format!(
                    "{}={other:?}: write 1 or 0",
                    names::ENV_DISABLE
                )));
            }
        };
        let mut request = amount(get, names::ENV_REQUEST)?;
        if request.is_none() {
            request = whole_mib(get, "NVIDIA_GPU_MEMORY_REQUEST")?;
        }
        let mut limit = amount(get, names::ENV_LIMIT)?;
        let mut device_limits = Vec::new();
        if limit.is_none() {
            limit = whole_mib(get, "NVIDIA_GPU_MEMORY_LIMIT")?;
        }
        if limit.is_none() {
            limit = amount(get, "CUDA_DEVICE_MEMORY_LIMIT")?;
            for device in 0..spillway_protocol::MAX_DEVICES {
                let name = format!("CUDA_DEVICE_MEMORY_LIMIT_{device}");
                if let Some(value) = amount(get, &name)? {
                    device_limits.push((device, value));
                }
            }
        }
        let ordered = match (request, limit) {
            (Some(Amount::Bytes(r)), Some(Amount::Bytes(l))) => r <= l,
            (Some(Amount::Fraction(r)), Some(Amount::Fraction(l))) => r <= l,
            _ => true,
        };
        if let (false, Some(r), Some(l)) = (ordered, request, limit) {
            return Err(ConfigError(format!(
                "{} ({r}) is more than {} ({l}): lower the request or raise the limit",
                names::ENV_REQUEST,
                names::ENV_LIMIT
            )));
        }
        let workload = get(names::ENV_WORKLOAD).unwrap_or_default();
        if !workload.is_empty() && !names::valid_workload_name(&workload) {
            return Err(ConfigError(format!(
                "{}={workload:?}: use 1 to 128 letters, digits and . _ - / :, starting with a letter or digit",
                names::ENV_WORKLOAD
            )));
        }
        let priority = match get(names::ENV_PRIORITY) {
            None => 0,
            Some(text) => text.trim().parse().map_err(|_| {
                ConfigError(format!(
                    "{}={text:?}: write an integer",
                    names::ENV_PRIORITY
                ))
            })?,
        };
        let swap = match get(names::ENV_SWAP).as_deref() {
            None | Some("" | "auto") => true,
            Some("never") => false,
            Some(other) => {
                return Err(ConfigError(format!(
                    "{}={other:?}: write auto or never",
                    names::ENV_SWAP
                )));
            }
        };
        let no_coordinator =
            get(names::ENV_NO_COORDINATOR).is_some_and(|v| !v.is_empty() && v != "0");
        Ok(Self {
            disabled,
            workload,
            request,
            limit,
            device_limits,
            priority,
            swap,
            no_coordinator,
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
        Some(spillway_protocol::granules_down(limit.of(total)).min(total))
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

    fn read(vars: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::read(&|name| {
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
            ("SPILLWAY_WORKLOAD", "two words"),
        ] {
            let ConfigError(text) = read(&[(name, value)]).unwrap_err();
            assert!(text.contains(name) && text.contains(value), "{text}");
        }
    }

    #[test]
    fn a_request_above_the_limit_is_refused() {
        assert!(read(&[("SPILLWAY_REQUEST", "2GiB"), ("SPILLWAY_LIMIT", "1GiB")]).is_err());
        assert!(read(&[("SPILLWAY_REQUEST", "50%"), ("SPILLWAY_LIMIT", "0.4")]).is_err());
    }
}
