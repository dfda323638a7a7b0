//! The plain pinned copy that swaps are compared with: how long so many bytes take over the link.
//!
//!     in BYTES | out BYTES | both BYTES   -> SECONDS
//!     quit
//!
//! Told by lines on stdin; `both` moves so many bytes each way at once. Prints `ready` first. The host memory is
//! pinned and touched beforehand, the pieces are large, and nothing else is done: as fast as the driver copies.

use std::io::{BufRead, Write};
use std::ptr::null_mut;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;
use spillway_bench::driver::{Handle, check};
use spillway_bench::setup::Device;

/// Bytes of one copy.
const PIECE: usize = 64 << 20;
/// `CU_STREAM_NON_BLOCKING`
const NON_BLOCKING: u32 = 1;

#[derive(Parser)]
#[command(about = "How long plain pinned copies take")]
struct Command {}

/// One way over the link, with memory and a stream of its own.
struct Lane {
    host: Handle,
    device: u64,
    stream: Handle,
}

impl Lane {
    fn new(device: &Device) -> Result<Self> {
        let driver = &device.both.hooked;
        let (mut host, mut at, mut stream) = (null_mut(), 0, null_mut());
        // SAFETY: the driver fills the objects that it is given.
        unsafe {
            check(
                "cuMemAllocHost",
                (driver.cuMemAllocHost_v2)(&raw mut host, PIECE),
            )?;
            check("cuMemAlloc", (driver.cuMemAlloc_v2)(&raw mut at, PIECE))?;
            check(
                "cuStreamCreate",
                (driver.cuStreamCreate)(&raw mut stream, NON_BLOCKING),
            )?;
        }
        // SAFETY: the driver gave so many writable bytes.
        unsafe { host.cast::<u8>().write_bytes(0x5a, PIECE) };
        Ok(Self {
            host,
            device: at,
            stream,
        })
    }

    /// Submits copies of so many bytes in all.
    fn submit(&self, device: &Device, inward: bool, bytes: usize) -> Result<()> {
        let driver = &device.both.hooked;
        let mut left = bytes;
        while left > 0 {
            let now = left.min(PIECE);
            // SAFETY: both places have `PIECE` bytes and live as long as the process.
            let code = unsafe {
                if inward {
                    (driver.cuMemcpyHtoDAsync_v2)(self.device, self.host, now, self.stream)
                } else {
                    (driver.cuMemcpyDtoHAsync_v2)(self.host, self.device, now, self.stream)
                }
            };
            check("a copy", code)?;
            left -= now;
        }
        Ok(())
    }
}

fn answer(device: &Device, lanes: &[Lane; 2], line: &str) -> Result<f64> {
    let (what, bytes) = line.split_once(' ').context("in, out or both, and BYTES")?;
    let bytes: usize = bytes.trim().parse().context("BYTES")?;
    let [inward, outward] = lanes;
    let began = Instant::now();
    match what {
        "in" => inward.submit(device, true, bytes)?,
        "out" => outward.submit(device, false, bytes)?,
        "both" => {
            inward.submit(device, true, bytes)?;
            outward.submit(device, false, bytes)?;
        }
        other => bail!("what is {other:?}?"),
    }
    // SAFETY: no pointers are involved.
    check("cuCtxSynchronize", unsafe {
        (device.both.hooked.cuCtxSynchronize)()
    })?;
    Ok(began.elapsed().as_secs_f64())
}

#[allow(clippy::print_stdout)]
fn main() -> Result<()> {
    Command::parse();
    let device = Device::start()?;
    let lanes = [Lane::new(&device)?, Lane::new(&device)?];
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim() == "quit" {
            break;
        }
        println!("{:.6}", answer(&device, &lanes, line.trim())?);
        std::io::stdout().flush()?;
    }
    Ok(())
}
