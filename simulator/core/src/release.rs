//! The releases of the driver that can be simulated, and what differs between them apart from the
//! entry points (those are in `simulator/cuda/driver_api.csv`).
//!
//! Source: `cuda.h` of the CUDA toolkits of the same numbers, as NVIDIA's packages
//! `nvidia-cuda-runtime` carry it; `scripts/sim-headers` compares.

/// A release.
#[derive(Debug, PartialEq, Eq)]
pub struct Release {
    /// As people write it, and as `SPILLWAY_SIM_DRIVER` takes it.
    pub name: &'static str,
    /// As `cuDriverGetVersion` reports it: 12080 is 12.8.
    pub cuda: u32,
    /// What the driver's package calls itself, as NVML reports it.
    pub package: &'static str,
    /// Newest PTX that it reads.
    pub ptx: (u32, u32),
    /// The first number that is not a `CUdevice_attribute`.
    pub attributes_end: i32,
    /// The first number that is not a `CUlimit`.
    pub limits_end: i32,
}

/// All of them, oldest first.
pub const RELEASES: [Release; 3] = [
    Release {
        name: "12.4",
        cuda: 12_040,
        package: "550.54.14",
        ptx: (8, 4),
        attributes_end: 135,
        limits_end: 7,
    },
    Release {
        name: "12.8",
        cuda: 12_080,
        package: "570.86.15",
        ptx: (8, 7),
        attributes_end: 144,
        limits_end: 10,
    },
    Release {
        name: "13.0",
        cuda: 13_000,
        package: "580.65.06",
        ptx: (9, 0),
        attributes_end: 148,
        limits_end: 10,
    },
];

/// The one that is simulated unless another is asked for.
pub const DEFAULT: &Release = &RELEASES[1];

impl Release {
    /// The release that `SPILLWAY_SIM_DRIVER` names.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        RELEASES.iter().find(|release| release.name == name.trim())
    }

    /// The release with this `cuDriverGetVersion`.
    #[must_use]
    pub fn of(cuda: u32) -> Option<&'static Self> {
        RELEASES.iter().find(|release| release.cuda == cuda)
    }

    /// Whether its headers have this result code; [`crate::code`] holds those of all releases.
    #[must_use]
    pub fn has_code(&self, code: u32) -> bool {
        let since = match code {
            226 | 721 | 916 => 12_080,
            36 => 13_000,
            // Later than any release here.
            47 | 227 | 917..=919 => u32::MAX,
            _ => 0,
        };
        since <= self.cuda
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_say_the_same() {
        for release in &RELEASES {
            let (major, minor) = release.name.split_once('.').unwrap();
            let (major, minor): (u32, u32) = (major.parse().unwrap(), minor.parse().unwrap());
            assert_eq!(release.cuda, major * 1000 + minor * 10);
            assert_eq!(Release::of(release.cuda), Some(release));
            assert_eq!(
                Release::named(&format!(" {} ", release.name)),
                Some(release)
            );
        }
        assert_eq!(Release::named("12.9"), None);
        assert_eq!(DEFAULT.name, "12.8");
    }

    #[test]
    fn codes_come_with_their_release() {
        let [old, middle, new] = &RELEASES;
        assert!(old.has_code(1) && !old.has_code(916) && middle.has_code(916));
        assert!(!middle.has_code(36) && new.has_code(36) && !new.has_code(919));
    }
}
