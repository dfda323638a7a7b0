//! Requests to valgrind's callgrind: count only what lies between two of them.
//!
//! A request is a sequence of instructions that does nothing anywhere else.

use std::collections::HashMap;
use std::ffi::CStr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

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

/// Runs this program once more under callgrind, with `arguments`, and reads the parts that [`counted`] made:
/// instructions by label.
///
/// # Errors
/// There is no valgrind, or it or the program failed.
pub fn run_again(arguments: &[String]) -> Result<HashMap<String, u64>> {
    let folder = std::env::temp_dir().join(format!("callgrind.{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let parts = run_into(&folder, arguments);
    // Nothing else is in it.
    let _ = std::fs::remove_dir_all(&folder);
    parts
}

fn run_into(folder: &Path, arguments: &[String]) -> Result<HashMap<String, u64>> {
    let out = folder.join("part");
    let started = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe()?)
        .args(arguments)
        .stdout(Stdio::null())
        .output();
    let output = match started {
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => bail!("no valgrind"),
        other => other.context("valgrind")?,
    };
    ensure!(
        output.status.success(),
        "valgrind ends with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
            .lines()
            .last()
            .unwrap_or_default()
    );
    let mut parts = HashMap::new();
    for entry in std::fs::read_dir(folder)? {
        let text = std::fs::read_to_string(entry?.path())?;
        let after = |word: &str| text.lines().find_map(|line| line.strip_prefix(word));
        if let (Some(label), Some(total)) =
            (after("desc: Trigger: Client Request: "), after("totals: "))
        {
            parts.insert(label.to_owned(), total.trim().parse().context("a total")?);
        }
    }
    Ok(parts)
}
