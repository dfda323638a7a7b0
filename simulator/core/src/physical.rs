//! Physical memory, of a GPU or of the host, and what else `cuMemMap` takes: it lives while something refers to it.

use crate::code::{INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, R};
use crate::config::FRAME;
use crate::driver::Driver;
use crate::frames::Owner;
use crate::host_memory::HostMemory;
use crate::multicast::Multicast;
use crate::shared::Shared;
use crate::sync::lock;
use std::fs::File;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// `CUmemLocation`: a kind of place and which of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub kind: u32,
    pub id: i32,
}

impl Place {
    pub const NONE: Self = Self { kind: 0, id: 0 };
    pub const HOST: Self = Self { kind: 2, id: 0 };
    /// The one NUMA node.
    pub const NODE: Self = Self { kind: 3, id: 0 };

    #[must_use]
    pub fn gpu(gpu: u32) -> Self {
        Self {
            kind: 1,
            id: gpu as i32,
        }
    }

    #[must_use]
    pub fn is_host(self) -> bool {
        self.kind >= 2
    }

    #[must_use]
    pub fn gpu_index(self) -> Option<usize> {
        (self.kind == 1).then_some(self.id as usize)
    }

    /// As the calls of the first version have it: an ordinal, -1 for the CPU, -2 for nowhere.
    #[must_use]
    pub fn ordinal(self) -> i32 {
        match self.kind {
            0 => -2,
            1 => self.id,
            _ => -1,
        }
    }
}

/// What is behind a handle.
enum Backing {
    /// Memory of a GPU.
    Frames(u32, Vec<u32>),
    Host(HostMemory),
    Multicast(Multicast),
}

/// Physical memory; returned when the last mapping and handle are gone.
pub struct Physical {
    shared: &'static Shared,
    backing: Backing,
    /// Where it was asked to be.
    pub place: Place,
    /// Handle value, as the application knows it.
    pub id: u64,
    /// References by handles: creations and retentions less releases.
    pub handles: AtomicU32,
    /// `requestedHandleTypes` and the allocation flags of its properties.
    pub handle_types: u32,
    pub flags: [u8; 8],
    /// The open description that keeps exported memory alive.
    export: Mutex<Option<File>>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0x5000_0000_1000);

/// A handle value that no other object has; looks like a pointer and is none.
#[must_use]
pub fn fresh_id() -> u64 {
    NEXT_ID.fetch_add(0x40, Ordering::Relaxed)
}

impl Physical {
    /// Takes `bytes` (a multiple of [`FRAME`]) of `gpu`.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn new(
        shared: &'static Shared,
        gpu: u32,
        bytes: u64,
        handle_types: u32,
        flags: [u8; 8],
    ) -> R<Arc<Self>> {
        Ok(Self::of(
            shared,
            gpu,
            shared.take(gpu, bytes / FRAME)?,
            handle_types,
            flags,
        ))
    }

    /// Takes `n` frames of `gpu`, each on its own.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn singles(driver: &Driver, gpu: u32, n: u64) -> R<Vec<Arc<Self>>> {
        if n == 0 {
            return Ok(Vec::new());
        }
        let shared = driver.shared;
        let taken = shared.take(gpu, n).or_else(|_| {
            driver.trim_pools(gpu, true);
            shared.take(gpu, n)
        })?;
        let one = |frame| Self::of(shared, gpu, vec![frame], 0, [0; 8]);
        Ok(taken.into_iter().map(one).collect())
    }

    /// Memory that only counts: a context's, a module's.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn charge(shared: &'static Shared, gpu: u32, bytes: u64) -> R<Arc<Self>> {
        Ok(Self::of(
            shared,
            gpu,
            shared.charge(gpu, bytes.div_ceil(FRAME))?,
            0,
            [0; 8],
        ))
    }

    /// As [`Self::charge`], for managed memory, and without making room by moving other managed memory out.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn charge_managed(shared: &'static Shared, gpu: u32, bytes: u64) -> R<Arc<Self>> {
        let frames = shared.charge_spare(gpu, bytes.div_ceil(FRAME), Owner::Managed)?;
        Ok(Self::of(shared, gpu, frames, 0, [0; 8]))
    }

    fn of(
        shared: &'static Shared,
        gpu: u32,
        frames: Vec<u32>,
        handle_types: u32,
        flags: [u8; 8],
    ) -> Arc<Self> {
        let backing = Backing::Frames(gpu, frames);
        Self::made(shared, backing, Place::gpu(gpu), handle_types, flags)
    }

    fn made(
        shared: &'static Shared,
        backing: Backing,
        place: Place,
        handle_types: u32,
        flags: [u8; 8],
    ) -> Arc<Self> {
        let (id, handles) = (fresh_id(), AtomicU32::new(1));
        Arc::new(Self {
            shared,
            backing,
            place,
            id,
            handles,
            handle_types,
            flags,
            export: Mutex::new(None),
        })
    }

    /// Takes `bytes` of host memory.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn host(
        shared: &'static Shared,
        place: Place,
        bytes: u64,
        handle_types: u32,
        flags: [u8; 8],
    ) -> R<Arc<Self>> {
        let backing = Backing::Host(HostMemory::new(bytes)?);
        Ok(Self::made(shared, backing, place, handle_types, flags))
    }

    /// A multicast object.
    #[must_use]
    pub fn team(shared: &'static Shared, multicast: Multicast) -> Arc<Self> {
        let backing = Backing::Multicast(multicast);
        Self::made(shared, backing, Place::NONE, 0, [0; 8])
    }

    /// The memory behind an exported descriptor.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it is not one.
    pub fn import(shared: &'static Shared, fd: i32) -> R<Arc<Self>> {
        if let Some(memory) = HostMemory::import(fd) {
            let backing = Backing::Host(memory);
            return Ok(Self::made(shared, backing, Place::NODE, POSIX_FD, [0; 8]));
        }
        let imported = shared.import(fd).ok_or(INVALID_VALUE)?;
        Ok(Self::of_import(shared, imported))
    }

    /// The memory of an exported object, by its name.
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is none.
    pub fn import_named(shared: &'static Shared, name: &str) -> R<Arc<Self>> {
        let imported = shared.import_named(name).ok_or(INVALID_VALUE)?;
        Ok(Self::of_import(shared, imported))
    }

    fn of_import(shared: &'static Shared, (gpu, frames, file): (u32, Vec<u32>, File)) -> Arc<Self> {
        let physical = Self::of(shared, gpu, frames, POSIX_FD, [0; 8]);
        *lock(&physical.export) = Some(file);
        physical
    }

    /// A descriptor of this memory for another process.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if there is no room for one more export, `NOT_SUPPORTED` for what is no memory.
    pub fn export(&self) -> R<File> {
        let (gpu, frames) = match &self.backing {
            Backing::Frames(gpu, frames) => (*gpu, frames),
            Backing::Host(memory) => return memory.export(),
            Backing::Multicast(_) => return Err(NOT_SUPPORTED),
        };
        let mut export = lock(&self.export);
        if export.is_none() {
            *export = Some(self.shared.export(gpu, frames)?);
        }
        export
            .as_ref()
            .and_then(|file| file.try_clone().ok())
            .ok_or(OUT_OF_MEMORY)
    }

    /// The GPU whose memory it is; `None` for anything else.
    #[must_use]
    pub fn gpu(&self) -> Option<u32> {
        match &self.backing {
            Backing::Frames(gpu, _) => Some(*gpu),
            Backing::Host(_) | Backing::Multicast(_) => None,
        }
    }

    /// Whether it is host memory.
    #[must_use]
    pub fn on_host(&self) -> Option<&HostMemory> {
        match &self.backing {
            Backing::Host(memory) => Some(memory),
            _ => None,
        }
    }

    /// The multicast object that it is, if it is one.
    #[must_use]
    pub fn multicast(&self) -> Option<&Multicast> {
        match &self.backing {
            Backing::Multicast(multicast) => Some(multicast),
            _ => None,
        }
    }

    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.backing {
            Backing::Frames(_, frames) => frames.len() as u64 * FRAME,
            Backing::Host(memory) => memory.bytes(),
            Backing::Multicast(multicast) => multicast.length,
        }
    }

    /// Where `offset` lies in this process, and how many bytes follow it without a jump; `None` if it is no
    /// memory.
    #[must_use]
    pub fn locate(&self, offset: u64) -> Option<(*mut u8, u64)> {
        let (gpu, frames) = match &self.backing {
            Backing::Frames(gpu, frames) => (*gpu, frames),
            Backing::Host(memory) => return Some((memory.at(offset), memory.bytes() - offset)),
            Backing::Multicast(_) => return None,
        };
        let index = (offset / FRAME) as usize;
        let mut run = 1;
        while run < 16 && frames.get(index + run) == Some(&(frames[index] + run as u32)) {
            run += 1;
        }
        let within = offset % FRAME;
        // SAFETY: `within` is inside the frame.
        let at = unsafe { self.shared.frame(gpu, frames[index]).add(within as usize) };
        Some((at, run as u64 * FRAME - within))
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        let export = self
            .export
            .get_mut()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        if let Some(file) = export {
            drop(file);
            self.shared.exports_closed();
        } else if let Backing::Frames(gpu, frames) = &self.backing {
            self.shared.release(*gpu, frames);
        }
    }
}

const POSIX_FD: u32 = 1;
