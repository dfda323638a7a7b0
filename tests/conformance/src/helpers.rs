//! What a case runs in a second process: `spillway-conformance helper NAME ARGS`.
//!
//! A helper says `ready` when it has done its part and ends when its stdin ends or it is killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::{Outcome, Stop, check, ok};

/// Runs a helper in this process.
pub fn run(name: &str, args: &[&str]) -> ExitCode {
    let number = |index: usize| {
        args.get(index)
            .and_then(|a| a.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let result = match name {
        "hold" => hold(usize::try_from(number(0)).unwrap_or(0)),
        "spin" => spin(number(0)),
        "ipc" => open_ipc(args.first().copied().unwrap_or("")),
        "pool" => import_from_pool(number(0), args.get(1).copied().unwrap_or(""), number(2)),
        "pool-alloc" => allocate_from_import(number(0)),
        _ => Err(Stop::Fail(format!("no helper {name}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Fail(text) | Stop::Skip(text)) => {
            println!("failed {text}");
            ExitCode::FAILURE
        }
    }
}

fn ready_until_told() -> Outcome {
    println!("ready");
    let _ = std::io::stdout().flush();
    let mut rest = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut rest);
    Ok(())
}

/// Allocates and keeps.
fn hold(bytes: usize) -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(bytes)?;
    ok!(cuMemsetD8_v2(address, 0x5a, bytes));
    ready_until_told()
}

/// Has a kernel running.
fn spin(milliseconds: u64) -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    ok!(kernels.spin(0, Duration::from_millis(milliseconds)));
    ready_until_told()
}

/// Opens another process's allocation and checks its first bytes.
fn open_ipc(hex: &str) -> Outcome {
    let _gpu = Gpu::start()?;
    let handle = IpcHandle(bytes_of(hex));
    let mut address = 0;
    ok!(cuIpcOpenMemHandle_v2(&mut address, handle, 1));
    let bytes = read(address, 4096)?;
    check!(
        bytes == pattern(4096, 77),
        "the opened memory holds other bytes"
    );
    ok!(cuMemsetD8_v2(address, 0x3c, 4096));
    ok!(cuCtxSynchronize());
    ok!(cuIpcCloseMemHandle(address));
    ready_until_told()
}

/// Uses an allocation of another process's pool.
fn import_from_pool(fd: u64, hex: &str, bytes: u64) -> Outcome {
    let _gpu = Gpu::start()?;
    // What work takes that this does first is not the pool's.
    let first = alloc(MIB)?;
    ok!(cuMemsetD8_v2(first, 1, MIB));
    ok!(cuCtxSynchronize());
    let (bytes, before) = (usize::try_from(bytes).unwrap_or(0), quiet()?);
    let (mut pool, mut address) = (0, 0);
    let descriptor = usize::try_from(fd).unwrap_or(0);
    ok!(cuMemPoolImportFromShareableHandle(
        &mut pool, descriptor, 1, 0
    ));
    let data = PoolPointer(bytes_of(hex));
    ok!(cuMemPoolImportPointer(&mut address, pool, &data));
    let free = free_bytes()?;
    check!(free + 4 * MIB >= before, "free was {before}, is {free}");
    check!(
        read(address, bytes)? == pattern(bytes, 77),
        "the imported memory holds other bytes"
    );
    ok!(cuMemsetD8_v2(address, 0x3c, 4096));
    ok!(cuCtxSynchronize());
    ok!(cuMemFreeAsync(address, 0));
    ok!(cuCtxSynchronize());
    let again = cuMemFree_v2(address);
    check!(!again.is_ok(), "freed twice: {again:?}");
    ok!(cuMemPoolDestroy(pool));
    ready_until_told()
}

fn allocate_from_import(fd: u64) -> Outcome {
    let _gpu = Gpu::start()?;
    let (mut pool, mut address) = (0, 0);
    let descriptor = usize::try_from(fd).unwrap_or(0);
    ok!(cuMemPoolImportFromShareableHandle(
        &mut pool, descriptor, 1, 0
    ));
    let code = cuMemAllocFromPoolAsync(&mut address, MIB, pool, 0);
    check!(!code.is_ok(), "an imported pool gave memory: {code:?}");
    ready_until_told()
}

/// Bytes as text, for a helper's arguments.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn bytes_of<const N: usize>(hex: &str) -> [u8; N] {
    let mut bytes = [0; N];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = hex
            .get(2 * i..2 * i + 2)
            .and_then(|h| u8::from_str_radix(h, 16).ok())
            .unwrap_or(0);
    }
    bytes
}

/// A copy of a descriptor that a helper inherits under the same number.
pub fn inheritable(fd: i32) -> Result<i32, Stop> {
    // SAFETY: a plain call; a wrong descriptor is an error.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD, 100) };
    check!(copy >= 0, "descriptor {fd} cannot be copied");
    Ok(copy)
}

/// A helper that has said `ready`; killed when dropped.
pub struct Helper {
    child: Child,
}

impl Helper {
    pub fn start(args: &[&str]) -> Result<Helper, Stop> {
        let program = std::env::current_exe().map_err(|e| Stop::Fail(e.to_string()))?;
        let child = Command::new(program)
            .arg("helper")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Stop::Fail(format!("cannot start a helper: {e}")))?;
        let mut helper = Helper { child };
        let mut line = String::new();
        if let Some(out) = helper.child.stdout.take() {
            let _ = BufReader::new(out).read_line(&mut line);
        }
        check!(line.trim() == "ready", "helper {args:?} said {line:?}");
        Ok(helper)
    }

    /// SIGKILL, as from the out-of-memory killer, and waits for the end.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
