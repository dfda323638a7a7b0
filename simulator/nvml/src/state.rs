//! Whether NVML is initialised, and the machine it looks at.

use crate::abi::{DRIVER_NOT_LOADED, INVALID_ARGUMENT, R, UNINITIALIZED};
use spillway_simulator_core::shared::Shared;
use spillway_simulator_core::sync::{lock, now_ns};
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

static SHARED: OnceLock<Shared> = OnceLock::new();
/// Initialisations less shutdowns.
static USERS: Mutex<u32> = Mutex::new(0);

/// Opens the machine, the first time.
///
/// # Errors
/// `DRIVER_NOT_LOADED`, with a line on stderr.
pub fn init() -> R {
    let mut users = lock(&USERS);
    if SHARED.get().is_none() {
        let shared = Shared::open(false).map_err(|line| {
            eprintln!("{line}");
            DRIVER_NOT_LOADED
        })?;
        let _ = SHARED.set(shared);
    }
    *users += 1;
    Ok(())
}

/// # Errors
/// `UNINITIALIZED`.
pub fn shutdown() -> R {
    let mut users = lock(&USERS);
    *users = users.checked_sub(1).ok_or(UNINITIALIZED)?;
    Ok(())
}

/// The machine.
///
/// # Errors
/// `UNINITIALIZED`.
pub fn shared() -> R<&'static Shared> {
    if *lock(&USERS) == 0 {
        return Err(UNINITIALIZED);
    }
    SHARED.get().ok_or(UNINITIALIZED)
}

const HANDLE: u64 = 0x4e56_4d4c_0001;

/// The handle of a GPU.
pub fn handle(gpu: u32) -> u64 {
    HANDLE + u64::from(gpu) * 0x100
}

/// The GPU of a handle.
///
/// # Errors
/// `UNINITIALIZED`, `INVALID_ARGUMENT`.
pub fn gpu(of: u64) -> R<(&'static Shared, u32)> {
    let shared = shared()?;
    let found = (0..shared.config().gpus).find(|gpu| handle(*gpu) == of);
    Ok((shared, found.ok_or(INVALID_ARGUMENT)?))
}

/// Per GPU and process (0: all): time and busy time of the last but one and the last sample.
type Samples = HashMap<(u32, u32), [(u64, u64); 2]>;

/// Percent of the time since an earlier sample, at least a sixth of a second ago if there was
/// one, that `busy_ns` grew by.
pub fn utilisation(gpu: u32, pid: u32, busy_ns: u64) -> u32 {
    static SAMPLES: Mutex<Option<Samples>> = Mutex::new(None);
    const WINDOW_NS: u64 = 166_000_000;
    let now = now_ns();
    let mut samples = lock(&SAMPLES);
    let pair = samples
        .get_or_insert_default()
        .entry((gpu, pid))
        .or_insert([(now, busy_ns); 2]);
    if now - pair[1].0 > WINDOW_NS {
        *pair = [pair[1], (now, busy_ns)];
    }
    let (since, before) = pair[0];
    let elapsed = now.saturating_sub(since);
    let share = (busy_ns.saturating_sub(before) * 100).checked_div(elapsed);
    share.unwrap_or(0).min(100) as u32
}
