//! Forked children.

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("fork":
    a_child_forked_after_init_is_not_initialized,
    a_child_forked_before_init_may_use_cuda,
    the_parent_goes_on_after_a_fork,
);

/// Forks; the child's answer is its exit code.
fn in_child(work: impl FnOnce() -> u8) -> Result<i32, Stop> {
    // SAFETY: the process has one thread of its own making; the child runs `work` and leaves by _exit.
    let pid = unsafe { libc::fork() };
    check!(pid >= 0, "fork failed");
    if pid == 0 {
        let code = work();
        // SAFETY: _exit ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(code)) };
    }
    let mut status = 0;
    // SAFETY: `pid` is our child and `status` ours to fill.
    let got = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    check!(got == pid, "waitpid failed");
    check!(libc::WIFEXITED(status), "the child was killed: status {status:#x}");
    Ok(libc::WEXITSTATUS(status))
}

/// In a child that was forked after cuInit every call, cuInit too, is NOT_INITIALIZED.
/// Source: CUDA C++ Programming Guide and PyTorch ("cannot re-initialize CUDA in forked subprocess").
fn a_child_forked_after_init_is_not_initialized() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(MIB)?;
    let code = in_child(|| {
        let (mut other, mut n, mut byte) = (0, 0, 0_u8);
        let calls = [
            cuMemAlloc_v2(Some(&mut other), MIB),
            cuMemcpyDtoH_v2(&raw mut byte, address, 1),
            cuDeviceGetCount(&mut n),
            cuInit(0),
            cuCtxSynchronize(),
        ];
        let wrong = calls.iter().position(|code| *code != Code::NOT_INITIALIZED);
        wrong.map_or(0, |at| u8::try_from(at).unwrap_or(90) + 1)
    })?;
    check!(code == 0, "call {code} of the child answered something else than NOT_INITIALIZED");
    Ok(())
}

/// A child that was forked before cuInit uses CUDA as its own; so does the parent.
/// Source: general practice (Python's multiprocessing with CUDA first used in the children).
fn a_child_forked_before_init_may_use_cuda() -> Outcome {
    let code = in_child(|| {
        let work = || -> Outcome {
            let _gpu = Gpu::start()?;
            let address = alloc(MIB)?;
            ok!(cuMemsetD8_v2(address, 9, MIB));
            check!(read(address, 4)? == [9; 4], "contents differ");
            Ok(())
        };
        u8::from(work().is_err())
    })?;
    check!(code == 0, "the child failed");
    let _gpu = Gpu::start()?;
    let address = alloc(MIB)?;
    ok!(cuMemsetD8_v2(address, 9, MIB));
    Ok(())
}

/// The parent keeps its memory and its context, also after the child has ended.
/// Source: general practice (programs fork shells while they use CUDA).
fn the_parent_goes_on_after_a_fork() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let address = alloc(4 * MIB)?;
    let bytes = pattern(4 * MIB, 41);
    write(address, &bytes)?;
    let code = in_child(|| 0)?;
    check!(code == 0, "the child failed");
    let output = std::process::Command::new("true").status();
    check!(output.is_ok_and(|s| s.success()), "a child program failed");
    check!(read(address, 4 * MIB)? == bytes, "contents differ after the fork");
    ok!(kernels.fill(0, address, 4, 8));
    ok!(cuCtxSynchronize());
    check!(read_u32(address)? == 8, "got {}", read_u32(address)?);
    Ok(())
}
