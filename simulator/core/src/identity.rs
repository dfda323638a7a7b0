//! How a simulated GPU is called: name, UUID, place on the bus; the same for CUDA and NVML.

use crate::shared::Shared;

/// The device's name.
pub const NAME: &str = "Spillway Simulated GPU";

/// The device's UUID; differs between machines and GPUs.
#[must_use]
pub fn uuid(shared: &Shared, gpu: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut state = shared.seed() ^ (shared.machine(gpu) as u64 + 1) << 32;
    for chunk in bytes.chunks_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        chunk.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
    }
    bytes
}

/// As NVML writes it: `GPU-` and five groups.
#[must_use]
pub fn uuid_text(uuid: [u8; 16]) -> String {
    let hex: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
    format!(
        "GPU-{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// The bus number of a GPU.
#[must_use]
pub fn bus(shared: &Shared, gpu: u32) -> u32 {
    FIRST_BUS + shared.machine(gpu) as u32
}

const FIRST_BUS: u32 = 0x10;

/// `domain:bus:device.function` as CUDA writes it.
#[must_use]
pub fn bus_id(shared: &Shared, gpu: u32) -> String {
    place(bus(shared, gpu))
}

fn place(bus: u32) -> String {
    format!("0000:{bus:02X}:00.0")
}

/// Whether `text` names the GPU's place, in any of the usual spellings.
#[must_use]
pub fn is_bus_id(shared: &Shared, gpu: u32, text: &str) -> bool {
    names_place(bus(shared, gpu), text)
}

fn names_place(bus: u32, text: &str) -> bool {
    let text = text.to_ascii_uppercase();
    let short = format!("{bus:02X}:00");
    let long = text.strip_suffix(".0").unwrap_or(&text);
    long == short
        || long.strip_suffix(&short).is_some_and(|domain| {
            !domain.is_empty() && domain.trim_end_matches(':').bytes().all(|b| b == b'0')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_a_place() {
        assert_eq!(place(0x11), "0000:11:00.0");
        for text in ["0000:11:00.0", "00000000:11:00.0", "11:00.0", "11:00"] {
            assert!(names_place(0x11, text), "{text}");
        }
        assert!(!names_place(0x10, "0000:11:00.0"));
        assert!(!names_place(0x11, "0001:11:00.0"));
    }
}
