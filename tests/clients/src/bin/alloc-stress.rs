//! Many allocations of all sizes that must keep their bytes and addresses while everything else goes on.
//!
//!     alloc-stress [--count 500] [--bytes 1GiB] [--largest 512MiB] [--threads 4] [--churn]
//!                  [--rounds N | --seconds S]
//!
//! Fills each allocation with bytes of its own, keeps threads launching on buffers of theirs, and checks every
//! allocation by its checksum and its address range: each round, or whenever a line `verify` comes on stdin,
//! which is answered by `ok N` (N: verifications so far) or `bad TEXT`. `ready` is printed when all is filled.
//! Without `--rounds` or `--seconds` it goes on until `quit` or the end of stdin. Prints a JSON summary at the
//! end; exits with 1 if anything was wrong.

use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use cudarc::driver::{CudaStream, DriverError};
use spillway_clients::device::{Device, is_out_of_memory};
use spillway_clients::memory::{Kind, Memory, checksums};
use spillway_clients::pattern::{self, Checksum, Random};
use spillway_clients::sizes;

#[derive(Parser)]
struct Args {
    /// How many allocations
    #[arg(long, default_value_t = 500)]
    count: usize,
    /// Bytes in all of them together
    #[arg(long, value_parser = sizes::parse_bytes, default_value = "1GiB")]
    bytes: u64,
    /// Size of the largest; the others are spread evenly over the logarithm of their size
    #[arg(long, value_parser = sizes::parse_bytes, default_value = "512MiB")]
    largest: u64,
    /// Threads that launch all the time
    #[arg(long, default_value_t = 4)]
    threads: usize,
    /// One more thread that allocates, uses and frees all the time
    #[arg(long)]
    churn: bool,
    /// End after this many verifications
    #[arg(long)]
    rounds: Option<u64>,
    /// End after this time, verifying all the while
    #[arg(long)]
    seconds: Option<f64>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 0)]
    device: usize,
}

/// An allocation and what it must hold.
struct Kept {
    memory: Memory,
    checksum: u64,
}

/// What all threads see.
struct Shared {
    device: Device,
    stop: AtomicBool,
    launches: AtomicU64,
    churned: AtomicU64,
    refused: AtomicU64,
    longest_round_us: AtomicU64,
    wrong: Mutex<Vec<String>>,
}

impl Shared {
    fn complain(&self, text: String) {
        eprintln!("alloc-stress: {text}");
        if let Ok(mut wrong) = self.wrong.lock() {
            wrong.push(text);
        }
    }

    fn wrong(&self) -> Vec<String> {
        self.wrong
            .lock()
            .map(|w| w.clone())
            .unwrap_or_else(|_| vec!["a thread panicked".into()])
    }

    /// Launches on a buffer of its own until told to stop; every result is checked.
    fn launch_loop(&self, number: usize) -> Result<(), DriverError> {
        let stream = self.device.stream()?;
        let memory = Memory::new(&stream, Kind::alternate(number), 1 << 20)?;
        let mut value = 0x1000_0000 + u32::try_from(number).unwrap_or(0);
        while !self.stop.load(SeqCst) {
            let start = Instant::now();
            value = value.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
            self.device
                .fill(&stream, memory.address(), memory.words(), value)?;
            let sums = checksums(
                &self.device,
                &stream,
                std::iter::once((memory.address(), memory.words())),
            )?;
            if sums[0] != pattern::checksum_of_filled(value, memory.words()) {
                self.complain(format!(
                    "thread {number}: its buffer holds other words than it just wrote"
                ));
                return Ok(());
            }
            self.launches.fetch_add(2, SeqCst);
            let took = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.longest_round_us.fetch_max(took, SeqCst);
        }
        Ok(())
    }

    /// Allocates, uses and frees until told to stop; keeps a few so that frees are out of order.
    fn churn_loop(&self, seed: u64) -> Result<(), DriverError> {
        let stream = self.device.stream()?;
        let mut random = Random::new(seed);
        let mut kept: Vec<(Memory, u32)> = Vec::new();
        while !self.stop.load(SeqCst) {
            if kept.len() >= 8 {
                let at = usize::try_from(random.below(kept.len() as u64)).unwrap_or(0);
                let (memory, value) = kept.swap_remove(at);
                let sums = checksums(
                    &self.device,
                    &stream,
                    std::iter::once((memory.address(), memory.words())),
                )?;
                if sums[0] != pattern::checksum_of_filled(value, memory.words()) {
                    self.complain(format!(
                        "churn: {} bytes at {:#x} changed",
                        memory.bytes(),
                        memory.address()
                    ));
                    return Ok(());
                }
                self.churned.fetch_add(1, SeqCst);
            }
            let size = (1024_u64 << random.below(13)) + (random.below(1024) & !3);
            let kind = Kind::alternate(usize::try_from(random.below(2)).unwrap_or(0));
            match Memory::new(&stream, kind, size) {
                Ok(memory) => {
                    let value = u32::try_from(random.next_word() >> 32).unwrap_or(0);
                    self.device
                        .fill(&stream, memory.address(), memory.words(), value)?;
                    kept.push((memory, value));
                }
                Err(error) if is_out_of_memory(&error) => {
                    self.refused.fetch_add(1, SeqCst);
                    kept.pop();
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn prepare(args: &Args, device: &Device, stream: &Arc<CudaStream>) -> anyhow::Result<Vec<Kept>> {
    ensure!(
        args.count >= 1 && args.largest <= args.bytes,
        "--largest is above --bytes"
    );
    let mut sizes = sizes::log_uniform(args.count - 1, 1024, args.bytes - args.largest, args.seed);
    // In the middle, so that small ones lie on both sides.
    sizes.insert(sizes.len() / 2, args.largest & !3);
    let mut kept = Vec::with_capacity(sizes.len());
    let mut bytes = vec![0; usize::try_from(args.largest).unwrap_or(0)];
    for (number, size) in sizes.into_iter().enumerate() {
        let piece = usize::try_from(size).unwrap_or(0);
        if piece > bytes.len() {
            bytes.resize(piece, 0);
        }
        let bytes = &mut bytes[..piece];
        pattern::fill(bytes, args.seed.wrapping_mul(1_000_003) + number as u64, 0);
        let mut memory = Memory::new(stream, Kind::alternate(number), size)
            .with_context(|| format!("allocation {number} of {size} bytes"))?;
        memory.write(stream, bytes)?;
        kept.push(Kept {
            memory,
            checksum: Checksum::of(bytes),
        });
    }
    device.context.synchronize()?;
    Ok(kept)
}

/// What is wrong with the allocations, if anything.
fn verify(
    device: &Device,
    stream: &Arc<CudaStream>,
    kept: &[Kept],
) -> Result<Option<String>, DriverError> {
    let sums = checksums(
        device,
        stream,
        kept.iter().map(|k| (k.memory.address(), k.memory.words())),
    )?;
    for (number, (one, sum)) in kept.iter().zip(sums).enumerate() {
        let (bytes, address) = (one.memory.bytes(), one.memory.address());
        if sum != one.checksum {
            return Ok(Some(format!(
                "allocation {number}, {bytes} bytes at {address:#x}, holds other bytes"
            )));
        }
        if !one.memory.unmoved(device)? {
            return Ok(Some(format!(
                "allocation {number}, {bytes} bytes, is not at {address:#x} any more"
            )));
        }
    }
    Ok(None)
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

fn main() -> anyhow::Result<std::process::ExitCode> {
    let args = Args::parse();
    let device = Device::open(args.device)?;
    let stream = device.stream()?;
    let kept = prepare(&args, &device, &stream)?;
    let shared = Arc::new(Shared {
        device,
        stop: AtomicBool::new(false),
        launches: AtomicU64::new(0),
        churned: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        longest_round_us: AtomicU64::new(0),
        wrong: Mutex::new(Vec::new()),
    });
    let mut threads = Vec::new();
    for number in 0..args.threads + usize::from(args.churn) {
        let (shared, churn, seed) = (shared.clone(), number == args.threads, args.seed);
        threads.push(std::thread::spawn(move || {
            let result = if churn {
                shared.churn_loop(seed)
            } else {
                shared.launch_loop(number)
            };
            if let Err(error) = result {
                shared.complain(format!("thread {number}: {error:?}"));
            }
        }));
    }
    say("ready");
    let (start, mut verified) = (Instant::now(), 0_u64);
    let mut check = || match verify(&shared.device, &stream, &kept) {
        Ok(None) => {
            verified += 1;
            format!("ok {verified}")
        }
        Ok(Some(text)) => {
            shared.complain(text.clone());
            format!("bad {text}")
        }
        Err(error) => {
            shared.complain(format!("verifying: {error:?}"));
            format!("bad {error:?}")
        }
    };
    if args.rounds.is_some() || args.seconds.is_some() {
        let mut rounds = 0;
        while args.rounds.is_none_or(|wanted| rounds < wanted)
            && args
                .seconds
                .is_none_or(|limit| start.elapsed().as_secs_f64() < limit)
            && shared.wrong().is_empty()
        {
            check();
            rounds += 1;
        }
    } else {
        for line in std::io::stdin().lock().lines() {
            match line?.trim() {
                "verify" => say(&check()),
                "quit" => break,
                "" => {}
                other => say(&format!("bad what is {other:?}? verify or quit")),
            }
        }
    }
    shared.stop.store(true, SeqCst);
    for thread in threads {
        let _ = thread.join();
    }
    let wrong = shared.wrong();
    #[expect(
        clippy::cast_precision_loss,
        reason = "microseconds to be read by people"
    )]
    let longest = shared.longest_round_us.load(SeqCst) as f64 / 1e6;
    say(&serde_json::json!({
        "ok": wrong.is_empty(), "allocations": kept.len(),
        "bytes": kept.iter().map(|k| k.memory.bytes()).sum::<u64>(),
        "verified": verified, "launches": shared.launches.load(SeqCst), "churned": shared.churned.load(SeqCst),
        "refused": shared.refused.load(SeqCst), "longest_launch_seconds": longest,
        "seconds": start.elapsed().as_secs_f64(), "wrong": wrong,
    }).to_string());
    Ok(if wrong.is_empty() {
        std::process::ExitCode::SUCCESS
    } else {
        std::process::ExitCode::FAILURE
    })
}
