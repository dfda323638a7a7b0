//! What the environment asks for: sizes, speeds and costs of the simulated machine.
//!
//! Read once, by the process that creates the shared state; every later process takes the values
//! from there, so that all see the same machine. A value that cannot be read is an error that
//! names the variable.

use crate::release::{self, Release};
use std::path::PathBuf;

/// One physical page of device memory, the granularity of the VMM calls.
pub const FRAME: u64 = 2 << 20;
/// Most GPUs one simulated machine can have.
pub const GPUS_MAX: usize = 16;

/// The simulated machine, fixed when its shared state is created.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub gpus: u32,
    /// Bytes per GPU, a multiple of [`FRAME`].
    pub memory: u64,
    /// As `cuDriverGetVersion` reports it: 12080 is 12.8.
    pub driver: u32,
    /// Bytes that a context takes on its device.
    pub context: u64,
    /// Bytes that a loaded module takes on its device.
    pub module: u64,
    /// How long a released frame stays unavailable to other processes.
    pub release_delay_us: u64,
    /// How long after a process died its memory is still counted as used.
    pub death_delay_us: u64,
    /// Bytes per second host to device, device to host, and both together; 0 is unthrottled.
    pub link: [u64; 3],
    /// Factor on the modelled cost of the VMM calls, in thousandths.
    pub vmm_cost_milli: u64,
}

/// Reads a size: `4GiB`, `512MiB`, `64KiB`, `4GB`, `4g`, `512m`, `64k`, or plain bytes.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().ok()?;
    let scale: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1_048_576.0,
        "g" | "gib" => 1_073_741_824.0,
        "t" | "tib" => 1_099_511_627_776.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return None,
    };
    let bytes = number * scale;
    (bytes.is_finite() && (0.0..1e15).contains(&bytes)).then_some(bytes as u64)
}

fn variable<T>(name: &str, default: T, read: impl Fn(&str) -> Option<T>) -> Result<T, String> {
    match std::env::var(name) {
        Err(_) => Ok(default),
        Ok(text) => read(&text)
            .ok_or_else(|| format!("{name}={text} cannot be read; see simulator/README.md")),
    }
}

fn millis(text: &str) -> Option<u64> {
    let value: f64 = text.trim().trim_end_matches("ms").parse().ok()?;
    (0.0..1e6).contains(&value).then_some((value * 1e3) as u64)
}

fn link(text: &str) -> Option<[u64; 3]> {
    let rates: Vec<u64> = text
        .split(',')
        .map(|part| {
            part.trim()
                .parse::<f64>()
                .ok()
                .filter(|r| (0.0..1e5).contains(r))
                .map(|r| (r * 1e9) as u64)
        })
        .collect::<Option<_>>()?;
    match rates[..] {
        [each] => Some([each, each, each * 2]),
        [inward, outward] => Some([inward, outward, inward + outward]),
        [inward, outward, both] => Some([inward, outward, both]),
        _ => None,
    }
}

fn driver(text: &str) -> Option<u32> {
    Release::named(text).map(|release| release.cuda)
}

impl Config {
    /// The configuration that the environment asks for.
    ///
    /// # Errors
    /// One line that names the variable and its value.
    pub fn from_env() -> Result<Self, String> {
        let whole = |text: &str| {
            parse_size(text)
                .filter(|b| *b >= 16 * FRAME)
                .map(|b| b / FRAME * FRAME)
        };
        Ok(Self {
            gpus: variable("SPILLWAY_SIM_GPUS", 1, |t| {
                t.trim()
                    .parse()
                    .ok()
                    .filter(|n: &u32| (1..=GPUS_MAX as u32).contains(n))
            })?,
            memory: variable("SPILLWAY_SIM_MEMORY", 4 << 30, whole)?,
            driver: Self::driver_from_env()?,
            context: variable("SPILLWAY_SIM_CONTEXT", 32 << 20, parse_size)?,
            module: variable("SPILLWAY_SIM_MODULE", 2 << 20, parse_size)?,
            release_delay_us: variable("SPILLWAY_SIM_RELEASE_DELAY", 3_000, millis)?,
            death_delay_us: variable("SPILLWAY_SIM_DEATH_DELAY", 20_000, millis)?,
            link: variable("SPILLWAY_SIM_LINK", [0; 3], link)?,
            vmm_cost_milli: variable("SPILLWAY_SIM_VMM_COST", 1_000, |t| {
                t.trim()
                    .parse::<f64>()
                    .ok()
                    .filter(|f| (0.0..1e3).contains(f))
                    .map(|f| (f * 1e3) as u64)
            })?,
        })
    }

    /// The driver's version that the environment asks for.
    ///
    /// # Errors
    /// One line that names the variable and its value.
    pub fn driver_from_env() -> Result<u32, String> {
        variable("SPILLWAY_SIM_DRIVER", release::DEFAULT.cuda, driver)
    }

    /// The release of the driver.
    #[must_use]
    pub fn release(&self) -> &'static Release {
        Release::of(self.driver).unwrap_or(release::DEFAULT)
    }

    /// The directory of the shared state; the second value says that the user chose it.
    #[must_use]
    pub fn directory() -> (PathBuf, bool) {
        match std::env::var_os("SPILLWAY_SIM_DIR") {
            Some(dir) if !dir.is_empty() => (PathBuf::from(dir), true),
            _ => {
                // SAFETY: geteuid has no preconditions.
                let user = unsafe { libc::geteuid() };
                (PathBuf::from(format!("/tmp/spillway-sim-{user}")), false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4GiB"), Some(4 << 30));
        assert_eq!(parse_size("1.5g"), Some(3 << 29));
        assert_eq!(parse_size("24GB"), Some(24_000_000_000));
        assert_eq!(parse_size("512 MiB"), Some(512 << 20));
        assert_eq!(parse_size("12"), Some(12));
        assert_eq!(parse_size("12q"), None);
        assert_eq!(parse_size(""), None);
    }

    #[test]
    fn links_may_leave_out_later_figures() {
        assert_eq!(
            link("10"),
            Some([10_000_000_000, 10_000_000_000, 20_000_000_000])
        );
        assert_eq!(
            link("10,5"),
            Some([10_000_000_000, 5_000_000_000, 15_000_000_000])
        );
        assert_eq!(
            link("50, 50, 83"),
            Some([50_000_000_000, 50_000_000_000, 83_000_000_000])
        );
        assert_eq!(link("a"), None);
        assert_eq!(link("1,2,3,4"), None);
    }

    #[test]
    fn only_the_implemented_drivers() {
        assert_eq!(driver("12.4"), Some(12_040));
        assert_eq!(driver("12.8"), Some(12_080));
        assert_eq!(driver("13.0"), Some(13_000));
        assert_eq!(driver("12.9"), None);
    }
}
