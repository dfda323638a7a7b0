//! Launches: what the kernels compute, what the arguments may be.

use std::ffi::c_void;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("launches":
    fill_writes_every_word_and_no_other,
    checksum_adds_up,
    axpy_computes,
    any_grid_gives_the_same_result,
    arguments_are_copied_by_the_call,
    arguments_may_come_in_a_buffer,
    extended_launches,
    cooperative_launches,
    empty_grids_and_blocks_are_refused,
    blocks_beyond_the_limit_are_refused,
    too_much_shared_memory_is_refused,
    a_null_function_is_refused,
    launches_need_a_context,
    the_device_goes_on_after_a_refused_launch,
);

/// fill writes exactly its words.
/// Source: the kernel's own text (simulator/kernels/spillway.ptx).
fn fill_writes_every_word_and_no_other() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    for words in [1, 31, 32, 33, 8192, 100_003] {
        let bytes = words * 4;
        let address = alloc(bytes + 8)?;
        ok!(cuMemsetD8_v2(address, 0xee, bytes + 8));
        ok!(kernels.fill(0, address + 4, words as u64, 0xabcd_0123));
        ok!(cuCtxSynchronize());
        let got = read(address, bytes + 8)?;
        check!(got[..4] == [0xee; 4] && got[bytes + 4..] == [0xee; 4], "{words} words: written outside");
        check!(got[4..bytes + 4].chunks(4).all(|w| w == [0x23, 0x01, 0xcd, 0xab]), "{words} words: one differs");
        ok!(cuMemFree_v2(address));
    }
    Ok(())
}

/// What `checksum_u32` adds for these words.
fn reference_sum(bytes: &[u8]) -> u64 {
    let mut sum = 0_u64;
    for (i, word) in bytes.chunks_exact(4).enumerate() {
        let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        let place = u32::try_from(i & 0xffff_ffff).unwrap_or(0).wrapping_mul(0x9E37_79B1);
        sum = sum.wrapping_add(u64::from(value ^ place));
    }
    sum
}

fn read_u64(address: Dptr) -> Result<u64, Stop> {
    Ok(u64::from(read_u32(address)?) | u64::from(read_u32(address + 4)?) << 32)
}

/// checksum adds each word, mixed with its place, to what its result held.
/// Source: the kernel's own text (simulator/kernels/spillway.ptx).
fn checksum_adds_up() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let (words, out) = (1_000_003_usize, alloc(256)?);
    let address = alloc(words * 4)?;
    let bytes = pattern(words * 4, 31);
    write(address, &bytes)?;
    ok!(cuMemsetD8_v2(out, 0, 8));
    let args = [Arg::U64(address), Arg::U64(words as u64), Arg::U64(out)];
    ok!(launch(kernels.checksum, 64, 256, 0, &args));
    ok!(cuCtxSynchronize());
    let wanted = reference_sum(&bytes);
    check!(read_u64(out)? == wanted, "got {:x}, wanted {wanted:x}", read_u64(out)?);
    ok!(launch(kernels.checksum, 64, 256, 0, &args));
    ok!(cuCtxSynchronize());
    check!(read_u64(out)? == wanted.wrapping_mul(2), "the second launch did not add");
    Ok(())
}

/// axpy computes a*x + y in single precision.
/// Source: the kernel's own text (simulator/kernels/spillway.ptx).
fn axpy_computes() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let n = 10_007_u16;
    let bytes: Vec<u8> = (0..n).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    let (x, y) = (alloc(bytes.len())?, alloc(bytes.len())?);
    write(x, &bytes)?;
    ok!(cuMemsetD32_v2(y, 1.5_f32.to_bits(), usize::from(n)));
    let args = [Arg::U64(u64::from(n)), Arg::F32(0.25), Arg::U64(x), Arg::U64(y)];
    ok!(launch(kernels.axpy, 8, 128, 0, &args));
    ok!(cuCtxSynchronize());
    for (i, word) in read(y, bytes.len())?.chunks_exact(4).enumerate() {
        let got = f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        let wanted = 0.25_f32.mul_add(f32::from(u16::try_from(i).unwrap_or(0)), 1.5);
        check!(got == wanted, "word {i}: {got}, wanted {wanted}");
    }
    Ok(())
}

/// The kernels' loops stride by the grid: any one-dimensional launch gives the same.
/// Source: the kernels' own text (simulator/kernels/spillway.ptx).
fn any_grid_gives_the_same_result() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let words = 10_000_usize;
    let (address, out) = (alloc(words * 4)?, alloc(256)?);
    let bytes = pattern(words * 4, 32);
    write(address, &bytes)?;
    for (grid, block) in [(1, 1), (1, 1024), (7, 33), (1000, 64), (100_000, 32)] {
        ok!(cuMemsetD8_v2(out, 0, 8));
        let args = [Arg::U64(address), Arg::U64(words as u64), Arg::U64(out)];
        ok!(launch(kernels.checksum, grid, block, 0, &args));
        ok!(cuCtxSynchronize());
        check!(read_u64(out)? == reference_sum(&bytes), "grid {grid}, block {block}: another sum");
    }
    Ok(())
}

/// When the launch returns, its argument list may change.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchKernel.
fn arguments_are_copied_by_the_call() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let stream = stream(NON_BLOCKING)?;
    let address = alloc(4096)?;
    ok!(kernels.spin(stream, std::time::Duration::from_millis(50)));
    let (mut at, mut n, mut value) = (address, 4_u64, 5_u32);
    let mut params = [(&raw mut at).cast(), (&raw mut n).cast(), (&raw mut value).cast()];
    ok!(cuLaunchKernel(kernels.fill, 1, 1, 1, 32, 1, 1, 0, stream, params.as_mut_ptr(), std::ptr::null_mut()));
    (at, n, value) = (0, u64::MAX, 6);
    ok!(cuStreamSynchronize(stream));
    check!(read_u32(address)? == 5, "got {} (the arguments now are {at}, {n}, {value})", read_u32(address)?);
    Ok(())
}

/// Marks in the list of extra options of a launch.
const BUFFER_POINTER: usize = 1;
const BUFFER_SIZE: usize = 2;

/// Arguments may come packed in one buffer.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchKernel (CU_LAUNCH_PARAM_BUFFER_POINTER).
fn arguments_may_come_in_a_buffer() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let address = alloc(4096)?;
    let mut buffer = Vec::new();
    buffer.extend_from_slice(&address.to_le_bytes());
    buffer.extend_from_slice(&16_u64.to_le_bytes());
    buffer.extend_from_slice(&77_u32.to_le_bytes());
    let mut size = buffer.len();
    let mut extra: [*mut c_void; 5] = [
        BUFFER_POINTER as *mut c_void,
        buffer.as_mut_ptr().cast(),
        BUFFER_SIZE as *mut c_void,
        (&raw mut size).cast(),
        std::ptr::null_mut(),
    ];
    ok!(cuLaunchKernel(kernels.fill, 1, 1, 1, 32, 1, 1, 0, 0, std::ptr::null_mut(), extra.as_mut_ptr()));
    ok!(cuCtxSynchronize());
    check!(read_u32(address + 60)? == 77, "got {}", read_u32(address + 60)?);
    Ok(())
}

/// cuLaunchKernelEx without attributes is cuLaunchKernel.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchKernelEx.
fn extended_launches() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let (stream, address) = (stream(NON_BLOCKING)?, alloc(4096)?);
    let config = LaunchConfig {
        grid: [2, 1, 1],
        block: [64, 1, 1],
        shared_bytes: 0,
        stream,
        attributes: 0,
        attribute_count: 0,
    };
    let mut args = Args::new(&[Arg::U64(address), Arg::U64(16), Arg::U32(78)]);
    ok!(cuLaunchKernelEx(&config, kernels.fill, args.pointer(), std::ptr::null_mut()));
    ok!(cuStreamSynchronize(stream));
    check!(read_u32(address)? == 78, "got {}", read_u32(address)?);
    let empty = LaunchConfig { grid: [0, 1, 1], ..config };
    is!(cuLaunchKernelEx(&empty, kernels.fill, args.pointer(), std::ptr::null_mut()), INVALID_VALUE);
    Ok(())
}

/// A grid that fits the device can be launched cooperatively.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchCooperativeKernel.
fn cooperative_launches() -> Outcome {
    let gpu = Gpu::start()?;
    gpu.needs(95, "cooperative launches")?;
    let kernels = Kernels::load()?;
    let address = alloc(4096)?;
    let mut args = Args::new(&[Arg::U64(address), Arg::U64(16), Arg::U32(79)]);
    ok!(cuLaunchCooperativeKernel(kernels.fill, 1, 1, 1, 64, 1, 1, 0, 0, args.pointer()));
    ok!(cuCtxSynchronize());
    check!(read_u32(address)? == 79, "got {}", read_u32(address)?);
    Ok(())
}

fn try_shape(kernels: &Kernels, address: Dptr, grid: [u32; 3], block: [u32; 3], shared: u32) -> Code {
    let mut args = Args::new(&[Arg::U64(address), Arg::U64(16), Arg::U32(80)]);
    let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
    cuLaunchKernel(kernels.fill, gx, gy, gz, bx, by, bz, shared, 0, args.pointer(), std::ptr::null_mut())
}

/// No dimension of grid or block may be 0.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchKernel (returned codes).
fn empty_grids_and_blocks_are_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let (kernels, at) = (Kernels::load()?, alloc(4096)?);
    for grid in [[0, 1, 1], [1, 0, 1], [1, 1, 0]] {
        is!(try_shape(&kernels, at, grid, [32, 1, 1], 0), INVALID_VALUE);
        is!(try_shape(&kernels, at, [1, 1, 1], grid, 0), INVALID_VALUE);
    }
    Ok(())
}

/// A block of more threads than the device takes is INVALID_VALUE.
/// Source: CUDA C++ Programming Guide, Technical Specifications (1024 threads, 64 in z; grid y and z 65535).
fn blocks_beyond_the_limit_are_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let (kernels, at) = (Kernels::load()?, alloc(4096)?);
    for block in [[1025, 1, 1], [64, 32, 1], [1, 1, 65], [2048, 1, 1]] {
        is!(try_shape(&kernels, at, [1, 1, 1], block, 0), INVALID_VALUE);
    }
    is!(try_shape(&kernels, at, [1, 65_536, 1], [32, 1, 1], 0), INVALID_VALUE);
    is!(try_shape(&kernels, at, [1, 1, 65_536], [32, 1, 1], 0), INVALID_VALUE);
    ok!(try_shape(&kernels, at, [1, 1, 1], [32, 32, 1], 0));
    ok!(cuCtxSynchronize());
    Ok(())
}

/// More dynamic shared memory than the function was allowed is INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuFuncSetAttribute (48 KiB unless opted in).
fn too_much_shared_memory_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let (kernels, at) = (Kernels::load()?, alloc(4096)?);
    ok!(try_shape(&kernels, at, [1, 1, 1], [32, 1, 1], 48 * 1024));
    is!(try_shape(&kernels, at, [1, 1, 1], [32, 1, 1], 64 * 1024 * 1024), INVALID_VALUE);
    ok!(cuCtxSynchronize());
    Ok(())
}

/// A null function is refused.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchKernel (INVALID_HANDLE, INVALID_VALUE).
fn a_null_function_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let code = launch(0, 1, 1, 0, &[Arg::U64(0)]);
    check!(code == Code::INVALID_HANDLE || code == Code::INVALID_VALUE, "{code:?}");
    observe!("a null function: {code:?}");
    Ok(())
}

/// Launching without a current context is INVALID_CONTEXT.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchKernel (returned codes).
fn launches_need_a_context() -> Outcome {
    let _gpu = Gpu::start()?;
    let (kernels, at) = (Kernels::load()?, alloc(4096)?);
    ok!(cuCtxSetCurrent(0));
    is!(kernels.fill(0, at, 4, 1), INVALID_CONTEXT);
    Ok(())
}

/// A refused launch leaves no error behind.
/// Source: NVIDIA CUDA Driver API, Execution Control (only faults of running kernels are sticky).
fn the_device_goes_on_after_a_refused_launch() -> Outcome {
    let _gpu = Gpu::start()?;
    let (kernels, at) = (Kernels::load()?, alloc(4096)?);
    is!(try_shape(&kernels, at, [1, 1, 1], [2048, 1, 1], 0), INVALID_VALUE);
    ok!(kernels.fill(0, at, 4, 15));
    ok!(cuCtxSynchronize());
    check!(read_u32(at)? == 15, "got {}", read_u32(at)?);
    Ok(())
}
