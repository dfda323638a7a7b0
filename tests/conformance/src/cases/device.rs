//! Start, devices and their attributes.

use std::ffi::{CStr, CString};

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("device":
    nothing_works_before_init,
    init_takes_no_flags,
    init_may_be_repeated,
    version_is_known_before_init,
    ordinals_past_the_count_are_refused,
    unknown_attributes_are_refused,
    names_are_terminated_within_their_buffer,
    attributes_fit_the_hardware,
    total_agrees_with_memory_info,
    uuids_are_stable,
    bus_ids_lead_back_to_the_device,
    error_codes_have_names,
    attributes_end_where_the_header_does,
    visible_devices_select_and_order,
    visible_devices_by_uuid,
    an_empty_selection_leaves_no_device,
);

/// Any function of the driver fails with NOT_INITIALIZED before cuInit.
/// Source: NVIDIA CUDA Driver API, Initialization, cuInit.
fn nothing_works_before_init() -> Outcome {
    let (mut n, mut context, mut address) = (0, 0, 0);
    is!(cuDeviceGetCount(&mut n), NOT_INITIALIZED);
    is!(cuCtxGetCurrent(&mut context), NOT_INITIALIZED);
    is!(cuMemAlloc_v2(Some(&mut address), 4096), NOT_INITIALIZED);
    ok!(cuInit(0));
    ok!(cuDeviceGetCount(&mut n));
    check!(n >= 1, "no device");
    Ok(())
}

/// cuInit's flags must be 0.
/// Source: NVIDIA CUDA Driver API, Initialization, cuInit.
fn init_takes_no_flags() -> Outcome {
    is!(cuInit(1), INVALID_VALUE);
    ok!(cuInit(0));
    Ok(())
}

/// cuInit may be called again, from any thread; only the first call does something.
/// Source: general practice (each of several CUDA runtimes in one process calls it).
fn init_may_be_repeated() -> Outcome {
    ok!(cuInit(0));
    ok!(cuInit(0));
    on_thread(0, || {
        ok!(cuInit(0));
        Ok(())
    })
}

/// cuDriverGetVersion needs no cuInit and answers 1000 x major + 10 x minor.
/// Source: NVIDIA CUDA Driver API, Version Management; the CUDA runtime asks it first.
fn version_is_known_before_init() -> Outcome {
    let mut version = 0;
    ok!(cuDriverGetVersion(&mut version));
    observe!("driver version {version}");
    check!((12000..100_000).contains(&version), "version {version}");
    Ok(())
}

/// cuDeviceGet refuses an ordinal outside [0, count) with INVALID_DEVICE.
/// Source: NVIDIA CUDA Driver API, Device Management, cuDeviceGet.
fn ordinals_past_the_count_are_refused() -> Outcome {
    ok!(cuInit(0));
    let (mut n, mut device) = (0, 0);
    ok!(cuDeviceGetCount(&mut n));
    is!(cuDeviceGet(&mut device, n), INVALID_DEVICE);
    is!(cuDeviceGet(&mut device, -1), INVALID_DEVICE);
    for ordinal in 0..n {
        ok!(cuDeviceGet(&mut device, ordinal));
    }
    Ok(())
}

/// cuDeviceGetAttribute refuses an attribute that does not exist with INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Device Management, cuDeviceGetAttribute.
fn unknown_attributes_are_refused() -> Outcome {
    ok!(cuInit(0));
    let mut value = 0;
    is!(cuDeviceGetAttribute(&mut value, 100_000, 0), INVALID_VALUE);
    is!(cuDeviceGetAttribute(&mut value, -1, 0), INVALID_VALUE);
    Ok(())
}

/// cuDeviceGetName writes at most `len` bytes and terminates them.
/// Source: NVIDIA CUDA Driver API, Device Management, cuDeviceGetName.
fn names_are_terminated_within_their_buffer() -> Outcome {
    ok!(cuInit(0));
    let mut buffer = [0x7f_u8; 256];
    ok!(cuDeviceGetName(buffer.as_mut_ptr().cast(), 256, 0));
    let name = CStr::from_bytes_until_nul(&buffer).map(|n| n.to_string_lossy().into_owned());
    check!(name.as_ref().is_ok_and(|n| !n.is_empty()), "name {name:?}");
    observe!("device {}", name.unwrap_or_default());
    let mut short = [0x7f_u8; 16];
    let code = cuDeviceGetName(short.as_mut_ptr().cast(), 4, 0);
    check!(short[4..].iter().all(|b| *b == 0x7f), "wrote past the 4 bytes that it was given");
    observe!("a name cut to 4 bytes: {code:?}");
    Ok(())
}

/// Warps are 32 wide, blocks take 1024 threads, addresses are unified, virtual memory and pools are there.
/// Source: CUDA C++ Programming Guide, Technical Specifications per Compute Capability (7.0 and later).
fn attributes_fit_the_hardware() -> Outcome {
    ok!(cuInit(0));
    let gpu = Gpu { device: 0, context: 0 };
    for (attribute, name, wanted) in [
        (1, "MAX_THREADS_PER_BLOCK", 1024),
        (2, "MAX_BLOCK_DIM_X", 1024),
        (5, "MAX_GRID_DIM_X", i32::MAX),
        (10, "WARP_SIZE", 32),
        (41, "UNIFIED_ADDRESSING", 1),
        (102, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", 1),
        (115, "MEMORY_POOLS_SUPPORTED", 1),
    ] {
        let value = gpu.attribute(attribute)?;
        check!(value == wanted, "{name} is {value}, not {wanted}");
    }
    check!(gpu.attribute(75)? >= 7, "compute capability {}.{}", gpu.attribute(75)?, gpu.attribute(76)?);
    check!(gpu.attribute(16)? >= 1, "MULTIPROCESSOR_COUNT {}", gpu.attribute(16)?);
    check!(gpu.attribute(40)? >= 1, "ASYNC_ENGINE_COUNT {}", gpu.attribute(40)?);
    check!(gpu.attribute(8)? >= 48 * 1024, "MAX_SHARED_MEMORY_PER_BLOCK {}", gpu.attribute(8)?);
    for attribute in [18, 19, 83, 88, 93, 94, 95, 103, 125] {
        observe!("attribute {attribute} is {}", gpu.attribute(attribute)?);
    }
    Ok(())
}

/// The device's total memory is what cuMemGetInfo calls total, and free is at most that.
/// Source: NVIDIA CUDA Driver API, cuDeviceTotalMem and cuMemGetInfo.
fn total_agrees_with_memory_info() -> Outcome {
    let gpu = Gpu::start()?;
    let mut total = 0;
    ok!(cuDeviceTotalMem_v2(&mut total, gpu.device));
    let (free, info) = memory_info()?;
    check!(total == info, "cuDeviceTotalMem {total}, cuMemGetInfo {info}");
    check!(free <= info && free > 0, "free {free} of {info}");
    Ok(())
}

/// The uuid of a device is the same each time, differs between devices, and is not empty.
/// Source: NVIDIA CUDA Driver API, Device Management, cuDeviceGetUuid.
fn uuids_are_stable() -> Outcome {
    ok!(cuInit(0));
    let mut n = 0;
    ok!(cuDeviceGetCount(&mut n));
    let mut all = Vec::new();
    for device in 0..n {
        let (mut a, mut b, mut old) = ([0; 16], [0; 16], [0; 16]);
        ok!(cuDeviceGetUuid_v2(&mut a, device));
        ok!(cuDeviceGetUuid_v2(&mut b, device));
        ok!(cuDeviceGetUuid(&mut old, device));
        check!(a == b, "the uuid changed between two calls");
        check!(a != [0; 16], "the uuid is empty");
        observe!("cuDeviceGetUuid agrees with _v2: {}", a == old);
        check!(!all.contains(&a), "two devices have one uuid");
        all.push(a);
    }
    Ok(())
}

/// cuDeviceGetByPCIBusId finds the device whose bus id cuDeviceGetPCIBusId gave.
/// Source: NVIDIA CUDA Driver API, Device Management, cuDeviceGetByPCIBusId.
fn bus_ids_lead_back_to_the_device() -> Outcome {
    ok!(cuInit(0));
    let mut buffer = [0_u8; 64];
    ok!(cuDeviceGetPCIBusId(buffer.as_mut_ptr().cast(), 64, 0));
    let text = CStr::from_bytes_until_nul(&buffer).map(CStr::to_owned).unwrap_or_default();
    check!(text.to_bytes().len() >= 7, "bus id {text:?}");
    let mut device = -1;
    ok!(cuDeviceGetByPCIBusId(&mut device, text.as_ptr()));
    check!(device == 0, "{text:?} led to device {device}");
    let nonsense = CString::new("ffff:ff:1f.0").unwrap_or_default();
    let code = cuDeviceGetByPCIBusId(&mut device, nonsense.as_ptr());
    check!(code == Code::INVALID_DEVICE || code == Code::INVALID_VALUE, "an unknown bus id gave {code:?}");
    Ok(())
}

/// Every code has a name and a description; an unknown one is INVALID_VALUE.
/// Source: NVIDIA CUDA Driver API, Error Handling.
fn error_codes_have_names() -> Outcome {
    let mut text = std::ptr::null();
    for (code, wanted) in [
        (0, c"CUDA_SUCCESS"),
        (1, c"CUDA_ERROR_INVALID_VALUE"),
        (2, c"CUDA_ERROR_OUT_OF_MEMORY"),
        (3, c"CUDA_ERROR_NOT_INITIALIZED"),
        (201, c"CUDA_ERROR_INVALID_CONTEXT"),
        (600, c"CUDA_ERROR_NOT_READY"),
        (700, c"CUDA_ERROR_ILLEGAL_ADDRESS"),
        (900, c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"),
        (999, c"CUDA_ERROR_UNKNOWN"),
    ] {
        ok!(cuGetErrorName(code, &mut text));
        // SAFETY: on success the driver gave a C string that it keeps for ever.
        let name = unsafe { CStr::from_ptr(text) };
        check!(name == wanted, "{code} is called {name:?}");
        ok!(cuGetErrorString(code, &mut text));
        check!(!text.is_null(), "{code} has no description");
    }
    is!(cuGetErrorName(123_456, &mut text), INVALID_VALUE);
    check!(text.is_null(), "the name of an unknown code is not null");
    Ok(())
}

/// Attributes that the driver's own header does not have are refused.
/// Source: cuda.h of 12.4, 12.8 and 13.0, CU_DEVICE_ATTRIBUTE_MAX.
fn attributes_end_where_the_header_does() -> Outcome {
    let gpu = Gpu::start()?;
    let (mut version, mut value) = (0, 0);
    ok!(cuDriverGetVersion(&mut version));
    let end = match version {
        12040 => 135,
        12080 => 144,
        13000 => 148,
        _ => skip!("the header of driver {version} is not known here"),
    };
    is!(cuDeviceGetAttribute(&mut value, end, gpu.device), INVALID_VALUE);
    ok!(cuDeviceGetAttribute(&mut value, end - 1, gpu.device));
    Ok(())
}

/// The uuids of all devices of the machine, as NVML numbers them.
fn uuids() -> Result<Vec<String>, Stop> {
    if !nvml_found() {
        skip!("libnvidia-ml.so.1 could not be opened");
    }
    ok!(nvmlInit_v2());
    let mut count = 0;
    ok!(nvmlDeviceGetCount_v2(&mut count));
    let mut all = Vec::new();
    for index in 0..count {
        let (mut handle, mut text) = (0, [0_u8; 96]);
        ok!(nvmlDeviceGetHandleByIndex_v2(index, &mut handle));
        ok!(nvmlDeviceGetUUID(handle, text.as_mut_ptr().cast(), 96));
        let text = CStr::from_bytes_until_nul(&text).map_or_else(|_| String::new(), |t| t.to_string_lossy().into_owned());
        all.push(text);
    }
    Ok(all)
}

/// Selects devices for this process, before its cuInit.
fn select(list: &str) {
    // SAFETY: the case has one thread, and the driver has not been started.
    unsafe {
        std::env::set_var("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
        std::env::set_var("CUDA_VISIBLE_DEVICES", list);
    }
}

fn uuid_of(ordinal: i32) -> Result<String, Stop> {
    let (mut device, mut uuid) = (0, [0; 16]);
    ok!(cuDeviceGet(&mut device, ordinal));
    ok!(cuDeviceGetUuid_v2(&mut uuid, device));
    let hex: String = uuid.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// CUDA_VISIBLE_DEVICES selects devices and orders them, up to the first that does not exist; NVML does not look at it.
/// Source: CUDA C++ Programming Guide, CUDA environment variables; NVML API Reference, nvmlDeviceGetHandleByIndex.
fn visible_devices_select_and_order() -> Outcome {
    let all = uuids()?;
    if all.len() < 2 {
        skip!("one device only");
    }
    select("1,0,99,1");
    ok!(cuInit(0));
    let mut n = 0;
    ok!(cuDeviceGetCount(&mut n));
    check!(n == 2, "{n} devices");
    check!(uuid_of(0)? == all[1] && uuid_of(1)? == all[0], "{} and {} of {all:?}", uuid_of(0)?, uuid_of(1)?);
    check!(uuids()? == all, "NVML's order is now {:?}", uuids()?);
    let mut context = 0;
    ok!(cuDevicePrimaryCtxRetain(&mut context, 0));
    ok!(cuCtxSetCurrent(context));
    let _address = alloc(64 * MIB)?;
    for (index, wanted) in [(0, 0), (1, 1)] {
        let (mut handle, mut n) = (0, 256);
        let mut list = [NvmlProcess::default(); 256];
        ok!(nvmlDeviceGetHandleByIndex_v2(index, &mut handle));
        ok!(nvmlDeviceGetComputeRunningProcesses_v3(handle, &mut n, list.as_mut_ptr()));
        let own = list[..n as usize].iter().filter(|p| p.pid == std::process::id()).count();
        observe!("NVML's device {index} lists this process {own} times, wanted {wanted}");
    }
    Ok(())
}

/// CUDA_VISIBLE_DEVICES takes uuids, which may be cut short.
/// Source: CUDA C++ Programming Guide, CUDA environment variables.
fn visible_devices_by_uuid() -> Outcome {
    let all = uuids()?;
    let Some(last) = all.last().filter(|uuid| uuid.starts_with("GPU-") && uuid.len() > 12) else {
        skip!("the last of {all:?} is no whole GPU");
    };
    select(&last[..12]);
    ok!(cuInit(0));
    let mut n = 0;
    ok!(cuDeviceGetCount(&mut n));
    check!(n == 1, "{n} devices");
    check!(uuid_of(0)? == *last, "{} instead of {last}", uuid_of(0)?);
    Ok(())
}

/// When CUDA_VISIBLE_DEVICES selects none, cuInit says that there is no device.
/// Source: CUDA C++ Programming Guide, CUDA environment variables; cuda.h, CUDA_ERROR_NO_DEVICE.
fn an_empty_selection_leaves_no_device() -> Outcome {
    select("-1");
    is!(cuInit(0), NO_DEVICE);
    is!(cuInit(0), NO_DEVICE);
    Ok(())
}
