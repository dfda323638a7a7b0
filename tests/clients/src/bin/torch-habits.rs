//! A program that allocates as PyTorch does: a caching allocator, graphs with pools of their own, out of memory
//! that is answered by giving back and asking again.
//!
//!     torch-habits [--backend native|expandable|async] [--seed N]
//!
//! Prints `ready`, then answers lines of standard input: `train N` does N steps (allocate, fill, check, free),
//! `capture` captures a graph with a pool of its own, `full` takes all that it can and frees it again, `verify`
//! checks every block and replays every graph, `empty` gives back what is cached, `drop` destroys the oldest graph,
//! `quit` ends. An answer is one line: `ok` and figures in JSON, or `bad TEXT`.

use std::io::{BufRead, Write};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use clap::{Parser, ValueEnum};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError, sys};
use spillway_clients::caching::{Caching, Counts};
use spillway_clients::device::{Device, is_out_of_memory};
use spillway_clients::pattern::{Random, checksum_of_filled};
use spillway_clients::segments::{Expandable, Plain, keep_everything};

/// `CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH`, as PyTorch instantiates.
const AUTO_FREE: u64 = 1;
/// Checksums that one pass makes: their place is taken at first, since later there may be none.
const PASS: usize = 64;
/// Blocks that live at once while it trains.
const LIVE: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Backend {
    Native,
    Expandable,
    Async,
}

#[derive(Parser)]
struct Args {
    #[arg(long, value_enum, default_value = "native")]
    backend: Backend,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// A block and the word that fills it.
struct Block {
    at: u64,
    bytes: u64,
    value: u32,
}

/// A captured graph: what it writes each time, and the pool that its blocks come from.
struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    writes: Vec<Block>,
    /// The driver's own nodes hold the memory, or this does.
    pool: Option<Caching>,
}

/// Where blocks come from.
enum Allocator {
    Caching(Caching),
    Ordered(sys::CUmemoryPool, Counts),
}

struct Program {
    backend: Backend,
    device: Device,
    stream: Arc<CudaStream>,
    allocator: Allocator,
    results: CudaSlice<u64>,
    live: Vec<Block>,
    graphs: Vec<Graph>,
    random: Random,
    checked: u64,
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn ordered(stream: &CudaStream, bytes: u64) -> Result<u64, DriverError> {
    let mut at = 0;
    // SAFETY: a place of ours, and a stream that lives as long as the program.
    unsafe { sys::cuMemAllocAsync(&raw mut at, size(bytes), stream.cu_stream()) }.result()?;
    Ok(at)
}

impl Program {
    fn caching(&self) -> Result<Caching, DriverError> {
        let stream = self.stream.clone();
        Ok(Caching::new(match self.backend {
            Backend::Expandable => Box::new(Expandable::new(stream, 0)?),
            _ => Box::new(Plain { stream }),
        }))
    }

    fn allocate(&mut self, bytes: u64) -> Result<u64, DriverError> {
        match &mut self.allocator {
            Allocator::Caching(caching) => caching.allocate(bytes),
            Allocator::Ordered(pool, counts) => {
                let mut got = ordered(&self.stream, bytes);
                if got.as_ref().is_err_and(is_out_of_memory) {
                    self.stream.synchronize()?;
                    // SAFETY: the device's default pool.
                    unsafe { sys::cuMemPoolTrimTo(*pool, 0) }.result()?;
                    got = ordered(&self.stream, bytes);
                    counts.retries += u64::from(got.is_ok());
                }
                counts.refusals += u64::from(got.is_err());
                got
            }
        }
    }

    fn free(&mut self, block: &Block) -> Result<(), DriverError> {
        match &mut self.allocator {
            Allocator::Caching(caching) => caching.free(block.at, block.bytes),
            Allocator::Ordered(..) => {
                // SAFETY: a block from `allocate`, freed once, in the order of the stream that uses it.
                unsafe { sys::cuMemFreeAsync(block.at, self.stream.cu_stream()) }.result()?;
            }
        }
        Ok(())
    }

    /// A block that is filled with a word of its own; `None`: out of memory, after giving back and asking again.
    fn block(&mut self, bytes: u64) -> Result<Option<Block>, DriverError> {
        let value = (self.random.next_word() >> 32) as u32;
        match self.allocate(bytes) {
            Ok(at) => {
                self.device.fill(&self.stream, at, bytes / 4, value)?;
                Ok(Some(Block { at, bytes, value }))
            }
            Err(error) if is_out_of_memory(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is in these blocks is what was written there.
    fn check(&mut self, blocks: &[Block]) -> anyhow::Result<()> {
        for part in blocks.chunks(PASS) {
            self.stream.memset_zeros(&mut self.results)?;
            let at = self.results.device_ptr(&self.stream).0;
            for (number, block) in part.iter().enumerate() {
                let out = at + 8 * number as u64;
                self.device
                    .checksum(&self.stream, block.at, block.bytes / 4, out)?;
            }
            let mut sums = [0; PASS];
            self.stream.memcpy_dtoh(&self.results, &mut sums)?;
            self.stream.synchronize()?;
            for (block, sum) in part.iter().zip(sums) {
                ensure!(
                    sum == checksum_of_filled(block.value, block.bytes / 4),
                    "{} bytes at {:#x} hold other words",
                    block.bytes,
                    block.at
                );
                self.checked += 1;
            }
        }
        Ok(())
    }

    fn release(&mut self, number: usize) -> anyhow::Result<()> {
        let block = self.live.swap_remove(number);
        self.check(std::slice::from_ref(&block))?;
        Ok(self.free(&block)?)
    }

    /// A size as tensors have: mostly small, sometimes large.
    fn size(&mut self) -> u64 {
        let shift = self.random.below(15);
        (512 + self.random.below(1024) * 4) << shift.saturating_sub(2)
    }

    fn train(&mut self, steps: u64) -> anyhow::Result<()> {
        for _ in 0..steps {
            let bytes = self.size();
            while self.live.len() >= LIVE {
                let number = self.random.below(self.live.len() as u64);
                self.release(size(number))?;
            }
            match self.block(bytes)? {
                Some(block) => self.live.push(block),
                None if self.live.is_empty() => {
                    bail!("nothing is held, and {bytes} bytes are refused")
                }
                // As a program that catches the error and makes its batch smaller.
                None => self.release(0)?,
            }
        }
        Ok(())
    }

    /// All that can be had, twice: what the first time left cached has to make room the second time. Bytes.
    fn full(&mut self) -> anyhow::Result<u64> {
        self.take_all(&[20 << 20])?;
        self.take_all(&[64 << 20, 20 << 20, 6 << 20, 1 << 20])
    }

    fn take_all(&mut self, sizes: &[u64]) -> anyhow::Result<u64> {
        let mut held = Vec::new();
        for &bytes in sizes {
            while let Some(block) = self.block(bytes)? {
                held.push(block);
                ensure!(held.len() < 10_000, "no end");
            }
        }
        let sum = held.iter().map(|block| block.bytes).sum();
        self.check(&held)?;
        for block in &held {
            self.free(block)?;
        }
        Ok(sum)
    }

    /// Captures a graph that writes three blocks; what it allocates comes from a pool that nobody else uses.
    fn capture(&mut self) -> anyhow::Result<()> {
        let mut pool = match self.backend {
            Backend::Async => None,
            _ => Some(self.caching()?),
        };
        self.stream.synchronize()?;
        let raw = self.stream.cu_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream that lives as long as the program.
        unsafe { sys::cuStreamBeginCapture_v2(raw, mode) }.result()?;
        let written = self.write_captured(pool.as_mut());
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream captures; a place of ours.
        unsafe { sys::cuStreamEndCapture(raw, &raw mut graph) }.result()?;
        let writes = written.context("while capturing")?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph from above and a place of ours.
        unsafe { sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, AUTO_FREE) }.result()?;
        self.graphs.push(Graph {
            graph,
            exec,
            writes,
            pool,
        });
        self.replay(self.graphs.len() - 1)
    }

    /// The work of a capture: two blocks that stay, and one whose place is used again within it.
    fn write_captured(&mut self, mut pool: Option<&mut Caching>) -> anyhow::Result<Vec<Block>> {
        let mut writes = Vec::new();
        for bytes in [3 << 20, 12 << 20, 256 << 10] {
            let value = (self.random.next_word() >> 32) as u32;
            let at = match &mut pool {
                Some(pool) => {
                    // Freed at once, so the same place again: as an intermediate of the captured work.
                    let first = pool.allocate(bytes)?;
                    self.device.fill(&self.stream, first, bytes / 4, !value)?;
                    pool.free(first, bytes);
                    pool.allocate(bytes)?
                }
                None => ordered(&self.stream, bytes)?,
            };
            self.device.fill(&self.stream, at, bytes / 4, value)?;
            writes.push(Block { at, bytes, value });
        }
        Ok(writes)
    }

    fn replay(&mut self, number: usize) -> anyhow::Result<()> {
        let graph = &self.graphs[number];
        // SAFETY: an executable graph that is destroyed only by `forget`.
        unsafe { sys::cuGraphLaunch(graph.exec, self.stream.cu_stream()) }.result()?;
        let blocks: Vec<Block> = graph
            .writes
            .iter()
            .map(|block| Block { ..*block })
            .collect();
        self.check(&blocks).context("what a graph wrote")
    }

    fn forget(&mut self) -> anyhow::Result<()> {
        if self.graphs.is_empty() {
            return Ok(());
        }
        self.stream.synchronize()?;
        let graph = self.graphs.remove(0);
        // SAFETY: both are destroyed once, and nothing runs them.
        unsafe {
            sys::cuGraphExecDestroy(graph.exec).result()?;
            sys::cuGraphDestroy(graph.graph).result()?;
        }
        if self.backend == Backend::Async {
            for block in &graph.writes {
                // What the graph left allocated is the program's; freed with the graph, it is gone already.
                // SAFETY: an address; the driver refuses it if it is nobody's.
                let _ = unsafe { sys::cuMemFreeAsync(block.at, self.stream.cu_stream()) };
            }
            self.stream.synchronize()?;
            // SAFETY: a plain number.
            unsafe { sys::cuDeviceGraphMemTrim(0) }.result()?;
        } else if let Some(mut pool) = graph.pool {
            for block in &graph.writes {
                pool.free(block.at, block.bytes);
            }
            pool.empty()?;
        }
        Ok(())
    }

    fn verify(&mut self) -> anyhow::Result<()> {
        let live = std::mem::take(&mut self.live);
        let checked = self.check(&live);
        self.live = live;
        checked?;
        for number in 0..self.graphs.len() {
            self.replay(number)?;
        }
        Ok(())
    }

    fn empty(&mut self) -> anyhow::Result<()> {
        match &mut self.allocator {
            Allocator::Caching(caching) => caching.empty()?,
            Allocator::Ordered(pool, _) => {
                self.stream.synchronize()?;
                // SAFETY: the device's default pool.
                unsafe { sys::cuMemPoolTrimTo(*pool, 0) }.result()?;
            }
        }
        Ok(())
    }

    fn obey(&mut self, line: &str) -> anyhow::Result<serde_json::Value> {
        let mut words = line.split_whitespace();
        let mut took = 0;
        match words.next().unwrap_or_default() {
            "train" => self.train(words.next().unwrap_or("100").parse()?)?,
            "capture" => self.capture()?,
            "full" => took = self.full()?,
            "verify" => self.verify()?,
            "empty" => self.empty()?,
            "drop" => self.forget()?,
            other => bail!("what is {other:?}?"),
        }
        let (counts, reserved) = match &self.allocator {
            Allocator::Caching(caching) => (caching.counts, caching.reserved()),
            Allocator::Ordered(_, counts) => (*counts, 0),
        };
        Ok(serde_json::json!({
            "live": self.live.iter().map(|block| block.bytes).sum::<u64>(), "blocks": self.live.len(),
            "graphs": self.graphs.len(), "reserved": reserved, "segments": counts.segments,
            "retries": counts.retries, "refusals": counts.refusals, "checked": self.checked, "took": took,
        }))
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let device = Device::open(0)?;
    let stream = device.stream()?;
    device.context.bind_to_thread()?;
    let source = Plain {
        stream: stream.clone(),
    };
    let results = stream.alloc_zeros(PASS)?;
    let mut program = Program {
        results,
        backend: args.backend,
        device,
        stream,
        allocator: Allocator::Caching(Caching::new(Box::new(source))),
        live: Vec::new(),
        graphs: Vec::new(),
        random: Random::new(args.seed),
        checked: 0,
    };
    program.allocator = match args.backend {
        Backend::Async => Allocator::Ordered(keep_everything(0)?, Counts::default()),
        _ => Allocator::Caching(program.caching()?),
    };
    say("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "quit" {
            break;
        }
        match program.obey(&line) {
            Ok(figures) => say(&format!("ok {figures}")),
            Err(why) => say(&format!("bad {why:#}")),
        }
    }
    Ok(())
}
