//! Requests to valgrind's callgrind: count only what lies between two of them.
//!
//! A request is a sequence of instructions that does nothing anywhere else.

use std::ffi::CStr;

const RUNNING: usize = 0x1001;
const CALLGRIND: usize = (b'C' as usize) << 24 | (b'T' as usize) << 16;
const ZERO: usize = CALLGRIND + 1;
const TOGGLE: usize = CALLGRIND + 2;
const DUMP_AT: usize = CALLGRIND + 3;

#[cfg(target_arch = "x86_64")]
fn request(code: usize, argument: usize) -> usize {
    let block = [code, argument, 0, 0, 0, 0];
    let mut answer = 0_usize;
    // SAFETY: rotates a register by 128 bits in all and exchanges one with itself. Valgrind reads the block.
    unsafe {
        std::arch::asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51", "xchg rbx, rbx",
            in("rax") block.as_ptr(),
            inout("rdx") answer,
        );
    }
    answer
}

#[cfg(not(target_arch = "x86_64"))]
fn request(_code: usize, _argument: usize) -> usize {
    0
}

/// This process runs under valgrind.
#[must_use]
pub fn under_valgrind() -> bool {
    request(RUNNING, 0) != 0
}

/// Counts what `run` does, in this thread, into a part of callgrind's output called `label`. For a program
/// that was started with `--collect-atstart=no`.
pub fn counted(label: &CStr, run: impl FnOnce()) {
    request(ZERO, 0);
    request(TOGGLE, 0);
    run();
    request(TOGGLE, 0);
    request(DUMP_AT, label.as_ptr() as usize);
}
