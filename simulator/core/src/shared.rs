//! The machine that all processes share: files in the simulator's directory.
//!
//! - `state`: configuration, slots, clocks, the owner of each frame; mapped by everybody.
//! - `slots`: one byte per process slot, held by a classic POSIX record lock. The kernel drops it
//!   when the process dies, whatever namespace it lives in, a forked child does not inherit it,
//!   and `F_GETLK` gives a reader the owner's pid as the reader sees it. Such locks go when the
//!   process closes *any* descriptor of the file: descriptors of `slots` are never closed here.
//! - `gpuN`: the memory of one GPU, sparse; each process maps all of it once (its window), so a
//!   frame that was touched before costs no page fault.
//! - `object-N-G`: an exported allocation; alive while somebody holds an open description of it.
//!
//! Files are 0666 and the directory 0777: processes of different users share one machine.

use crate::code::{OUT_OF_MEMORY, R};
use crate::config::{Config, FRAME, GPUS_MAX};
use crate::frames::{Frames, Owner};
use crate::sync::now_ns;
use std::cell::UnsafeCell;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Processes that can use the machine at once.
pub const SLOTS: usize = 1024;
/// Exported allocations that can be alive at once.
pub const OBJECTS: usize = 1024;
const MAGIC: u64 = 0x5350_4c57_5349_4d31;
const VERSION: u64 = 1;

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

const DEAD: u64 = 1 << 63;

/// A process as the others see it.
#[repr(C)]
pub struct Slot {
    /// 0 is free, 1 in use; the top bit with a time (ns) says when its death was first seen.
    state: AtomicU64,
    pid: AtomicU32,
    _unused: AtomicU32,
    pid_namespace: AtomicU64,
    pub contexts: [AtomicU32; GPUS_MAX],
    pub busy_ns: [AtomicU64; GPUS_MAX],
}

#[repr(C)]
struct Header {
    magic: AtomicU64,
    version: AtomicU64,
    gpus: AtomicU64,
    memory: AtomicU64,
    driver: AtomicU64,
    context: AtomicU64,
    module: AtomicU64,
    release_delay_us: AtomicU64,
    death_delay_us: AtomicU64,
    link: [AtomicU64; 3],
    vmm_cost_milli: AtomicU64,
    seed: AtomicU64,
    lock: UnsafeCell<libc::pthread_mutex_t>,
    vmm_clock: AtomicU64,
    generation: AtomicU64,
    engines: [Engines; GPUS_MAX],
    slots: [Slot; SLOTS],
    /// Generation and state of each exported allocation (0 is free), and the slot that made it.
    objects: [AtomicU64; OBJECTS],
    object_maker: [AtomicU32; OBJECTS],
}

const HEADER: usize = size_of::<Header>().next_multiple_of(4096);

/// One GPU's memory in this process.
struct Window {
    base: *mut u8,
    file: File,
}

/// This process's view of the machine.
pub struct Shared {
    header: *const Header,
    dir: PathBuf,
    slots_fd: RawFd,
    windows: Vec<Window>,
    config: Config,
    /// The slot of this process, if it takes part (NVML only looks).
    slot: Option<u16>,
}

// SAFETY: the mappings live as long as the process, and everything in them is atomic or guarded by
// the robust mutex.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

fn say(path: &Path, what: &str, error: &dyn std::fmt::Display) -> String {
    format!("spillway simulator: {what} {}: {error}", path.display())
}

fn open_shared(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o666)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)?;
    let mode = file.metadata()?.mode();
    if mode & 0o666 != 0o666 {
        // Only the owner may; the umask took something away.
        let _ = file.set_permissions(Permissions::from_mode(0o666));
    }
    Ok(file)
}

fn map(file: &File, length: usize) -> io::Result<*mut u8> {
    // SAFETY: a fresh shared mapping of a file of at least `length` bytes, at no fixed address.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(base.cast()) }
}

fn record_lock(kind: i32, byte: usize) -> libc::flock {
    // SAFETY: flock is plain data for which zero is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte as libc::off_t;
    lock.l_len = 1;
    lock
}

fn try_lock(fd: RawFd, command: i32, kind: i32, byte: usize) -> bool {
    let lock = record_lock(kind, byte);
    // SAFETY: `lock` is a valid request for the duration of the call.
    unsafe { libc::fcntl(fd, command, &raw const lock) == 0 }
}

/// Who holds the byte, as this process's pid namespace numbers it; `None` if nobody does.
fn holder(fd: RawFd, command: i32, byte: usize) -> Option<i32> {
    let mut lock = record_lock(libc::F_WRLCK, byte);
    // SAFETY: `lock` is a valid request that the call fills in.
    let done = unsafe { libc::fcntl(fd, command, &raw mut lock) };
    (done != 0 || lock.l_type != libc::F_UNLCK as libc::c_short).then_some(lock.l_pid)
}

fn pid_namespace() -> u64 {
    std::fs::metadata("/proc/self/ns/pid").map(|m| m.ino()).unwrap_or(0)
}

/// Held while the owner words change; dropped by the kernel if its holder dies.
struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: this thread locked the mutex in `Shared::lock`.
        unsafe { libc::pthread_mutex_unlock((*self.0.header).lock.get()) };
    }
}

impl Shared {
    /// Opens the machine in the configured directory, creating it if it is not there; with
    /// `takes_part` the process gets a slot.
    ///
    /// # Errors
    /// One line that says which file or variable is at fault.
    pub fn open(takes_part: bool) -> Result<Self, String> {
        let wanted = Config::from_env().map_err(|e| format!("spillway simulator: {e}"))?;
        let (dir, chosen) = Config::directory();
        if std::fs::create_dir(&dir).is_ok() {
            let mode = if chosen { 0o777 } else { 0o700 };
            std::fs::set_permissions(&dir, Permissions::from_mode(mode)).map_err(|e| say(&dir, "cannot open up", &e))?;
        }
        let lock_path = dir.join("lock");
        let lock = open_shared(&lock_path).map_err(|e| say(&lock_path, "cannot open", &e))?;
        // SAFETY: a valid descriptor; the lock goes with it.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(say(&lock_path, "cannot lock", &io::Error::last_os_error()));
        }
        let slots_path = dir.join("slots");
        let slots_fd = open_shared(&slots_path).map_err(|e| say(&slots_path, "cannot open", &e))?.into_raw_fd();
        let state_path = dir.join("state");
        let (header, config) = open_state(&state_path, &wanted, slots_fd, chosen)?;
        let mut windows = Vec::new();
        for gpu in 0..config.gpus {
            let path = dir.join(format!("gpu{gpu}"));
            let window = open_shared(&path)
                .and_then(|file| {
                    if file.metadata()?.len() != config.memory {
                        file.set_len(config.memory)?;
                    }
                    let base = map(&file, config.memory as usize)?;
                    // SAFETY: the range just mapped; a child of fork has no use for it.
                    unsafe { libc::madvise(base.cast(), config.memory as usize, libc::MADV_DONTFORK) };
                    Ok(Window { base, file })
                })
                .map_err(|e| say(&path, "cannot map", &e))?;
            windows.push(window);
        }
        let mut shared = Self { header, dir, slots_fd, windows, config, slot: None };
        if takes_part {
            shared.slot = Some(shared.take_slot()?);
        }
        Ok(shared)
    }

    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn header(&self) -> &Header {
        // SAFETY: mapped for the life of the process; all its fields are atomics or cells.
        unsafe { &*self.header }
    }

    /// The slot of this process.
    #[must_use]
    pub fn slot(&self) -> u16 {
        self.slot.unwrap_or(u16::MAX)
    }

    /// What the others see of this process.
    #[must_use]
    pub fn own(&self) -> &Slot {
        &self.header().slots[self.slot.map_or(0, usize::from)]
    }

    #[must_use]
    pub fn engines(&self, gpu: u32) -> &Engines {
        &self.header().engines[gpu as usize]
    }

    #[must_use]
    pub fn vmm_clock(&self) -> &AtomicU64 {
        &self.header().vmm_clock
    }

    /// A number that differs between machines: the devices' UUIDs are made from it.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.header().seed.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn frames(&self, gpu: u32) -> Frames<'_> {
        let n = (self.config.memory / FRAME) as usize;
        // SAFETY: the state file was sized for `gpus * n` words after the header.
        Frames(unsafe {
            std::slice::from_raw_parts(self.header.cast::<u8>().add(HEADER).cast::<AtomicU64>().add(gpu as usize * n), n)
        })
    }

    /// Where a frame lies in this process.
    #[must_use]
    pub fn frame(&self, gpu: u32, frame: u32) -> *mut u8 {
        // SAFETY: frame numbers come from the table, so the offset is inside the window.
        unsafe { self.windows[gpu as usize].base.add(frame as usize * FRAME as usize) }
    }

    fn lock(&self) -> Guard<'_> {
        let mutex = self.header().lock.get();
        // SAFETY: the mutex was initialised as robust and shared when the file was made.
        unsafe {
            if libc::pthread_mutex_lock(mutex) == libc::EOWNERDEAD {
                // Owner words are whole at any moment: nothing to repair.
                libc::pthread_mutex_consistent(mutex);
            }
        }
        Guard(self)
    }

    fn take_slot(&self) -> Result<u16, String> {
        self.reap();
        let _guard = self.lock();
        for (index, slot) in self.header().slots.iter().enumerate() {
            if slot.state.load(Ordering::Acquire) != 0 || !try_lock(self.slots_fd, libc::F_SETLK, libc::F_WRLCK, index) {
                continue;
            }
            slot.pid.store(std::process::id(), Ordering::Relaxed);
            slot.pid_namespace.store(pid_namespace(), Ordering::Relaxed);
            for gpu in 0..GPUS_MAX {
                slot.contexts[gpu].store(0, Ordering::Relaxed);
                slot.busy_ns[gpu].store(0, Ordering::Relaxed);
            }
            slot.state.store(1, Ordering::Release);
            return Ok(index as u16);
        }
        Err(format!("spillway simulator: {} processes use {} already", SLOTS, self.dir.display()))
    }

    /// The pid of a slot's process as the caller's namespace numbers it: 0 if it is not visible
    /// there, `None` if it is dead.
    fn slot_pid(&self, index: usize) -> Option<i32> {
        let slot = &self.header().slots[index];
        let own = slot.pid.load(Ordering::Relaxed) == std::process::id()
            && slot.pid_namespace.load(Ordering::Relaxed) == pid_namespace();
        if own { Some(std::process::id() as i32) } else { holder(self.slots_fd, libc::F_GETLK, index) }
    }

    /// Says that this process is about to end: its memory comes back the delay from now.
    pub fn leave(&self) {
        self.own().state.store(DEAD | now_ns(), Ordering::Release);
    }

    /// Notices who died, and frees what the dead held once the delay is over.
    pub fn reap(&self) {
        let now = now_ns();
        for index in 0..SLOTS {
            let slot = &self.header().slots[index];
            let state = slot.state.load(Ordering::Acquire);
            if state == 0 || self.slot == Some(index as u16) || self.slot_pid(index).is_some() {
                continue;
            }
            let died = if state & DEAD == 0 {
                let _ = slot.state.compare_exchange(state, DEAD | now, Ordering::AcqRel, Ordering::Relaxed);
                now
            } else {
                state & !DEAD
            };
            if now < died + self.config.death_delay_us * 1000 {
                continue;
            }
            let _guard = self.lock();
            let state = slot.state.load(Ordering::Acquire);
            if state & DEAD != 0 {
                for gpu in 0..self.config.gpus {
                    self.frames(gpu).replace(|o| matches!(o, Owner::Slot(s) | Owner::Cooling(s, _) if usize::from(s) == index), Owner::Free);
                }
                slot.state.store(0, Ordering::Release);
            }
        }
        self.reap_objects();
    }

    fn object_path(&self, index: usize, generation: u64) -> PathBuf {
        self.dir.join(format!("object-{index}-{generation}"))
    }

    fn reap_objects(&self) {
        for index in 0..OBJECTS {
            let generation = self.header().objects[index].load(Ordering::Acquire);
            if generation == 0 {
                continue;
            }
            let path = self.object_path(index, generation);
            let alive = match open_shared_existing(&path) {
                Ok(file) => holder(file.as_raw_fd(), libc::F_OFD_GETLK, 0).is_some(),
                // No descriptors left here, say: rather a frame too few than one used twice.
                Err(e) => e.kind() != io::ErrorKind::NotFound,
            };
            if alive {
                continue;
            }
            let _guard = self.lock();
            if self.header().objects[index].load(Ordering::Acquire) == generation {
                for gpu in 0..self.config.gpus {
                    self.frames(gpu).replace(|o| o == Owner::Object(index as u16), Owner::Free);
                }
                let _ = std::fs::remove_file(&path);
                self.header().objects[index].store(0, Ordering::Release);
            }
        }
    }

    /// Takes `n` frames of `gpu` for this process, to be read and written.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if the GPU, or the disk behind it, has not that many.
    pub fn take(&self, gpu: u32, n: u64) -> R<Vec<u32>> {
        let chosen = self.charge(gpu, n)?;
        if let Err(error) = self.back(gpu, &chosen) {
            eprintln!("{}", say(&self.dir, "no space for device memory in", &error));
            let frames = self.frames(gpu);
            let _guard = self.lock();
            for frame in &chosen {
                frames.set_owner(*frame, Owner::Free);
            }
            return Err(OUT_OF_MEMORY);
        }
        Ok(chosen)
    }

    /// Takes `n` frames that only count: nobody will touch them.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if the GPU has not that many.
    pub fn charge(&self, gpu: u32, n: u64) -> R<Vec<u32>> {
        let frames = self.frames(gpu);
        if n > frames.0.len() as u64 {
            return Err(OUT_OF_MEMORY);
        }
        let choose = || {
            let _guard = self.lock();
            let chosen = frames.choose(n as usize, self.slot(), now_ns() / 1000)?;
            for frame in &chosen {
                frames.set_owner(*frame, Owner::Slot(self.slot()));
            }
            Some(chosen)
        };
        let chosen = choose().or_else(|| {
            self.reap();
            choose()
        });
        chosen.ok_or(OUT_OF_MEMORY)
    }

    /// Gives fresh frames their storage, so that a full disk is an error here and not a SIGBUS
    /// later, and something to read that is not zero.
    fn back(&self, gpu: u32, chosen: &[u32]) -> io::Result<()> {
        let frames = self.frames(gpu);
        for frame in chosen.iter().copied().filter(|f| !frames.backed(*f)) {
            let offset = i64::from(frame) * FRAME as i64;
            // SAFETY: a plain call on a descriptor that is open.
            let failed = unsafe { libc::posix_fallocate(self.windows[gpu as usize].file.as_raw_fd(), offset, FRAME as i64) };
            if failed != 0 {
                return Err(io::Error::from_raw_os_error(failed));
            }
            // SAFETY: the frame was just taken by this process and lies inside the window.
            unsafe { self.frame(gpu, frame).write_bytes(0xa5, 64) };
            frames.set_backed(frame);
        }
        Ok(())
    }

    /// Returns frames of this process.
    pub fn release(&self, gpu: u32, released: &[u32]) {
        let until_us = now_ns() / 1000 + self.config.release_delay_us;
        let owner = if self.config.release_delay_us == 0 { Owner::Free } else { Owner::Cooling(self.slot(), until_us) };
        let frames = self.frames(gpu);
        let _guard = self.lock();
        for frame in released {
            frames.set_owner(*frame, owner);
        }
    }

    /// Bytes of `gpu` in use by all processes.
    #[must_use]
    pub fn used(&self, gpu: u32) -> u64 {
        self.reap();
        self.frames(gpu).used() * FRAME
    }

    /// Living processes: pid (0 if not visible from here), contexts on `gpu`, bytes there.
    #[must_use]
    pub fn processes(&self, gpu: u32) -> Vec<Process> {
        self.reap();
        let frames = self.frames(gpu);
        let mut bytes = vec![0_u64; SLOTS];
        for frame in 0..frames.0.len() as u32 {
            let slot = match frames.owner(frame) {
                Owner::Slot(slot) => usize::from(slot),
                Owner::Object(object) => self.header().object_maker[usize::from(object)].load(Ordering::Relaxed) as usize,
                Owner::Free | Owner::Cooling(..) => continue,
            };
            if let Some(sum) = bytes.get_mut(slot) {
                *sum += FRAME;
            }
        }
        let mut all = Vec::new();
        for (index, slot) in self.header().slots.iter().enumerate() {
            if slot.state.load(Ordering::Acquire) == 0 {
                continue;
            }
            if let Some(pid) = self.slot_pid(index) {
                all.push(Process {
                    pid: pid.max(0) as u32,
                    contexts: slot.contexts[gpu as usize].load(Ordering::Relaxed),
                    bytes: bytes[index],
                    busy_ns: slot.busy_ns[gpu as usize].load(Ordering::Relaxed),
                });
            }
        }
        all
    }

    /// Turns this process's `frames` into an exported allocation; returns the open description
    /// that keeps it alive.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if too many exports are alive or the file cannot be written.
    pub fn export(&self, gpu: u32, exported: &[u32]) -> R<File> {
        self.reap_objects();
        let _guard = self.lock();
        let header = self.header();
        let index = (0..OBJECTS).find(|i| header.objects[*i].load(Ordering::Acquire) == 0).ok_or(OUT_OF_MEMORY)?;
        let generation = header.generation.fetch_add(1, Ordering::AcqRel) + 1;
        let path = self.object_path(index, generation);
        let write = || -> io::Result<File> {
            use std::io::Write;
            let mut file = open_shared(&path)?;
            if !try_lock(file.as_raw_fd(), libc::F_OFD_SETLK, libc::F_RDLCK, 0) {
                return Err(io::Error::last_os_error());
            }
            let list: Vec<String> = exported.iter().map(ToString::to_string).collect();
            write!(file, "spillway-sim-object {gpu} {}\n", list.join(" "))?;
            Ok(file)
        };
        let file = write().map_err(|e| {
            eprintln!("{}", say(&path, "cannot export", &e));
            OUT_OF_MEMORY
        })?;
        header.object_maker[index].store(u32::from(self.slot()), Ordering::Relaxed);
        header.objects[index].store(generation, Ordering::Release);
        for frame in exported {
            self.frames(gpu).set_owner(*frame, Owner::Object(index as u16));
        }
        Ok(file)
    }

    /// The GPU and frames of an exported allocation, with an own description that keeps it alive.
    #[must_use]
    pub fn import(&self, fd: RawFd) -> Option<(u32, Vec<u32>, File)> {
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
        let name = link.file_name()?.to_str()?.to_owned();
        if !name.starts_with("object-") {
            return None;
        }
        let path = self.dir.join(name);
        let file = open_shared_existing(&path).ok()?;
        // SAFETY: stat is plain data for which zero is a valid value.
        let mut given: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the caller's descriptor is only looked at.
        if unsafe { libc::fstat(fd, &raw mut given) } != 0 || given.st_ino != file.metadata().ok()?.ino() {
            return None;
        }
        if !try_lock(file.as_raw_fd(), libc::F_OFD_SETLK, libc::F_RDLCK, 0) {
            return None;
        }
        let text = std::fs::read_to_string(&path).ok()?;
        let mut words = text.strip_prefix("spillway-sim-object ")?.split_whitespace();
        let gpu: u32 = words.next()?.parse().ok()?;
        let n = (self.config.memory / FRAME) as u32;
        let frames: Vec<u32> = words.map(|w| w.parse().ok().filter(|f| *f < n)).collect::<Option<_>>()?;
        (gpu < self.config.gpus && !frames.is_empty()).then_some((gpu, frames, file))
    }

    /// To be called after the description of an exported allocation was closed.
    pub fn exports_closed(&self) {
        self.reap_objects();
    }
}

fn open_shared_existing(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path)
}

/// A process on a GPU.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: u32,
    pub contexts: u32,
    pub bytes: u64,
    pub busy_ns: u64,
}

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
        link: [get(&header.link[0]), get(&header.link[1]), get(&header.link[2])],
        vmm_cost_milli: get(&header.vmm_cost_milli),
    }
}

/// Maps `state`, making it first if it is not there, or if nobody uses a default one that was
/// configured otherwise. Called under the directory's lock.
fn open_state(path: &Path, wanted: &Config, slots_fd: RawFd, chosen: bool) -> Result<(*const Header, Config), String> {
    let n = wanted.memory / FRAME * u64::from(wanted.gpus);
    let length = HEADER + n as usize * size_of::<AtomicU64>();
    if let Ok(file) = open_shared_existing(path) {
        let size = file.metadata().map_err(|e| say(path, "cannot read", &e))?.len() as usize;
        if size >= HEADER {
            let base = map(&file, size).map_err(|e| say(path, "cannot map", &e))?;
            // SAFETY: mapped for the life of the process, large enough, page aligned; every field
            // is valid for any bytes.
            let header = unsafe { &*base.cast::<Header>() };
            let config = read_config(header);
            let whole = header.magic.load(Ordering::Acquire) == MAGIC
                && header.version.load(Ordering::Relaxed) == VERSION
                && (1..=GPUS_MAX as u32).contains(&config.gpus)
                && size as u64 >= HEADER as u64 + config.memory / FRAME * u64::from(config.gpus) * 8;
            let in_use = (0..SLOTS).any(|i| header.slots[i].state.load(Ordering::Acquire) != 0 && holder(slots_fd, libc::F_GETLK, i).is_some());
            if whole && (chosen || in_use || config == *wanted) {
                return Ok((base.cast(), config));
            }
            if chosen {
                return Err(say(path, "not a simulator's state, or of another version:", &"remove its directory"));
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
