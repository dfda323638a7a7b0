//! The witness: a process that is not under Spillway and samples NVML's figures all the time.
//!
//! On standard input `reset` begins a new span, `look` samples now, both are answered by the figures since
//! the last reset as one line of JSON: per device in NVML's order the most that was used in all, and what is
//! now; per process the most on any one device.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::io::{BufRead, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

/// Between two samples.
const EVERY: Duration = Duration::from_millis(2);
/// More processes than any adversary starts.
const PROCESSES: usize = 256;

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlProcessInfo_t` of the third version of the call.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Process {
    pid: u32,
    bytes: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

type GetCount = unsafe extern "C" fn(*mut u32) -> i32;
type GetHandle = unsafe extern "C" fn(u32, *mut usize) -> i32;
type GetMemory = unsafe extern "C" fn(usize, *mut Memory) -> i32;
type GetProcesses = unsafe extern "C" fn(usize, *mut u32, *mut Process) -> i32;

struct Nvml {
    devices: Vec<usize>,
    memory: GetMemory,
    processes: GetProcesses,
}

#[derive(Default)]
struct Span {
    most: Vec<u64>,
    now: Vec<u64>,
    processes: BTreeMap<u32, u64>,
    samples: u64,
}

fn symbol(library: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: an open library and a C string.
    let at = unsafe { libc::dlsym(library, name.as_ptr()) };
    if at.is_null() {
        Err(format!(
            "libnvidia-ml.so.1 has no {}",
            name.to_string_lossy()
        ))
    } else {
        Ok(at)
    }
}

impl Nvml {
    fn open() -> Result<Self, String> {
        // SAFETY: a C string; the library stays open.
        let library = unsafe { libc::dlopen(c"libnvidia-ml.so.1".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return Err("libnvidia-ml.so.1 cannot be loaded".to_owned());
        }
        let init = symbol(library, c"nvmlInit_v2")?;
        let count = symbol(library, c"nvmlDeviceGetCount_v2")?;
        let handle = symbol(library, c"nvmlDeviceGetHandleByIndex_v2")?;
        let memory = symbol(library, c"nvmlDeviceGetMemoryInfo")?;
        let processes = symbol(library, c"nvmlDeviceGetComputeRunningProcesses_v3")?;
        // SAFETY: NVML's functions of these names have these signatures; pointers are to locals.
        unsafe {
            let init: unsafe extern "C" fn() -> i32 = std::mem::transmute(init);
            let count: GetCount = std::mem::transmute(count);
            let handle: GetHandle = std::mem::transmute(handle);
            let started = init();
            if started != 0 {
                return Err(format!("nvmlInit_v2: {started}"));
            }
            let mut number = 0;
            count(&raw mut number);
            let devices = (0..number).map(|index| {
                let mut device = 0;
                handle(index, &raw mut device);
                device
            });
            Ok(Self {
                devices: devices.collect(),
                memory: std::mem::transmute::<*mut c_void, GetMemory>(memory),
                processes: std::mem::transmute::<*mut c_void, GetProcesses>(processes),
            })
        }
    }

    fn sample(&self, span: &mut Span) {
        span.most.resize(self.devices.len(), 0);
        span.now.resize(self.devices.len(), 0);
        span.samples += 1;
        for (index, device) in self.devices.iter().enumerate() {
            let mut memory = Memory::default();
            let mut list = [Process::default(); PROCESSES];
            let mut count = u32::try_from(PROCESSES).unwrap_or(0);
            // SAFETY: a device's handle, and locals with the room that is stated.
            let (memory_code, list_code) = unsafe {
                (
                    (self.memory)(*device, &raw mut memory),
                    (self.processes)(*device, &raw mut count, list.as_mut_ptr()),
                )
            };
            if memory_code == 0 {
                span.now[index] = memory.used;
                span.most[index] = span.most[index].max(memory.used);
            }
            if list_code == 0 {
                for process in list.iter().take(count as usize) {
                    let most = span.processes.entry(process.pid).or_default();
                    *most = process.bytes.max(*most);
                }
            }
        }
    }
}

/// Runs until standard input ends.
///
/// # Errors
/// NVML cannot be used.
pub fn run() -> Result<(), String> {
    let nvml = Arc::new(Nvml::open()?);
    let span = Arc::new(Mutex::new(Span::default()));
    let (other, shared) = (Arc::clone(&nvml), Arc::clone(&span));
    std::thread::spawn(move || {
        loop {
            other.sample(&mut shared.lock().unwrap_or_else(PoisonError::into_inner));
            std::thread::sleep(EVERY);
        }
    });
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let mut span = span.lock().unwrap_or_else(PoisonError::into_inner);
        if line.trim() == "reset" {
            *span = Span::default();
        }
        nvml.sample(&mut span);
        let answer = json!({
            "most": span.most, "now": span.now, "samples": span.samples,
            "processes": span.processes.iter().map(|(pid, bytes)| json!([pid, bytes])).collect::<Vec<_>>(),
        });
        drop(span);
        println!("{answer}");
        let _ = std::io::stdout().flush();
    }
    Ok(())
}
