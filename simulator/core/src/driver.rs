//! The one driver of a process: all registries, started by `cuInit`, unusable after a fork.

use crate::code::{DEINITIALIZED, NO_DEVICE, NOT_INITIALIZED, NOT_PERMITTED, OPERATING_SYSTEM, R};
use crate::config::{Config, GPUS_MAX};
use crate::context::{Context, Primary};
use crate::engine::Compute;
use crate::event::Event;
use crate::fault::Faults;
use crate::graph::{Exec, Graph};
use crate::green::{Green, Part};
use crate::host::HostTable;
use crate::managed::{self, Managed};
use crate::module::{Function, Kernel, Library, Module};
use crate::pool::{self, Pool};
use crate::shared::Shared;
use crate::space::{Physical, Space};
use crate::state::peek_driver;
use crate::stream::Stream;
use crate::sync::{lock, read, write};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};

/// Handles of one kind.
pub struct Registry<T>(RwLock<HashMap<u64, Arc<T>>>);

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Self(RwLock::default())
    }
}

impl<T> Registry<T> {
    #[must_use]
    pub fn get(&self, id: u64) -> Option<Arc<T>> {
        read(&self.0).get(&id).cloned()
    }

    pub fn insert(&self, id: u64, value: Arc<T>) {
        write(&self.0).insert(id, value);
    }

    pub fn remove(&self, id: u64) -> Option<Arc<T>> {
        write(&self.0).remove(&id)
    }

    #[must_use]
    pub fn all(&self) -> Vec<Arc<T>> {
        read(&self.0).values().cloned().collect()
    }

    pub fn retain(&self, keep: impl Fn(&T) -> bool) {
        let gone: Vec<Arc<T>> = {
            let mut map = write(&self.0);
            let ids: Vec<u64> = map
                .iter()
                .filter(|(_, v)| !keep(v))
                .map(|(id, _)| *id)
                .collect();
            ids.iter().filter_map(|id| map.remove(id)).collect()
        };
        // Dropped without the lock: a destructor may use the registry.
        drop(gone);
    }
}

/// Everything.
pub struct Driver {
    pub shared: &'static Shared,
    pub space: RwLock<Space>,
    pub host: RwLock<HostTable>,
    pub managed: Mutex<Managed>,
    pub contexts: Registry<Context>,
    /// Green contexts, and the descriptions that they are made of.
    pub greens: Registry<Green>,
    pub descriptions: Registry<Part>,
    pub streams: Registry<Stream>,
    pub events: Registry<Event>,
    pub modules: Registry<Module>,
    pub functions: Registry<Function>,
    pub libraries: Registry<Library>,
    pub kernels: Registry<Kernel>,
    pub pools: Registry<Pool>,
    pub graphs: Registry<Graph>,
    pub execs: Registry<Exec>,
    /// Memory of graphs.
    pub graph_pools: Mutex<crate::graph_pool::Pools>,
    /// VMM handles with at least one reference.
    pub handles: Registry<Physical>,
    /// All VMM memory, also when only mappings keep it.
    pub physicals: Mutex<HashMap<u64, Weak<Physical>>>,
    pub primaries: Vec<Mutex<Primary>>,
    pub default_pools: Vec<Arc<Pool>>,
    pub current_pools: Vec<Mutex<u64>>,
    compute: Vec<Compute>,
    peers: [AtomicU32; GPUS_MAX],
    pub faults: Faults,
    /// Allocations (by id) whose owner asked for SYNC_MEMOPS.
    pub sync_memops: Mutex<std::collections::HashSet<u64>>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();
/// Held while the driver starts; true: it was tried, and no GPU is visible.
static STARTING: Mutex<bool> = Mutex::new(false);
static FORKED: AtomicBool = AtomicBool::new(false);
static EXITING: AtomicBool = AtomicBool::new(false);

extern "C" fn note_fork() {
    FORKED.store(true, Ordering::Release);
}

/// Whether this is the child of a process that used CUDA.
#[must_use]
pub fn forked() -> bool {
    FORKED.load(Ordering::Acquire)
}

/// The process exits in order: what it holds is given up, and the API is closed to later handlers.
extern "C" fn exiting() {
    if let (false, Some(driver)) = (FORKED.load(Ordering::Acquire), DRIVER.get()) {
        EXITING.store(true, Ordering::Release);
        driver.shared.leave();
    }
}

/// Managed memory leaves a GPU that is full.
fn make_room(gpu: u32, frames: u64) -> bool {
    DRIVER
        .get()
        .is_some_and(|driver| managed::make_room(driver, gpu, frames))
}

std::thread_local! {
    static IN_CALLBACK: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs a function of the application from a stream: the API is closed to it.
pub fn in_callback(f: impl FnOnce()) {
    IN_CALLBACK.set(true);
    f();
    IN_CALLBACK.set(false);
}

/// Starts the driver, once.
///
/// # Errors
/// `NOT_INITIALIZED` in a forked child, `NO_DEVICE` if none is visible, `OPERATING_SYSTEM` (with a line on stderr) if the shared
/// machine cannot be opened.
pub fn init() -> R {
    if FORKED.load(Ordering::Acquire) {
        return Err(NOT_INITIALIZED);
    }
    if DRIVER.get().is_some() {
        return Ok(());
    }
    let mut none_visible = lock(&STARTING);
    if DRIVER.get().is_some() {
        return Ok(());
    }
    if *none_visible {
        return Err(NO_DEVICE);
    }
    let driver = start().map_err(|line| {
        eprintln!("{line}");
        OPERATING_SYSTEM
    })?;
    if driver.shared.config().gpus == 0 {
        *none_visible = true;
        return Err(NO_DEVICE);
    }
    if DRIVER.set(driver).is_ok() {
        if let Some(driver) = DRIVER.get() {
            let _ = driver.shared.make_room.set(make_room);
        }
        // SAFETY: handlers that only store flags; this library is never unloaded.
        unsafe {
            libc::pthread_atfork(None, None, Some(note_fork));
            libc::atexit(exiting);
        }
    }
    Ok(())
}

fn start() -> Result<Driver, String> {
    let faults = Faults::parse(&std::env::var("SPILLWAY_SIM_FAULTS").unwrap_or_default())
        .map_err(|e| format!("spillway simulator: {e}"))?;
    let shared: &'static Shared = Box::leak(Box::new(Shared::open(true)?));
    let space =
        Space::new().map_err(|_| "spillway simulator: no address space to reserve".to_owned())?;
    let gpus = shared.config().gpus;
    let pools = Registry::default();
    let default_pools: Vec<Arc<Pool>> = (0..gpus)
        .map(|gpu| Pool::new(gpu, pool::Kind::Default, 0, 0))
        .collect();
    for pool in &default_pools {
        pools.insert(pool.id, Arc::clone(pool));
    }
    Ok(Driver {
        shared,
        space: RwLock::new(space),
        host: RwLock::default(),
        managed: Mutex::default(),
        contexts: Registry::default(),
        greens: Registry::default(),
        descriptions: Registry::default(),
        streams: Registry::default(),
        events: Registry::default(),
        modules: Registry::default(),
        functions: Registry::default(),
        libraries: Registry::default(),
        kernels: Registry::default(),
        graphs: Registry::default(),
        execs: Registry::default(),
        graph_pools: Mutex::default(),
        handles: Registry::default(),
        physicals: Mutex::default(),
        primaries: (0..gpus).map(|_| Mutex::default()).collect(),
        current_pools: default_pools.iter().map(|p| Mutex::new(p.id)).collect(),
        default_pools,
        pools,
        compute: (0..gpus).map(|_| Compute::default()).collect(),
        peers: Default::default(),
        faults,
        sync_memops: Mutex::default(),
    })
}

/// The driver's version, also before `cuInit`: that of the machine, if it exists and was chosen,
/// else what the environment asks for.
///
/// # Errors
/// One line that names the variable at fault.
pub fn version() -> Result<u32, String> {
    if let Some(driver) = DRIVER.get() {
        return Ok(driver.shared.config().driver);
    }
    let (dir, chosen) = Config::directory();
    let known = if chosen { peek_driver(&dir) } else { None };
    known.map_or_else(Config::driver_from_env, Ok)
}

/// The driver.
///
/// # Errors
/// `NOT_INITIALIZED` before `cuInit` and in a forked child, `NOT_PERMITTED` in a host callback,
/// `DEINITIALIZED` while the process exits.
pub fn get() -> R<&'static Driver> {
    if FORKED.load(Ordering::Acquire) {
        return Err(NOT_INITIALIZED);
    }
    if IN_CALLBACK.get() {
        return Err(NOT_PERMITTED);
    }
    if EXITING.load(Ordering::Acquire) {
        return Err(DEINITIALIZED);
    }
    DRIVER.get().ok_or(NOT_INITIALIZED)
}

impl Driver {
    #[must_use]
    pub fn compute(&self, gpu: u32) -> &Compute {
        &self.compute[gpu as usize]
    }

    /// Whether `from` may access the classic memory of `to`.
    #[must_use]
    pub fn peer_enabled(&self, from: u32, to: u32) -> bool {
        self.peers[from as usize].load(Ordering::Acquire) >> to & 1 != 0
    }

    /// Changes that; returns what it was. Mappings of the VMM calls are not touched.
    pub fn set_peer(&self, from: u32, to: u32, enabled: bool) -> bool {
        let bit = 1 << to;
        let word = &self.peers[from as usize];
        let before = if enabled {
            word.fetch_or(bit, Ordering::AcqRel)
        } else {
            word.fetch_and(!bit, Ordering::AcqRel)
        };
        for region in write(&self.space)
            .regions
            .values_mut()
            .filter(|r| !r.vmm && r.pool == 0 && r.physical.gpu() == Some(to))
        {
            region.access[from as usize] = if enabled { crate::space::READ_WRITE } else { 0 };
        }
        before & bit != 0
    }

    /// Trims the pools of a GPU: to nothing, or to their thresholds.
    pub fn trim_pools(&self, gpu: u32, all: bool) {
        for pool in self.pools.all().iter().filter(|p| p.gpu == gpu) {
            if all {
                pool.trim(self, 0);
            } else {
                pool.synchronised(self);
            }
        }
    }
}
