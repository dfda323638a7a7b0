//! What an adversary is given: a device, a limit, and cases that are watched from outside.
//!
//! An adversary and its runner go in step, by lines of JSON on standard output and plain lines on standard
//! input: `begin` (the witness starts afresh), `top` (the witness looks now), `evict` (the coordinator
//! evicts the workload), `result`, `end`. Standard input closed: run by hand, nobody watches.

use std::cell::Cell;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::driver::{
    Code, Handle, cuCtxSetCurrent, cuDevicePrimaryCtxRetain, cuInit, cuMemGetInfo_v2,
};

/// A page of device memory: what is charged at least.
pub const GRANULE: u64 = 2 << 20;
pub const MIB: u64 = 1 << 20;

/// How long freed memory may take to show, where the figure is measured and not counted.
const SETTLES_WITHIN: Duration = Duration::from_millis(1500);

/// Why a case ended before its end.
#[derive(Debug)]
pub enum Stop {
    /// The driver cannot do this.
    Skip(String),
    /// Something failed that has nothing to do with the limit.
    Broken(String),
}

/// A case's outcome.
pub type Done = Result<(), Stop>;

/// Free and total bytes, as the program is told.
pub type Info = (u64, u64);

/// See the module.
pub struct Stage {
    /// The device, and its primary context, which is current.
    pub device: i32,
    pub context: Handle,
    /// No coordinator: overhead is not measured.
    pub alone: bool,
    ended: Cell<bool>,
}

/// One watched attempt.
pub struct Case<'a> {
    stage: &'a Stage,
    name: String,
    before: Info,
    top: Info,
    held: u64,
    held_most: u64,
    refused: Vec<String>,
    wrong: Vec<String>,
    leak: Vec<String>,
    /// Processes beside this one whose memory counts against limits of their own.
    workloads: u64,
    /// Memory that others may leave to this workload beyond its limit.
    left: u64,
}

/// Turns a code into a stop: what the driver does not have is skipped.
pub fn need(code: Code, what: &str) -> Done {
    if code.is_ok() {
        Ok(())
    } else if code.is_missing() {
        Err(Stop::Skip(format!("{what}: the driver answers {}", code.0)))
    } else {
        Err(Stop::Broken(format!("{what}: {}", code.0)))
    }
}

/// What `cuMemGetInfo` says of the current context's device.
pub fn info() -> Info {
    let (mut free, mut total) = (0, 0);
    let code = cuMemGetInfo_v2(&mut free, &mut total);
    if code.is_ok() {
        (free as u64, total as u64)
    } else {
        (0, 0)
    }
}

fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(MIB) {
        format!("{} MiB", bytes / MIB)
    } else {
        format!("{bytes} B")
    }
}

impl Stage {
    /// Starts CUDA on the first visible device.
    ///
    /// # Errors
    /// The driver's refusal.
    pub fn new(alone: bool) -> Result<Self, Stop> {
        need(cuInit(0), "cuInit")?;
        let mut context = 0;
        need(
            cuDevicePrimaryCtxRetain(&mut context, 0),
            "cuDevicePrimaryCtxRetain",
        )?;
        need(cuCtxSetCurrent(context), "cuCtxSetCurrent")?;
        Ok(Self {
            device: 0,
            context,
            alone,
            ended: Cell::new(false),
        })
    }

    /// Tells the runner something and waits for its line; empty: nobody is there.
    pub fn tell(&self, what: &Value) -> String {
        println!("{what}");
        let _ = std::io::stdout().flush();
        if self.ended.get() {
            return String::new();
        }
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line).unwrap_or(0);
        self.ended.set(read == 0);
        line.trim().to_owned()
    }

    /// One watched attempt: nothing may be held before it, and nothing after.
    pub fn case(&self, name: &str, attempt: impl FnOnce(&mut Case<'_>) -> Done) {
        self.tell(&json!({"do": "begin", "case": name}));
        let before = info();
        let mut case = Case {
            stage: self,
            name: name.to_owned(),
            before,
            top: before,
            held: 0,
            held_most: 0,
            refused: Vec::new(),
            wrong: Vec::new(),
            leak: Vec::new(),
            workloads: 1,
            left: 0,
        };
        let done = attempt(&mut case);
        if done.is_ok() {
            case.released("at the end");
        }
        let after = info();
        let (skipped, broken) = match done {
            Ok(()) => (None, None),
            Err(Stop::Skip(why)) => (Some(why), None),
            Err(Stop::Broken(why)) => (None, Some(why)),
        };
        let result = json!({
            "do": "result", "case": case.name, "held": case.held_most, "before": case.before, "top": case.top,
            "after": after, "refused": case.refused, "wrong": case.wrong, "leak": case.leak,
            "workloads": case.workloads, "left": case.left, "skipped": skipped, "broken": broken,
        });
        self.tell(&result);
    }

    /// A way that the driver does not have at all.
    pub fn skip(&self, name: &str, why: &str) {
        self.case(name, |_| Err(Stop::Skip(why.to_owned())));
    }
}

impl Case<'_> {
    /// The stage.
    pub fn stage(&self) -> &Stage {
        self.stage
    }

    /// `cuMemGetInfo` when the case began.
    pub fn before(&self) -> Info {
        self.before
    }

    /// So much was got.
    pub fn took(&mut self, bytes: u64) {
        self.held += bytes;
        self.held_most = self.held_most.max(self.held);
    }

    /// So much was given back.
    pub fn gave(&mut self, bytes: u64) {
        self.held = self.held.saturating_sub(bytes);
    }

    /// As much as can be had is held now: the witness looks.
    pub fn top(&mut self) -> Info {
        let now = info();
        if now.0 <= self.top.0 {
            self.top = now;
        }
        self.stage.tell(&json!({"do": "top"}));
        now
    }

    /// The coordinator evicts this workload, and answers when it is done.
    ///
    /// # Errors
    /// It could not; skipped if there is none.
    pub fn evict(&self) -> Done {
        match self.stage.tell(&json!({"do": "evict"})).as_str() {
            "ok" => Ok(()),
            "" => Err(Stop::Skip("nobody there to evict it".to_owned())),
            other => Err(Stop::Broken(format!("evict: {other}"))),
        }
    }

    /// More than one workload takes part: the sum of their limits counts.
    pub fn workloads(&mut self, count: u64) {
        self.workloads = count;
    }

    /// What was another workload's when this one mapped it is not taken away when that one ends. So much may be
    /// left to it beyond its limit, and no more.
    pub fn left(&mut self, bytes: u64) {
        self.left = bytes;
    }

    /// Something that still fits was refused.
    pub fn refused(&mut self, what: impl Into<String>) {
        self.refused.push(what.into());
    }

    /// Something was answered in another way than it has to be.
    pub fn wrong(&mut self, what: impl Into<String>) {
        self.wrong.push(what.into());
    }

    /// Something did not come back.
    pub fn leak(&mut self, what: impl Into<String>) {
        self.leak.push(what.into());
    }

    /// What must fit: a refusal is noted.
    pub fn fits(&mut self, code: Code, bytes: u64, what: &str) -> bool {
        if !code.is_ok() {
            let (free, _) = info();
            self.refused(format!(
                "{what} of {}: {}, with {} free",
                size(bytes),
                code.0,
                size(free)
            ));
        }
        code.is_ok()
    }

    /// What must be refused as out of memory, and nothing else.
    pub fn too_much(&mut self, code: Code, bytes: u64, what: &str) {
        if code.is_ok() {
            self.wrong(format!(
                "{what} of {} more than is free: not refused",
                size(bytes)
            ));
        } else {
            self.refusal(code, what);
        }
    }

    /// A refusal has the one code that it may have.
    pub fn refusal(&mut self, code: Code, what: &str) {
        if code != Code::OUT_OF_MEMORY {
            self.wrong(format!("{what}: refused by {} instead of 2", code.0));
        }
    }

    /// All is freed: `cuMemGetInfo` says what it said before, at once or when it was measured again.
    pub fn released(&mut self, when: &str) {
        self.held = 0;
        let start = Instant::now();
        let mut now = info();
        while now != self.before && start.elapsed() < SETTLES_WITHIN {
            std::thread::sleep(Duration::from_millis(5));
            now = info();
        }
        if now != self.before {
            self.leak(format!(
                "{when}: {} of {} free, before {} of {}",
                size(now.0),
                size(now.1),
                size(self.before.0),
                size(self.before.1)
            ));
        }
    }
}
