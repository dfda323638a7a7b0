//! The layout of the `state` file, and how it comes to be.

use crate::config::{Config, FRAME, GPUS_MAX};
use crate::files::{holder, map, open_shared, open_shared_existing, say};
use crate::sync::now_ns;
use std::cell::UnsafeCell;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Processes that can use the machine at once.
pub const SLOTS: usize = 1024;
/// Exported allocations that can be alive at once.
pub const OBJECTS: usize = 1024;
const MAGIC: u64 = 0x5350_4c57_5349_4d31;
const VERSION: u64 = 2;

/// When each engine of a GPU is free again, in monotonic nanoseconds: a virtual queue that needs
/// no lock, so that the dead and the stopped hold up nobody.
#[repr(C)]
#[derive(Default)]
pub struct Engines {
    pub compute: AtomicU64,
    /// Host to device, device to host, and the link that both share.
    pub link: [AtomicU64; 3],
    /// Time that the compute engine was in use, in all.
    pub busy_ns: AtomicU64,
}

/// Marks a slot whose process is gone, or about to go; the rest is when that was.
pub const DEAD: u64 = 1 << 63;

/// A process as the others see it.
#[repr(C)]
pub struct Slot {
    /// 0 is free, 1 in use; the top bit with a time (ns) says when its death was first seen.
    pub state: AtomicU64,
    pub pid: AtomicU32,
    _unused: AtomicU32,
    pub pid_namespace: AtomicU64,
    pub contexts: [AtomicU32; GPUS_MAX],
    pub busy_ns: [AtomicU64; GPUS_MAX],
}

/// The start of the file; one word per frame of each GPU follows.
#[repr(C)]
pub struct Header {
    magic: AtomicU64,
    version: AtomicU64,
    pub gpus: AtomicU64,
    memory: AtomicU64,
    driver: AtomicU64,
    context: AtomicU64,
    module: AtomicU64,
    release_delay_us: AtomicU64,
    death_delay_us: AtomicU64,
    link: [AtomicU64; 3],
    vmm_cost_milli: AtomicU64,
    pub seed: AtomicU64,
    pub lock: UnsafeCell<libc::pthread_mutex_t>,
    pub vmm_clock: AtomicU64,
    pub generation: AtomicU64,
    pub engines: [Engines; GPUS_MAX],
    pub slots: [Slot; SLOTS],
    /// Generation and state of each exported allocation (0 is free), and the slot that made it.
    pub objects: [AtomicU64; OBJECTS],
    pub object_maker: [AtomicU32; OBJECTS],
    /// A bit per slot that imported it: when the maker is gone, one of them holds the memory.
    pub object_importers: [[AtomicU64; SLOTS / 64]; OBJECTS],
}

/// Bytes before the frames' words.
pub const HEADER: usize = size_of::<Header>().next_multiple_of(4096);

fn read_config(header: &Header) -> Config {
    let get = |word: &AtomicU64| word.load(Ordering::Relaxed);
    Config {
        gpus: get(&header.gpus) as u32,
        memory: get(&header.memory),
        driver: get(&header.driver) as u32,
        context: get(&header.context),
        module: get(&header.module),
        release_delay_us: get(&header.release_delay_us),
        death_delay_us: get(&header.death_delay_us),
        link: [
            get(&header.link[0]),
            get(&header.link[1]),
            get(&header.link[2]),
        ],
        vmm_cost_milli: get(&header.vmm_cost_milli),
    }
}

/// The driver's version of a machine that exists: only looks, for those who must not open it yet.
#[must_use]
pub fn peek_driver(dir: &Path) -> Option<u32> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(dir.join("state")).ok()?;
    let word = |offset: usize| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset as u64).ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    let ours = word(std::mem::offset_of!(Header, magic))? == MAGIC
        && word(std::mem::offset_of!(Header, version))? == VERSION;
    let driver = word(std::mem::offset_of!(Header, driver))? as u32;
    (ours && crate::release::Release::of(driver).is_some()).then_some(driver)
}

/// Maps `state`, making it first if it is not there, or if nobody uses a default one that was
/// configured otherwise. Called under the directory's lock.
///
/// # Errors
/// One line that says which file is at fault.
pub fn open_state(
    path: &Path,
    wanted: &Config,
    slots_fd: RawFd,
    chosen: bool,
) -> Result<(*const Header, Config), String> {
    let n = wanted.memory / FRAME * u64::from(wanted.gpus);
    let length = HEADER + n as usize * size_of::<AtomicU64>();
    if let Ok(file) = open_shared_existing(path) {
        let size = file
            .metadata()
            .map_err(|e| say(path, "cannot read", &e))?
            .len() as usize;
        if size >= HEADER {
            let base = map(&file, size).map_err(|e| say(path, "cannot map", &e))?;
            // SAFETY: mapped for the life of the process, large enough, page aligned; every field
            // is valid for any bytes.
            let header = unsafe { &*base.cast::<Header>() };
            let config = read_config(header);
            let whole = header.magic.load(Ordering::Acquire) == MAGIC
                && header.version.load(Ordering::Relaxed) == VERSION
                && (1..=GPUS_MAX as u32).contains(&config.gpus)
                && crate::release::Release::of(config.driver).is_some()
                && size as u64
                    >= HEADER as u64 + config.memory / FRAME * u64::from(config.gpus) * 8;
            let in_use = (0..SLOTS).any(|i| {
                header.slots[i].state.load(Ordering::Acquire) != 0
                    && holder(slots_fd, libc::F_GETLK, i).is_some()
            });
            if whole && (chosen || in_use || config == *wanted) {
                return Ok((base.cast(), config));
            }
            if chosen {
                return Err(say(
                    path,
                    "not a simulator's state, or of another version:",
                    &"remove its directory",
                ));
            }
        }
        std::fs::remove_file(path).map_err(|e| say(path, "cannot replace", &e))?;
    }
    let temporary = path.with_extension("new");
    let _ = std::fs::remove_file(&temporary);
    let make = || -> io::Result<*mut u8> {
        let file = open_shared(&temporary)?;
        file.set_len(length as u64)?;
        map(&file, length)
    };
    let base = make().map_err(|e| say(path, "cannot create", &e))?;
    // SAFETY: as above; the file is all zero, which every field accepts.
    let header = unsafe { &*base.cast::<Header>() };
    let put = |word: &AtomicU64, value: u64| word.store(value, Ordering::Relaxed);
    put(&header.gpus, u64::from(wanted.gpus));
    put(&header.memory, wanted.memory);
    put(&header.driver, u64::from(wanted.driver));
    put(&header.context, wanted.context);
    put(&header.module, wanted.module);
    put(&header.release_delay_us, wanted.release_delay_us);
    put(&header.death_delay_us, wanted.death_delay_us);
    for (word, value) in header.link.iter().zip(wanted.link) {
        put(word, value);
    }
    put(&header.vmm_cost_milli, wanted.vmm_cost_milli);
    put(&header.seed, now_ns() ^ u64::from(std::process::id()) << 40);
    put(&header.version, VERSION);
    // SAFETY: the attribute object is local, the mutex lies in the mapping and nobody sees it yet.
    unsafe {
        let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut attributes);
        libc::pthread_mutexattr_setpshared(&raw mut attributes, libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(header.lock.get(), &raw const attributes);
        libc::pthread_mutexattr_destroy(&raw mut attributes);
    }
    header.magic.store(MAGIC, Ordering::Release);
    std::fs::rename(&temporary, path).map_err(|e| say(path, "cannot create", &e))?;
    Ok((base.cast(), wanted.clone()))
}
