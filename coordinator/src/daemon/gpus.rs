//! What the driver knows about devices, behind a trait: NVML, or devices that do not exist.

use std::collections::{BTreeMap, BTreeSet};

/// A device, as found at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// As the process knows it (`cuDeviceGetUuid_v2`).
    pub uuid: [u8; 16],
    /// Product name.
    pub name: String,
    /// All of its memory, in bytes.
    pub total: u64,
}

/// What processes hold on a device: by process id; `None`: the driver does not say for this process.
pub type ProcessMemory = BTreeMap<i32, Option<u64>>;

/// A measurement of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Bytes in use; `None`: the driver does not say.
    pub used: Option<u64>,
    /// Who holds how much; `None`: the driver does not say.
    pub processes: Option<ProcessMemory>,
    /// Those of them that compute. Without those in MIG instances, whose memory is not shared out here.
    pub compute: BTreeSet<i32>,
    /// Those of them that draw.
    pub graphics: BTreeSet<i32>,
}

/// A source of measurements. Queries may take long (hundreds of milliseconds have been seen), so
/// they are made on a thread of their own.
pub trait Gpus: Send {
    /// The devices, in the order in which they are numbered from now on.
    fn devices(&self) -> Vec<Gpu>;
    /// Measures one of them.
    fn measure(&self, device: usize) -> Measured;
}

/// Devices that do not exist: for tests of the coordinator without a driver. Nothing is measured.
#[derive(Debug)]
pub struct FakeGpus(pub Vec<u64>);

impl Gpus for FakeGpus {
    fn devices(&self) -> Vec<Gpu> {
        let device = |(index, total): (usize, &u64)| {
            let mut uuid = [0u8; 16];
            uuid[15] = u8::try_from(index).unwrap_or(u8::MAX);
            Gpu {
                uuid,
                name: "fake device".to_owned(),
                total: *total,
            }
        };
        self.0.iter().enumerate().map(device).collect()
    }

    fn measure(&self, _device: usize) -> Measured {
        // An empty list of processes, not an unknown one: what the dead held is back at once.
        Measured {
            used: None,
            processes: Some(ProcessMemory::new()),
            ..Measured::default()
        }
    }
}

/// `GPU-` and the hexadecimal groups.
#[must_use]
pub fn format_uuid(uuid: &[u8; 16]) -> String {
    use std::fmt::Write;
    let mut text = String::from("GPU");
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 0 | 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Reads `GPU-...` or `MIG-...`.
#[must_use]
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .split_once('-')?
        .1
        .bytes()
        .filter(|byte| *byte != b'-')
        .map(|byte| {
            char::from(byte)
                .to_digit(16)
                .and_then(|d| u8::try_from(d).ok())
        })
        .collect::<Option<_>>()?;
    let pairs: Vec<u8> = digits
        .chunks(2)
        .map(|pair| pair.iter().fold(0, |sum, d| sum << 4 | d))
        .collect();
    if digits.len() == 32 {
        pairs.try_into().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_survive_their_text() {
        let uuid = *b"0123456789abcdef";
        let text = format_uuid(&uuid);
        assert_eq!(text, "GPU-30313233-3435-3637-3839-616263646566");
        assert_eq!(parse_uuid(&text), Some(uuid));
        assert_eq!(parse_uuid("GPU-30"), None);
        assert_eq!(parse_uuid("GPU-3031323334353637383961626364656g"), None);
    }
}
