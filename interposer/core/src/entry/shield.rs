//! No panic of ours reaches the application.

use crate::driver::Status;
use core::sync::atomic::{AtomicBool, Ordering};
use std::panic::{AssertUnwindSafe, catch_unwind};

static DETACHED: AtomicBool = AtomicBool::new(false);

/// Runs the body of an export. A panic inside becomes [`Status::UNKNOWN`], and the library counts as
/// detached from then on.
#[inline]
pub fn shield(body: impl FnOnce() -> Status) -> Status {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        detach();
        Status::UNKNOWN
    })
}

/// Marks the library as detached: its own accounts can no longer be trusted.
#[cold]
pub fn detach() {
    DETACHED.store(true, Ordering::SeqCst);
}

/// Whether a panic of ours was caught in this process.
#[must_use]
pub fn is_detached() -> bool {
    DETACHED.load(Ordering::SeqCst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_and_detaches() {
        assert_eq!(shield(|| Status::SUCCESS), Status::SUCCESS);
        assert!(!is_detached());
        assert_eq!(shield(|| panic!("expected by this test")), Status::UNKNOWN);
        assert!(is_detached());
    }
}
