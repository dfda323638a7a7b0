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
    unsafe {
        asm!("mov {}, qword ptr fs:[0]", out(reg) base, options(nostack, preserves_flags, readonly, pure))
    };
    base.wrapping_add_signed(offset()) as *const Thread
}

/// Enters without looking: the caller must look at the word and the state next.
///
/// # Safety
/// `offset` is the gate line's, and not 0.
#[inline(always)]
pub unsafe fn arrive(offset: isize) {
    // SAFETY: the thread's own word. Without `nomem` this also keeps later loads after it.
    unsafe {
        asm!("add qword ptr fs:[{}], {}", in(reg) offset, const super::ENTER, options(nostack))
    };
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

/// The function in a row's slot, read without a detour through the global offset table.
#[doc(hidden)]
#[macro_export]
macro_rules! load_slot {
    (hot $name:ident) => {{
        let real: *const ();
        // SAFETY: reads the slot. Any value it holds, now or earlier, is a function of the row's signature.
        unsafe {
            core::arch::asm!(
                "mov {real}, qword ptr [rip + {line} + {slot}]",
                real = out(reg) real,
                line = sym $crate::gate::LINE,
                slot = const core::mem::offset_of!($crate::gate::Line, hot.$name),
                options(nostack, preserves_flags, readonly),
            );
            core::mem::transmute::<*const (), $crate::table::sig::$name>(real)
        }
    }};
    ($how:ident $name:ident) => {{
        let real: *const ();
        // SAFETY: as above.
        unsafe {
            core::arch::asm!(
                "mov {real}, qword ptr [rip + {slot}]",
                real = out(reg) real,
                slot = sym $crate::driver::slots::$name,
                options(nostack, preserves_flags, readonly),
            );
            core::mem::transmute::<*const (), $crate::table::sig::$name>(real)
        }
    }};
}

/// The body of an exported function that forwards to its slot through the gate.
#[doc(hidden)]
#[macro_export]
macro_rules! gated_body {
    ($how:ident $name:ident ($($argument:ident),*)) => {{
        let offset: isize;
        // SAFETY: reads the gate's offset.
        unsafe {
            core::arch::asm!(
                "mov {offset}, qword ptr [rip + {line} + {at}]",
                offset = out(reg) offset,
                line = sym $crate::gate::LINE,
                at = const core::mem::offset_of!($crate::gate::Line, offset),
                options(nostack, preserves_flags, readonly),
            );
        }
        if offset == 0 {
            // SAFETY: the same arguments.
            return unsafe { $crate::wrappers::unstarted::$name($($argument),*) };
        }
        // SAFETY: enters, then looks at the word's sign and at the state, in this order; loads are not
        // moved before, as the block may touch memory. The slow function completes the entry.
        unsafe {
            core::arch::asm!(
                "add qword ptr fs:[{offset}], {enter}",
                "js {slow}",
                "cmp dword ptr [rip + {line} + {at}], 0",
                "jne {slow}",
                offset = in(reg) offset,
                enter = const $crate::gate::ENTER,
                line = sym $crate::gate::LINE,
                at = const core::mem::offset_of!($crate::gate::Line, state),
                slow = label {
                    // SAFETY: the same arguments, and an entry has begun.
                    return unsafe { $crate::wrappers::slow::$name($($argument),*) };
                },
                options(nostack),
            );
        }
        let real = $crate::load_slot!($how $name);
        // SAFETY: a function of this signature; the caller keeps the driver's rules.
        let status = unsafe { real($($argument),*) };
        // SAFETY: entered above.
        unsafe { $crate::gate::word::depart(offset) };
        status
    }};
}
