//! Streams: a queue and a thread each; order between them by waiting for sequence numbers.
//!
//! A dependency always points at something submitted before, so waits cannot form a ring. The
//! thread starts with the first work and ends when the stream was destroyed and is empty.

use crate::capture::Capture;
use crate::code::{OUT_OF_MEMORY, R};
use crate::context::Context;
use crate::driver::Driver;
use crate::exec::{Op, Work};
use crate::green::Green;
use crate::sync::lock;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Which rules of implicit order a stream follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The legacy default stream: in order with every blocking stream.
    Legacy,
    /// Created without `CU_STREAM_NON_BLOCKING`, and the per-thread default streams.
    Blocking,
    NonBlocking,
}

struct Task {
    op: Op,
    after: Vec<(Arc<Stream>, u64)>,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    submitted: u64,
    running: bool,
    closed: bool,
    waiters: u32,
    /// The thread waits for work: only then is waking it worth a system call.
    asleep: bool,
}

/// A stream.
pub struct Stream {
    pub id: u64,
    pub kind: Kind,
    pub per_thread: bool,
    pub flags: u32,
    pub priority: i32,
    pub context: Arc<Context>,
    /// The green context that it was made in.
    pub green: Option<Arc<Green>>,
    queue: Mutex<Queue>,
    work: Condvar,
    done: Condvar,
    completed: AtomicU64,
    pub capturing: AtomicBool,
    pub capture: Mutex<Option<Arc<Capture>>>,
    /// The nodes that the next captured operation of this stream follows.
    pub frontier: Mutex<Vec<usize>>,
}

/// Launches that may be pending in a stream before the next one blocks.
const DEPTH: usize = 1024;

fn wait_on<'a>(condition: &Condvar, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
    condition
        .wait(queue)
        .unwrap_or_else(PoisonError::into_inner)
}

impl Stream {
    #[must_use]
    pub fn new(
        id: u64,
        kind: Kind,
        per_thread: bool,
        flags: u32,
        priority: i32,
        context: Arc<Context>,
        green: Option<Arc<Green>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            kind,
            per_thread,
            flags,
            priority,
            context,
            green,
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            completed: AtomicU64::new(0),
            capturing: AtomicBool::new(false),
            capture: Mutex::new(None),
            frontier: Mutex::default(),
        })
    }

    /// The `CUgreenCtx` that it was made in; 0: none.
    #[must_use]
    pub fn green_id(&self) -> u64 {
        self.green.as_ref().map_or(0, |green| green.id)
    }

    /// The blocking streams that a legacy default stream is in order with, all but those of other green contexts.
    #[must_use]
    pub fn blocking_beside(&self) -> Vec<Arc<Self>> {
        let beside = |s: &Arc<Self>| s.kind == Kind::Blocking && s.green_id() == self.green_id();
        self.context.streams().into_iter().filter(beside).collect()
    }

    /// The default stream that a blocking one is in order with.
    fn default_beside(&self) -> Option<Arc<Self>> {
        match &self.green {
            Some(green) => green.default_stream(),
            None => self.context.legacy(),
        }
    }

    /// # Errors
    /// The lasting error of its context, or `CONTEXT_IS_DESTROYED`.
    pub fn check(&self) -> R {
        match &self.green {
            Some(green) => green.check(),
            None => self.context.check(),
        }
    }

    /// The sequence number of the last work submitted.
    #[must_use]
    pub fn submitted(&self) -> u64 {
        lock(&self.queue).submitted
    }

    #[must_use]
    pub fn reached(&self, sequence: u64) -> bool {
        self.completed.load(Ordering::Acquire) >= sequence
    }

    /// Whether anything is still to do.
    #[must_use]
    pub fn busy(&self) -> bool {
        !self.reached(self.submitted())
    }

    /// Waits until the work of that number is done.
    pub fn wait(&self, sequence: u64) {
        if self.reached(sequence) {
            return;
        }
        let mut queue = lock(&self.queue);
        queue.waiters += 1;
        while !self.reached(sequence) {
            queue = wait_on(&self.done, queue);
        }
        queue.waiters -= 1;
    }

    /// Queues work behind everything that the rules put before it; returns its number.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if the stream's thread cannot be started.
    pub fn submit(self: &Arc<Self>, driver: &'static Driver, op: Op) -> R<u64> {
        // Room first, without holding the context's order: who makes room may have to submit.
        let mut queue = lock(&self.queue);
        if queue.tasks.len() >= DEPTH {
            queue.waiters += 1;
            while queue.tasks.len() >= DEPTH {
                queue = wait_on(&self.done, queue);
            }
            queue.waiters -= 1;
        }
        if self.kind == Kind::NonBlocking {
            return self.push(driver, queue, op, Vec::new());
        }
        drop(queue);
        let _order = lock(&self.context.order);
        let pending = |stream: &Arc<Self>| {
            let submitted = stream.submitted();
            (!stream.reached(submitted)).then(|| (Arc::clone(stream), submitted))
        };
        let after = if self.kind == Kind::Legacy {
            self.blocking_beside().iter().filter_map(pending).collect()
        } else {
            self.default_beside().iter().filter_map(pending).collect()
        };
        self.push(driver, lock(&self.queue), op, after)
    }

    fn push(
        self: &Arc<Self>,
        driver: &'static Driver,
        mut queue: MutexGuard<'_, Queue>,
        op: Op,
        after: Vec<(Arc<Self>, u64)>,
    ) -> R<u64> {
        if !queue.running {
            let stream = Arc::clone(self);
            std::thread::Builder::new()
                .name("sim-stream".into())
                .spawn(move || stream.serve(driver))
                .map_err(|_| OUT_OF_MEMORY)?;
            queue.running = true;
        }
        queue.tasks.push_back(Task { op, after });
        queue.submitted += 1;
        let sequence = queue.submitted;
        let asleep = std::mem::take(&mut queue.asleep);
        drop(queue);
        if asleep {
            self.work.notify_one();
        }
        Ok(sequence)
    }

    /// Lets the thread end once the queue is empty.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.work.notify_one();
    }

    fn serve(&self, driver: &'static Driver) {
        block_signals();
        let work = Work {
            driver,
            context: &self.context,
            stream: self.id,
        };
        loop {
            let task = {
                let mut queue = lock(&self.queue);
                loop {
                    if let Some(task) = queue.tasks.pop_front() {
                        break task;
                    }
                    if queue.closed {
                        queue.running = false;
                        return;
                    }
                    queue.asleep = true;
                    queue = wait_on(&self.work, queue);
                }
            };
            for (stream, sequence) in &task.after {
                stream.wait(*sequence);
            }
            if self.context.error.load(Ordering::Acquire) == 0 {
                let outcome =
                    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work.run(&task.op)));
                if let Err(code) = outcome.unwrap_or(Err(crate::code::LAUNCH_FAILED)) {
                    self.context.fail(code);
                    work.skip(&task.op);
                }
            } else {
                work.skip(&task.op);
            }
            drop(task);
            let queue = lock(&self.queue);
            self.completed.fetch_add(1, Ordering::AcqRel);
            if queue.waiters > 0 {
                self.done.notify_all();
            }
        }
    }
}

/// The application's signal handlers must not run on our threads.
fn block_signals() {
    // SAFETY: a local set, filled and then applied to this thread only.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
    }
}
