//! The closer's barrier on all other threads.

/// From <linux/membarrier.h>.
const PRIVATE_EXPEDITED: i32 = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: i32 = 1 << 4;

fn membarrier(command: i32) -> bool {
    // SAFETY: takes no pointer.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0u32, 0i32) == 0 }
}

/// Announces to the kernel that [`everywhere`] will be used; false where it is not to be had (old
/// kernels, gVisor, seccomp).
pub(super) fn register() -> bool {
    membarrier(REGISTER_PRIVATE_EXPEDITED)
}

/// Makes every running thread of this process pass a full barrier before it returns true. False if the
/// kernel refuses now (a filter that came after registration; no memory).
pub(super) fn everywhere() -> bool {
    (0..3).any(|_| membarrier(PRIVATE_EXPEDITED))
}
