//! Exported allocations: a file each, alive while somebody holds an open description of it.
//!
//! The lock on it belongs to the description, so it follows the descriptor wherever that is sent,
//! and goes with the last copy.

use crate::code::{OUT_OF_MEMORY, R};
use crate::config::FRAME;
use crate::files::{holder, open_shared, open_shared_existing, say, try_lock};
use crate::frames::Owner;
use crate::shared::Shared;
use crate::state::{OBJECTS, SLOTS};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

impl Shared {
    fn object_path(&self, index: usize, generation: u64) -> PathBuf {
        self.dir().join(format!("object-{index}-{generation}"))
    }

    /// Frees the frames of exports that nobody holds any more.
    pub fn reap_objects(&self) {
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
                for gpu in 0..self.machine_gpus() {
                    self.machine_frames(gpu as usize)
                        .replace(|o| o == Owner::Object(index as u16), Owner::Free);
                }
                let _ = std::fs::remove_file(&path);
                self.header().objects[index].store(0, Ordering::Release);
            }
        }
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
        let index = (0..OBJECTS)
            .find(|i| header.objects[*i].load(Ordering::Acquire) == 0)
            .ok_or(OUT_OF_MEMORY)?;
        let generation = header.generation.fetch_add(1, Ordering::AcqRel) + 1;
        let path = self.object_path(index, generation);
        let write = || -> io::Result<File> {
            use std::io::Write;
            let mut file = open_shared(&path)?;
            if !try_lock(file.as_raw_fd(), libc::F_OFD_SETLK, libc::F_RDLCK, 0) {
                return Err(io::Error::last_os_error());
            }
            let list: Vec<String> = exported.iter().map(ToString::to_string).collect();
            writeln!(
                file,
                "spillway-sim-object {} {}",
                self.machine(gpu),
                list.join(" ")
            )?;
            Ok(file)
        };
        let file = write().map_err(|e| {
            eprintln!("{}", say(&path, "cannot export", &e));
            OUT_OF_MEMORY
        })?;
        header.object_maker[index].store(u32::from(self.slot()), Ordering::Relaxed);
        for word in &header.object_importers[index] {
            word.store(0, Ordering::Relaxed);
        }
        header.objects[index].store(generation, Ordering::Release);
        for frame in exported {
            self.frames(gpu)
                .set_owner(*frame, Owner::Object(index as u16));
        }
        Ok(file)
    }

    /// The GPU and frames of an exported allocation, with an own description that keeps it alive.
    #[must_use]
    pub fn import(&self, fd: RawFd) -> Option<(u32, Vec<u32>, File)> {
        // SAFETY: stat is plain data for which zero is a valid value.
        let mut given: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the caller's descriptor is only looked at.
        if unsafe { libc::fstat(fd, &raw mut given) } != 0 {
            return None;
        }
        let (gpu, frames, file) = self.import_named(&object_name(fd)?)?;
        (given.st_ino == file.metadata().ok()?.ino()).then_some((gpu, frames, file))
    }

    /// As [`Self::import`], by the name of the object's file.
    #[must_use]
    pub fn import_named(&self, name: &str) -> Option<(u32, Vec<u32>, File)> {
        if !name.starts_with("object-") || name.contains('/') {
            return None;
        }
        let path = self.dir().join(name);
        let file = open_shared_existing(&path).ok()?;
        // One that nobody holds is being taken away.
        holder(file.as_raw_fd(), libc::F_OFD_GETLK, 0)?;
        if !try_lock(file.as_raw_fd(), libc::F_OFD_SETLK, libc::F_RDLCK, 0) {
            return None;
        }
        let index: usize = name.split('-').nth(1)?.parse().ok()?;
        let importers = self.header().object_importers.get(index)?;
        let slot = usize::from(self.slot());
        importers
            .get(slot / 64)?
            .fetch_or(1 << (slot % 64), Ordering::Relaxed);
        let text = std::fs::read_to_string(&path).ok()?;
        let mut words = text
            .strip_prefix("spillway-sim-object ")?
            .split_whitespace();
        // Memory of a GPU that this process does not see cannot be had.
        let gpu = self.seen(words.next()?.parse().ok()?)?;
        let n = (self.config().memory / FRAME) as u32;
        let frames: Vec<u32> = words
            .map(|w| w.parse().ok().filter(|f| *f < n))
            .collect::<Option<_>>()?;
        (!frames.is_empty()).then_some((gpu, frames, file))
    }

    /// The slot whose process an exported allocation counts for: its maker, or once that is gone one
    /// that imported it.
    #[must_use]
    pub(crate) fn object_holder(&self, object: usize) -> Option<usize> {
        let header = self.header();
        let maker = header.object_maker[object].load(Ordering::Relaxed) as usize;
        if maker < SLOTS {
            return Some(maker);
        }
        let words = (0..).zip(&header.object_importers[object]);
        words
            .map(|(index, word): (usize, _)| (index, word.load(Ordering::Relaxed)))
            .find(|(_, word)| *word != 0)
            .map(|(index, word)| index * 64 + word.trailing_zeros() as usize)
    }

    /// Forgets a process that is gone as the maker or importer of what others still hold.
    pub(crate) fn disown_objects(&self, slot: usize) {
        let header = self.header();
        for object in 0..OBJECTS {
            header.object_importers[object][slot / 64]
                .fetch_and(!(1 << (slot % 64)), Ordering::Relaxed);
            let _ = header.object_maker[object].compare_exchange(
                slot as u32,
                u32::MAX,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
    }

    /// To be called after the description of an exported allocation was closed.
    pub fn exports_closed(&self) {
        self.reap_objects();
    }
}

/// The file name of the object that a descriptor is of.
#[must_use]
pub fn object_name(fd: RawFd) -> Option<String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    let name = link.file_name()?.to_str()?;
    name.starts_with("object-").then(|| name.to_owned())
}
