//! Waiting for something to become true, always bounded.

use std::time::{Duration, Instant};

/// Waits up to 20 s until `check` yields something.
///
/// # Panics
/// It does not: with what was waited for.
pub fn until<T>(what: &str, check: impl FnMut() -> Option<T>) -> T {
    until_within(Duration::from_secs(20), what, check)
}

/// Waits until `check` yields something.
///
/// # Panics
/// It does not within `time`: with what was waited for.
pub fn until_within<T>(time: Duration, what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(start.elapsed() < time, "not within {time:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
