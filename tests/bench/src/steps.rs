//! How many instructions a call takes: the processor's trap flag, and a count of the traps.
//!
//! Exact, and needs nothing but the program itself. Only where the processor has such a flag.

use std::sync::atomic::{AtomicU64, Ordering};

static STEPS: AtomicU64 = AtomicU64::new(0);

#[cfg(target_arch = "x86_64")]
extern "C" fn step(_signal: i32) {
    STEPS.fetch_add(1, Ordering::Relaxed);
}

/// Instructions that `run` takes, plus the same few for every `run`; `None`: cannot be counted here. Other
/// threads must not be counted at the same time.
#[cfg(target_arch = "x86_64")]
pub fn count(run: impl FnOnce()) -> Option<u64> {
    use std::arch::asm;
    if crate::callgrind::under_valgrind() {
        return None;
    }
    // SAFETY: a handler that only counts; put back below.
    let before = unsafe { libc::signal(libc::SIGTRAP, step as *const () as libc::sighandler_t) };
    STEPS.store(0, Ordering::Relaxed);
    // SAFETY: sets and clears the trap flag and nothing else; each trap is handled above. Both use the stack,
    // as the compiler is told by what they do not promise.
    unsafe {
        asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq");
        run();
        asm!("pushfq", "and qword ptr [rsp], ~0x100", "popfq");
        libc::signal(libc::SIGTRAP, before);
    }
    Some(STEPS.load(Ordering::Relaxed)).filter(|&steps| steps > 0)
}

/// See the other one.
#[cfg(not(target_arch = "x86_64"))]
pub fn count(_run: impl FnOnce()) -> Option<u64> {
    None
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::count;
    use std::arch::asm;

    #[test]
    fn every_instruction_is_counted() {
        let none = count(|| ()).expect("a count");
        // SAFETY: does nothing, ten times.
        let ten = count(|| unsafe { asm!(".rept 10", "nop", ".endr") }).expect("a count");
        assert_eq!(ten - none, 10);
    }
}
