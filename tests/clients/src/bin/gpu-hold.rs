//! Holds device memory, for tests of bursts and quotas: idle, busy, or touched every so often; told what to do
//! by lines on stdin.
//!
//!     alloc SIZE   -> ok | oom | error TEXT
//!     free [N]     -> ok N BYTES         frees the last N allocations, or all
//!     info         -> FREE TOTAL         as cuMemGetInfo says, bytes
//!     held         -> BYTES
//!     name         -> NAME               of the device
//!     launch       -> ok SECONDS         fills all that is held, waits
//!     spin         -> ok SECONDS         a kernel of 1 ms that touches no memory, waits
//!     checksum     -> ok | bad TEXT      whether all that is held still has its contents
//!     busy | idle  -> ok                 starts or stops launching all the time
//!     quit         -> (ends; so does the end of stdin)
//!
//! First it prints `held BYTES` when it has got what `--bytes` asks for, or `held BYTES oom` when there was less.

use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Parser;
use cudarc::driver::{CudaStream, DriverError};
use spillway_clients::device::{Device, is_out_of_memory};
use spillway_clients::memory::{Kind, Memory, checksums};
use spillway_clients::{pattern, sizes};

#[derive(Parser)]
struct Args {
    /// How much to hold from the start
    #[arg(long, value_parser = sizes::parse_bytes)]
    bytes: Option<u64>,
    /// Size of each allocation of `--bytes`
    #[arg(long, value_parser = sizes::parse_bytes, default_value = "64MiB")]
    step: u64,
    /// Launch all the time
    #[arg(long, conflicts_with_all = ["idle", "touch_every"])]
    busy: bool,
    /// Launch nothing (the default)
    #[arg(long)]
    idle: bool,
    /// Launch once every so many milliseconds
    #[arg(long, value_name = "MS")]
    touch_every: Option<u64>,
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Allocate by cuMemAllocAsync, as cudarc does by itself, and not by cuMemAlloc
    #[arg(long)]
    ordered: bool,
}

/// An allocation and the word that it was filled with.
struct Held {
    memory: Memory,
    value: u32,
}

struct Program {
    device: Device,
    stream: Arc<CudaStream>,
    kind: Kind,
    held: Mutex<Vec<Held>>,
    filled: AtomicU64,
    busy: AtomicBool,
    touch_every: AtomicU64,
    quit: AtomicBool,
}

impl Program {
    fn alloc(&self, bytes: u64) -> Result<(), DriverError> {
        let memory = Memory::new(&self.stream, self.kind, bytes)?;
        let value =
            u32::try_from(self.filled.fetch_add(0x0001_0003, SeqCst) & 0xffff_ffff).unwrap_or(0);
        self.device
            .fill(&self.stream, memory.address(), memory.words(), value)?;
        self.stream.synchronize()?;
        self.held
            .lock()
            .map(|mut held| held.push(Held { memory, value }))
            .unwrap_or_default();
        Ok(())
    }

    fn total(&self) -> u64 {
        self.held
            .lock()
            .map(|held| held.iter().map(|h| h.memory.bytes()).sum())
            .unwrap_or(0)
    }

    fn free(&self, count: usize) -> (usize, u64) {
        let Ok(mut held) = self.held.lock() else {
            return (0, 0);
        };
        let keep = held.len().saturating_sub(count);
        let gone = held.split_off(keep);
        let bytes = gone.iter().map(|h| h.memory.bytes()).sum();
        (gone.len(), bytes)
    }

    /// Fills everything again with the values that it has: a write to all that is held.
    fn touch(&self) -> Result<(), DriverError> {
        let Ok(held) = self.held.lock() else {
            return Ok(());
        };
        for one in held.iter() {
            self.device.fill(
                &self.stream,
                one.memory.address(),
                one.memory.words(),
                one.value,
            )?;
        }
        self.stream.synchronize()
    }

    fn check(&self) -> Result<Option<String>, DriverError> {
        let Ok(held) = self.held.lock() else {
            return Ok(Some("a thread panicked".into()));
        };
        let sums = checksums(
            &self.device,
            &self.stream,
            held.iter().map(|h| (h.memory.address(), h.memory.words())),
        )?;
        for (number, (one, sum)) in held.iter().zip(sums).enumerate() {
            if sum != pattern::checksum_of_filled(one.value, one.memory.words()) {
                return Ok(Some(format!(
                    "allocation {number} at {:#x} has other contents",
                    one.memory.address()
                )));
            }
            if !one.memory.unmoved(&self.device)? {
                return Ok(Some(format!(
                    "allocation {number} is not at {:#x} any more",
                    one.memory.address()
                )));
            }
        }
        Ok(None)
    }

    /// Runs on a thread of its own: launches while busy, or when it is time.
    fn launch_loop(&self) {
        while !self.quit.load(SeqCst) {
            let every = self.touch_every.load(SeqCst);
            if self.busy.load(SeqCst) || every > 0 {
                let start = Instant::now();
                let spun = self
                    .device
                    .spin(&self.stream, 200_000)
                    .and_then(|()| self.touch());
                if let Err(error) = spun {
                    say(&format!("error in background {error:?}"));
                    return;
                }
                if every > 0 && !self.busy.load(SeqCst) {
                    std::thread::sleep(
                        Duration::from_millis(every).saturating_sub(start.elapsed()),
                    );
                }
            } else {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    fn answer(&self, line: &str) -> Result<String, DriverError> {
        let mut words = line.split_whitespace();
        Ok(match (words.next(), words.next()) {
            (Some("alloc"), Some(size)) => match sizes::parse_bytes(size) {
                Err(text) => format!("error {text}"),
                Ok(bytes) => match self.alloc(bytes) {
                    Ok(()) => "ok".into(),
                    Err(error) if is_out_of_memory(&error) => "oom".into(),
                    Err(error) => return Err(error),
                },
            },
            (Some("free"), count) => {
                let (count, bytes) =
                    self.free(count.and_then(|c| c.parse().ok()).unwrap_or(usize::MAX));
                format!("ok {count} {bytes}")
            }
            (Some("info"), _) => {
                let (free, total) = self.device.context.mem_get_info()?;
                format!("{free} {total}")
            }
            (Some("name"), _) => self.device.context.name()?,
            (Some("held"), _) => self.total().to_string(),
            (Some("launch"), _) => {
                let start = Instant::now();
                self.touch()?;
                format!("ok {:.6}", start.elapsed().as_secs_f64())
            }
            (Some("spin"), _) => {
                let start = Instant::now();
                self.device.spin(&self.stream, 1_000_000)?;
                self.stream.synchronize()?;
                format!("ok {:.6}", start.elapsed().as_secs_f64())
            }
            (Some("checksum"), _) => match self.check()? {
                None => "ok".into(),
                Some(text) => format!("bad {text}"),
            },
            (Some("busy"), _) => {
                self.busy.store(true, SeqCst);
                "ok".into()
            }
            (Some("idle"), _) => {
                self.busy.store(false, SeqCst);
                self.touch_every.store(0, SeqCst);
                self.stream.synchronize()?;
                "ok".into()
            }
            _ => format!("error what is {line:?}?"),
        })
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let device = Device::open(args.device)?;
    let program = Arc::new(Program {
        stream: device.stream()?,
        device,
        kind: if args.ordered {
            Kind::Ordered
        } else {
            Kind::Plain
        },
        held: Mutex::new(Vec::new()),
        filled: AtomicU64::new(0x1234_5678),
        busy: AtomicBool::new(args.busy && !args.idle),
        touch_every: AtomicU64::new(args.touch_every.unwrap_or(0)),
        quit: AtomicBool::new(false),
    });
    let wanted = args.bytes.unwrap_or(0);
    let mut full = "";
    while program.total() < wanted {
        match program.alloc(args.step.min(wanted - program.total()).next_multiple_of(4)) {
            Ok(()) => {}
            Err(error) if is_out_of_memory(&error) => {
                full = " oom";
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    say(&format!("held {}{full}", program.total()));
    let background = std::thread::spawn({
        let program = program.clone();
        move || program.launch_loop()
    });
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.trim() {
            "" => {}
            "quit" => break,
            line => match program.answer(line) {
                Ok(text) => say(&text),
                Err(error) => say(&format!("error {error:?}")),
            },
        }
    }
    program.quit.store(true, SeqCst);
    let _ = background.join();
    Ok(())
}
