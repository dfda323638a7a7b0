//! A second process of an adversary: started from this program, in step by lines.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::process::{Command, Stdio};

use crate::driver::{
    Address, Handle, cuCtxSetCurrent, cuDevicePrimaryCtxRetain, cuInit, cuIpcCloseMemHandle,
    cuIpcOpenMemHandle_v2, cuMemAlloc_v2, cuMemCreate, cuMemRelease,
};
use crate::family::physical;
use crate::stage::{GRANULE, Stop, info, need};
use crate::types::{AllocationProperties, IpcHandle, POSIX_FD};

/// See the module. Its end of input ends it.
pub struct Child {
    process: std::process::Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Child {
    /// Starts it, with variables changed, and waits until it has started CUDA.
    ///
    /// # Errors
    /// It did not start.
    pub fn start(arguments: &[&str], vars: &[(&str, &str)]) -> Result<Self, Stop> {
        let broken = |why: std::io::Error| Stop::Broken(format!("a second process: {why}"));
        let program = std::env::current_exe().map_err(broken)?;
        let mut command = Command::new(program);
        command.arg("child").args(arguments);
        command.envs(vars.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().map_err(broken)?;
        let answers = process
            .stdout
            .take()
            .ok_or_else(|| Stop::Broken("no pipe".to_owned()))?;
        let mut child = Self {
            process,
            answers: BufReader::new(answers),
        };
        let hello = child.hear()?;
        if hello == "ready" {
            Ok(child)
        } else {
            Err(Stop::Broken(format!("a second process says: {hello}")))
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// `SIGKILL`, and waits for its end.
    pub fn kill(mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Sends a line.
    pub fn tell(&mut self, line: &str) {
        if let Some(input) = &mut self.process.stdin {
            let _ = writeln!(input, "{line}");
            let _ = input.flush();
        }
    }

    /// Its next line.
    ///
    /// # Errors
    /// It ended.
    pub fn hear(&mut self) -> Result<String, Stop> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(1..) => Ok(line.trim().to_owned()),
            _ => Err(Stop::Broken("a second process ended".to_owned())),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// Lets a descriptor pass to what is started next.
pub fn inherit(descriptor: &impl AsRawFd, on: bool) {
    let flags = if on { 0 } else { libc::FD_CLOEXEC };
    // SAFETY: a descriptor of ours; the call changes one flag of it.
    unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFD, flags) };
}

fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}

fn begin() -> Result<(), Stop> {
    need(cuInit(0), "cuInit")?;
    let mut context: Handle = 0;
    need(
        cuDevicePrimaryCtxRetain(&mut context, 0),
        "cuDevicePrimaryCtxRetain",
    )?;
    need(cuCtxSetCurrent(context), "cuCtxSetCurrent")
}

/// Takes until it is refused; the last answer.
fn greedy() -> i32 {
    loop {
        let mut at: Address = 0;
        let code = cuMemAlloc_v2(&mut at, GRANULE as usize);
        if !code.is_ok() {
            return code.0;
        }
    }
}

/// Opens what was handed to it: `fd NUMBER BYTES` or `ipc HEX`.
fn open(words: &[String]) -> String {
    match words {
        [kind, number, bytes] if kind == "fd" => {
            let (Ok(number), Ok(bytes)) = (number.parse::<i32>(), bytes.parse::<u64>()) else {
                return "bad words".to_owned();
            };
            // SAFETY: inherited, and open as long as this process.
            let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
            let Ok(owned) = borrowed.try_clone_to_owned() else {
                return "no such descriptor".to_owned();
            };
            let opened = physical::import(&owned).and_then(|handle| physical::map(handle, bytes));
            opened.map_or_else(|code| format!("refused {}", code.0), |_| "open".to_owned())
        }
        [kind, hex] if kind == "ipc" => {
            let mut handle = IpcHandle([0; 64]);
            for (byte, pair) in handle.0.iter_mut().zip(hex.as_bytes().chunks(2)) {
                let text = std::str::from_utf8(pair).unwrap_or("0");
                *byte = u8::from_str_radix(text, 16).unwrap_or(0);
            }
            let mut at = 0;
            let code = cuIpcOpenMemHandle_v2(&mut at, handle, 1);
            if code.is_ok() {
                // Twice open is charged once, and closed once it is still open.
                let mut again = 0;
                if cuIpcOpenMemHandle_v2(&mut again, handle, 1).is_ok() {
                    cuIpcCloseMemHandle(again);
                }
                return "open".to_owned();
            }
            format!("refused {}", code.0)
        }
        _ => "bad words".to_owned(),
    }
}

/// The child's life.
pub fn run(arguments: &[String]) -> i32 {
    let first = arguments.first().map(String::as_str).unwrap_or_default();
    let mut other_half: Option<std::io::PipeWriter> = None;
    if first == "fork" {
        let Ok((waits, tells)) = std::io::pipe() else {
            return 1;
        };
        // SAFETY: the process has one thread.
        let other = unsafe { libc::fork() };
        if other == 0 {
            // SAFETY: plain numbers: this half ends with the other one.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            // The other half gets a context in any case; from then on, or once that one has taken all, both take
            // what they can.
            drop(tells);
            let _ = std::io::Read::read(&mut &waits, &mut [0]);
            if begin().is_ok() {
                greedy();
            }
            loop {
                std::thread::sleep(std::time::Duration::from_secs(1));
            }
        }
        other_half = Some(tells);
    }
    if let Err(why) = begin() {
        say(&format!("{why:?}"));
        return 1;
    }
    if arguments.get(1).is_none_or(|word| word != "late") {
        drop(other_half.take());
    }
    let mut opened = String::new();
    if arguments.first().is_some_and(|word| word == "open") {
        opened = open(&arguments[1..]);
    }
    say("ready");
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        match line.trim() {
            "take" | "more" => {
                say(&format!("refused {}", greedy()));
                drop(other_half.take());
            }
            "opened" => say(&opened),
            "free" => say(&info().0.to_string()),
            word if word.starts_with("export ") => {
                let bytes = word[7..].parse().unwrap_or(0);
                let made = physical::create(bytes, POSIX_FD).and_then(physical::export);
                match made {
                    Ok(descriptor) => say(&format!("fd {}", descriptor.into_raw_fd())),
                    Err(code) => say(&format!("refused {}", code.0)),
                }
            }
            "all" => {
                let free = info().0 / GRANULE * GRANULE;
                let (mut one, mut more) = (0, 0);
                let properties = AllocationProperties::device(0, 0);
                let fits = cuMemCreate(&mut one, free as usize, &properties, 0);
                let over = cuMemCreate(&mut more, GRANULE as usize, &properties, 0);
                say(&format!("{} {}", fits.0, over.0));
                cuMemRelease(more);
            }
            other => say(&format!("what is {other}?")),
        }
    }
    0
}
