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
use crate::files::{holder, map, open_shared, pid_namespace, say, try_lock};
use crate::frames::{Frames, Owner};
use crate::identity;
use crate::selection;
use crate::state::{DEAD, Engines, HEADER, Header, SLOTS, Slot, open_state};
use crate::sync::now_ns;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

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
    pid_namespace: u64,
    windows: Vec<Window>,
    /// The machine, as this process sees it: with the GPUs that are visible to it.
    config: Config,
    /// The machine's number of each GPU that this process sees; everywhere else GPUs are numbered
    /// as the process sees them.
    visible: Vec<u32>,
    /// The slot of this process, if it takes part (NVML only looks).
    slot: Option<u16>,
    /// Frees frames of this process on a GPU that has none left; says whether it could.
    pub make_room: OnceLock<fn(u32, u64) -> bool>,
}

// SAFETY: the mappings live as long as the process, and everything in them is atomic or guarded by
// the robust mutex.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Held while the owner words change; dropped by the kernel if its holder dies.
pub(crate) struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        // SAFETY: this thread locked the mutex in `Shared::lock`.
        unsafe { libc::pthread_mutex_unlock((*self.0.header).lock.get()) };
    }
}

impl Shared {
    /// Opens the machine in the configured directory, creating it if it is not there; with
    /// `takes_part` the process gets a slot, and sees the GPUs that `CUDA_VISIBLE_DEVICES` selects.
    ///
    /// # Errors
    /// One line that says which file or variable is at fault.
    pub fn open(takes_part: bool) -> Result<Self, String> {
        let wanted = Config::from_env().map_err(|e| format!("spillway simulator: {e}"))?;
        let (dir, chosen) = Config::directory();
        if std::fs::create_dir(&dir).is_ok() {
            let mode = if chosen { 0o777 } else { 0o700 };
            std::fs::set_permissions(&dir, Permissions::from_mode(mode))
                .map_err(|e| say(&dir, "cannot open up", &e))?;
        }
        let lock_path = dir.join("lock");
        let lock = open_shared(&lock_path).map_err(|e| say(&lock_path, "cannot open", &e))?;
        // SAFETY: a valid descriptor; the lock goes with it.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(say(&lock_path, "cannot lock", &io::Error::last_os_error()));
        }
        let slots_path = dir.join("slots");
        let slots_fd = open_shared(&slots_path)
            .map_err(|e| say(&slots_path, "cannot open", &e))?
            .into_raw_fd();
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
                    unsafe {
                        libc::madvise(base.cast(), config.memory as usize, libc::MADV_DONTFORK)
                    };
                    Ok(Window { base, file })
                })
                .map_err(|e| say(&path, "cannot map", &e))?;
            windows.push(window);
        }
        let mut shared = Self {
            header,
            dir,
            slots_fd,
            pid_namespace: pid_namespace(),
            windows,
            visible: (0..config.gpus).collect(),
            config,
            slot: None,
            make_room: OnceLock::new(),
        };
        if takes_part {
            let uuids: Vec<String> = (0..shared.config.gpus)
                .map(|gpu| identity::uuid_text(identity::uuid(&shared, gpu)))
                .collect();
            let list = std::env::var_os("CUDA_VISIBLE_DEVICES");
            let list = list.as_ref().map(|list| list.to_string_lossy());
            shared.visible = selection::select(list.as_deref(), &uuids);
            shared.config.gpus = shared.visible.len() as u32;
            if shared.config.gpus > 0 {
                shared.slot = Some(shared.take_slot()?);
            }
        }
        Ok(shared)
    }

    #[must_use]
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn header(&self) -> &Header {
        // SAFETY: mapped for the life of the process; all its fields are atomics or cells.
        unsafe { &*self.header }
    }

    /// The machine's number of a GPU that this process sees.
    #[must_use]
    pub fn machine(&self, gpu: u32) -> usize {
        self.visible
            .get(gpu as usize)
            .map_or(0, |gpu| *gpu as usize)
    }

    /// How this process sees the machine's GPU of that number; `None` if it does not.
    #[must_use]
    pub fn seen(&self, machine: u32) -> Option<u32> {
        (0..)
            .zip(&self.visible)
            .find(|(_, m)| **m == machine)
            .map(|(gpu, _)| gpu)
    }

    /// GPUs of the machine, seen by this process or not.
    #[must_use]
    pub(crate) fn machine_gpus(&self) -> u32 {
        self.windows.len() as u32
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

    /// Notes that this process has one context more, or one less.
    pub fn count_context(&self, gpu: u32, more: bool) {
        let contexts = &self.own().contexts[self.machine(gpu)];
        if more {
            contexts.fetch_add(1, Ordering::Relaxed);
        } else {
            contexts.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Notes that this process used a compute engine.
    pub fn count_busy(&self, gpu: u32, ns: u64) {
        self.engines(gpu).busy_ns.fetch_add(ns, Ordering::Relaxed);
        self.own().busy_ns[self.machine(gpu)].fetch_add(ns, Ordering::Relaxed);
    }

    #[must_use]
    pub fn engines(&self, gpu: u32) -> &Engines {
        &self.header().engines[self.machine(gpu)]
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
        self.machine_frames(self.machine(gpu))
    }

    pub(crate) fn machine_frames(&self, machine: usize) -> Frames<'_> {
        let n = (self.config.memory / FRAME) as usize;
        // SAFETY: the state file was sized for `gpus * n` words after the header.
        Frames(unsafe {
            std::slice::from_raw_parts(
                self.header
                    .cast::<u8>()
                    .add(HEADER)
                    .cast::<AtomicU64>()
                    .add(machine * n),
                n,
            )
        })
    }

    /// Where a frame lies in this process.
    #[must_use]
    pub fn frame(&self, gpu: u32, frame: u32) -> *mut u8 {
        // SAFETY: frame numbers come from the table, so the offset is inside the window.
        unsafe {
            self.windows[self.machine(gpu)]
                .base
                .add(frame as usize * FRAME as usize)
        }
    }

    pub(crate) fn lock(&self) -> Guard<'_> {
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
            if slot.state.load(Ordering::Acquire) != 0
                || !try_lock(self.slots_fd, libc::F_SETLK, libc::F_WRLCK, index)
            {
                continue;
            }
            slot.pid.store(std::process::id(), Ordering::Relaxed);
            slot.pid_namespace
                .store(self.pid_namespace, Ordering::Relaxed);
            for gpu in 0..GPUS_MAX {
                slot.contexts[gpu].store(0, Ordering::Relaxed);
                slot.busy_ns[gpu].store(0, Ordering::Relaxed);
            }
            slot.state.store(1, Ordering::Release);
            return Ok(index as u16);
        }
        Err(format!(
            "spillway simulator: {} processes use {} already",
            SLOTS,
            self.dir.display()
        ))
    }

    /// The pid of a slot's process as the caller's namespace numbers it: 0 if it is not visible
    /// there, `None` if it is dead.
    fn slot_pid(&self, index: usize) -> Option<i32> {
        let slot = &self.header().slots[index];
        let own = slot.pid.load(Ordering::Relaxed) == std::process::id()
            && slot.pid_namespace.load(Ordering::Relaxed) == self.pid_namespace;
        if own {
            Some(std::process::id() as i32)
        } else {
            holder(self.slots_fd, libc::F_GETLK, index)
        }
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
                let _ = slot.state.compare_exchange(
                    state,
                    DEAD | now,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
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
                for gpu in 0..self.windows.len() {
                    self.machine_frames(gpu).replace(|o| matches!(o, Owner::Slot(s) | Owner::Managed(s) | Owner::Cooling(s, _) if usize::from(s) == index), Owner::Free);
                }
                self.disown_objects(index);
                slot.state.store(0, Ordering::Release);
            }
        }
        self.reap_objects();
    }

    /// Takes `n` frames of `gpu` for this process, to be read and written.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if the GPU, or the disk behind it, has not that many.
    pub fn take(&self, gpu: u32, n: u64) -> R<Vec<u32>> {
        let chosen = self.charge(gpu, n)?;
        if let Err(error) = self.back(gpu, &chosen) {
            eprintln!(
                "{}",
                say(&self.dir, "no space for device memory in", &error)
            );
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
        self.charge_spare(gpu, n, Owner::Slot).or_else(|error| {
            let made = self.make_room.get().is_some_and(|make| make(gpu, n));
            if made {
                self.charge_spare(gpu, n, Owner::Slot)
            } else {
                Err(error)
            }
        })
    }

    /// As [`Self::charge`], from what is free only, and for what of this process.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if the GPU has not that many.
    pub(crate) fn charge_spare(&self, gpu: u32, n: u64, what: fn(u16) -> Owner) -> R<Vec<u32>> {
        let frames = self.frames(gpu);
        if n > frames.0.len() as u64 {
            return Err(OUT_OF_MEMORY);
        }
        let choose = || {
            let _guard = self.lock();
            let chosen = frames.choose(n as usize, self.slot(), now_ns() / 1000)?;
            for frame in &chosen {
                frames.set_owner(*frame, what(self.slot()));
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
    /// later, and something to read that is not zero. Used ones hold garbage: who relies on what was
    /// there before, because he often gets the same frames back, must not get away with it.
    fn back(&self, gpu: u32, chosen: &[u32]) -> io::Result<()> {
        let frames = self.frames(gpu);
        for frame in chosen.iter().copied() {
            if frames.backed(frame) {
                self.spoil(gpu, frame);
                continue;
            }
            let offset = i64::from(frame) * FRAME as i64;
            // SAFETY: a plain call on a descriptor that is open.
            let failed = unsafe {
                libc::posix_fallocate(
                    self.windows[self.machine(gpu)].file.as_raw_fd(),
                    offset,
                    FRAME as i64,
                )
            };
            if failed != 0 {
                return Err(io::Error::from_raw_os_error(failed));
            }
            // SAFETY: the frame was just taken by this process and lies inside the window.
            unsafe { self.frame(gpu, frame).write_bytes(0xa5, 64) };
            frames.set_backed(frame);
        }
        Ok(())
    }

    /// Overwrites one word of every page of a frame that was just taken, another one each time: all
    /// of it would cost as much as a copy.
    fn spoil(&self, gpu: u32, frame: u32) {
        const PAGE: u64 = 4096;
        let mut random = now_ns() ^ u64::from(frame) << 40;
        for page in 0..FRAME / PAGE {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let word = (random >> 33) % (PAGE / 8);
            // SAFETY: the frame was just taken by this process and lies inside the window; the word
            // lies inside the frame, and is aligned as the window is to pages.
            unsafe {
                let at = self
                    .frame(gpu, frame)
                    .add((page * PAGE + word * 8) as usize);
                at.cast::<u64>().write_volatile(random);
            }
        }
    }

    /// Returns frames of this process.
    pub fn release(&self, gpu: u32, released: &[u32]) {
        let until_us = now_ns() / 1000 + self.config.release_delay_us;
        let owner = if self.config.release_delay_us == 0 {
            Owner::Free
        } else {
            Owner::Cooling(self.slot(), until_us)
        };
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

    /// Living processes: pid (0 if not visible from here), contexts on `gpu`, bytes there; managed memory is
    /// in no process's figure (seen with driver 580 on an H200), only in the device's.
    #[must_use]
    pub fn processes(&self, gpu: u32) -> Vec<Process> {
        self.reap();
        let frames = self.frames(gpu);
        let mut bytes = vec![0_u64; SLOTS];
        for owner in frames.owners() {
            let slot = match owner {
                Owner::Slot(slot) => usize::from(slot),
                Owner::Object(object) => match self.object_holder(usize::from(object)) {
                    Some(slot) => slot,
                    None => continue,
                },
                Owner::Free | Owner::Managed(_) | Owner::Cooling(..) => continue,
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
                    contexts: slot.contexts[self.machine(gpu)].load(Ordering::Relaxed),
                    bytes: bytes[index],
                    busy_ns: slot.busy_ns[self.machine(gpu)].load(Ordering::Relaxed),
                });
            }
        }
        all
    }
}

/// A process on a GPU.
#[derive(Clone, Debug)]
pub struct Process {
    pub pid: u32,
    pub contexts: u32,
    pub bytes: u64,
    pub busy_ns: u64,
}
