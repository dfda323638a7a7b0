//! Copies and memsets: contents, widths, shapes, refusals.

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("copies":
    bytes_survive_the_round_trip,
    unaligned_pieces_go_where_they_belong,
    device_to_device_copies,
    the_generic_copy_finds_the_direction,
    copies_of_nothing_succeed,
    unknown_device_addresses_are_refused,
    memsets_write_their_width,
    memsets_want_aligned_addresses,
    memsets_of_rectangles_spare_the_rest,
    rectangles_between_host_and_device,
    rectangles_wider_than_their_pitch_are_refused,
    boxes_between_host_and_device,
    large_copies,
);

/// What is copied in comes back.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpyHtoD, cuMemcpyDtoH.
fn bytes_survive_the_round_trip() -> Outcome {
    let _gpu = Gpu::start()?;
    for size in [1, 2, 3, 5, 255, 4096, 65_537, 5 * MIB + 3] {
        let address = alloc(size)?;
        let bytes = pattern(size, size as u64);
        write(address, &bytes)?;
        check!(read(address, size)? == bytes, "{size} bytes differ");
    }
    Ok(())
}

/// Copies may start and end at any byte.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpyHtoD (no alignment asked).
fn unaligned_pieces_go_where_they_belong() -> Outcome {
    let _gpu = Gpu::start()?;
    let size = 100_000;
    let address = alloc(size)?;
    let mut expected = vec![0xab_u8; size];
    ok!(cuMemsetD8_v2(address, 0xab, size));
    for (i, (at, n)) in [(0, 1), (3, 7), (4095, 2), (10_001, 30_003), (99_998, 2)].into_iter().enumerate() {
        let piece = pattern(n, i as u64 + 1);
        write(address + at as u64, &piece)?;
        expected[at..at + n].copy_from_slice(&piece);
    }
    check!(read(address, size)? == expected, "a piece went elsewhere");
    check!(read(address + 10_000, 5)? == expected[10_000..10_005], "an unaligned read differs");
    Ok(())
}

/// Device-to-device copies, synchronous and in a stream.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpyDtoD.
fn device_to_device_copies() -> Outcome {
    let _gpu = Gpu::start()?;
    let (a, b) = (alloc(3 * MIB)?, alloc(3 * MIB)?);
    let bytes = pattern(3 * MIB, 4);
    write(a, &bytes)?;
    ok!(cuMemcpyDtoD_v2(b, a, 3 * MIB));
    ok!(cuCtxSynchronize());
    check!(read(b, 3 * MIB)? == bytes, "contents differ");
    ok!(cuMemsetD8_v2(b, 0, 3 * MIB));
    ok!(cuMemcpyDtoDAsync_v2(b + 5, a + 1, MIB, 0));
    ok!(cuCtxSynchronize());
    check!(read(b + 5, MIB)? == bytes[1..=MIB], "contents of the asynchronous copy differ");
    Ok(())
}

/// cuMemcpy takes device and host addresses alike.
/// Source: CUDA C++ Programming Guide, Unified Virtual Address Space; cuMemcpy.
fn the_generic_copy_finds_the_direction() -> Outcome {
    let _gpu = Gpu::start()?;
    let (a, b) = (alloc(MIB)?, alloc(MIB)?);
    let bytes = pattern(MIB, 5);
    let mut back = vec![0_u8; MIB];
    ok!(cuMemcpy(a, bytes.as_ptr() as u64, MIB));
    ok!(cuMemcpy(b, a, MIB));
    ok!(cuMemcpy(back.as_mut_ptr() as u64, b, MIB));
    check!(back == bytes, "contents differ");
    let pinned = Pinned::new(MIB)?;
    pinned.fill(0x42);
    ok!(cuMemcpyAsync(a, pinned.address as u64, MIB, 0));
    ok!(cuCtxSynchronize());
    check!(read(a, MIB)?.iter().all(|byte| *byte == 0x42), "contents of cuMemcpyAsync differ");
    Ok(())
}

/// A copy or memset of 0 bytes succeeds and does nothing.
/// Source: general practice (the runtime and PyTorch pass 0).
fn copies_of_nothing_succeed() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4096)?;
    let mut byte = 9_u8;
    ok!(cuMemcpyHtoD_v2(address, &raw const byte, 0));
    ok!(cuMemcpyDtoH_v2(&raw mut byte, address, 0));
    ok!(cuMemsetD8_v2(address, 1, 0));
    check!(byte == 9, "a copy of nothing wrote");
    Ok(())
}

/// A synchronous copy from or to a device address of no allocation fails.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpyDtoH (returned codes).
fn unknown_device_addresses_are_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut bytes = [0_u8; 64];
    is!(cuMemcpyHtoD_v2(0, bytes.as_ptr(), 64), INVALID_VALUE);
    is!(cuMemcpyDtoH_v2(bytes.as_mut_ptr(), 0, 64), INVALID_VALUE);
    fails!(cuMemcpyHtoD_v2(0x7_0000_0000_0000, bytes.as_ptr(), 64));
    fails!(cuMemsetD8_v2(0x7_0000_0000_0000, 0, 64));
    let address = alloc(4 * MIB)?;
    let big = vec![0_u8; 256 * MIB];
    observe!("copying 256 MiB into 4 MiB: {:?}", cuMemcpyHtoD_v2(address, big.as_ptr(), big.len()));
    Ok(())
}

/// D8, D16 and D32 write values of their width, synchronous and in a stream.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemsetD8, D16, D32.
fn memsets_write_their_width() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4096)?;
    ok!(cuMemsetD8_v2(address, 0, 4096));
    ok!(cuMemsetD8_v2(address + 1, 0xa1, 3));
    ok!(cuMemsetD16_v2(address + 8, 0xb2c3, 2));
    ok!(cuMemsetD32_v2(address + 16, 0x1234_5678, 2));
    ok!(cuMemsetD8Async(address + 32, 0xd4, 2, 0));
    ok!(cuMemsetD16Async(address + 40, 0xe5f6, 1, 0));
    ok!(cuMemsetD32Async(address + 48, 0x9abc_def0, 1, 0));
    ok!(cuCtxSynchronize());
    let mut expected = vec![0_u8; 64];
    expected[1..4].fill(0xa1);
    expected[8..12].copy_from_slice(&[0xc3, 0xb2, 0xc3, 0xb2]);
    expected[16..24].copy_from_slice(&[0x78, 0x56, 0x34, 0x12, 0x78, 0x56, 0x34, 0x12]);
    expected[32..34].fill(0xd4);
    expected[40..42].copy_from_slice(&[0xf6, 0xe5]);
    expected[48..52].copy_from_slice(&[0xf0, 0xde, 0xbc, 0x9a]);
    let got = read(address, 64)?;
    check!(got == expected, "got {got:02x?}");
    Ok(())
}

/// cuMemsetD16 wants an address aligned to 2 bytes, cuMemsetD32 to 4.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemsetD16, cuMemsetD32.
fn memsets_want_aligned_addresses() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4096)?;
    is!(cuMemsetD16_v2(address + 1, 0, 4), INVALID_VALUE);
    is!(cuMemsetD32_v2(address + 2, 0, 4), INVALID_VALUE);
    Ok(())
}

/// Two-dimensional memsets write the rectangle and leave the rest of each row.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemsetD2D8, D2D16, D2D32.
fn memsets_of_rectangles_spare_the_rest() -> Outcome {
    let _gpu = Gpu::start()?;
    let (pitch, rows) = (512, 8);
    let address = alloc(pitch * rows)?;
    ok!(cuMemsetD8_v2(address, 0, pitch * rows));
    ok!(cuMemsetD2D8_v2(address, pitch, 0x11, 100, 3));
    ok!(cuMemsetD2D16_v2(address + 200, pitch, 0x2233, 10, 8));
    ok!(cuMemsetD2D32_v2(address + 300, pitch, 0x4455_6677, 5, 2));
    let got = read(address, pitch * rows)?;
    for (row, line) in got.chunks(pitch).enumerate() {
        let mut expected = vec![0_u8; pitch];
        if row < 3 {
            expected[..100].fill(0x11);
        }
        for pair in expected[200..220].chunks_mut(2) {
            pair.copy_from_slice(&[0x33, 0x22]);
        }
        if row < 2 {
            for word in expected[300..320].chunks_mut(4) {
                word.copy_from_slice(&[0x77, 0x66, 0x55, 0x44]);
            }
        }
        check!(line == expected, "row {row} differs");
    }
    Ok(())
}

const HOST: i32 = 1;
const DEVICE: i32 = 2;

/// Two-dimensional copies honour offsets and both pitches, in every direction.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpy2D.
fn rectangles_between_host_and_device() -> Outcome {
    let _gpu = Gpu::start()?;
    let (width, height) = (300, 20);
    let (mut device, mut pitch) = (0, 0);
    ok!(cuMemAllocPitch_v2(&mut device, &mut pitch, 400, 30, 4));
    let (mut other, mut other_pitch) = (0, 0);
    ok!(cuMemAllocPitch_v2(&mut other, &mut other_pitch, 700, 30, 4));
    ok!(cuMemsetD8_v2(device, 0xff, pitch * 30));
    ok!(cuMemsetD8_v2(other, 0xff, other_pitch * 30));
    let source = pattern(350 * 25, 6);
    let into = Copy2d {
        src_x_bytes: 10,
        src_y: 2,
        src_kind: HOST,
        src_host: source.as_ptr() as usize,
        src_pitch: 350,
        dst_x_bytes: 4,
        dst_y: 3,
        dst_kind: DEVICE,
        dst_device: device,
        dst_pitch: pitch,
        width_bytes: width,
        height,
        ..Default::default()
    };
    ok!(cuMemcpy2D_v2(&into));
    let across = Copy2d {
        src_x_bytes: 4,
        src_y: 3,
        src_kind: DEVICE,
        src_device: device,
        src_pitch: pitch,
        dst_x_bytes: 8,
        dst_y: 1,
        dst_kind: DEVICE,
        dst_device: other,
        dst_pitch: other_pitch,
        width_bytes: width,
        height,
        ..Default::default()
    };
    ok!(cuMemcpy2DUnaligned_v2(&across));
    let mut back = vec![0_u8; 320 * 22];
    let out = Copy2d {
        src_x_bytes: 8,
        src_y: 1,
        src_kind: DEVICE,
        src_device: other,
        src_pitch: other_pitch,
        dst_x_bytes: 5,
        dst_y: 1,
        dst_kind: HOST,
        dst_host: back.as_mut_ptr() as usize,
        dst_pitch: 320,
        width_bytes: width,
        height,
        ..Default::default()
    };
    ok!(cuMemcpy2DAsync_v2(&out, 0));
    ok!(cuCtxSynchronize());
    for row in 0..height {
        let got = &back[(row + 1) * 320 + 5..][..width];
        let wanted = &source[(row + 2) * 350 + 10..][..width];
        check!(got == wanted, "row {row} differs");
    }
    check!(back[..325].iter().all(|b| *b == 0), "bytes before the rectangle were written");
    check!(read(device, 4)? == [0xff; 4], "bytes beside the rectangle were written on the device");
    Ok(())
}

/// A rectangle wider than a pitch is INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpy2D (srcPitch and dstPitch).
fn rectangles_wider_than_their_pitch_are_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let device = alloc(4096)?;
    let source = vec![0_u8; 4096];
    let copy = Copy2d {
        src_kind: HOST,
        src_host: source.as_ptr() as usize,
        src_pitch: 64,
        dst_kind: DEVICE,
        dst_device: device,
        dst_pitch: 128,
        width_bytes: 100,
        height: 4,
        ..Default::default()
    };
    is!(cuMemcpy2D_v2(&copy), INVALID_VALUE);
    Ok(())
}

/// Three-dimensional copies honour pitches, heights and offsets.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpy3D.
fn boxes_between_host_and_device() -> Outcome {
    let _gpu = Gpu::start()?;
    let (pitch, rows, slices) = (512, 8, 4);
    let device = alloc(pitch * rows * slices)?;
    ok!(cuMemsetD8_v2(device, 0, pitch * rows * slices));
    let source = pattern(100 * 6 * 3, 8);
    let copy = Copy3d {
        src_kind: HOST,
        src_host: source.as_ptr() as usize,
        src_pitch: 100,
        src_height: 6,
        dst_x_bytes: 16,
        dst_y: 1,
        dst_z: 1,
        dst_kind: DEVICE,
        dst_device: device,
        dst_pitch: pitch,
        dst_height: rows,
        width_bytes: 100,
        height: 6,
        depth: 3,
        ..Default::default()
    };
    ok!(cuMemcpy3D_v2(&copy));
    let got = read(device, pitch * rows * slices)?;
    let mut expected = vec![0_u8; pitch * rows * slices];
    for z in 0..3 {
        for y in 0..6 {
            let from = (z * 6 + y) * 100;
            let to = ((z + 1) * rows + y + 1) * pitch + 16;
            expected[to..to + 100].copy_from_slice(&source[from..from + 100]);
        }
    }
    check!(got == expected, "the box differs");
    Ok(())
}

/// Large copies, over what any staging buffer holds, arrive whole.
/// Source: NVIDIA CUDA Driver API, Memory Management.
fn large_copies() -> Outcome {
    let _gpu = Gpu::start()?;
    let size = 96 * MIB + 12_345;
    let address = alloc(size)?;
    let bytes = pattern(size, 9);
    write(address, &bytes)?;
    check!(read(address, size)? == bytes, "pageable memory: contents differ");
    let pinned = Pinned::new(size)?;
    pinned.fill(0x99);
    ok!(cuMemcpyHtoDAsync_v2(address, pinned.pointer(), size, 0));
    ok!(cuCtxSynchronize());
    pinned.fill(0);
    ok!(cuMemcpyDtoHAsync_v2(pinned.pointer(), address, size, 0));
    ok!(cuCtxSynchronize());
    check!(pinned.all(0x99), "pinned memory: contents differ");
    Ok(())
}
