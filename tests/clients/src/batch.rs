//! Requests in batches, as engines for language models serve them: continuous batching, without mathematics.
//!
//! One thread makes steps. A step is one kernel that lasts `step + per_request * n` for the n requests in it: reading
//! the weights takes as long for one as for many, the rest grows with them. A request needs a KV cache for as long
//! as it runs, allocated when it joins and no sooner. While there is no memory for one more, those that came later
//! wait, first come first served, and the batch stays as large as it is. A cache whose request is done goes to the
//! next one that waits; when nobody waits, it is given back to the driver. So how many run at a time is decided by
//! memory alone, and a server uses more of it only while it has to.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::Context;
use cudarc::driver::{CudaStream, DriverError};

use crate::device::{Device, is_out_of_memory};
use crate::memory::{Kind, Memory};

/// How long a step lasts, and what a request needs.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The part of a step that does not depend on how many are in it.
    pub step: Duration,
    /// What each request in it adds.
    pub per_request: Duration,
    /// Bytes of the KV cache of one request.
    pub kv: u64,
    /// After answers, and when the first of a batch came: for so long more may join before the next step.
    pub linger: Duration,
}

/// A request in the queue.
pub struct Request {
    /// How many steps it takes; the first answer is there after one.
    pub steps: u32,
    /// When it came.
    pub arrived: Instant,
    /// Where the answer goes.
    pub answer: Sender<Result<Done, String>>,
}

/// How a request went.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// From its arrival to the end of its first step.
    pub first: Duration,
    /// From its arrival to its end.
    pub total: Duration,
    /// The most that were in a step with it.
    pub batch: usize,
}

/// What there was so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Steps made.
    pub steps: AtomicU64,
    /// Requests answered.
    pub answered: AtomicU64,
    /// The most that ran at a time.
    pub batch_max: AtomicU64,
    /// Times that there was no memory for one more.
    pub full: AtomicU64,
}

struct Running {
    request: Request,
    cache: Memory,
    left: u32,
    first: Option<Duration>,
    batch: usize,
}

/// The queue, the batch and the caches kept for who waits.
pub struct Engine {
    device: Device,
    settings: Settings,
    stream: Arc<CudaStream>,
    inbox: Receiver<Request>,
    counters: Arc<Counters>,
    waiting: VecDeque<Request>,
    running: Vec<Running>,
    spare: Vec<Memory>,
    fills: u32,
}

/// So much of a new cache is written: that it is there shows.
const TOUCHED: u64 = 64 << 10;

impl Engine {
    /// Makes the stream; nothing else is taken before there are requests.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(
        device: Device,
        settings: Settings,
        inbox: Receiver<Request>,
        counters: Arc<Counters>,
    ) -> Result<Self, DriverError> {
        Ok(Self {
            stream: device.stream()?,
            device,
            settings,
            inbox,
            counters,
            waiting: VecDeque::new(),
            running: Vec::new(),
            spare: Vec::new(),
            fills: 1,
        })
    }

    /// Serves until nobody can send requests any more.
    ///
    /// # Errors
    /// What the driver says, other than that memory is out.
    pub fn run(mut self) -> anyhow::Result<()> {
        loop {
            if self.running.is_empty() && self.waiting.is_empty() {
                let Ok(request) = self.inbox.recv() else {
                    return Ok(());
                };
                self.waiting.push_back(request);
                self.linger();
            }
            self.waiting.extend(self.inbox.try_iter());
            self.admit()?;
            if self.waiting.is_empty() {
                self.spare.clear();
            }
            if self.running.is_empty() {
                continue;
            }
            self.step()?;
            if self.answer() && self.waiting.is_empty() {
                self.linger();
            }
            if self.waiting.is_empty() {
                self.spare.clear();
            }
        }
    }

    /// Gives clients that were just answered, or come together, the time to be in the next step.
    fn linger(&mut self) {
        let until = Instant::now() + self.settings.linger;
        loop {
            match self
                .inbox
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(request) => self.waiting.push_back(request),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Takes from the queue while there is memory.
    fn admit(&mut self) -> anyhow::Result<()> {
        while let Some(request) = self.waiting.pop_front() {
            let cache = match self.spare.pop() {
                Some(cache) => cache,
                None => match Memory::new(&self.stream, Kind::Plain, self.settings.kv) {
                    Ok(cache) => cache,
                    Err(error) if is_out_of_memory(&error) => {
                        self.counters.full.fetch_add(1, SeqCst);
                        if self.running.is_empty() {
                            let _ = request
                                .answer
                                .send(Err("no memory for one KV cache".to_owned()));
                        } else {
                            self.waiting.push_front(request);
                        }
                        return Ok(());
                    }
                    Err(error) => return Err(error).context("KV cache"),
                },
            };
            let words = (cache.bytes().min(TOUCHED)) / 4;
            self.device
                .fill(&self.stream, cache.address(), words, self.fills)
                .context("writing a KV cache")?;
            self.fills = self.fills.wrapping_add(0x0100_0193);
            self.running.push(Running {
                left: request.steps.max(1),
                request,
                cache,
                first: None,
                batch: 0,
            });
        }
        Ok(())
    }

    fn step(&mut self) -> anyhow::Result<()> {
        let batch = self.running.len();
        let lasts =
            self.settings.step + self.settings.per_request * u32::try_from(batch).unwrap_or(1);
        self.device
            .spin(
                &self.stream,
                u64::try_from(lasts.as_nanos()).unwrap_or(u64::MAX),
            )
            .context("a step")?;
        self.stream.synchronize().context("a step")?;
        self.counters.steps.fetch_add(1, SeqCst);
        self.counters.batch_max.fetch_max(batch as u64, SeqCst);
        for one in &mut self.running {
            one.left -= 1;
            one.batch = one.batch.max(batch);
            one.first
                .get_or_insert_with(|| one.request.arrived.elapsed());
        }
        Ok(())
    }

    /// Answers who is done; whether there was anybody.
    fn answer(&mut self) -> bool {
        let before = self.running.len();
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].left > 0 {
                at += 1;
                continue;
            }
            let one = self.running.remove(at);
            self.counters.answered.fetch_add(1, SeqCst);
            // Who asked may be gone.
            let _ = one.request.answer.send(Ok(Done {
                first: one.first.unwrap_or_default(),
                total: one.request.arrived.elapsed(),
                batch: one.batch,
            }));
            self.spare.push(one.cache);
        }
        self.running.len() < before
    }
}
