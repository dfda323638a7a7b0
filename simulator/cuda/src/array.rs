//! Arrays and mipmapped arrays: memory with a shape, here linear underneath. Textures and surfaces on them are
//! not simulated.
//!
//! Sparse arrays and those with deferred mapping have no memory of their own: what is mapped into them by
//! `cuMemMapArrayAsync` is kept, and their contents are not simulated.

use crate::abi::{In, Out, exports};
use crate::array_shape::{DEFERRED, Level, SPARSE, levels, tile};
use crate::device::device;
use crate::layout::{
    Array3dDescriptor, ArrayDescriptor, ArrayMapping, MemoryRequirements, SparseProperties,
};
use crate::memory::allocate;
use crate::submit::{here, stream, submit};
use crate::vmm;
use spillway_simulator_core::classic;
use spillway_simulator_core::code::{INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED, R};
use spillway_simulator_core::config::FRAME;
use spillway_simulator_core::driver::{self, Registry};
use spillway_simulator_core::exec::Op;
use spillway_simulator_core::graph::EMPTY;
use spillway_simulator_core::space::{Physical, fresh_id};
use spillway_simulator_core::sync::lock;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

/// What a mapping into an array is of: the subresource, as the call names it.
type Part = [u64; 4];

/// The memory of an array, or of a mipmapped one.
struct Storage {
    /// `None`: what is mapped into it.
    address: Option<u64>,
    shape: Array3dDescriptor,
    levels: Vec<Level>,
    mapped: Mutex<HashMap<Part, Arc<Physical>>>,
}

/// An array: a level of a storage.
struct Array {
    storage: Arc<Storage>,
    level: usize,
    /// A level of a mipmapped array, which goes with that.
    of_mipmapped: bool,
}

struct Mipmapped {
    storage: Arc<Storage>,
    /// Handles of the levels that were asked for.
    handles: Mutex<HashMap<usize, u64>>,
}

static ARRAYS: LazyLock<Registry<Array>> = LazyLock::new(Registry::default);
static MIPMAPPED: LazyLock<Registry<Mipmapped>> = LazyLock::new(Registry::default);

fn array(handle: u64) -> R<Arc<Array>> {
    ARRAYS.get(handle).ok_or(INVALID_HANDLE)
}

fn mipmapped(handle: u64) -> R<Arc<Mipmapped>> {
    MIPMAPPED.get(handle).ok_or(INVALID_HANDLE)
}

impl Array {
    fn level(&self) -> &Level {
        &self.storage.levels[self.level]
    }
}

/// Address, row and slice pitch of an array.
///
/// # Errors
/// `INVALID_HANDLE`; `NOT_SUPPORTED` for contents that are not simulated.
pub fn storage(handle: u64) -> R<(u64, u64, u64)> {
    let array = array(handle)?;
    let level = array.level();
    let address = array.storage.address.ok_or(NOT_SUPPORTED)?;
    Ok((address + level.offset, level.pitch, level.slice))
}

fn create(shape: Array3dDescriptor, count: u32) -> R<Arc<Storage>> {
    here()?;
    let levels = levels(&shape, count)?;
    let bytes = levels.last().map_or(0, |l| l.offset + l.bytes());
    let address = if shape.flags & (SPARSE | DEFERRED) == 0 {
        Some(allocate(bytes)?)
    } else {
        None
    };
    Ok(Arc::new(Storage {
        address,
        shape,
        levels,
        mapped: Mutex::default(),
    }))
}

/// Makes an array.
///
/// # Errors
/// `INVALID_VALUE`, `OUT_OF_MEMORY`.
pub fn create_array(out: Out<u64>, shape: Array3dDescriptor) -> R {
    out.needed()?;
    let array = Array {
        storage: create(shape, 1)?,
        level: 0,
        of_mipmapped: false,
    };
    let handle = fresh_id();
    ARRAYS.insert(handle, Arc::new(array));
    out.set(handle)
}

fn release(storage: &Storage) -> R {
    match storage.address {
        Some(address) => classic::free_and_wait(driver::get()?, address),
        None => {
            for context in driver::get()?.contexts.all() {
                context.drain();
            }
            lock(&storage.mapped).clear();
            Ok(())
        }
    }
}

fn requirements(out: Out<MemoryRequirements>, storage: &Storage, ordinal: i32) -> R {
    out.needed()?;
    device(ordinal)?;
    if storage.shape.flags & DEFERRED == 0 {
        return Err(INVALID_VALUE);
    }
    let bytes = storage.levels.last().map_or(0, |l| l.offset + l.bytes());
    out.set(MemoryRequirements {
        bytes: bytes.next_multiple_of(FRAME) as usize,
        alignment: FRAME as usize,
        reserved: [0; 4],
    })
}

fn sparse_properties(out: Out<SparseProperties>, storage: &Storage) -> R {
    const TILE: u64 = 64 << 10;
    out.needed()?;
    if storage.shape.flags & SPARSE == 0 {
        return Err(INVALID_VALUE);
    }
    let tile = tile(&storage.shape)?;
    // Levels smaller than a tile share the tail.
    let small =
        |l: &Level| l.shape.width < tile[0] as usize || l.shape.height.max(1) < tile[1] as usize;
    let first = storage
        .levels
        .iter()
        .position(small)
        .unwrap_or(storage.levels.len());
    let tail: u64 = storage.levels[first..].iter().map(Level::bytes).sum();
    out.set(SparseProperties {
        tile,
        tail_first: first as u32,
        tail_bytes: tail.next_multiple_of(TILE),
        flags: 0,
        reserved: [0; 4],
    })
}

/// One operation of a list of them.
fn map_part(info: &ArrayMapping) -> R {
    const ARRAY: u32 = 0;
    const MIPMAPPED: u32 = 1;
    const MAP: u32 = 1;
    const UNMAP: u32 = 2;
    let storage = match info.kind {
        ARRAY => Arc::clone(&array(info.resource)?.storage),
        MIPMAPPED => Arc::clone(&mipmapped(info.resource)?.storage),
        _ => return Err(INVALID_VALUE),
    };
    let unmapped = storage.address.is_none();
    if !unmapped
        || info.part_kind > 1
        || info.handle_kind != 0
        || info.flags != 0
        || info.devices == 0
    {
        return Err(INVALID_VALUE);
    }
    let mut mapped = lock(&storage.mapped);
    match info.operation {
        MAP => {
            let memory = vmm::handle(driver::get()?, info.memory)?;
            if memory.multicast().is_some() || info.offset >= memory.bytes() {
                return Err(INVALID_VALUE);
            }
            mapped.insert(info.part, memory);
        }
        UNMAP => {
            mapped.remove(&info.part);
        }
        _ => return Err(INVALID_VALUE),
    }
    Ok(())
}

/// The shape of an array, without and with its third dimension.
///
/// # Errors
/// `INVALID_HANDLE`.
pub fn descriptor(handle: u64) -> R<ArrayDescriptor> {
    let shape = descriptor3(handle)?;
    Ok(ArrayDescriptor {
        width: shape.width,
        height: shape.height,
        format: shape.format,
        channels: shape.channels,
    })
}

/// See [`descriptor`].
///
/// # Errors
/// As there.
pub fn descriptor3(handle: u64) -> R<Array3dDescriptor> {
    Ok(array(handle)?.level().shape)
}

exports! {
    fn cuArrayCreate_v2(out: Out<u64>, descriptor: In<ArrayDescriptor>) {
        let d = descriptor.get()?;
        create_array(out, Array3dDescriptor { width: d.width, height: d.height, depth: 0, format: d.format, channels: d.channels, flags: 0 })
    }

    fn cuArray3DCreate_v2(out: Out<u64>, descriptor: In<Array3dDescriptor>) {
        create_array(out, descriptor.get()?)
    }

    fn cuArrayGetDescriptor_v2(out: Out<ArrayDescriptor>, handle: u64) {
        out.set(crate::array::descriptor(handle)?)
    }

    fn cuArray3DGetDescriptor_v2(out: Out<Array3dDescriptor>, handle: u64) {
        out.set(descriptor3(handle)?)
    }

    fn cuArrayDestroy(handle: u64) {
        here()?;
        if array(handle)?.of_mipmapped {
            return Err(INVALID_VALUE);
        }
        release(&ARRAYS.remove(handle).ok_or(INVALID_HANDLE)?.storage)
    }

    fn cuArrayGetMemoryRequirements(out: Out<MemoryRequirements>, handle: u64, ordinal: i32) {
        requirements(out, &array(handle)?.storage, ordinal)
    }

    fn cuArrayGetSparseProperties(out: Out<SparseProperties>, handle: u64) {
        sparse_properties(out, &array(handle)?.storage)
    }

    fn cuMipmappedArrayCreate(out: Out<u64>, descriptor: In<Array3dDescriptor>, count: u32) {
        out.needed()?;
        let mipmapped = Mipmapped { storage: create(descriptor.get()?, count)?, handles: Mutex::default() };
        let handle = fresh_id();
        MIPMAPPED.insert(handle, Arc::new(mipmapped));
        out.set(handle)
    }

    fn cuMipmappedArrayGetLevel(out: Out<u64>, handle: u64, level: u32) {
        out.needed()?;
        let mipmapped = mipmapped(handle)?;
        let level = level as usize;
        if level >= mipmapped.storage.levels.len() {
            return Err(INVALID_VALUE);
        }
        let mut handles = lock(&mipmapped.handles);
        let handle = *handles.entry(level).or_insert_with(|| {
            let handle = fresh_id();
            let storage = Arc::clone(&mipmapped.storage);
            ARRAYS.insert(handle, Arc::new(Array { storage, level, of_mipmapped: true }));
            handle
        });
        out.set(handle)
    }

    fn cuMipmappedArrayDestroy(handle: u64) {
        here()?;
        let mipmapped = MIPMAPPED.remove(handle).ok_or(INVALID_HANDLE)?;
        for level in lock(&mipmapped.handles).values() {
            ARRAYS.remove(*level);
        }
        release(&mipmapped.storage)
    }

    fn cuMipmappedArrayGetMemoryRequirements(out: Out<MemoryRequirements>, handle: u64, ordinal: i32) {
        requirements(out, &mipmapped(handle)?.storage, ordinal)
    }

    fn cuMipmappedArrayGetSparseProperties(out: Out<SparseProperties>, handle: u64) {
        sparse_properties(out, &mipmapped(handle)?.storage)
    }

    fn cuMemMapArrayAsync / cuMemMapArrayAsync_ptsz [per_thread] (list: In<ArrayMapping>, count: u32, on: u64) {
        let stream = stream(on, per_thread)?;
        for info in list.list(count as usize)? {
            map_part(&info)?;
        }
        submit(&stream, EMPTY, Op::Empty).map(|_| ())
    }
}
