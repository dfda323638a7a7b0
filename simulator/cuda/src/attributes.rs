//! Device attributes: those of a large data centre GPU of compute capability 9.0, less what the
//! simulator does not do.

use spillway_simulator_core::identity;
use spillway_simulator_core::shared::Shared;

/// Compute capability, major and minor.
pub const CAPABILITY: (i32, i32) = (9, 0);
/// Multiprocessors.
pub const MULTIPROCESSORS: i32 = spillway_simulator_core::limits::MULTIPROCESSORS as i32;

/// The value of a `CUdevice_attribute`; `None` if the driver has none of that number.
pub fn of(attribute: i32, shared: &Shared, gpu: u32) -> Option<i32> {
    if attribute >= shared.config().release().attributes_end {
        return None;
    }
    Some(match attribute {
        // Threads per block, block and grid dimensions.
        1 => 1024,
        2 | 3 => 1024,
        4 => 64,
        5 => i32::MAX,
        6 | 7 => 65_535,
        // Shared and constant memory, warp, pitch, registers, clock (kHz), texture alignment.
        8 => 48 << 10,
        9 => 64 << 10,
        10 => 32,
        11 => i32::MAX,
        12 | 82 => 65_536,
        13 => 1_980_000,
        14 => 512,
        15 => 1,
        16 => MULTIPROCESSORS,
        17 | 18 | 20 => 0,
        19 => 1,
        // Texture and surface dimensions.
        21 | 27 | 42 | 45 | 46 | 57..=68 | 77 => 32_768,
        22 | 23 | 55 | 56 | 70 | 71 | 73 | 74 => 131_072,
        24..=26 | 47..=49 => 16_384,
        28 => 32_768,
        29 | 43 | 54 => 2048,
        30 => 512,
        44 => 1,
        51 => 32,
        52 | 53 => 32_768,
        69 => 1 << 28,
        72 => 2_097_120,
        31 => 1,
        32 => 1,
        33 => identity::bus(shared, gpu) as i32,
        34 | 50 => 0,
        35 => 0,
        36 => 2_619_000,
        37 => 5120,
        38 => 50 << 20,
        39 => 2048,
        40 => 3,
        41 => 1,
        75 => CAPABILITY.0,
        76 => CAPABILITY.1,
        78..=80 => 1,
        81 => 228 << 10,
        83 => 1,
        84 => 0,
        85 => gpu as i32,
        86 => 0,
        87 => 2,
        // Concurrent access to managed memory; none to pageable memory.
        89 => 1,
        88 | 100 | 101 => 0,
        90 => 1,
        91 => 1,
        92..=94 | 122 | 123 => 1,
        95 => 1,
        96 => 0,
        97 => 227 << 10,
        98 => 0,
        99 => 1,
        102 | 103 => 1,
        104 | 105 => 0,
        106 => 32,
        107 => 0,
        108 => 32 << 20,
        109 => 128 << 20,
        110 => 0,
        111 => 1024,
        112 => 1,
        113 => 1,
        114 => 0,
        115 => 1,
        116 => 0,
        117 | 118 => 0,
        // Pools can be shared by file descriptors.
        119 => 1,
        120 => 1,
        121 => 1,
        124 | 125 => 0,
        126 => 4,
        127 => 1,
        128 => 0,
        129 => 1,
        130 => 0,
        131 => -1,
        // Multicast needs a team.
        132 => i32::from(shared.config().gpus > 1),
        // The NUMA node of the GPU, and memory of cuMemCreate there.
        134 => 0,
        141 => 1,
        133 | 135..=140 | 142..=148 => 0,
        _ => return None,
    })
}
