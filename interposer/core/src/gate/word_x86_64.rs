//! The thread's word in static thread-local storage: `x86_64`.
//!
//! A hidden symbol in `.tdata`, found by its offset from the thread pointer (initial-exec model: the
//! loader reserves the 64 bytes when it maps this library, and hands out a small surplus even after
//! start). Entering and leaving are one instruction each, so a signal never sees them half done.

use super::registry::Thread;
use core::arch::{asm, global_asm};

global_asm!(
    ".pushsection .tdata.spillway_gate,\"awT\",@progbits",
    ".balign 64",
    ".globl spillway_gate_thread",
    ".hidden spillway_gate_thread",
    ".type spillway_gate_thread,@object",
    ".size spillway_gate_thread,64",
    "spillway_gate_thread:",
    ".quad {slow}",
    ".zero 56",
    ".popsection",
    slow = const super::SLOW,
);

/// Where the word is, relative to the thread pointer. Never 0.
pub(super) fn offset() -> isize {
    let offset: isize;
    // SAFETY: reads the entry that the loader filled for the hidden symbol above.
    unsafe {
        asm!("mov {}, qword ptr [rip + spillway_gate_thread@GOTTPOFF]", out(reg) offset,
            options(nostack, preserves_flags, readonly, pure));
    }
    offset
}

/// The calling thread's record.
pub(super) fn current() -> *const Thread {
    let base: usize;
    // SAFETY: the first word at fs is the thread pointer itself, by the ABI.
    unsafe { asm!("mov {}, qword ptr fs:[0]", out(reg) base, options(nostack, preserves_flags, readonly, pure)) };
    base.wrapping_add_signed(offset()) as *const Thread
}

/// Enters without looking: the caller must look at the word and the state next.
///
/// # Safety
/// `offset` is the gate line's, and not 0.
#[inline(always)]
pub unsafe fn arrive(offset: isize) {
    // SAFETY: the thread's own word. Without `nomem` this also keeps later loads after it.
    unsafe { asm!("add qword ptr fs:[{}], {}", in(reg) offset, const super::ENTER, options(nostack)) };
}

/// Leaves.
///
/// # Safety
/// `offset` is the gate line's, not 0, and this thread has entered and not left.
#[inline(always)]
pub unsafe fn depart(offset: isize) {
    // SAFETY: the thread's own word; a plain store is a release on this architecture.
    unsafe { asm!("dec qword ptr fs:[{}]", in(reg) offset, options(nostack)) };
}

/// The body of an exported function that forwards to its slot through the gate.
#[doc(hidden)]
#[macro_export]
macro_rules! gated_body {
    ($how:ident $name:ident ($($argument:ident),*)) => {{
        let offset = $crate::gate::LINE.offset.load(core::sync::atomic::Ordering::Relaxed);
        if offset == 0 {
            // SAFETY: the same arguments.
            return unsafe { $crate::wrappers::unstarted::$name($($argument),*) };
        }
        // SAFETY: `arrive` and the look at the sign in one; the offset is the gate's. `settle` in the
        // slow function completes the entry that has begun.
        unsafe {
            core::arch::asm!(
                "add qword ptr fs:[{offset}], {enter}",
                "js {slow}",
                offset = in(reg) offset,
                enter = const $crate::gate::ENTER,
                slow = label {
                    // SAFETY: the same arguments, and an entry has begun.
                    return unsafe { $crate::wrappers::slow::$name($($argument),*) };
                },
                options(nostack),
            );
        }
        if $crate::gate::LINE.state.load(core::sync::atomic::Ordering::Acquire) != 0 {
            // SAFETY: as above.
            return unsafe { $crate::wrappers::slow::$name($($argument),*) };
        }
        // SAFETY: the slot has the function's own signature; the caller keeps the driver's rules.
        let status = unsafe { $crate::slot_of!($how $name).get()($($argument),*) };
        // SAFETY: entered above.
        unsafe { $crate::gate::word::depart(offset) };
        status
    }};
}
