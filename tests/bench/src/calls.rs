//! Which files a program opens, and which threads and sockets it makes, by watching its system calls.

use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What was seen of a program and its children.
#[derive(Debug, Default)]
pub struct Seen {
    /// System calls.
    pub calls: usize,
    /// Files that were opened.
    pub files: BTreeSet<String>,
    /// Threads that were started.
    pub threads: usize,
    /// Sockets and pairs of them.
    pub sockets: usize,
}

/// `struct ptrace_syscall_info` of the kernel, as far as it is read here: the part of an entry or an exit.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    op: u8,
    pad: [u8; 3],
    arch: u32,
    instruction: u64,
    stack: u64,
    /// Number and six arguments; at an exit the result and whether it is an error.
    words: [u64; 7],
}

const ENTRY: u8 = 1;
const EXIT: u8 = 2;

/// Runs a program to its end.
///
/// # Errors
/// It cannot be started or watched; containers may forbid it.
pub fn watch(command: &mut Command) -> Result<Seen> {
    // SAFETY: between fork and exec, one system call that is safe there.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let child = command.spawn().context("to be watched by ptrace")?;
    let root = i32::try_from(child.id())?;
    let mut seen = Seen::default();
    let mut opening = std::collections::HashMap::new();
    let (first, _) = wait(root)?;
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_EXITKILL;
    // SAFETY: a child of ours that has stopped.
    if unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, first, 0, options) } != 0 {
        bail!("ptrace: {}", io::Error::last_os_error());
    }
    go_on(first, 0);
    loop {
        let (pid, status) = wait(-1)?;
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if pid == root {
                return Ok(seen);
            }
            continue;
        }
        let signal = libc::WSTOPSIG(status);
        if signal == libc::SIGTRAP | 0x80 {
            look(pid, &mut seen, &mut opening);
            go_on(pid, 0);
        } else {
            // The kernel's own stops, at an exec or a new child, are not for the program.
            let own = signal == libc::SIGTRAP || signal == libc::SIGSTOP;
            go_on(pid, if own { 0 } else { signal });
        }
    }
}

fn wait(pid: i32) -> Result<(i32, i32)> {
    let mut status = 0;
    // SAFETY: the kernel fills one integer.
    match unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } {
        -1 => bail!("waitpid: {}", io::Error::last_os_error()),
        pid => Ok((pid, status)),
    }
}

fn go_on(pid: i32, signal: i32) {
    // SAFETY: a stopped child of ours; one that died meanwhile is refused.
    unsafe { libc::ptrace(libc::PTRACE_SYSCALL, pid, 0, signal) };
}

fn look(pid: i32, seen: &mut Seen, opening: &mut std::collections::HashMap<i32, String>) {
    /// `PTRACE_GET_SYSCALL_INFO`
    const GET_INFO: libc::c_uint = 0x420e;
    const THREAD: u64 = 0x0001_0000;
    let mut info = MaybeUninit::<Info>::zeroed();
    // SAFETY: the kernel writes at most as many bytes as it is told.
    let got = unsafe { libc::ptrace(GET_INFO, pid, size_of::<Info>(), info.as_mut_ptr()) };
    if got <= 0 {
        return;
    }
    // SAFETY: zeroed, then partly filled; all are integers.
    let info = unsafe { info.assume_init() };
    let [number, first, second, ..] = info.words;
    match info.op {
        ENTRY => {
            seen.calls += 1;
            let number = i64::try_from(number).unwrap_or(-1);
            opening.remove(&pid);
            match number {
                libc::SYS_openat => _ = opening.insert(pid, text(pid, second)),
                #[cfg(target_arch = "x86_64")]
                libc::SYS_open => _ = opening.insert(pid, text(pid, first)),
                libc::SYS_memfd_create | libc::SYS_eventfd2 | libc::SYS_epoll_create1 => {
                    seen.files
                        .insert(format!("descriptor of system call {number}"));
                }
                libc::SYS_socket | libc::SYS_socketpair => seen.sockets += 1,
                libc::SYS_clone if first & THREAD != 0 => seen.threads += 1,
                libc::SYS_clone3 if word(pid, first) & THREAD != 0 => seen.threads += 1,
                _ => {}
            }
        }
        EXIT => {
            if let Some(path) = opening.remove(&pid)
                && number.cast_signed() >= 0
            {
                seen.files.insert(path);
            }
        }
        _ => {}
    }
}

fn read(pid: i32, address: u64, bytes: &mut [u8]) -> usize {
    std::fs::File::open(format!("/proc/{pid}/mem"))
        .and_then(|memory| memory.read_at(bytes, address))
        .unwrap_or(0)
}

fn word(pid: i32, address: u64) -> u64 {
    let mut bytes = [0; 8];
    read(pid, address, &mut bytes);
    u64::from_ne_bytes(bytes)
}

fn text(pid: i32, address: u64) -> String {
    let mut bytes = [0; 4096];
    // A page may be the last one that is mapped.
    let here = usize::try_from(4096 - address % 4096).unwrap_or(4096);
    let mut got = read(pid, address, &mut bytes[..here]);
    if !bytes[..got].contains(&0) && here < 4096 {
        got += read(pid, address + here as u64, &mut bytes[here..]);
    }
    let end = bytes[..got]
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(got);
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::watch;
    use std::process::Command;

    #[test]
    fn files_sockets_and_threads_are_seen() {
        let script = "
import socket, threading
socket.socketpair()
thread = threading.Thread(target=print); thread.start(); thread.join()
open('/etc/passwd').close()
try: open('/no/such/file')
except OSError: pass
";
        let run = |script: &str| {
            let mut command = Command::new("python3");
            command
                .args(["-c", script])
                .stdout(std::process::Stdio::null());
            watch(&mut command)
        };
        // What python3 itself does, or the shell script that some machines have in its place.
        let (without, seen) = match run("pass").and_then(|without| Ok((without, run(script)?))) {
            Ok(both) => both,
            Err(why) => {
                println!("skipped: {why:#}");
                return;
            }
        };
        assert!(seen.files.contains("/etc/passwd") && !seen.files.contains("/no/such/file"));
        let added = (
            seen.sockets.wrapping_sub(without.sockets),
            seen.threads.wrapping_sub(without.threads),
        );
        assert_eq!(added, (1, 1), "{without:?}, then {seen:?}");
    }
}
