//! Arrays and mipmapped arrays: what they take, which shapes there are, and those without memory of their own.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("arrays":
    an_array_takes_memory_until_it_is_destroyed,
    shapes_are_remembered,
    shapes_that_are_none_are_refused,
    formats_of_images_are_counted,
    a_mipmapped_array_has_all_its_levels,
    levels_hold_what_is_copied_to_them,
    a_sparse_array_has_no_memory,
    an_array_with_deferred_mapping_has_no_memory,
    requirements_are_of_deferred_arrays,
    handles_that_are_gone_are_refused,
);

const FLOAT: u32 = 0x20;
const LAYERED: u32 = 1;
const CUBEMAP: u32 = 4;
const SPARSE: u32 = 0x40;
const DEFERRED: u32 = 0x80;

fn shape(width: usize, height: usize, depth: usize, flags: u32) -> ArrayShape {
    ArrayShape { width, height, depth, format: FLOAT, channels: 1, flags }
}

fn create(shape: &ArrayShape) -> Result<Handle, Stop> {
    let mut array = 0;
    ok!(cuArray3DCreate_v2(&mut array, shape));
    Ok(array)
}

fn back(before: usize, what: &str) -> Outcome {
    let free = wait_free(before.saturating_sub(4 * MIB), Duration::from_secs(2))?;
    check!(free + 4 * MIB >= before, "{what}: free was {before}, is {free}");
    Ok(())
}

fn taken(before: usize, bytes: usize, what: &str) -> Outcome {
    let taken = before.saturating_sub(free_bytes()?);
    check!(taken + 4 * MIB >= bytes, "{what}: {bytes} bytes of texels take {taken}");
    check!(taken <= bytes + bytes / 4 + 8 * MIB, "{what}: {bytes} bytes of texels take {taken}");
    Ok(())
}

/// An array takes at least what its texels need, from its creation to its destruction.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuArrayCreate, cuArrayDestroy.
fn an_array_takes_memory_until_it_is_destroyed() -> Outcome {
    let _gpu = Gpu::start()?;
    ok!(cuArrayDestroy(create(&shape(64, 64, 0, 0))?));
    let before = quiet()?;
    let (mut flat, plain) = (0, FlatShape { width: 4096, height: 4096, format: FLOAT, channels: 1 });
    ok!(cuArrayCreate_v2(&mut flat, &plain));
    taken(before, 64 * MIB, "a flat array")?;
    ok!(cuArrayDestroy(flat));
    back(before, "a flat array")?;
    for (what, shape) in [
        ("layered", shape(1024, 1024, 16, LAYERED)),
        ("a cube map", shape(1024, 1024, 6, CUBEMAP)),
        ("layers of cube maps", shape(512, 512, 48, CUBEMAP | LAYERED)),
        ("solid", shape(256, 256, 256, 0)),
    ] {
        let array = create(&shape)?;
        taken(before, shape.width * shape.height * shape.depth * 4, what)?;
        ok!(cuArrayDestroy(array));
        back(before, what)?;
    }
    Ok(())
}

/// A description comes back as it was given.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuArray3DGetDescriptor.
fn shapes_are_remembered() -> Outcome {
    let _gpu = Gpu::start()?;
    for wanted in [shape(100, 0, 0, 0), shape(100, 50, 0, 0), shape(30, 20, 10, 0), shape(64, 0, 5, LAYERED), shape(32, 32, 6, CUBEMAP)] {
        let (array, mut got) = (create(&wanted)?, ArrayShape::default());
        ok!(cuArray3DGetDescriptor_v2(&mut got, array));
        check!(got == wanted, "{got:?} is not {wanted:?}");
        ok!(cuArrayDestroy(array));
    }
    Ok(())
}

/// Arrays without width, with flat cubes, or of unknown formats are refused.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuArray3DCreate.
fn shapes_that_are_none_are_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut array = 0;
    let plain = shape(64, 64, 0, 0);
    for wrong in [
        shape(0, 64, 0, 0),
        shape(64, 0, 64, 0),
        shape(64, 64, 0, LAYERED),
        shape(64, 32, 6, CUBEMAP),
        shape(64, 64, 5, CUBEMAP),
        shape(1 << 24, 0, 0, 0),
        ArrayShape { format: 0x77, ..plain },
        ArrayShape { channels: 3, ..plain },
        ArrayShape { channels: 0, ..plain },
    ] {
        let code = cuArray3DCreate_v2(&mut array, &wrong);
        check!(!code.is_ok(), "{wrong:?} was accepted");
    }
    is!(cuArray3DCreate_v2(&mut array, &shape(0, 64, 0, 0)), INVALID_VALUE);
    Ok(())
}

/// Formats of images and video take what their texels, blocks or planes take.
/// Source: NVIDIA CUDA Driver API, CUarray_format.
fn formats_of_images_are_counted() -> Outcome {
    let _gpu = Gpu::start()?;
    ok!(cuArrayDestroy(create(&shape(64, 64, 0, 0))?));
    let before = quiet()?;
    let texels = 4096 * 4096;
    for (what, format, channels, bytes) in [
        ("half floats of 4", 0x10, 4, texels * 8),
        ("NV12", 0xb0, 3, texels * 3 / 2),
        ("UNORM_INT8X4", 0xc2, 4, texels * 4),
        ("SNORM_INT16X2", 0xca, 2, texels * 4),
        ("BC1", 0x91, 4, texels / 2),
        ("BC7", 0x9d, 4, texels),
    ] {
        let mut array = 0;
        let code = cuArray3DCreate_v2(&mut array, &ArrayShape { format, channels, ..shape(4096, 4096, 0, 0) });
        if !code.is_ok() {
            observe!("{what}: {code:?}");
            continue;
        }
        taken(before, bytes, what)?;
        ok!(cuArrayDestroy(array));
        back(before, what)?;
    }
    Ok(())
}

/// A mipmapped array takes all its levels; one beyond the last does not exist.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMipmappedArrayCreate, cuMipmappedArrayGetLevel.
fn a_mipmapped_array_has_all_its_levels() -> Outcome {
    let _gpu = Gpu::start()?;
    let (mut array, mut level) = (0, 0);
    ok!(cuMipmappedArrayCreate(&mut array, &shape(64, 64, 0, 0), 7));
    ok!(cuMipmappedArrayDestroy(array));
    let before = quiet()?;
    ok!(cuMipmappedArrayCreate(&mut array, &shape(4096, 4096, 0, 0), 13));
    taken(before, 64 * MIB / 3 * 4, "13 levels")?;
    for (at, edge) in [(0, 4096), (1, 2048), (12, 1)] {
        let mut got = ArrayShape::default();
        ok!(cuMipmappedArrayGetLevel(&mut level, array, at));
        ok!(cuArray3DGetDescriptor_v2(&mut got, level));
        check!(got.width == edge && got.height == edge, "level {at}: {got:?}");
    }
    fails!(cuMipmappedArrayGetLevel(&mut level, array, 13));
    ok!(cuMipmappedArrayDestroy(array));
    back(before, "destroyed")?;
    fails!(cuMipmappedArrayCreate(&mut array, &shape(0, 1, 0, 0), 1));
    Ok(())
}

/// Copies reach each level.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpy2D (CU_MEMORYTYPE_ARRAY).
fn levels_hold_what_is_copied_to_them() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut array = 0;
    ok!(cuMipmappedArrayCreate(&mut array, &shape(256, 256, 0, 0), 4));
    let mut levels = Vec::new();
    for at in 0..4_u32 {
        let (mut level, edge) = (0, 256_usize >> at);
        ok!(cuMipmappedArrayGetLevel(&mut level, array, at));
        let bytes = pattern(edge * edge * 4, u64::from(at));
        let copy = Copy2d {
            src_kind: 1,
            src_host: bytes.as_ptr() as usize,
            src_pitch: edge * 4,
            dst_kind: 3,
            dst_array: level,
            width_bytes: edge * 4,
            height: edge,
            ..Default::default()
        };
        ok!(cuMemcpy2D_v2(&copy));
        levels.push((level, edge, bytes));
    }
    for (level, edge, bytes) in levels {
        let mut got = vec![0_u8; bytes.len()];
        let copy = Copy2d {
            src_kind: 3,
            src_array: level,
            dst_kind: 1,
            dst_host: got.as_mut_ptr() as usize,
            dst_pitch: edge * 4,
            width_bytes: edge * 4,
            height: edge,
            ..Default::default()
        };
        ok!(cuMemcpy2D_v2(&copy));
        check!(got == bytes, "the level of {edge} texels holds other bytes");
    }
    ok!(cuMipmappedArrayDestroy(array));
    Ok(())
}

/// A sparse array takes nothing: memory is mapped into it by tiles.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuArray3DCreate (CUDA_ARRAY3D_SPARSE).
fn a_sparse_array_has_no_memory() -> Outcome {
    let gpu = Gpu::start()?;
    gpu.needs(112, "sparse arrays")?;
    ok!(cuArrayDestroy(create(&shape(256, 256, 0, SPARSE))?));
    let before = quiet()?;
    let (array, mut tiles) = (create(&shape(4096, 4096, 0, SPARSE))?, SparseProperties::default());
    back(before, "a sparse array")?;
    ok!(cuArrayGetSparseProperties(&mut tiles, array));
    let [width, height, depth] = tiles.tile;
    check!(width * height * depth * 4 == 64 << 10, "tiles of {width} x {height} x {depth} texels");
    let mut mipmapped = 0;
    ok!(cuMipmappedArrayCreate(&mut mipmapped, &shape(4096, 4096, 0, SPARSE), 13));
    back(before, "a sparse mipmapped array")?;
    ok!(cuMipmappedArrayGetSparseProperties(&mut tiles, mipmapped));
    check!(tiles.tail_first > 0 && tiles.tail_first < 13, "the tail begins at level {}", tiles.tail_first);
    ok!(cuMipmappedArrayDestroy(mipmapped));
    let dense = create(&shape(256, 256, 0, 0))?;
    fails!(cuArrayGetSparseProperties(&mut tiles, dense));
    // Memory for tiles is made for that (CU_MEM_CREATE_USAGE_TILE_POOL).
    let (mut memory, prop) = (0, AllocationProp { usage: 1, ..gpu.prop() });
    ok!(cuMemCreate(&mut memory, 32 * MIB, &prop, 0));
    let mut part = ArrayMapping { resource: array, memory, devices: 1 << gpu.device, operation: 1, ..Default::default() };
    part.extent = [width, height, depth];
    let code = cuMemMapArrayAsync(&part, 1, 0);
    observe!("mapping a tile: {code:?}");
    if code.is_ok() {
        ok!(cuCtxSynchronize());
        part.operation = 2;
        part.memory = 0;
        ok!(cuMemMapArrayAsync(&part, 1, 0));
        ok!(cuCtxSynchronize());
    }
    ok!(cuMemRelease(memory));
    ok!(cuArrayDestroy(array));
    ok!(cuArrayDestroy(dense));
    back(before, "all destroyed")
}

/// An array with deferred mapping takes nothing, and says how much memory it is to be given.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuArrayGetMemoryRequirements.
fn an_array_with_deferred_mapping_has_no_memory() -> Outcome {
    let gpu = Gpu::start()?;
    gpu.needs(121, "arrays with deferred mapping")?;
    ok!(cuArrayDestroy(create(&shape(256, 256, 0, DEFERRED))?));
    let before = quiet()?;
    let (array, mut wanted) = (create(&shape(4096, 4096, 0, DEFERRED))?, MemoryRequirements::default());
    back(before, "an array with deferred mapping")?;
    ok!(cuArrayGetMemoryRequirements(&mut wanted, array, gpu.device));
    check!(wanted.bytes >= 64 * MIB && wanted.alignment > 0, "{wanted:?}");
    ok!(cuArrayDestroy(array));
    let mut mipmapped = 0;
    ok!(cuMipmappedArrayCreate(&mut mipmapped, &shape(4096, 4096, 0, DEFERRED), 4));
    back(before, "a mipmapped array with deferred mapping")?;
    ok!(cuMipmappedArrayGetMemoryRequirements(&mut wanted, mipmapped, gpu.device));
    check!(wanted.bytes >= 84 * MIB, "{wanted:?}");
    ok!(cuMipmappedArrayDestroy(mipmapped));
    Ok(())
}

/// Only arrays with deferred mapping have requirements to ask for.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuArrayGetMemoryRequirements (CUDA_ERROR_INVALID_VALUE).
fn requirements_are_of_deferred_arrays() -> Outcome {
    let gpu = Gpu::start()?;
    let (array, mut wanted) = (create(&shape(256, 256, 0, 0))?, MemoryRequirements::default());
    is!(cuArrayGetMemoryRequirements(&mut wanted, array, gpu.device), INVALID_VALUE);
    ok!(cuArrayDestroy(array));
    Ok(())
}

/// Null is no array.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuArrayDestroy (returned codes).
fn handles_that_are_gone_are_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let (mut got, mut level) = (ArrayShape::default(), 0);
    fails!(cuArrayDestroy(0));
    fails!(cuArray3DGetDescriptor_v2(&mut got, 0));
    fails!(cuMipmappedArrayDestroy(0));
    fails!(cuMipmappedArrayGetLevel(&mut level, 0, 0));
    Ok(())
}
