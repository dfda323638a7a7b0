//! The exported `dlsym`.
//!
//! It looks at the name only, with registers that no caller expects to keep, and jumps to the real one:
//! the return address stays the application's, so `RTLD_NEXT` and `RTLD_DEFAULT` mean what they mean
//! without us. Names that begin with `cu` or `nvml` and a capital letter go to
//! [`lookup`](spillway_interposer_core::entry::lookup) first, which may answer.
//!
//! Before the loader has relocated this library (another object's constructor or resolver may call
//! `dlsym` that early) the answer is null: nothing else here could be used.

use crate::EXPORTS;
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
        "je 1f",
        "cmp byte ptr [rsi], 99",           // 'c'
        "je 2f",
        "cmp byte ptr [rsi], 110",          // 'n'
        "je 3f",
        // The real one, with everything as it came.
        "1:",
        "mov rax, qword ptr [rip + {real}]",
        "test rax, rax",
        "je 5f",
        "jmp rax",
        "2:",                               // cu[A-Z]
        "cmp byte ptr [rsi + 1], 117",
        "jne 1b",
        "movzx eax, byte ptr [rsi + 2]",
        "jmp 4f",
        "3:",                               // nvml[A-Z]
        "cmp byte ptr [rsi + 1], 118",
        "jne 1b",
        "cmp byte ptr [rsi + 2], 109",
        "jne 1b",
        "cmp byte ptr [rsi + 3], 108",
        "jne 1b",
        "movzx eax, byte ptr [rsi + 4]",
        "4:",
        "sub eax, 65",
        "cmp eax, 25",
        "ja 1b",
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
        "je 1b",
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
