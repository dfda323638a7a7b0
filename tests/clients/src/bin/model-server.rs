//! A model server as far as memory goes: weights that stay, a KV cache that comes and goes, no mathematics.
//!
//!     model-server --weights FILE --listen SOCKET [--kv 64MiB] [--device 0] [--name N] [--cold]
//!                  [--step MS --per-request MS [--linger MS]] [--disk SIZE]
//!
//! Loads the weights into many allocations of both kinds, checks them, then prints
//! `{"ready":true,...}` and answers lines of JSON on a unix socket, any number of connections at a time:
//!
//!     {"op":"infer"} -> {"ok":true,"checksum":"HEX","first_answer_seconds":S,"pointers_unchanged":true}
//!     {"op":"stats"} -> {"ok":true,"requests":N,"weights_bytes":B,"free_bytes":F,"total_bytes":T,...}
//!     {"op":"generate","steps":N} -> {"ok":true,"first_seconds":S,"seconds":S,"batch":N}
//!     {"op":"quit"}  -> {"ok":true}, then the process ends with 0
//!
//! `infer` allocates the KV cache, runs a checksum kernel over all weights, writes and reads the cache, frees it.
//! A wrong byte is `"ok":false` with what was wrong. With `--cold` the weights are loaded anew for every request
//! and freed after it: what serving many models costs without keeping them anywhere.
//!
//! With `--step`, requests to `generate` are served in batches whose size memory alone decides
//! ([`spillway_clients::batch`]); what a step computes is a kernel that takes as long. The weights are then not
//! checked before the first request, so that a cold start is no longer than reading them; `infer` checks them.
//! `--disk` makes reading the weights take as long as from a disk of that many bytes per second.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use cudarc::driver::CudaStream;
use serde_json::{Value, json};
use spillway_clients::batch::{Counters, Engine, Request, Settings};
use spillway_clients::device::Device;
use spillway_clients::disk::Disk;
use spillway_clients::memory::{Kind, Memory, checksums};
use spillway_clients::{pattern, sizes, weights};

#[derive(Parser)]
struct Args {
    /// The weights file (see make-weights)
    #[arg(long)]
    weights: PathBuf,
    /// The unix socket to listen on
    #[arg(long)]
    listen: PathBuf,
    /// Bytes of the KV cache of one request
    #[arg(long, value_parser = sizes::parse_bytes, default_value = "64MiB")]
    kv: u64,
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// What the server calls itself in its answers
    #[arg(long, default_value = "model")]
    name: String,
    /// Load the weights anew for every request
    #[arg(long)]
    cold: bool,
    /// Milliseconds of a step, without what its requests add: serves `generate`
    #[arg(long, value_name = "MS", conflicts_with = "cold")]
    step: Option<f64>,
    /// Milliseconds that each request adds to a step
    #[arg(long, value_name = "MS", default_value_t = 0.0, requires = "step")]
    per_request: f64,
    /// For how many milliseconds others may join a batch before its next step
    #[arg(long, value_name = "MS", default_value_t = 1.0, requires = "step")]
    linger: f64,
    /// Reads the weights no faster than so many bytes per second
    #[arg(long, value_name = "SIZE", value_parser = sizes::parse_bytes)]
    disk: Option<u64>,
}

fn milliseconds(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

/// The weights on the device, and what their checksum must be.
struct Weights {
    tensors: Vec<Memory>,
    checksum: u64,
}

impl Weights {
    fn load(device: &Device, path: &PathBuf, disk: Option<u64>) -> anyhow::Result<Weights> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let bytes = file.metadata()?.len();
        ensure!(
            bytes > 0 && bytes.is_multiple_of(4),
            "{}: {bytes} bytes are no weights",
            path.display()
        );
        let stream = device.stream()?;
        let sizes = weights::tensors(bytes);
        let mut tensors = Vec::with_capacity(sizes.len());
        let mut disk = disk.map(Disk::new);
        let checksum = weights::read_tensors::<anyhow::Error>(&file, &sizes, |number, bytes| {
            let mut memory = Memory::new(&stream, Kind::alternate(number), bytes.len() as u64)
                .with_context(|| format!("tensor {number} of {} bytes", bytes.len()))?;
            if let Some(disk) = &mut disk {
                disk.wait_for(bytes.len());
            }
            memory.write(&stream, bytes)?;
            tensors.push(memory);
            Ok(())
        })?;
        Ok(Weights { tensors, checksum })
    }

    fn on_device(&self, device: &Device, stream: &Arc<CudaStream>) -> anyhow::Result<u64> {
        let sums = checksums(
            device,
            stream,
            self.tensors.iter().map(|t| (t.address(), t.words())),
        )?;
        Ok(pattern::combine(&sums))
    }

    fn unmoved(&self, device: &Device) -> anyhow::Result<bool> {
        for tensor in &self.tensors {
            if !tensor.unmoved(device)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn bytes(&self) -> u64 {
        self.tensors.iter().map(Memory::bytes).sum()
    }
}

struct Server {
    args: Args,
    device: Device,
    /// None when cold.
    weights: Option<Weights>,
    load_seconds: f64,
    requests: AtomicU64,
    failures: AtomicU64,
    /// What the next KV cache is filled with.
    fills: AtomicU32,
    /// Where requests to generate go, if any are served.
    queue: Option<Mutex<Sender<Request>>>,
    counters: Arc<Counters>,
}

impl Server {
    fn answer(
        &self,
        stream: &mut Option<Arc<CudaStream>>,
        line: &str,
        arrived: Instant,
    ) -> (Value, bool) {
        let request: Value = match serde_json::from_str(line) {
            Ok(request) => request,
            Err(error) => {
                return (
                    json!({"ok": false, "error": format!("no JSON: {error}")}),
                    false,
                );
            }
        };
        match request.get("op").and_then(Value::as_str) {
            Some("infer") => {
                self.requests.fetch_add(1, SeqCst);
                // Made when first needed and not when connected: whatever it waits for is the request's time.
                let stream = match stream {
                    Some(stream) => Ok(stream.clone()),
                    None => self
                        .device
                        .stream()
                        .map(|new| stream.insert(new).clone())
                        .map_err(anyhow::Error::from),
                };
                let answer = stream.and_then(|stream| self.infer(&stream, arrived));
                let answer = answer.unwrap_or_else(|error| {
                    self.failures.fetch_add(1, SeqCst);
                    json!({"ok": false, "error": format!("{error:#}")})
                });
                (answer, false)
            }
            Some("generate") => {
                self.requests.fetch_add(1, SeqCst);
                let steps = request.get("steps").and_then(Value::as_u64).unwrap_or(1);
                let answer = self.generate(steps, arrived).unwrap_or_else(|error| {
                    self.failures.fetch_add(1, SeqCst);
                    json!({"ok": false, "error": format!("{error:#}")})
                });
                (answer, false)
            }
            Some("stats") => (
                self.stats()
                    .unwrap_or_else(|e| json!({"ok": false, "error": format!("{e:#}")})),
                false,
            ),
            Some("quit") => (json!({"ok": true}), true),
            other => (
                json!({"ok": false, "error": format!("unknown op {other:?}: infer, generate, stats or quit")}),
                false,
            ),
        }
    }

    fn infer(&self, stream: &Arc<CudaStream>, arrived: Instant) -> anyhow::Result<Value> {
        let loaded;
        let weights = match &self.weights {
            Some(weights) => weights,
            None => {
                loaded = Weights::load(&self.device, &self.args.weights, self.args.disk)?;
                &loaded
            }
        };
        let mut cache = self.cache(stream).context("KV cache")?;
        let checksum = weights.on_device(&self.device, stream)?;
        // The first token would leave here.
        let first_answer = arrived.elapsed().as_secs_f64();
        if checksum != weights.checksum {
            bail!(
                "the weights' checksum is {checksum:016x}, in the file {:016x}",
                weights.checksum
            );
        }
        self.use_cache(stream, &mut cache).context("KV cache")?;
        let unmoved = weights.unmoved(&self.device)?;
        drop(cache);
        Ok(json!({
            "ok": true, "name": self.args.name, "checksum": format!("{checksum:016x}"),
            "first_answer_seconds": first_answer, "pointers_unchanged": unmoved,
        }))
    }

    /// Queues a request and waits for its end.
    fn generate(&self, steps: u64, arrived: Instant) -> anyhow::Result<Value> {
        let queue = self
            .queue
            .as_ref()
            .context("started without --step, this server does not generate")?;
        let (answer, answered) = channel();
        let request = Request {
            steps: u32::try_from(steps).unwrap_or(u32::MAX),
            arrived,
            answer,
        };
        queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(request)
            .context("nobody serves requests any more")?;
        let done = answered
            .recv()
            .context("nobody serves requests any more")?
            .map_err(anyhow::Error::msg)?;
        Ok(json!({
            "ok": true, "first_seconds": done.first.as_secs_f64(), "seconds": done.total.as_secs_f64(),
            "batch": done.batch,
        }))
    }

    /// Blocks of unequal size, alternately of either kind.
    fn cache(&self, stream: &Arc<CudaStream>) -> anyhow::Result<Vec<Memory>> {
        let mut left = self.args.kv & !3;
        let mut blocks = Vec::new();
        while left > 0 {
            let size = if blocks.len() == 7 {
                left
            } else {
                ((left / 3) & !3).max(4096).min(left)
            };
            blocks.push(Memory::new(stream, Kind::alternate(blocks.len()), size)?);
            left -= size;
        }
        Ok(blocks)
    }

    fn use_cache(&self, stream: &Arc<CudaStream>, blocks: &mut [Memory]) -> anyhow::Result<()> {
        let value = self.fills.fetch_add(0x0100_0193, SeqCst);
        for block in blocks.iter() {
            self.device
                .fill(stream, block.address(), block.words(), value)?;
        }
        let sums = checksums(
            &self.device,
            stream,
            blocks.iter().map(|b| (b.address(), b.words())),
        )?;
        for (number, (block, sum)) in blocks.iter().zip(sums).enumerate() {
            ensure!(
                sum == pattern::checksum_of_filled(value, block.words()),
                "block {number} holds other words"
            );
        }
        if let Some(block) = blocks.first_mut() {
            let mut bytes = vec![0; usize::try_from(block.bytes().min(1 << 20)).unwrap_or(0)];
            pattern::fill(&mut bytes, u64::from(value), 0);
            block.write(stream, &bytes)?;
            let mut back = vec![0; bytes.len()];
            block.read(stream, &mut back)?;
            ensure!(
                back == bytes,
                "block 0 gives back other bytes than were written"
            );
        }
        Ok(())
    }

    fn stats(&self) -> anyhow::Result<Value> {
        let (free, total) = self.device.context.mem_get_info()?;
        Ok(json!({
            "ok": true, "name": self.args.name, "pid": std::process::id(),
            "requests": self.requests.load(SeqCst), "failures": self.failures.load(SeqCst),
            "weights_bytes": self.weights.as_ref().map_or(0, Weights::bytes),
            "tensors": self.weights.as_ref().map_or(0, |w| w.tensors.len()),
            "checksum": self.weights.as_ref().map(|w| format!("{:016x}", w.checksum)),
            "load_seconds": self.load_seconds, "free_bytes": free, "total_bytes": total,
            "steps": self.counters.steps.load(SeqCst), "answered": self.counters.answered.load(SeqCst),
            "batch_max": self.counters.batch_max.load(SeqCst), "full": self.counters.full.load(SeqCst),
        }))
    }

    fn serve(&self, connection: &UnixStream) -> anyhow::Result<bool> {
        let mut stream: Option<Arc<CudaStream>> = None;
        for line in BufReader::new(connection).lines() {
            let (line, arrived) = (line?, Instant::now());
            let (answer, quit) = self.answer(&mut stream, &line, arrived);
            writeln!(&*connection, "{answer}")?;
            if quit {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Starts the thread that serves requests in batches; gives the queue's end.
fn start_engine(
    args: &Args,
    step: f64,
    device: &Device,
    counters: Arc<Counters>,
) -> anyhow::Result<Sender<Request>> {
    let settings = Settings {
        step: milliseconds(step),
        per_request: milliseconds(args.per_request),
        kv: args.kv,
        linger: milliseconds(args.linger),
    };
    let (queue, inbox) = channel();
    let engine = Engine::new(device.clone(), settings, inbox, counters)?;
    let name = args.name.clone();
    std::thread::spawn(move || {
        // Who waits for an answer sees that the queue is gone.
        if let Err(error) = engine.run() {
            eprintln!("model-server {name}: {error:#}");
        }
    });
    Ok(queue)
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let start = Instant::now();
    let device = Device::open(args.device)?;
    let weights = if args.cold {
        None
    } else {
        Some(Weights::load(&device, &args.weights, args.disk)?)
    };
    if let (Some(weights), None) = (&weights, args.step) {
        let checksum = weights.on_device(&device, &device.stream()?)?;
        ensure!(
            checksum == weights.checksum,
            "the weights did not arrive on the device as they are in the file"
        );
    }
    // A socket that an earlier server left behind; anything else at that path is not ours to remove.
    if std::os::unix::net::UnixStream::connect(&args.listen).is_err() {
        use std::os::unix::fs::FileTypeExt;
        if std::fs::symlink_metadata(&args.listen).is_ok_and(|m| m.file_type().is_socket()) {
            std::fs::remove_file(&args.listen)?;
        }
    }
    let listener = UnixListener::bind(&args.listen)
        .with_context(|| format!("cannot listen on {}", args.listen.display()))?;
    let load_seconds = start.elapsed().as_secs_f64();
    let counters = Arc::<Counters>::default();
    let queue = match args.step {
        Some(step) => Some(Mutex::new(start_engine(
            &args,
            step,
            &device,
            counters.clone(),
        )?)),
        None => None,
    };
    let server = Arc::new(Server {
        args,
        device,
        weights,
        load_seconds,
        requests: AtomicU64::new(0),
        failures: AtomicU64::new(0),
        fills: AtomicU32::new(0x0bad_cafe),
        queue,
        counters,
    });
    println!(
        "{}",
        json!({"ready": true, "name": server.args.name, "load_seconds": load_seconds})
    );
    let (quit, ended) = std::sync::mpsc::channel();
    std::thread::spawn({
        let server = server.clone();
        move || {
            for connection in listener.incoming().flatten() {
                let (server, quit) = (server.clone(), quit.clone());
                std::thread::spawn(move || match server.serve(&connection) {
                    Ok(true) => drop(quit.send(())),
                    Ok(false) => {}
                    Err(error) => eprintln!("model-server {}: {error:#}", server.args.name),
                });
            }
        }
    });
    let _ = ended.recv();
    let _ = std::fs::remove_file(&server.args.listen);
    // The answer to `quit` was written before; threads of other connections end with the process.
    std::process::exit(0)
}
