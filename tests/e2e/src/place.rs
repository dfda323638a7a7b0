//! One test's machine: its folders, the simulated driver, the environment of everything started
//! there, and the end of it all.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::artifacts::artifact;
use crate::client::Launch;
use crate::daemon::Daemon;
use crate::memory::MemoryDir;

/// Marks every process of a place, whatever becomes of its parents.
const MARK: &str = "SPILLWAY_TEST_PLACE";

/// What a place is to be like. See [`Place::new`].
pub struct PlaceBuilder {
    name: String,
    time: Duration,
    world: bool,
    vars: BTreeMap<String, OsString>,
}

/// See the module.
pub struct Place {
    name: String,
    dir: PathBuf,
    vars: BTreeMap<String, OsString>,
    watch: Arc<Watch>,
    _memory: Option<MemoryDir>,
    _keep: tempfile::TempDir,
}

#[derive(Default)]
struct Watch {
    over: Mutex<bool>,
    word: Condvar,
    expired: AtomicBool,
}

/// A program that ran to its end.
#[derive(Debug)]
pub struct Shot {
    /// Exit code; `None`: a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl PlaceBuilder {
    /// Memory of each simulated GPU: `2GiB`.
    #[must_use]
    pub fn memory(self, size: &str) -> Self {
        self.var("SPILLWAY_SIM_MEMORY", size)
    }

    /// Number of simulated GPUs.
    #[must_use]
    pub fn gpus(self, count: u32) -> Self {
        self.var("SPILLWAY_SIM_GPUS", &count.to_string())
    }

    /// Speed of the simulated link: GB/s in, out, both together (`1,1,2`).
    #[must_use]
    pub fn link(self, rates: &str) -> Self {
        self.var("SPILLWAY_SIM_LINK", rates)
    }

    /// A variable for everything that is started in the place.
    #[must_use]
    pub fn var(mut self, name: &str, value: &str) -> Self {
        self.vars.insert(name.to_owned(), value.into());
        self
    }

    /// How long the test may take; then all of its processes are killed and it fails.
    #[must_use]
    pub fn time(mut self, time: Duration) -> Self {
        self.time = time;
        self
    }

    /// Other users may use the machine: for tests that drop privileges.
    #[must_use]
    pub fn world(mut self) -> Self {
        self.world = true;
        self
    }

    /// Makes it.
    ///
    /// # Panics
    /// The file system does not let us, or the simulator is not built.
    #[must_use]
    pub fn build(mut self) -> Place {
        let base = std::env::temp_dir();
        // A socket's address holds 107 bytes: a deep TMPDIR leaves no room for the names below it.
        let base = if base.as_os_str().len() <= 60 {
            base
        } else {
            "/tmp".into()
        };
        let keep = tempfile::Builder::new()
            .prefix("spillway-test.")
            .tempdir_in(base)
            .expect("a folder for the test");
        let dir = keep.path().to_owned();
        for part in ["lib", "run", "logs"] {
            std::fs::create_dir(dir.join(part)).expect("a folder");
        }
        let memory = MemoryDir::new();
        let sim = dir.join("sim");
        match &memory {
            Some(memory) => std::os::unix::fs::symlink(memory.path(), &sim).expect("a link"),
            None => std::fs::create_dir(&sim).expect("a folder"),
        }
        for (from, to) in [
            ("libcuda.so", "libcuda.so.1"),
            ("libnvidia_ml.so", "libnvidia-ml.so.1"),
        ] {
            // Copies: a build meanwhile must not replace what runs.
            std::fs::copy(artifact(from), dir.join("lib").join(to)).expect("the simulated driver");
        }
        std::os::unix::fs::symlink("libcuda.so.1", dir.join("lib/libcuda.so")).expect("a link");
        for library in ["libspillway.so", "libspillway_strict.so"] {
            std::fs::copy(artifact(library), dir.join("lib").join(library)).expect("the library");
        }
        if self.world {
            use std::os::unix::fs::PermissionsExt;
            let mode = |path: &Path, mode| {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
                    .expect("a mode");
            };
            mode(&dir, 0o755);
            mode(&dir.join("sim"), 0o1777);
            if let Some(memory) = &memory {
                memory.open_to_all();
            }
        }
        let mut fix = |name: &str, value: OsString| self.vars.insert(name.to_owned(), value);
        fix(MARK, dir.clone().into());
        fix("LD_LIBRARY_PATH", dir.join("lib").into());
        fix("SPILLWAY_SIM_DIR", dir.join("sim").into());
        fix("SPILLWAY_RUN_DIR", dir.join("run").into());
        let watch = Arc::new(Watch::default());
        watchdog(&self.name, self.time, dir.clone(), Arc::clone(&watch));
        Place {
            name: self.name,
            dir,
            vars: self.vars,
            watch,
            _memory: memory,
            _keep: keep,
        }
    }
}

impl Place {
    /// A machine with one simulated GPU of 1 GiB and 90 s to live, to be changed before
    /// [`PlaceBuilder::build`].
    #[must_use]
    #[expect(clippy::new_ret_no_self, reason = "the builder makes it")]
    pub fn new(name: &str) -> PlaceBuilder {
        let builder = PlaceBuilder {
            name: name.to_owned(),
            time: Duration::from_secs(90),
            world: false,
            vars: BTreeMap::new(),
        };
        builder.memory("1GiB").gpus(1)
    }

    /// Its folder: `lib` (driver and library), `sim`, `run`, `logs`.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The coordinator's run directory.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The copy of `libspillway.so` that is used here.
    #[must_use]
    pub fn library(&self) -> PathBuf {
        self.dir.join("lib/libspillway.so")
    }

    /// The copy of `libspillway_strict.so` that is used here.
    #[must_use]
    pub fn strict_library(&self) -> PathBuf {
        self.dir.join("lib/libspillway_strict.so")
    }

    /// The environment of everything that is started here.
    #[must_use]
    pub fn vars(&self) -> &BTreeMap<String, OsString> {
        &self.vars
    }

    /// A new log file's path.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        let logs = self.dir.join("logs");
        (0..)
            .map(|n| logs.join(format!("{name}.{n}")))
            .find(|path| !path.exists())
            .unwrap_or_else(|| logs.join(name))
    }

    /// A command in the place's environment, without anything of Spillway's or CUDA's from outside;
    /// not under Spillway. It dies with the calling thread.
    #[must_use]
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            let foreign = ["SPILLWAY_", "CUDA_", "NVIDIA_", "LD_", "PYTHON"]
                .iter()
                .any(|prefix| text.starts_with(prefix));
            if foreign {
                command.env_remove(name);
            }
        }
        command.envs(&self.vars).stdin(Stdio::null());
        die_with_us(&mut command);
        command
    }

    /// Starts a coordinator and waits until it answers.
    #[must_use]
    pub fn daemon(&self, flags: &[&str]) -> Daemon<'_> {
        Daemon::start(self, flags)
    }

    /// A client program by the name of its file among the artifacts, to be started under Spillway.
    #[must_use]
    pub fn client(&self, program: &str) -> Launch<'_> {
        Launch::new(self, artifact(program))
    }

    /// The same for any program: by path, or found on PATH.
    #[must_use]
    pub fn program(&self, program: impl Into<PathBuf>) -> Launch<'_> {
        Launch::new(self, program.into())
    }

    /// Runs the `spillway` command to its end.
    #[must_use]
    pub fn spillway(&self, arguments: &[&str]) -> Shot {
        let mut command = self.command(artifact("spillway"));
        command
            .env("SPILLWAY_LIBRARY", self.library())
            .args(arguments);
        self.run(command)
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// It cannot be started.
    #[must_use]
    pub fn run(&self, mut command: Command) -> Shot {
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().expect("the command starts");
        Shot {
            code: status.code(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }

    /// Prints the tails of all logs.
    pub fn show_logs(&self) {
        show_logs(&self.name, &self.dir);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self
            .watch
            .over
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = true;
        self.watch.word.notify_all();
        let expired = self.watch.expired.load(SeqCst);
        if std::thread::panicking() && !expired {
            self.show_logs();
        }
        end_all(&self.dir);
        // What a killed coordinator leaves for whoever wants to know what it did last.
        let _ = std::fs::remove_file(snapshot(&self.run_dir()));
        assert!(
            !expired || std::thread::panicking(),
            "{}: took too long",
            self.name
        );
    }
}

/// The published snapshot of a run directory, by the rule in `include/spillway.h`.
fn snapshot(run_dir: &Path) -> PathBuf {
    let hash = run_dir.as_os_str().as_encoded_bytes().iter();
    let hash = hash.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    Path::new("/dev/shm").join(format!("spillway-{hash:016x}"))
}

/// The child gets SIGKILL when the thread that starts it ends.
fn die_with_us(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: prctl is a plain system call, allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

fn watchdog(name: &str, time: Duration, dir: PathBuf, watch: Arc<Watch>) {
    let name = name.to_owned();
    std::thread::spawn(move || {
        let over = watch
            .over
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let wait = watch.word.wait_timeout_while(over, time, |over| !*over);
        let (over, _) = wait.unwrap_or_else(std::sync::PoisonError::into_inner);
        if !*over {
            watch.expired.store(true, SeqCst);
            eprintln!("{name}: not done within {time:?}; killing its processes");
            show_logs(&name, &dir);
            end_all(&dir);
        }
    });
}

/// Kills every process of a place, until there is none.
fn end_all(dir: &Path) {
    let mark = format!("{MARK}={}", dir.display());
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        let mut any = false;
        for pid in processes() {
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            if environ.split(|b| *b == 0).any(|var| var == mark.as_bytes()) {
                any = true;
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        if !any {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn processes() -> Vec<i32> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|pid| *pid != own).collect()
}

fn show_logs(name: &str, dir: &Path) {
    let mut logs: Vec<PathBuf> = std::fs::read_dir(dir.join("logs"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    logs.sort();
    for log in logs {
        let text = String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(25)..];
        let file = log
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        eprintln!(
            "---- {name}: {file} ({} lines)\n{}",
            lines.len(),
            tail.join("\n")
        );
    }
}
