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
        "ipc-free" => free_opened(args.first().copied().unwrap_or("")),
        "pool" => import_from_pool(number(0), args.get(1).copied().unwrap_or(""), number(2)),
        "vmm-import" => import_memory(number(0), number(1)),
        "vmm-export" => export_memory(number(0), number(1)),
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

/// Opens another process's allocation, and frees it in wrong ways.
fn free_opened(hex: &str) -> Outcome {
    let _gpu = Gpu::start()?;
    let mut address = 0;
    ok!(cuIpcOpenMemHandle_v2(
        &mut address,
        IpcHandle(bytes_of(hex)),
        1
    ));
    for code in [
        cuMemFree_v2(address),
        cuMemFreeAsync(address, 0),
        cuIpcCloseMemHandle(address + 4096),
    ] {
        check!(!code.is_ok(), "opened memory was freed: {code:?}");
    }
    check!(read(address, 4096)? == pattern(4096, 77), "contents differ");
    ok!(cuIpcCloseMemHandle(address));
    let again = cuIpcCloseMemHandle(address);
    check!(!again.is_ok(), "closed twice: {again:?}");
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

fn map(gpu: &Gpu, handle: MemHandle, bytes: usize) -> Result<Dptr, Stop> {
    let mut address = 0;
    ok!(cuMemAddressReserve(&mut address, bytes, 0, 0, 0));
    ok!(cuMemMap(address, bytes, 0, handle, 0));
    ok!(cuMemSetAccess(address, bytes, &gpu.read_write(), 1));
    Ok(address)
}

/// Maps memory of a descriptor that this process inherited.
fn import_memory(fd: u64, bytes: u64) -> Outcome {
    let gpu = Gpu::start()?;
    let first = alloc(MIB)?;
    ok!(cuMemsetD8_v2(first, 1, MIB));
    ok!(cuCtxSynchronize());
    let (bytes, before) = (usize::try_from(bytes).unwrap_or(0), quiet()?);
    let mut handle = 0;
    let descriptor = usize::try_from(fd).unwrap_or(0);
    ok!(cuMemImportFromShareableHandle(&mut handle, descriptor, 1));
    let address = map(&gpu, handle, bytes)?;
    let free = free_bytes()?;
    check!(
        free + 4 * MIB >= before,
        "the memory counts twice: free was {before}, is {free}"
    );
    check!(
        read(address, bytes)? == pattern(bytes, 77),
        "the imported memory holds other bytes"
    );
    ok!(cuMemsetD8_v2(address, 0x3c, 4096));
    ok!(cuCtxSynchronize());
    ready_until_told()
}

/// Makes memory and sends a descriptor of it.
fn export_memory(socket: u64, bytes: u64) -> Outcome {
    let gpu = Gpu::start()?;
    let bytes = usize::try_from(bytes).unwrap_or(0);
    let prop = AllocationProp {
        handle_types: 1,
        ..gpu.prop()
    };
    let (mut handle, mut fd) = (0, -1_i32);
    ok!(cuMemCreate(&mut handle, bytes, &prop, 0));
    let address = map(&gpu, handle, bytes)?;
    write(address, &pattern(bytes, 92))?;
    ok!(cuMemExportToShareableHandle(
        (&raw mut fd).cast(),
        handle,
        1,
        0
    ));
    message(i32::try_from(socket).unwrap_or(-1), Some(fd))?;
    ready_until_told()
}

/// Sends one descriptor over a socket, or receives one.
fn message(socket: i32, sent: Option<i32>) -> Result<i32, Stop> {
    const HEAD: usize = size_of::<libc::cmsghdr>();
    let mut byte = [0_u8];
    let mut part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // A control message with one descriptor: its header, aligned as that, and four bytes padded to eight.
    let mut control = [0_u64; HEAD / 8 + 1];
    // SAFETY: plain data for which zero is a valid value.
    let mut all: libc::msghdr = unsafe { std::mem::zeroed() };
    all.msg_iov = &raw mut part;
    all.msg_iovlen = 1;
    all.msg_control = control.as_mut_ptr().cast();
    all.msg_controllen = size_of_val(&control);
    // SAFETY: the control buffer holds one message; the kernel reads or fills what the header names.
    unsafe {
        let head = libc::CMSG_FIRSTHDR(&raw const all);
        if let Some(fd) = sent {
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = HEAD + 4;
            libc::CMSG_DATA(head).cast::<i32>().write_unaligned(fd);
            check!(
                libc::sendmsg(socket, &raw const all, 0) == 1,
                "the descriptor cannot be sent"
            );
            return Ok(fd);
        }
        let n = libc::recvmsg(socket, &raw mut all, 0);
        let head = libc::CMSG_FIRSTHDR(&raw const all);
        check!(
            n == 1 && !head.is_null() && (*head).cmsg_type == libc::SCM_RIGHTS,
            "no descriptor came"
        );
        Ok(libc::CMSG_DATA(head).cast::<i32>().read_unaligned())
    }
}

/// Starts a helper with one end of a socket, given by its number, and takes the descriptor that it sends.
pub fn receive_descriptor(
    start: impl FnOnce(&str) -> Result<Helper, Stop>,
) -> Result<(Helper, i32), Stop> {
    use std::os::fd::AsRawFd;
    let (own, other) =
        std::os::unix::net::UnixDatagram::pair().map_err(|e| Stop::Fail(e.to_string()))?;
    let inherited = inheritable(other.as_raw_fd())?;
    let helper = start(&inherited.to_string())?;
    // SAFETY: made above, and only the helper's from now on.
    unsafe { libc::close(inherited) };
    Ok((helper, message(own.as_raw_fd(), None)?))
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
