//! Bounds that both sides rely on.

/// The version of the session protocol and of both pages. The coordinator serves this version and
/// the one before it.
pub const PROTOCOL_VERSION: u32 = 2;

/// The oldest version that a coordinator of this release still serves.
pub const PROTOCOL_VERSION_OLDEST: u32 = 1;

/// A library sends `Hold`, `Unhold`, `Claim` and `Unknown` only to a coordinator that welcomed it
/// with this version or a later one.
pub const PROTOCOL_VERSION_CLAIMS: u32 = 2;

/// Physical device memory is charged in steps of this many bytes: the granularity of `cuMemCreate`
/// on every device so far.
pub const GRANULE: u64 = 2 << 20;

/// Devices that one process can register: one page holds this many.
pub const MAX_DEVICES: usize = 16;

/// The largest session message, in bytes, without descriptors.
pub const MAX_MESSAGE: usize = 8192;

/// The longest workload name, in bytes.
pub const MAX_NAME: usize = 128;

/// The longest free text in a message, in bytes; longer texts are cut.
pub const MAX_TEXT: usize = 1024;

/// The largest host segment, in bytes.
pub const MAX_SEGMENT: u64 = 1 << 30;

/// Segments that one session may hold: bounds what a registration can carry over.
pub const MAX_SEGMENTS: usize = 4096;

/// What one session may hold for others to import, in calls of `Hold`; beyond that the oldest is
/// forgotten.
pub const MAX_HOLDS: usize = 65_536;

/// The longest name of an entry point of the driver, in bytes.
pub const MAX_ENTRY_POINT: usize = 64;

/// Names of unknown entry points that are kept of one workload.
pub const MAX_ENTRY_POINTS: usize = 64;

/// Rounds up to whole granules; saturates instead of wrapping.
#[must_use]
pub const fn granules_up(bytes: u64) -> u64 {
    match bytes.checked_add(GRANULE - 1) {
        Some(sum) => sum / GRANULE * GRANULE,
        None => u64::MAX / GRANULE * GRANULE,
    }
}

/// Rounds down to whole granules.
#[must_use]
pub const fn granules_down(bytes: u64) -> u64 {
    bytes / GRANULE * GRANULE
}
