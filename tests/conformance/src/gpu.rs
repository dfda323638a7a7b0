//! What most cases need: a device with its primary context, kernels, pinned memory, a clock.

use std::ffi::{CString, c_void};
use std::time::{Duration, Instant};

use crate::api::*;
use crate::harness::{Outcome, Stop, check, ok, skip};

pub const KIB: usize = 1 << 10;
pub const MIB: usize = 1 << 20;
pub const GIB: usize = 1 << 30;

/// The project's kernels: real PTX for a GPU, recognised by name on the simulator.
pub const PTX: &str = concat!(
    include_str!("../../../simulator/kernels/spillway.ptx"),
    "\0"
);

/// The first device with its primary context current on the thread that started it.
pub struct Gpu {
    pub device: i32,
    pub context: Handle,
}

impl Gpu {
    pub fn start() -> Result<Gpu, Stop> {
        let (mut device, mut context) = (0, 0);
        ok!(cuInit(0));
        ok!(cuDeviceGet(&mut device, 0));
        // What the process before held may come back a moment after its end.
        let begun = Instant::now();
        loop {
            match cuDevicePrimaryCtxRetain(&mut context, device) {
                Code::OUT_OF_MEMORY if begun.elapsed() < Duration::from_secs(3) => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                code => break ok!(code),
            }
        }
        ok!(cuCtxSetCurrent(context));
        Ok(Gpu { device, context })
    }

    pub fn attribute(&self, attribute: i32) -> Result<i32, Stop> {
        let mut value = 0;
        ok!(cuDeviceGetAttribute(&mut value, attribute, self.device));
        Ok(value)
    }

    /// Whether no real device can come to harm.
    pub fn is_simulated(&self) -> Result<bool, Stop> {
        let mut name = [0_u8; 64];
        ok!(cuDeviceGetName(name.as_mut_ptr().cast(), 64, self.device));
        Ok(name.windows(9).any(|word| word == b"Simulated"))
    }

    /// Skips the case unless the device says that it can do this.
    pub fn needs(&self, attribute: i32, what: &str) -> Outcome {
        if self.attribute(attribute)? == 0 {
            skip!("the device has no {what}");
        }
        Ok(())
    }

    pub fn prop(&self) -> AllocationProp {
        AllocationProp {
            kind: 1,
            location: self.location(),
            ..Default::default()
        }
    }

    pub fn location(&self) -> Location {
        Location {
            kind: 1,
            id: self.device,
        }
    }

    pub fn read_write(&self) -> AccessDesc {
        AccessDesc {
            location: self.location(),
            flags: 3,
        }
    }
}

/// What `cuMemGetInfo` calls free.
pub fn free_bytes() -> Result<usize, Stop> {
    Ok(memory_info()?.0)
}

/// The free figure once it rests: what an ended process held may come back a moment after its end.
pub fn quiet() -> Result<usize, Stop> {
    let start = Instant::now();
    let (mut figure, mut since) = (free_bytes()?, Instant::now());
    while since.elapsed() < Duration::from_millis(150) && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
        let now = free_bytes()?;
        if now != figure {
            (figure, since) = (now, Instant::now());
        }
    }
    Ok(figure)
}

/// For cases that let go of much: for some milliseconds after it another process may be told out of memory,
/// and the next case is one.
pub fn rest_after_a_release() {
    std::thread::sleep(Duration::from_millis(200));
}

/// (free, total) of `cuMemGetInfo`.
pub fn memory_info() -> Result<(usize, usize), Stop> {
    let (mut free, mut total) = (0, 0);
    ok!(cuMemGetInfo_v2(&mut free, &mut total));
    Ok((free, total))
}

/// Waits until at least this much is free: what another process or a release gives back may take a moment.
pub fn wait_free(at_least: usize, limit: Duration) -> Result<usize, Stop> {
    let start = Instant::now();
    loop {
        let free = free_bytes()?;
        if free >= at_least || start.elapsed() > limit {
            return Ok(free);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn alloc(bytes: usize) -> Result<Dptr, Stop> {
    let mut address = 0;
    ok!(cuMemAlloc_v2(Some(&mut address), bytes));
    check!(address != 0, "cuMemAlloc succeeded with a null address");
    Ok(address)
}

pub fn stream(flags: u32) -> Result<Handle, Stop> {
    let mut stream = 0;
    ok!(cuStreamCreate(Some(&mut stream), flags));
    Ok(stream)
}

pub const BLOCKING: u32 = 0;
pub const NON_BLOCKING: u32 = 1;

pub fn event(flags: u32) -> Result<Handle, Stop> {
    let mut event = 0;
    ok!(cuEventCreate(&mut event, flags));
    Ok(event)
}

/// Bytes that depend on their place and a seed, so that a shifted copy is seen.
pub fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

pub fn write(address: Dptr, bytes: &[u8]) -> Outcome {
    ok!(cuMemcpyHtoD_v2(address, bytes.as_ptr(), bytes.len()));
    Ok(())
}

pub fn read(address: Dptr, bytes: usize) -> Result<Vec<u8>, Stop> {
    let mut out = vec![0; bytes];
    ok!(cuMemcpyDtoH_v2(out.as_mut_ptr(), address, bytes));
    Ok(out)
}

pub fn read_u32(address: Dptr) -> Result<u32, Stop> {
    let b = read(address, 4)?;
    Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// Page-locked host memory of the driver, freed with the process.
pub struct Pinned {
    pub address: usize,
    pub bytes: usize,
}

impl Pinned {
    pub fn new(bytes: usize) -> Result<Pinned, Stop> {
        let mut address = 0;
        ok!(cuMemHostAlloc(&mut address, bytes, 0));
        Ok(Pinned { address, bytes })
    }

    pub fn fill(&self, value: u8) {
        // SAFETY: the driver gave `bytes` writable bytes at `address`; no reference to them is alive.
        unsafe { std::ptr::write_bytes(self.address as *mut u8, value, self.bytes) }
    }

    pub fn all(&self, value: u8) -> bool {
        // SAFETY: as in `fill`; a copy engine may write these bytes, cases wait for it before they read.
        let bytes = unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) };
        bytes.iter().all(|b| *b == value)
    }

    pub fn pointer(&self) -> *mut u8 {
        self.address as *mut u8
    }
}

/// Anonymous memory of our own, page-aligned, unmapped when dropped.
pub struct Pages {
    pub address: usize,
    pub bytes: usize,
}

impl Pages {
    pub fn new(bytes: usize) -> Result<Pages, Stop> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        check!(address != libc::MAP_FAILED, "mmap of {bytes} bytes failed");
        Ok(Pages {
            address: address as usize,
            bytes,
        })
    }

    pub fn fill(&self, value: u8) {
        // SAFETY: the mapping is ours and writable; no reference to it is alive.
        unsafe { std::ptr::write_bytes(self.address as *mut u8, value, self.bytes) }
    }

    pub fn all(&self, value: u8) -> bool {
        // SAFETY: the mapping is ours and readable for all its bytes.
        let bytes = unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) };
        bytes.iter().all(|b| *b == value)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nothing refers to it any more.
        unsafe { libc::munmap(self.address as *mut c_void, self.bytes) };
    }
}

/// The project's kernels, loaded into the current context.
pub struct Kernels {
    pub module: Handle,
    pub fill: Handle,
    pub checksum: Handle,
    pub axpy: Handle,
    pub spin: Handle,
}

pub fn function(module: Handle, name: &str) -> Result<Handle, Stop> {
    let text = CString::new(name).unwrap_or_default();
    let mut function = 0;
    ok!(cuModuleGetFunction(&mut function, module, text.as_ptr()));
    Ok(function)
}

impl Kernels {
    pub fn load() -> Result<Kernels, Stop> {
        let mut module = 0;
        ok!(cuModuleLoadData(&mut module, PTX.as_ptr().cast()));
        Ok(Kernels {
            module,
            fill: function(module, "fill_u32")?,
            checksum: function(module, "checksum_u32")?,
            axpy: function(module, "axpy_f32")?,
            spin: function(module, "spin_ns")?,
        })
    }

    /// Writes `value` to `words` words at `address`, in stream order.
    pub fn fill(&self, stream: Handle, address: Dptr, words: u64, value: u32) -> Code {
        launch(
            self.fill,
            64,
            128,
            stream,
            &[Arg::U64(address), Arg::U64(words), Arg::U32(value)],
        )
    }

    /// Keeps the device busy for a time, in stream order.
    pub fn spin(&self, stream: Handle, time: Duration) -> Code {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        launch(self.spin, 1, 1, stream, &[Arg::U64(ns)])
    }

    /// The first launch of each function may load code and take long; done ahead, timing cases measure work only.
    pub fn warm(&self) -> Outcome {
        let address = alloc(4 * KIB)?;
        ok!(self.fill(0, address, 16, 1));
        ok!(self.spin(0, Duration::from_micros(1)));
        ok!(cuCtxSynchronize());
        ok!(cuMemFree_v2(address));
        Ok(())
    }
}

/// A kernel's argument.
#[derive(Clone, Copy)]
pub enum Arg {
    U32(u32),
    U64(u64),
    F32(f32),
}

/// The argument list of a launch, kept alive for the call; the values' place on the heap does not move.
pub struct Args {
    _values: Vec<u64>,
    pointers: Vec<*mut c_void>,
}

impl Args {
    pub fn new(args: &[Arg]) -> Args {
        let mut values: Vec<u64> = args
            .iter()
            .map(|a| {
                // Little endian: the low bytes of the 64-bit word are the 32-bit value.
                match a {
                    Arg::U32(v) => u64::from(*v),
                    Arg::U64(v) => *v,
                    Arg::F32(v) => u64::from(v.to_bits()),
                }
            })
            .collect();
        let pointers = values
            .iter_mut()
            .map(|v| std::ptr::from_mut(v).cast())
            .collect();
        Args {
            _values: values,
            pointers,
        }
    }

    pub fn pointer(&mut self) -> *mut *mut c_void {
        self.pointers.as_mut_ptr()
    }
}

/// Launches with a one-dimensional grid.
pub fn launch(function: Handle, grid: u32, block: u32, stream: Handle, args: &[Arg]) -> Code {
    let mut args = Args::new(args);
    cuLaunchKernel(
        function,
        grid,
        1,
        1,
        block,
        1,
        1,
        0,
        stream,
        args.pointer(),
        std::ptr::null_mut(),
    )
}

/// How long a piece of work took on the host's clock.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let value = work();
    (value, start.elapsed())
}

/// Calls until the code is no longer "not ready", or the limit passes.
pub fn poll(mut query: impl FnMut() -> Code, limit: Duration) -> Code {
    let start = Instant::now();
    loop {
        let code = query();
        if code != Code::NOT_READY || start.elapsed() > limit {
            return code;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs work on a thread of its own with this context current there.
pub fn on_thread<T: Send>(
    context: Handle,
    work: impl FnOnce() -> Result<T, Stop> + Send,
) -> Result<T, Stop> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            if context != 0 {
                ok!(cuCtxSetCurrent(context));
            }
            work()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(Stop::Fail("a thread of the case panicked".into())))
    })
}
