//! NVML through `dlopen`: the daemon starts with a clear message where there is no driver, and works
//! with any version of the library that has the calls it needs.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

use super::gpus::{Gpu, Gpus, Measured, ProcessMemory, parse_uuid};

const LIBRARY: &str = "libnvidia-ml.so.1";
const SUCCESS: c_int = 0;
const INSUFFICIENT_SIZE: c_int = 7;
/// What NVML writes for "cannot tell" where a size is expected.
const NOT_AVAILABLE: u64 = u64::MAX;
/// What NVML writes as the instance of a process that is in none (MIG is off).
const NO_INSTANCE: c_uint = c_uint::MAX;
/// The longest UUID and name that NVML documents.
const TEXT_BYTES: c_uint = 96;
/// Processes on one device that are listed at most.
const MOST_PROCESSES: usize = 65_536;

type Device = *mut c_void;

#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlProcessInfo_t` as of version 2 of the query (and 3).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProcessInfo {
    pid: c_uint,
    used: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

type InitFn = unsafe extern "C" fn() -> c_int;
type CountFn = unsafe extern "C" fn(*mut c_uint) -> c_int;
type ByIndexFn = unsafe extern "C" fn(c_uint, *mut Device) -> c_int;
type TextFn = unsafe extern "C" fn(Device, *mut c_char, c_uint) -> c_int;
type MemoryFn = unsafe extern "C" fn(Device, *mut Memory) -> c_int;
type ProcessesFn = unsafe extern "C" fn(Device, *mut c_uint, *mut ProcessInfo) -> c_int;
type ErrorFn = unsafe extern "C" fn(c_int) -> *const c_char;

/// An initialised NVML.
pub struct Nvml {
    handles: Vec<Device>,
    devices: Vec<Gpu>,
    memory: MemoryFn,
    compute: Option<ProcessesFn>,
    graphics: Option<ProcessesFn>,
}

// SAFETY: NVML is documented to be thread safe; the handles are valid in the whole process.
unsafe impl Send for Nvml {}

struct Library(*mut c_void);

impl Library {
    fn symbol(&self, names: &[&str]) -> Option<*mut c_void> {
        names.iter().find_map(|name| {
            let name = CString::new(*name).ok()?;
            // SAFETY: a handle from dlopen that is never closed, and a C string.
            let at = unsafe { libc::dlsym(self.0, name.as_ptr()) };
            (!at.is_null()).then_some(at)
        })
    }
}

macro_rules! function {
    ($library:expr, $type:ty, $($name:literal),+) => {
        $library
            .symbol(&[$($name),+])
            // SAFETY: NVML exports a function of this type under these names.
            .map(|at| unsafe { std::mem::transmute::<*mut c_void, $type>(at) })
    };
}

fn needed<T>(function: Option<T>, name: &str) -> Result<T, String> {
    function.ok_or_else(|| format!("{LIBRARY} lacks {name}: is it the driver's?"))
}

impl Nvml {
    /// Loads and initialises NVML, and lists the devices.
    ///
    /// # Errors
    /// Text that names the library and what to do.
    pub fn open() -> Result<Self, String> {
        let name = CString::new(LIBRARY).map_err(|error| error.to_string())?;
        // SAFETY: a C string; the library's constructors are the driver's own.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return Err(format!(
                "cannot load {LIBRARY}: {}. It comes with the NVIDIA driver; if it is installed, put its directory into LD_LIBRARY_PATH",
                loader_error()
            ));
        }
        let library = Library(handle);
        let init = needed(
            function!(library, InitFn, "nvmlInit_v2", "nvmlInit"),
            "nvmlInit_v2",
        )?;
        let count = needed(
            function!(
                library,
                CountFn,
                "nvmlDeviceGetCount_v2",
                "nvmlDeviceGetCount"
            ),
            "nvmlDeviceGetCount_v2",
        )?;
        let by_index = needed(
            function!(
                library,
                ByIndexFn,
                "nvmlDeviceGetHandleByIndex_v2",
                "nvmlDeviceGetHandleByIndex"
            ),
            "nvmlDeviceGetHandleByIndex_v2",
        )?;
        let uuid = needed(
            function!(library, TextFn, "nvmlDeviceGetUUID"),
            "nvmlDeviceGetUUID",
        )?;
        let product = needed(
            function!(library, TextFn, "nvmlDeviceGetName"),
            "nvmlDeviceGetName",
        )?;
        let memory = needed(
            function!(library, MemoryFn, "nvmlDeviceGetMemoryInfo"),
            "nvmlDeviceGetMemoryInfo",
        )?;
        let error = function!(library, ErrorFn, "nvmlErrorString");
        let check = |code: c_int, what: &str| {
            if code == SUCCESS {
                Ok(())
            } else {
                Err(format!("{LIBRARY}: {what}: {}", error_text(error, code)))
            }
        };
        // Version 2 and 3 have the same structure; the older call without a version has another one,
        // and is not used: where it is all there is, nothing is known of processes.
        let compute = function!(
            library,
            ProcessesFn,
            "nvmlDeviceGetComputeRunningProcesses_v3",
            "nvmlDeviceGetComputeRunningProcesses_v2"
        );
        let graphics = function!(
            library,
            ProcessesFn,
            "nvmlDeviceGetGraphicsRunningProcesses_v3",
            "nvmlDeviceGetGraphicsRunningProcesses_v2"
        );
        // SAFETY: NVML's own initialisation; no arguments.
        check(unsafe { init() }, "nvmlInit")?;
        let mut devices: c_uint = 0;
        // SAFETY: writes one integer.
        check(unsafe { count(&raw mut devices) }, "nvmlDeviceGetCount")?;
        let mut this = Self {
            handles: Vec::new(),
            devices: Vec::new(),
            memory,
            compute,
            graphics,
        };
        for index in 0..devices {
            let mut handle: Device = std::ptr::null_mut();
            // SAFETY: writes one handle.
            let code = unsafe { by_index(index, &raw mut handle) };
            check(code, "nvmlDeviceGetHandleByIndex")?;
            let text = device_text(uuid, handle).unwrap_or_default();
            let Some(uuid) = parse_uuid(&text) else {
                return Err(format!(
                    "{LIBRARY}: device {index} has the unreadable UUID {text:?}"
                ));
            };
            let mut sizes = Memory::default();
            // SAFETY: a valid handle; writes three integers.
            let code = unsafe { memory(handle, &raw mut sizes) };
            check(code, "nvmlDeviceGetMemoryInfo")?;
            this.handles.push(handle);
            this.devices.push(Gpu {
                uuid,
                name: device_text(product, handle).unwrap_or_default(),
                total: sizes.total,
            });
        }
        Ok(this)
    }

    fn list(&self, query: ProcessesFn, handle: Device) -> Option<Vec<ProcessInfo>> {
        let mut room: usize = 64;
        while room <= MOST_PROCESSES {
            let mut list = vec![ProcessInfo::default(); room];
            let mut count = c_uint::try_from(room).ok()?;
            // SAFETY: a valid handle and `count` structures of the layout that this query fills.
            let code = unsafe { query(handle, &raw mut count, list.as_mut_ptr()) };
            if code == SUCCESS {
                list.truncate(count as usize);
                return Some(list);
            }
            if code != INSUFFICIENT_SIZE {
                return None;
            }
            room = (room * 2).max(count as usize + 16);
        }
        None
    }
}

impl Gpus for Nvml {
    fn devices(&self) -> Vec<Gpu> {
        self.devices.clone()
    }

    fn measure(&self, device: usize) -> Measured {
        let Some(handle) = self.handles.get(device).copied() else {
            return Measured::default();
        };
        let mut sizes = Memory::default();
        // SAFETY: a valid handle; writes three integers.
        let code = unsafe { (self.memory)(handle, &raw mut sizes) };
        let used = (code == SUCCESS).then_some(sizes.used);
        let mut measured = Measured {
            used,
            ..Measured::default()
        };
        let mut processes: Option<ProcessMemory> = None;
        let lists = [
            (self.compute, &mut measured.compute),
            (self.graphics, &mut measured.graphics),
        ];
        for (query, kind) in lists {
            let Some(list) = query.and_then(|query| self.list(query, handle)) else {
                continue;
            };
            let all = processes.get_or_insert_default();
            for entry in list {
                let Ok(pid) = i32::try_from(entry.pid) else {
                    continue;
                };
                let bytes = (entry.used != NOT_AVAILABLE).then_some(entry.used);
                // A process that computes and draws is in both lists, with the same figure; one in
                // several MIG instances is there several times and is not told apart here.
                let known = all.entry(pid).or_insert(bytes);
                *known = (*known).max(bytes);
                if entry.gpu_instance == NO_INSTANCE {
                    kind.insert(pid);
                }
            }
        }
        measured.processes = processes;
        measured
    }
}

fn device_text(query: TextFn, handle: Device) -> Option<String> {
    let mut buffer = [0 as c_char; TEXT_BYTES as usize];
    // SAFETY: a valid handle, and a buffer of the length said.
    let code = unsafe { query(handle, buffer.as_mut_ptr(), TEXT_BYTES) };
    if code != SUCCESS {
        return None;
    }
    if let Some(last) = buffer.last_mut() {
        *last = 0;
    }
    // SAFETY: the buffer ends with a zero, set above at the latest.
    let text = unsafe { CStr::from_ptr(buffer.as_ptr()) };
    Some(text.to_string_lossy().into_owned())
}

fn error_text(function: Option<ErrorFn>, code: c_int) -> String {
    let known = function.and_then(|function| {
        // SAFETY: returns a static string for any code.
        let text = unsafe { function(code) };
        if text.is_null() {
            return None;
        }
        // SAFETY: not null; static and ended by a zero.
        let text = unsafe { CStr::from_ptr(text) };
        Some(text.to_string_lossy().into_owned())
    });
    known.unwrap_or_else(|| format!("error {code}"))
}

fn loader_error() -> String {
    // SAFETY: returns the last error of this thread as a C string, or null.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "unknown error".to_owned();
    }
    // SAFETY: not null; valid until the next call of the loader in this thread.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}
