//! Exports that are nothing but a jump to the driver.
//!
//! A jump knows nothing of a call's arguments, so no signature can be wrong, and leaves no frame of ours on
//! the stack while the driver runs: callbacks may leave by `longjmp` or `pthread_exit`. The first call of
//! each looks the driver's function up, with all registers that carry arguments put aside.

use core::ffi::CStr;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, Ordering};
use spillway_interposer_core::driver::{Status, library};
use spillway_interposer_core::table::Library;

/// Where a function of the driver is.
#[repr(C)]
pub struct Target {
    /// Null until looked up; then never changed. The exports jump through this word.
    address: AtomicPtr<()>,
    name: &'static CStr,
}

impl Target {
    /// Not looked up yet.
    pub const fn new(name: &'static CStr) -> Self {
        Self {
            address: AtomicPtr::new(null_mut()),
            name,
        }
    }
}

/// The export of one name.
macro_rules! forward {
    ($name:ident) => {
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name() {
            static TARGET: $crate::forward::Target = $crate::forward::Target::new(
                match core::ffi::CStr::from_bytes_with_nul(
                    concat!(stringify!($name), "\0").as_bytes(),
                ) {
                    Ok(name) => name,
                    Err(_) => panic!("a name with a zero inside"),
                },
            );
            #[cfg(target_arch = "x86_64")]
            core::arch::naked_asm!(
                ".cfi_startproc",
                "endbr64",
                "mov r11, qword ptr [rip + {target}]",
                "test r11, r11",
                "je 2f",
                "jmp r11",
                "2:",
                "lea r11, [rip + {target}]",
                "jmp {first}",
                ".cfi_endproc",
                target = sym TARGET,
                first = sym $crate::forward::first,
            );
            #[cfg(target_arch = "aarch64")]
            core::arch::naked_asm!(
                ".cfi_startproc",
                "hint #34", // bti c
                "adrp x17, {target}",
                "add x17, x17, :lo12:{target}",
                "ldr x16, [x17]",
                "cbz x16, 2f",
                "br x16",
                "2:",
                "b {first}",
                ".cfi_endproc",
                target = sym TARGET,
                first = sym $crate::forward::first,
            );
        }
    };
}

/// The first call through a [`Target`], whose address is in a scratch register: looks the function up and
/// jumps there with everything as it came.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
pub unsafe extern "C" fn first() {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "push rdi",
        ".cfi_adjust_cfa_offset 8",
        "push rsi",
        ".cfi_adjust_cfa_offset 8",
        "push rdx",
        ".cfi_adjust_cfa_offset 8",
        "push rcx",
        ".cfi_adjust_cfa_offset 8",
        "push r8",
        ".cfi_adjust_cfa_offset 8",
        "push r9",
        ".cfi_adjust_cfa_offset 8",
        "sub rsp, 136", // eight vector registers, and aligned
        ".cfi_adjust_cfa_offset 136",
        "movups [rsp], xmm0",
        "movups [rsp + 16], xmm1",
        "movups [rsp + 32], xmm2",
        "movups [rsp + 48], xmm3",
        "movups [rsp + 64], xmm4",
        "movups [rsp + 80], xmm5",
        "movups [rsp + 96], xmm6",
        "movups [rsp + 112], xmm7",
        "mov rdi, r11",
        "call {look_up}",
        "mov r11, rax",
        "movups xmm0, [rsp]",
        "movups xmm1, [rsp + 16]",
        "movups xmm2, [rsp + 32]",
        "movups xmm3, [rsp + 48]",
        "movups xmm4, [rsp + 64]",
        "movups xmm5, [rsp + 80]",
        "movups xmm6, [rsp + 96]",
        "movups xmm7, [rsp + 112]",
        "add rsp, 136",
        ".cfi_adjust_cfa_offset -136",
        "pop r9",
        ".cfi_adjust_cfa_offset -8",
        "pop r8",
        ".cfi_adjust_cfa_offset -8",
        "pop rcx",
        ".cfi_adjust_cfa_offset -8",
        "pop rdx",
        ".cfi_adjust_cfa_offset -8",
        "pop rsi",
        ".cfi_adjust_cfa_offset -8",
        "pop rdi",
        ".cfi_adjust_cfa_offset -8",
        "jmp r11",
        ".cfi_endproc",
        look_up = sym look_up,
    )
}

/// As above; the target is in `x17`.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
pub unsafe extern "C" fn first() {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "stp x29, x30, [sp, #-208]!",
        ".cfi_def_cfa_offset 208",
        ".cfi_offset 29, -208",
        ".cfi_offset 30, -200",
        "stp x0, x1, [sp, #16]",
        "stp x2, x3, [sp, #32]",
        "stp x4, x5, [sp, #48]",
        "stp x6, x7, [sp, #64]",
        "stp q0, q1, [sp, #80]",
        "stp q2, q3, [sp, #112]",
        "stp q4, q5, [sp, #144]",
        "stp q6, q7, [sp, #176]",
        "mov x0, x17",
        "bl {look_up}",
        "mov x16, x0",
        "ldp q6, q7, [sp, #176]",
        "ldp q4, q5, [sp, #144]",
        "ldp q2, q3, [sp, #112]",
        "ldp q0, q1, [sp, #80]",
        "ldp x6, x7, [sp, #64]",
        "ldp x4, x5, [sp, #48]",
        "ldp x2, x3, [sp, #32]",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #208",
        ".cfi_def_cfa_offset 0",
        ".cfi_restore 29",
        ".cfi_restore 30",
        "br x16",
        ".cfi_endproc",
        look_up = sym look_up,
    )
}

/// Where to jump: to the driver's function, or to one that answers that there is none.
extern "C" fn look_up(target: &'static Target) -> *const () {
    let real: *mut () = library::symbol(Library::CUDA, target.name).cast();
    if real.is_null() {
        return missing as *const ();
    }
    // Relaxed: whoever jumps there gets the function; nothing else hangs on it.
    target.address.store(real, Ordering::Relaxed);
    real
}

/// For any arguments: they are not looked at.
extern "C" fn missing() -> Status {
    library::missing(Library::CUDA)
}
