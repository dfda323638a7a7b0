//! Driver calls by hand: one line on stdin is one call (or one storm of calls), one line on stdout its
//! outcome. It finds the driver as any program does, by `dlopen`, and reads its answers as plain
//! integers.
//!
//!     device N                  -> ok               makes device N's primary context current
//!     alloc BYTES               -> ok ADDRESS | error CODE
//!     ordered BYTES             -> the same, by cuMemAllocAsync on the legacy stream
//!     physical BYTES            -> ok HANDLE | error CODE      cuMemCreate: cannot be swapped
//!     managed BYTES             -> the same as alloc, by cuMemAllocManaged
//!     past BYTES                -> the same, by the driver's own cuMemAlloc: no hook of any library sees it
//!     export                    -> ok HANDLE | error CODE      cuIpcGetMemHandle of the last allocation
//!     import HANDLE             -> ok ADDRESS | error CODE     cuIpcOpenMemHandle
//!     pass BYTES                -> ok ADDRESS | error CODE     memory of a pool that is handed on; imported here once, and that freed
//!     table                     -> ok | error CODE  the simulator's own table, by cuGetExportTable
//!     race THREADS COUNT BYTES  -> won N refused N other N     each thread makes COUNT allocations at once
//!     modules THREADS           -> won N refused N other N     each thread loads a module at once, and unloads it
//!     storm THREADS MS          -> rounds N | bad TEXT   contexts and streams that come and go, with memory
//!     free all|last|ADDRESS     -> ok N
//!     let-go                    -> ok | error CODE  cuMemFreeAsync of the last allocation, on the legacy stream
//!     every SECOND              -> ok N             frees every SECOND-th allocation
//!     info                      -> FREE TOTAL       cuMemGetInfo
//!     total                     -> BYTES            cuDeviceTotalMem
//!     nvml                      -> USED FREE TOTAL  nvmlDeviceGetMemoryInfo of device 0
//!     fill WORD                 -> ok               writes to all that is allocated
//!     check WORD                -> ok | bad TEXT    reads it back
//!     late MS WORD              -> ok               the same as fill by kernels that begin MS from now; returns at once
//!     busy STREAMS              -> ok | error CODE  from now on as many streams always have work, of threads of their own
//!     stack                     -> ok | error CODE  finds a kernel that needs more stack than there is
//!     fork                      -> PID              a child that inherits all and sleeps for ever
//!     exit CODE | _exit CODE                        ends as it stands, freeing nothing

use std::ffi::{CStr, CString, c_char, c_void};
use std::io::{BufRead, Write};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// One library's functions by name.
struct Library(*mut c_void);

impl Library {
    fn open(name: &str) -> Option<Self> {
        let name = CString::new(name).ok()?;
        // SAFETY: a C string; the library's constructors are the driver's own.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        (!handle.is_null()).then_some(Self(handle))
    }

    fn at(&self, name: &str) -> *mut c_void {
        let text = CString::new(name).expect("a name");
        // SAFETY: an open library and a C string.
        let at = unsafe { libc::dlsym(self.0, text.as_ptr()) };
        assert!(!at.is_null(), "no {name}");
        at
    }
}

/// Calls `$library`'s `$name` with arguments of the given types; every status is a plain integer.
macro_rules! call {
    ($library:expr, $name:literal, $($value:expr => $type:ty),*) => {{
        let at = $library.at($name);
        // SAFETY: the driver's function of this name takes these arguments; pointers are to locals of
        // the caller that outlive the call.
        let status: i32 = unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> i32>(at)($($value),*)
        };
        status
    }};
}

// SAFETY: a library handle may be used by any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

mod kernels;
mod pass;

#[derive(Clone)]
struct Cuda(Arc<Library>);

/// `CUmemAllocationProp` with all that this program sets.
#[repr(C)]
struct Prop {
    kind: u32,
    handle_types: u32,
    location_type: u32,
    location: i32,
    windows: usize,
    flags: u64,
}

/// `CUipcMemHandle`, and what is exported of a pool's pointer.
#[repr(C)]
struct Handle([u8; 64]);

impl Cuda {
    fn alloc(&self, bytes: usize) -> Result<u64, i32> {
        let mut at = 0;
        match call!(self.0, "cuMemAlloc_v2", &raw mut at => *mut u64, bytes => usize) {
            0 => Ok(at),
            code => Err(code),
        }
    }

    fn managed(&self, bytes: usize) -> Result<u64, i32> {
        let mut at = 0;
        match call!(self.0, "cuMemAllocManaged", &raw mut at => *mut u64, bytes => usize, 1 => u32)
        {
            0 => Ok(at),
            code => Err(code),
        }
    }

    fn export(&self, at: u64) -> Result<String, i32> {
        let mut handle = Handle([0; 64]);
        match call!(self.0, "cuIpcGetMemHandle", &raw mut handle => *mut Handle, at => u64) {
            0 => Ok(handle.0.iter().map(|byte| format!("{byte:02x}")).collect()),
            code => Err(code),
        }
    }

    fn import(&self, text: &str) -> Result<u64, i32> {
        let mut handle = Handle([0; 64]);
        for (at, byte) in handle.0.iter_mut().enumerate() {
            let digits = text.get(at * 2..at * 2 + 2).ok_or(-1)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| -1)?;
        }
        let mut at = 0;
        let status = call!(self.0, "cuIpcOpenMemHandle_v2", &raw mut at => *mut u64,
            handle => Handle, 1 => u32);
        if status == 0 { Ok(at) } else { Err(status) }
    }

    /// A hook stands before `dlsym`, none before `dlvsym`: it finds the loader's own `dlsym`.
    fn past(&self, bytes: usize) -> Result<u64, i32> {
        type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;
        type Alloc = unsafe extern "C" fn(*mut u64, usize) -> i32;
        let names: [&CStr; 2] = [c"GLIBC_2.34", c"GLIBC_2.2.5"];
        // SAFETY: C strings; only looks names up.
        let found = names.map(|version| unsafe {
            libc::dlvsym(libc::RTLD_NEXT, c"dlsym".as_ptr(), version.as_ptr())
        });
        let dlsym = found.into_iter().find(|at| !at.is_null()).ok_or(-1)?;
        // SAFETY: the C library's function of this name.
        let dlsym = unsafe { std::mem::transmute::<*mut c_void, Dlsym>(dlsym) };
        // SAFETY: an open library and a C string.
        let alloc = unsafe { dlsym(self.0.0, c"cuMemAlloc_v2".as_ptr()) };
        if alloc.is_null() {
            return Err(-1);
        }
        // SAFETY: the driver's function of this name.
        let alloc = unsafe { std::mem::transmute::<*mut c_void, Alloc>(alloc) };
        let mut at = 0;
        // SAFETY: a place for one address.
        match unsafe { alloc(&raw mut at, bytes) } {
            0 => Ok(at),
            code => Err(code),
        }
    }

    fn ordered(&self, bytes: usize) -> Result<u64, i32> {
        let mut at = 0;
        match call!(self.0, "cuMemAllocAsync", &raw mut at => *mut u64, bytes => usize, 0 => usize)
        {
            0 => Ok(at),
            code => Err(code),
        }
    }

    fn physical(&self, bytes: usize, device: i32) -> Result<u64, i32> {
        let prop = Prop {
            kind: 1,
            handle_types: 0,
            location_type: 1,
            location: device,
            windows: 0,
            flags: 0,
        };
        let mut handle = 0;
        let status = call!(self.0, "cuMemCreate", &raw mut handle => *mut u64, bytes => usize,
            &raw const prop => *const Prop, 0 => u64);
        if status == 0 { Ok(handle) } else { Err(status) }
    }

    fn current(&self, context: usize) {
        assert_eq!(call!(self.0, "cuCtxSetCurrent", context => usize), 0);
    }
}

/// What a thread of `storm` does until `end`: a context of its own, streams and memory in it, written
/// and read back, and all of it destroyed, every second time with its memory still allocated.
fn storm(cuda: &Cuda, seed: u32, end: Instant) -> Result<u64, String> {
    let fine = |what: &str, code: i32| {
        if code == 0 {
            Ok(())
        } else {
            Err(format!("{what}: {code}"))
        }
    };
    let mut rounds = 0;
    while Instant::now() < end {
        let (mut context, mut stream) = (0usize, 0usize);
        let made =
            call!(cuda.0, "cuCtxCreate_v2", &raw mut context => *mut usize, 0 => u32, 0 => i32);
        fine("cuCtxCreate", made)?;
        fine(
            "cuStreamCreate",
            call!(cuda.0, "cuStreamCreate", &raw mut stream => *mut usize, 1 => u32),
        )?;
        let mut held = Vec::new();
        for bytes in [4096usize, 300_000, 3 << 20] {
            let at = cuda
                .alloc(bytes)
                .map_err(|code| format!("cuMemAlloc: {code}"))?;
            let word = seed
                .wrapping_mul(31)
                .wrapping_add(u32::try_from(rounds % 1000).unwrap_or(0));
            fine(
                "cuMemsetD32Async",
                call!(cuda.0, "cuMemsetD32Async", at => u64, word => u32, bytes / 4 => usize,
                stream => usize),
            )?;
            held.push((at, bytes, word));
        }
        fine(
            "cuStreamSynchronize",
            call!(cuda.0, "cuStreamSynchronize", stream => usize),
        )?;
        for (at, bytes, word) in held {
            let mut data = vec![0u32; bytes / 4];
            let to = data.as_mut_ptr().cast();
            fine(
                "cuMemcpyDtoH",
                call!(cuda.0, "cuMemcpyDtoH_v2", to => *mut c_void, at => u64, bytes => usize),
            )?;
            if data.iter().any(|got| *got != word) {
                return Err(format!("{bytes} bytes at {at:#x} changed"));
            }
            if rounds % 2 == 0 {
                fine("cuMemFree", call!(cuda.0, "cuMemFree_v2", at => u64))?;
            }
        }
        if rounds % 3 == 0 {
            fine(
                "cuStreamDestroy",
                call!(cuda.0, "cuStreamDestroy_v2", stream => usize),
            )?;
        }
        fine(
            "cuCtxDestroy",
            call!(cuda.0, "cuCtxDestroy_v2", context => usize),
        )?;
        rounds += 1;
    }
    Ok(rounds)
}

struct Probe {
    cuda: Cuda,
    contexts: Vec<usize>,
    device: usize,
    /// Address, bytes, device.
    held: Vec<(u64, usize, usize)>,
    handles: Vec<u64>,
    /// The kernels, in the first device's context.
    module: usize,
}

impl Probe {
    fn new() -> Self {
        let Some(library) = Library::open("libcuda.so.1") else {
            eprintln!("driver-probe: no libcuda.so.1");
            std::process::exit(2);
        };
        let cuda = Cuda(Arc::new(library));
        let started = call!(cuda.0, "cuInit", 0 => u32);
        if started != 0 {
            println!("cuInit {started}");
            std::process::exit(3);
        }
        let mut count = 0;
        assert_eq!(
            call!(cuda.0, "cuDeviceGetCount", &raw mut count => *mut i32),
            0
        );
        let count = usize::try_from(count).unwrap_or(0);
        let mut probe = Self {
            cuda,
            contexts: vec![0; count],
            device: 0,
            held: Vec::new(),
            handles: Vec::new(),
            module: 0,
        };
        probe.use_device(0);
        probe
    }

    fn use_device(&mut self, device: usize) {
        if self.contexts[device] == 0 {
            let ordinal = i32::try_from(device).unwrap_or(0);
            let context = &raw mut self.contexts[device];
            let status = call!(self.cuda.0, "cuDevicePrimaryCtxRetain", context => *mut usize, ordinal => i32);
            if status != 0 {
                println!("context {status}");
                std::process::exit(3);
            }
        }
        self.cuda.current(self.contexts[device]);
        self.device = device;
    }

    fn keep(&mut self, made: Result<u64, i32>, bytes: usize) -> String {
        match made {
            Ok(at) => {
                self.held.push((at, bytes, self.device));
                format!("ok {at:#x}")
            }
            Err(code) => format!("error {code}"),
        }
    }

    fn race(&mut self, threads: usize, count: usize, bytes: usize) -> String {
        let start = Arc::new(Barrier::new(threads));
        let context = self.contexts[self.device];
        let runners: Vec<_> = (0..threads)
            .map(|_| {
                let (cuda, start) = (self.cuda.clone(), start.clone());
                std::thread::spawn(move || {
                    cuda.current(context);
                    start.wait();
                    (0..count).map(|_| cuda.alloc(bytes)).collect::<Vec<_>>()
                })
            })
            .collect();
        let (mut won, mut refused, mut other) = (0, 0, 0);
        for made in runners
            .into_iter()
            .flat_map(|runner| runner.join().expect("a thread"))
        {
            match made {
                Ok(at) => {
                    won += 1;
                    self.held.push((at, bytes, self.device));
                }
                Err(2) => refused += 1,
                Err(_) => other += 1,
            }
        }
        format!("won {won} refused {refused} other {other}")
    }

    fn free(&mut self, which: impl Fn(usize, u64) -> bool) -> String {
        let held = std::mem::take(&mut self.held);
        let mut count = 0;
        for (number, (at, bytes, device)) in held.into_iter().enumerate() {
            if which(number, at) {
                let status = call!(self.cuda.0, "cuMemFree_v2", at => u64);
                if status != 0 {
                    return format!("error {status}");
                }
                count += 1;
            } else {
                self.held.push((at, bytes, device));
            }
        }
        format!("ok {count}")
    }

    fn fill(&self, word: u32) -> String {
        for &(at, bytes, device) in &self.held {
            self.cuda.current(self.contexts[device]);
            let word = word.wrapping_add(u32::try_from(at >> 9 & 0xffff_ffff).unwrap_or(0));
            let status =
                call!(self.cuda.0, "cuMemsetD32_v2", at => u64, word => u32, bytes / 4 => usize);
            if status != 0 {
                return format!("error {status}");
            }
        }
        for &context in self.contexts.iter().filter(|context| **context != 0) {
            self.cuda.current(context);
            match call!(self.cuda.0, "cuCtxSynchronize",) {
                0 => {}
                code => return format!("error {code}"),
            }
        }
        self.cuda.current(self.contexts[self.device]);
        "ok".to_owned()
    }

    fn check(&self, word: u32) -> String {
        for &(at, bytes, device) in &self.held {
            self.cuda.current(self.contexts[device]);
            let word = word.wrapping_add(u32::try_from(at >> 9 & 0xffff_ffff).unwrap_or(0));
            let mut data = vec![0u32; bytes / 4];
            let to = data.as_mut_ptr().cast();
            let status = call!(self.cuda.0, "cuMemcpyDtoH_v2", to => *mut c_void, at => u64, bytes / 4 * 4 => usize);
            if status != 0 {
                return format!("error {status}");
            }
            if data.iter().any(|got| *got != word) {
                return format!("bad {bytes} bytes at {at:#x} changed");
            }
        }
        self.cuda.current(self.contexts[self.device]);
        "ok".to_owned()
    }

    fn answer(&mut self, words: &[&str]) -> Option<String> {
        let number = |at: usize| words.get(at).and_then(|word| word.parse::<usize>().ok());
        Some(match *words.first()? {
            "device" => {
                self.use_device(number(1)?);
                "ok".to_owned()
            }
            "alloc" => self.keep(self.cuda.alloc(number(1)?), number(1)?),
            "ordered" => self.keep(self.cuda.ordered(number(1)?), number(1)?),
            "physical" => match self
                .cuda
                .physical(number(1)?, i32::try_from(self.device).ok()?)
            {
                Ok(handle) => {
                    self.handles.push(handle);
                    format!("ok {handle:#x}")
                }
                Err(code) => format!("error {code}"),
            },
            "managed" => self.keep(self.cuda.managed(number(1)?), number(1)?),
            "past" => self.keep(self.cuda.past(number(1)?), number(1)?),
            "export" => match self.cuda.export(self.held.last()?.0) {
                Ok(handle) => format!("ok {handle}"),
                Err(code) => format!("error {code}"),
            },
            "import" => match self.cuda.import(words.get(1)?) {
                Ok(at) => format!("ok {at:#x}"),
                Err(code) => format!("error {code}"),
            },
            "pass" => self.keep(self.cuda.pass(number(1)?), number(1)?),
            "table" => {
                let (mut table, id) = (0usize, *b"spillwaysimtable");
                let status = call!(self.cuda.0, "cuGetExportTable", &raw mut table => *mut usize,
                    id.as_ptr() => *const u8);
                if status == 0 && table != 0 {
                    "ok".to_owned()
                } else {
                    format!("error {status}")
                }
            }
            "race" => self.race(number(1)?, number(2)?, number(3)?),
            "modules" => self.modules(number(1)?),
            "storm" => {
                let end = Instant::now() + Duration::from_millis(words.get(2)?.parse().ok()?);
                let threads: Vec<_> = (0..u32::try_from(number(1)?).ok()?)
                    .map(|seed| {
                        let cuda = self.cuda.clone();
                        std::thread::spawn(move || storm(&cuda, seed, end))
                    })
                    .collect();
                let mut rounds = 0;
                let mut bad = None;
                for thread in threads {
                    match thread.join().expect("a thread") {
                        Ok(more) => rounds += more,
                        Err(text) => bad = Some(text),
                    }
                }
                bad.map_or_else(|| format!("rounds {rounds}"), |text| format!("bad {text}"))
            }
            "free" => match *words.get(1)? {
                "all" => {
                    for handle in std::mem::take(&mut self.handles) {
                        let _ = call!(self.cuda.0, "cuMemRelease", handle => u64);
                    }
                    self.free(|_, _| true)
                }
                "last" => {
                    let last = self.held.len().checked_sub(1)?;
                    self.free(|number, _| number == last)
                }
                address => {
                    let wanted = u64::from_str_radix(address.trim_start_matches("0x"), 16).ok()?;
                    self.free(|_, at| at == wanted)
                }
            },
            "let-go" => {
                let (at, ..) = self.held.pop()?;
                match call!(self.cuda.0, "cuMemFreeAsync", at => u64, 0 => usize) {
                    0 => "ok".to_owned(),
                    code => format!("error {code}"),
                }
            }
            "every" => {
                let step = number(1)?.max(1);
                self.free(|number, _| number.is_multiple_of(step))
            }
            "info" => {
                let (mut free, mut total) = (0usize, 0usize);
                let status = call!(self.cuda.0, "cuMemGetInfo_v2", &raw mut free => *mut usize,
                    &raw mut total => *mut usize);
                if status == 0 {
                    format!("{free} {total}")
                } else {
                    format!("error {status}")
                }
            }
            "total" => {
                let mut total = 0usize;
                let ordinal = i32::try_from(self.device).ok()?;
                let status = call!(self.cuda.0, "cuDeviceTotalMem_v2", &raw mut total => *mut usize, ordinal => i32);
                if status == 0 {
                    total.to_string()
                } else {
                    format!("error {status}")
                }
            }
            "nvml" => nvml()?,
            "late" => match self.late(words.get(1)?.parse().ok()?, words.get(2)?.parse().ok()?) {
                Ok(()) => "ok".to_owned(),
                Err(code) => format!("error {code}"),
            },
            "busy" => match self.busy(number(1)?) {
                Ok(()) => "ok".to_owned(),
                Err(code) => format!("error {code}"),
            },
            "stack" => match self.find_stack() {
                Ok(()) => "ok".to_owned(),
                Err(code) => format!("error {code}"),
            },
            "fill" => self.fill(words.get(1)?.parse().ok()?),
            "check" => self.check(words.get(1)?.parse().ok()?),
            // SAFETY: the child only sleeps.
            "fork" => match unsafe { libc::fork() } {
                0 => loop {
                    // SAFETY: no arguments, no memory.
                    unsafe { libc::pause() };
                },
                child => child.to_string(),
            },
            "exit" => std::process::exit(i32::try_from(number(1)?).ok()?),
            // SAFETY: ends the process.
            "_exit" => unsafe { libc::_exit(i32::try_from(number(1)?).ok()?) },
            _ => return None,
        })
    }
}

fn nvml() -> Option<String> {
    let library = Library::open("libnvidia-ml.so.1")?;
    let mut device = 0usize;
    let mut memory = [0u64; 3];
    let status = call!(library, "nvmlInit_v2",)
        | call!(library, "nvmlDeviceGetHandleByIndex_v2", 0 => u32, &raw mut device => *mut usize)
        | call!(library, "nvmlDeviceGetMemoryInfo", device => usize, memory.as_mut_ptr() => *mut u64);
    let [total, free, used] = memory;
    Some(if status == 0 {
        format!("{used} {free} {total}")
    } else {
        format!("error {status}")
    })
}

fn main() {
    let mut probe = Probe::new();
    say("ready");
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { return };
        let words: Vec<&str> = line.split_whitespace().collect();
        say(&probe
            .answer(&words)
            .unwrap_or_else(|| format!("what is {line:?}?")));
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}
