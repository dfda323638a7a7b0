//! Processes that share a device.

use std::time::Duration;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;
use crate::helpers::Helper;

cases!("processes":
    memory_is_shared_out_among_processes,
    a_dead_process_gives_its_memory_back,
    a_process_killed_amid_work_gives_its_memory_back,
    what_others_hold_cannot_be_had,
    classic_memory_can_be_opened_elsewhere,
);

/// What another process allocates is missing here, and comes back when it ends.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemGetInfo (free of the device, not of the process).
fn memory_is_shared_out_among_processes() -> Outcome {
    let _gpu = Gpu::start()?;
    ok!(cuMemFree_v2(alloc(MIB)?));
    let before = quiet()?;
    let neighbour = Helper::start(&["hold", "268435456"])?;
    let during = free_bytes()?;
    check!(during + 256 * MIB <= before, "another process took 256 MiB, free fell by {}", before - during);
    drop(neighbour);
    let after = wait_free(before, Duration::from_secs(5))?;
    check!(after + 4 * MIB >= before, "free was {before}, is {after}");
    Ok(())
}

/// A killed process's memory comes back, a little later.
/// Source: general practice (the kernel driver cleans up at the end of a process).
fn a_dead_process_gives_its_memory_back() -> Outcome {
    let _gpu = Gpu::start()?;
    ok!(cuMemFree_v2(alloc(MIB)?));
    let before = quiet()?;
    for _ in 0..3 {
        Helper::start(&["hold", "268435456"])?.kill();
        let start = std::time::Instant::now();
        let after = wait_free(before - 4 * MIB, Duration::from_secs(5))?;
        check!(after + 4 * MIB >= before, "free was {before}, is {after} 5 s after the kill");
        observe!("the memory was back {:?} after the end of the process", start.elapsed());
    }
    Ok(())
}

/// So does that of a process killed while its kernel runs; the device goes on.
/// Source: general practice.
fn a_process_killed_amid_work_gives_its_memory_back() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let before = quiet()?;
    Helper::start(&["spin", "2000"])?.kill();
    let after = wait_free(before - 4 * MIB, Duration::from_secs(8))?;
    check!(after + 4 * MIB >= before, "free was {before}, is {after}");
    let address = alloc(MIB)?;
    ok!(kernels.fill(0, address, 16, 6));
    ok!(cuCtxSynchronize());
    check!(read_u32(address)? == 6, "the device does not work any more");
    Ok(())
}

/// Memory that another process holds cannot be allocated here.
/// Source: the meaning of an allocation.
fn what_others_hold_cannot_be_had() -> Outcome {
    let _gpu = Gpu::start()?;
    let _neighbour = Helper::start(&["hold", "268435456"])?;
    let free = free_bytes()?;
    let mut address = 0;
    is!(cuMemAlloc_v2(Some(&mut address), free + 64 * MIB), OUT_OF_MEMORY);
    Ok(())
}

/// cuIpcGetMemHandle gives a handle of cuMemAlloc memory that another process opens as the same memory.
/// Source: NVIDIA CUDA Driver API, Device Management, cuIpcOpenMemHandle.
fn classic_memory_can_be_opened_elsewhere() -> Outcome {
    let _gpu = Gpu::start()?;
    let address = alloc(4 * MIB)?;
    write(address, &pattern(4096, 77))?;
    let mut handle = IpcHandle([0; 64]);
    match cuIpcGetMemHandle(&mut handle, address) {
        Code::NOT_SUPPORTED => skip!("this driver has no IPC"),
        code => ok!(code),
    }
    let hex: String = handle.0.iter().map(|b| format!("{b:02x}")).collect();
    let _helper = Helper::start(&["ipc", &hex])?;
    check!(read(address, 4096)?.iter().all(|b| *b == 0x3c), "the other process's bytes are not here");
    Ok(())
}
