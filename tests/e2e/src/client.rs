//! A client program in a place: started bare or under Spillway, driven by lines.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::place::Place;
use crate::wait::until_within;

/// How long an answer may take, unless said otherwise.
const ANSWER: Duration = Duration::from_secs(30);

/// A client about to be started.
pub struct Launch<'a> {
    place: &'a Place,
    program: PathBuf,
    name: String,
    arguments: Vec<OsString>,
    vars: Vec<(String, OsString)>,
    preload: bool,
}

/// See the module. Killed when dropped.
pub struct Client {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    log: PathBuf,
}

impl<'a> Launch<'a> {
    pub(crate) fn new(place: &'a Place, program: PathBuf) -> Self {
        let name = program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Self {
            place,
            program,
            name,
            arguments: Vec::new(),
            vars: Vec::new(),
            preload: true,
        }
    }

    /// Without Spillway.
    #[must_use]
    pub fn bare(mut self) -> Self {
        self.preload = false;
        self
    }

    /// An argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Arguments, split at spaces.
    #[must_use]
    pub fn args(mut self, arguments: &str) -> Self {
        self.arguments
            .extend(arguments.split_whitespace().map(OsString::from));
        self
    }

    /// A variable.
    #[must_use]
    pub fn var(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.vars.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// `SPILLWAY_WORKLOAD`; also names the log.
    #[must_use]
    pub fn workload(mut self, name: &str) -> Self {
        self.name = format!("{name}.{}", self.name).replace('/', "_");
        self.var("SPILLWAY_WORKLOAD", name)
    }

    /// `SPILLWAY_REQUEST`.
    #[must_use]
    pub fn request(self, size: &str) -> Self {
        self.var("SPILLWAY_REQUEST", size)
    }

    /// `SPILLWAY_LIMIT`.
    #[must_use]
    pub fn limit(self, size: &str) -> Self {
        self.var("SPILLWAY_LIMIT", size)
    }

    /// Starts it.
    ///
    /// # Panics
    /// It cannot be started.
    #[must_use]
    pub fn start(self) -> Client {
        let log = self.place.log(&self.name);
        let mut command = self.place.command(&self.program);
        command.args(&self.arguments);
        if self.preload {
            command.env("LD_PRELOAD", self.place.library());
        }
        command.envs(self.vars.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(std::fs::File::create(&log).expect("a log"));
        let spawned = command.spawn();
        let mut child = spawned.unwrap_or_else(|why| panic!("{}: {why}", self.program.display()));
        let (send, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let Ok(line) = line else { return };
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        Client {
            name: self.name,
            child,
            stdin,
            lines,
            log,
        }
    }

    /// Starts it, closes its standard input and waits for its end; returns its exit code and all of
    /// its standard output.
    #[must_use]
    pub fn finish(self, time: Duration) -> (Option<i32>, String, String) {
        let mut client = self.start();
        client.close_stdin();
        let code = client.wait(time);
        let output: Vec<String> = client.lines.iter().collect();
        (code, output.join("\n"), client.stderr())
    }
}

impl Client {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(0)
    }

    /// Sends a line.
    ///
    /// # Panics
    /// It does not read any more.
    pub fn send(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("standard input is open");
        let sent = stdin
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| stdin.flush());
        if let Err(why) = sent {
            panic!("{line:?}: {why}; {}", self.obituary());
        }
    }

    /// The next line of its standard output.
    ///
    /// # Panics
    /// None comes within 30 s.
    pub fn line(&mut self) -> String {
        self.line_within(ANSWER)
    }

    /// The next line of its standard output.
    ///
    /// # Panics
    /// None comes within `time`, or it ends.
    pub fn line_within(&mut self, time: Duration) -> String {
        match self.lines.recv_timeout(time) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                panic!(
                    "{}: no line within {time:?}; stderr: {}",
                    self.name,
                    self.stderr()
                )
            }
            Err(RecvTimeoutError::Disconnected) => panic!("{}", self.obituary()),
        }
    }

    /// The next line if one comes within `time`; `None`: not yet, or its output is closed.
    pub fn try_line(&mut self, time: Duration) -> Option<String> {
        self.lines.recv_timeout(time).ok()
    }

    /// Sends a line and returns the next one.
    pub fn ask(&mut self, line: &str) -> String {
        self.send(line);
        self.line()
    }

    /// Sends a line and returns the next one, waiting for up to `time`.
    pub fn ask_within(&mut self, line: &str, time: Duration) -> String {
        self.send(line);
        self.line_within(time)
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// All that it wrote to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// It still runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid()), signal);
    }

    /// `SIGKILL`, and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end; `None`: a signal ended it.
    ///
    /// # Panics
    /// It does not end within `time`.
    pub fn wait(&mut self, time: Duration) -> Option<i32> {
        let what = format!("{} ends", self.name);
        until_within(time, &what, || self.child.try_wait().ok().flatten()).code()
    }

    fn obituary(&mut self) -> String {
        std::thread::sleep(Duration::from_millis(20));
        let how = match self.child.try_wait() {
            Ok(Some(status)) => format!("it ended: {status}"),
            _ => "its output is closed".to_owned(),
        };
        format!("{}: {how}; stderr: {}", self.name, self.stderr())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if std::thread::panicking() && self.alive() {
            eprintln!("---- {}: {}", self.name, threads(self.pid()));
        }
        self.kill();
    }
}

/// What the threads of a process are doing, for the report of a failed test.
fn threads(pid: i32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let read = |path: PathBuf| {
        std::fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let lines = tasks.map(|task| {
        let [name, stat, wait, call] =
            ["comm", "stat", "wchan", "syscall"].map(|file| read(task.path().join(file)));
        // After the name in parentheses: the state, and the 12th and 13th figure are processor time.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let field = |at: usize| fields.get(at).copied().unwrap_or("?");
        let call = call.split(' ').next().unwrap_or_default();
        format!(
            "{name} {} {wait} syscall {call} ticks {}+{}",
            field(0),
            field(11),
            field(12)
        )
    });
    lines.collect::<Vec<_>>().join("\n    ")
}
