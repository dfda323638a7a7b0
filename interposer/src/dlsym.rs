//! The exported `dlsym`.
//!
//! It looks at the name only, with registers that no caller expects to keep, and jumps to the real one:
//! the return address stays the application's, so `RTLD_NEXT` and `RTLD_DEFAULT` mean what they mean
//! without us. Names that begin with `cu` or `nvml` and a capital letter go to
//! [`lookup`](spillway_interposer_core::entry::lookup) first, which may answer.
//!
//! Before the loader has relocated this library (another object's constructor or resolver may call
//! `dlsym` that early) the answer is null: nothing else here could be used.

use crate::exports::EXPORTS;
use core::ffi::{c_char, c_void};
use spillway_interposer_core::driver::library::{REAL_DLSYM, find_real_dlsym};
use spillway_interposer_core::entry::lookup;

/// Holds its own address once the loader has relocated this library.
#[repr(transparent)]
struct Relocated(*const Relocated);
// SAFETY: never changed after relocation.
unsafe impl Sync for Relocated {}
static RELOCATED: Relocated = Relocated(&raw const RELOCATED);

#[cfg(target_arch = "x86_64")]
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "endbr64",
        "lea rax, [rip + {relocated}]",
        "cmp rax, qword ptr [rip + {relocated}]",
        "jne 9f",
        "test rsi, rsi",
        "je 6f",
        "cmp byte ptr [rsi], 99",           // 'c'
        "je 2f",
        "cmp byte ptr [rsi], 110",          // 'n'
        "je 3f",
        // The real one, with everything as it came.
        "6:",
        "mov rax, qword ptr [rip + {real}]",
        "test rax, rax",
        "je 5f",
        "jmp rax",
        "2:",                               // cu[A-Z]
        "cmp byte ptr [rsi + 1], 117",
        "jne 6b",
        "movzx eax, byte ptr [rsi + 2]",
        "jmp 4f",
        "3:",                               // nvml[A-Z]
        "cmp byte ptr [rsi + 1], 118",
        "jne 6b",
        "cmp byte ptr [rsi + 2], 109",
        "jne 6b",
        "cmp byte ptr [rsi + 3], 108",
        "jne 6b",
        "movzx eax, byte ptr [rsi + 4]",
        "4:",
        "sub eax, 65",
        "cmp eax, 25",
        "ja 6b",
        "push rdi",
        ".cfi_adjust_cfa_offset 8",
        "push rsi",
        ".cfi_adjust_cfa_offset 8",
        "sub rsp, 8",
        ".cfi_adjust_cfa_offset 8",
        "mov rdx, qword ptr [rsp + 24]",    // where the caller goes on
        "lea rcx, [rip + {exports}]",
        "call {lookup}",
        "add rsp, 8",
        ".cfi_adjust_cfa_offset -8",
        "pop rsi",
        ".cfi_adjust_cfa_offset -8",
        "pop rdi",
        ".cfi_adjust_cfa_offset -8",
        "test rax, rax",
        "je 6b",
        "mov rax, rdx",
        "ret",
        "5:",                               // the first call of all
        "push rdi",
        ".cfi_adjust_cfa_offset 8",
        "push rsi",
        ".cfi_adjust_cfa_offset 8",
        "sub rsp, 8",
        ".cfi_adjust_cfa_offset 8",
        "call {find}",
        "add rsp, 8",
        ".cfi_adjust_cfa_offset -8",
        "pop rsi",
        ".cfi_adjust_cfa_offset -8",
        "pop rdi",
        ".cfi_adjust_cfa_offset -8",
        "test rax, rax",
        "je 9f",
        "jmp rax",
        "9:",
        "xor eax, eax",
        "ret",
        ".cfi_endproc",
        relocated = sym RELOCATED,
        real = sym REAL_DLSYM,
        exports = sym EXPORTS,
        lookup = sym lookup,
        find = sym find_real_dlsym,
    )
}

#[cfg(target_arch = "aarch64")]
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "hint #34", // bti c
        "adrp x9, {relocated}",
        "add x9, x9, :lo12:{relocated}",
        "ldr x10, [x9]",
        "cmp x9, x10",
        "b.ne 9f",
        "cbz x1, 6f",
        "ldrb w9, [x1]",
        "cmp w9, #99", // 'c'
        "b.eq 2f",
        "cmp w9, #110", // 'n'
        "b.eq 3f",
        // The real one, with everything as it came.
        "6:",
        "adrp x9, {real}",
        "ldr x16, [x9, :lo12:{real}]",
        "cbz x16, 5f",
        "br x16",
        "2:", // cu[A-Z]
        "ldrb w9, [x1, #1]",
        "cmp w9, #117",
        "b.ne 6b",
        "ldrb w9, [x1, #2]",
        "b 4f",
        "3:", // nvml[A-Z]
        "ldrb w9, [x1, #1]",
        "cmp w9, #118",
        "b.ne 6b",
        "ldrb w9, [x1, #2]",
        "cmp w9, #109",
        "b.ne 6b",
        "ldrb w9, [x1, #3]",
        "cmp w9, #108",
        "b.ne 6b",
        "ldrb w9, [x1, #4]",
        "4:",
        "sub w9, w9, #65",
        "cmp w9, #25",
        "b.hi 6b",
        ".cfi_remember_state",
        "stp x29, x30, [sp, #-32]!",
        ".cfi_def_cfa_offset 32",
        ".cfi_offset 29, -32",
        ".cfi_offset 30, -24",
        "stp x0, x1, [sp, #16]",
        "mov x2, x30", // where the caller goes on
        "adrp x3, {exports}",
        "add x3, x3, :lo12:{exports}",
        "bl {lookup}",
        "mov x9, x0",
        "mov x10, x1",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #32",
        ".cfi_restore_state",
        "cbz x9, 6b",
        "mov x0, x10",
        "ret",
        "5:", // the first call of all
        ".cfi_remember_state",
        "stp x29, x30, [sp, #-32]!",
        ".cfi_def_cfa_offset 32",
        ".cfi_offset 29, -32",
        ".cfi_offset 30, -24",
        "stp x0, x1, [sp, #16]",
        "bl {find}",
        "mov x16, x0",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #32",
        ".cfi_restore_state",
        "cbz x16, 9f",
        "br x16",
        "9:",
        "mov x0, #0",
        "ret",
        ".cfi_endproc",
        relocated = sym RELOCATED,
        real = sym REAL_DLSYM,
        exports = sym EXPORTS,
        lookup = sym lookup,
        find = sym find_real_dlsym,
    )
}
