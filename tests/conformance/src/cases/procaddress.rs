//! cuGetProcAddress: which function a name, a version and flags lead to.

use std::ffi::CString;

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("procaddress":
    an_exact_version_gives_a_working_function,
    an_older_version_gives_the_older_function,
    a_version_before_the_functions_own_gives_none,
    unknown_names_give_none,
    a_newer_version_is_as_good,
    per_thread_flags_give_per_thread_functions,
    the_first_form_works_too,
    it_finds_itself,
    addresses_compared_with_exports,
    what_is_newer_than_the_driver_is_not_there,
    a_version_after_the_drivers_own,
    statuses_tell_old_requests_from_unknown_names,
    flags_have_no_other_values,
    nonsense_is_refused,
);

/// (code, address, status) of the second form.
fn ask(name: &str, version: i32, flags: u64) -> (Code, usize, i32) {
    let text = CString::new(name).unwrap_or_default();
    let (mut address, mut status) = (0, -1);
    let code = cuGetProcAddress_v2(text.as_ptr(), &mut address, version, flags, Some(&mut status));
    (code, address, status)
}

fn found(name: &str, version: i32, flags: u64) -> Result<usize, Stop> {
    let (code, address, status) = ask(name, version, flags);
    check!(code.is_ok() && address != 0 && status == 0, "{name} at {version}, flags {flags}: {code:?}, status {status}");
    Ok(address)
}

fn not_found(name: &str, version: i32) -> Outcome {
    let (code, address, status) = ask(name, version, 0);
    observe!("{name} at {version}: {code:?}, status {status}");
    check!(code.is_ok() || code == Code::NOT_FOUND, "{code:?}");
    check!(address == 0, "{name} at {version} gave an address");
    check!(status == 1 || status == 2, "status {status}");
    Ok(())
}

/// The version in which a function took its present form leads to that form.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access, cuGetProcAddress.
fn an_exact_version_gives_a_working_function() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut address = 0;
    ok!(call_alloc(found("cuMemAlloc", 3020, 0)?, &mut address, 3 * MIB));
    let (mut base, mut bytes) = (0, 0);
    ok!(cuMemGetAddressRange_v2(Some(&mut base), Some(&mut bytes), address));
    check!(base == address, "another allocation");
    let kernels = Kernels::load()?;
    let mut args = Args::new(&[Arg::U64(address), Arg::U64(4), Arg::U32(3)]);
    let launch = Launch {
        function: kernels.fill,
        grid: (1, 1, 1),
        block: (32, 1, 1),
        shared_bytes: 0,
        stream: 0,
        params: args.pointer(),
        extra: std::ptr::null_mut(),
    };
    ok!(call_launch(found("cuLaunchKernel", 4000, 0)?, &launch));
    ok!(cuCtxSynchronize());
    check!(read_u32(address)? == 3, "got {}", read_u32(address)?);
    Ok(())
}

/// An older version leads to the older form of a function, where the driver still has it.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access (versions of one name).
fn an_older_version_gives_the_older_function() -> Outcome {
    ok!(cuInit(0));
    for (name, old, new) in [
        ("cuStreamBeginCapture", 10000, 10010),
        ("cuDevicePrimaryCtxRelease", 7000, 11000),
        ("cuMemHostRegister", 4000, 6050),
        ("cuEventDestroy", 2000, 4000),
    ] {
        let (first, second) = (found(name, old, 0)?, found(name, new, 0)?);
        observe!("{name} at {old} and {new} are {}", if first == second { "one function" } else { "two functions" });
    }
    Ok(())
}

/// A version in which the function did not exist gives no address.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access (VERSION_NOT_SUFFICIENT).
fn a_version_before_the_functions_own_gives_none() -> Outcome {
    ok!(cuInit(0));
    not_found("cuMemAllocAsync", 10000)?;
    not_found("cuMemCreate", 9000)?;
    not_found("cuLaunchKernel", 3000)?;
    let _address = found("cuMemAllocAsync", 11020, 0)?;
    Ok(())
}

/// A name that is no function's gives no address.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access (SYMBOL_NOT_FOUND).
fn unknown_names_give_none() -> Outcome {
    ok!(cuInit(0));
    not_found("cuNoSuchFunction", 12000)?;
    not_found("malloc", 12000)?;
    observe!("an empty name: {:?}", ask("", 12000, 0));
    Ok(())
}

/// A version between that of the function and the driver's leads to the function.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access.
fn a_newer_version_is_as_good() -> Outcome {
    ok!(cuInit(0));
    for name in ["cuMemAlloc", "cuMemFree", "cuLaunchKernel", "cuMemcpyHtoD", "cuStreamSynchronize"] {
        check!(found(name, 12000, 0)? == found(name, 11040, 0)?, "{name} differs between 11.4 and 12.0");
    }
    Ok(())
}

/// With the flag for per-thread streams a name leads to the function whose null stream is the thread's own.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access (PER_THREAD_DEFAULT_STREAM).
fn per_thread_flags_give_per_thread_functions() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    kernels.warm()?;
    let own = found("cuLaunchKernel", 7000, 2)?;
    let legacy = found("cuLaunchKernel", 7000, 1)?;
    check!(own != legacy, "both flags lead to one function");
    check!(legacy == found("cuLaunchKernel", 7000, 0)?, "no flag and the legacy flag differ");
    let mut args = Args::new(&[Arg::U64(150_000_000)]);
    let launch = Launch {
        function: kernels.spin,
        grid: (1, 1, 1),
        block: (1, 1, 1),
        shared_bytes: 0,
        stream: 0,
        params: args.pointer(),
        extra: std::ptr::null_mut(),
    };
    ok!(call_launch(own, &launch));
    is!(call_handle(found("cuStreamQuery", 7000, 2)?, 0), NOT_READY);
    is!(cuStreamQuery(2), NOT_READY);
    ok!(call_handle(found("cuStreamSynchronize", 7000, 2)?, 0));
    ok!(cuStreamQuery(2));
    let plain = found("cuMemAlloc", 7000, 2)?;
    check!(plain == found("cuMemAlloc", 7000, 0)?, "cuMemAlloc has no stream, yet two addresses");
    Ok(())
}

/// The form of CUDA 11.3, of four arguments, is still there.
/// Source: cuda.h of 11.3; the CUDA runtime of 11 uses it.
fn the_first_form_works_too() -> Outcome {
    ok!(cuInit(0));
    for (name, version) in [("cuMemAlloc", 3020), ("cuLaunchKernel", 4000), ("cuStreamSynchronize", 2000)] {
        let text = CString::new(name).unwrap_or_default();
        let mut address = 0;
        ok!(cuGetProcAddress(text.as_ptr(), &mut address, version, 0));
        check!(address == found(name, version, 0)?, "{name}: the two forms differ");
    }
    Ok(())
}

/// cuGetProcAddress leads to itself, in the form of the version.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access; the CUDA runtime of 12 and 13 asks for it.
fn it_finds_itself() -> Outcome {
    ok!(cuInit(0));
    let (first, second) = (found("cuGetProcAddress", 11030, 0)?, found("cuGetProcAddress", 12000, 0)?);
    check!(first != second, "both forms are one function, though they differ in their arguments");
    Ok(())
}

/// Whether what is returned is what is exported, for names that clients really ask for.
/// Source: open in the documentation; reported, not judged, but all are found both ways.
fn addresses_compared_with_exports() -> Outcome {
    ok!(cuInit(0));
    let names = [
        ("cuInit", "cuInit", 2000),
        ("cuDeviceGet", "cuDeviceGet", 2000),
        ("cuDeviceGetCount", "cuDeviceGetCount", 2000),
        ("cuDeviceTotalMem", "cuDeviceTotalMem_v2", 3020),
        ("cuDeviceGetAttribute", "cuDeviceGetAttribute", 2000),
        ("cuDeviceGetUuid", "cuDeviceGetUuid_v2", 11040),
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain", 7000),
        ("cuDevicePrimaryCtxRelease", "cuDevicePrimaryCtxRelease_v2", 11000),
        ("cuCtxSetCurrent", "cuCtxSetCurrent", 4000),
        ("cuCtxGetCurrent", "cuCtxGetCurrent", 4000),
        ("cuCtxSynchronize", "cuCtxSynchronize", 2000),
        ("cuMemGetInfo", "cuMemGetInfo_v2", 3020),
        ("cuMemAlloc", "cuMemAlloc_v2", 3020),
        ("cuMemFree", "cuMemFree_v2", 3020),
        ("cuMemAllocAsync", "cuMemAllocAsync", 11020),
        ("cuMemFreeAsync", "cuMemFreeAsync", 11020),
        ("cuMemcpyHtoD", "cuMemcpyHtoD_v2", 3020),
        ("cuMemcpyHtoDAsync", "cuMemcpyHtoDAsync_v2", 3020),
        ("cuMemsetD8", "cuMemsetD8_v2", 3020),
        ("cuMemCreate", "cuMemCreate", 10020),
        ("cuMemMap", "cuMemMap", 10020),
        ("cuMemSetAccess", "cuMemSetAccess", 10020),
        ("cuStreamCreate", "cuStreamCreate", 2000),
        ("cuStreamSynchronize", "cuStreamSynchronize", 2000),
        ("cuEventRecord", "cuEventRecord", 2000),
        ("cuModuleLoadData", "cuModuleLoadData", 2000),
        ("cuLibraryLoadData", "cuLibraryLoadData", 12000),
        ("cuLaunchKernel", "cuLaunchKernel", 4000),
        ("cuGraphInstantiateWithFlags", "cuGraphInstantiateWithFlags", 11040),
        ("cuStreamBeginCapture", "cuStreamBeginCapture_v2", 10010),
    ];
    let mut differ = Vec::new();
    for (base, symbol, version) in names {
        let returned = found(base, version, 0)?;
        check!(exported(symbol) != 0, "{symbol} is not exported");
        if returned != exported(symbol) {
            differ.push(symbol);
        }
    }
    observe!("of {} addresses {} differ from the exported ones: {differ:?}", names.len(), differ.len());
    Ok(())
}

/// A function that came with a later release is neither exported nor found; one that is as old is both.
/// Source: cuda.h and cudaTypedefs.h of 12.4, 12.8 and 13.0; NVIDIA CUDA Driver API, Driver Entry Point Access.
fn what_is_newer_than_the_driver_is_not_there() -> Outcome {
    ok!(cuInit(0));
    let mut driver = 0;
    ok!(cuDriverGetVersion(&mut driver));
    for (base, symbol, version) in [
        ("cuDeviceGetDevResource", "cuDeviceGetDevResource", 12040),
        ("cuCtxCreate", "cuCtxCreate_v4", 12050),
        ("cuCtxRecordEvent", "cuCtxRecordEvent", 12050),
        ("cuStreamGetDevice", "cuStreamGetDevice", 12080),
        ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync", 12080),
        ("cuEventElapsedTime", "cuEventElapsedTime_v2", 12080),
        ("cuMemGetMemPool", "cuMemGetMemPool", 13000),
        ("cuCtxSynchronize", "cuCtxSynchronize_v2", 13000),
        ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2", 13000),
        ("cuCoredumpRegisterStartCallback", "cuCoredumpRegisterStartCallback", 13020),
    ] {
        let there = exported(symbol) != 0;
        check!(there == (version <= driver), "driver {driver}, {symbol} of {version}: exported {there}");
        let (code, address, status) = ask(base, version, 0);
        if version <= driver {
            check!(code.is_ok() && address != 0 && status == 0, "{base} at {version}: {code:?}, status {status}");
        } else if base == symbol {
            check!(address == 0, "driver {driver} finds {base} of {version}");
        } else if code.is_ok() && address != 0 {
            // What it finds is the older form.
            check!(address == found(base, driver, 0)?, "{base} at {version} and at {driver} differ");
        }
    }
    Ok(())
}

/// A version later than the driver's is refused from 13.0 on; before, the request finds what the driver has.
/// Source: cuda.h of 13.0, cuGetProcAddress; the programming guide's example for older drivers.
fn a_version_after_the_drivers_own() -> Outcome {
    ok!(cuInit(0));
    let mut driver = 0;
    ok!(cuDriverGetVersion(&mut driver));
    let (code, address, status) = ask("cuMemAlloc", driver + 10, 0);
    if driver >= 13000 {
        check!(code == Code::INVALID_VALUE, "{code:?}");
    } else {
        observe!("driver {driver}, asked for {}: {code:?}, status {status}, address {}", driver + 10, address != 0);
    }
    Ok(())
}

/// Status 2 says that the driver has the name but not for so old a version, 1 that it has no such name. Where
/// there are several forms, the version picks the newest that is not later.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access, CUdriverProcAddressQueryResult.
fn statuses_tell_old_requests_from_unknown_names() -> Outcome {
    ok!(cuInit(0));
    for (name, version, wanted) in [
        ("cuMemCreate", 9000, 2),
        ("cuMemAllocAsync", 11010, 2),
        ("cuNoSuchFunction", 12000, 1),
        ("cuMemAlloc_v2", 12000, 1),
        ("cumemalloc", 12000, 1),
    ] {
        let (code, address, status) = ask(name, version, 0);
        check!(address == 0 && status == wanted, "{name} at {version}: {code:?}, status {status}");
    }
    check!(found("cuCtxCreate", 11040, 0)? != found("cuCtxCreate", 3020, 0)?, "two forms of cuCtxCreate are one");
    check!(found("cuCtxCreate", 12000, 0)? == found("cuCtxCreate", 11040, 0)?, "cuCtxCreate changed between 11.4 and 12.0");
    Ok(())
}

/// Flags are 0, 1 or 2. The status may be left out.
/// Source: NVIDIA CUDA Driver API, CUdriverProcAddress_flags.
fn flags_have_no_other_values() -> Outcome {
    ok!(cuInit(0));
    for flags in [4, 0x80, 1 << 40] {
        is!(ask("cuMemAlloc", 12000, flags).0, INVALID_VALUE);
    }
    observe!("flags 3: {:?}", ask("cuMemAlloc", 12000, 3).0);
    let mut address = 0;
    ok!(cuGetProcAddress_v2(c"cuMemAlloc".as_ptr(), &mut address, 12000, 0, None));
    check!(address == found("cuMemAlloc", 12000, 0)?, "with and without a status");
    Ok(())
}

/// A null name is refused; unknown flags are reported.
/// Source: NVIDIA CUDA Driver API, Driver Entry Point Access (returned codes).
fn nonsense_is_refused() -> Outcome {
    ok!(cuInit(0));
    let mut address = 0;
    // A null name crashes driver 580. A name that there is not:
    observe!("no such name: {:?}", cuGetProcAddress_v2(c"cuNothing".as_ptr(), &mut address, 12000, 0, None));
    check!(address == 0 || address == usize::MAX, "address {address:x}");
    observe!("flags 0x100: {:?}", ask("cuMemAlloc", 12000, 0x100).0);
    observe!("version 0: {:?}", ask("cuMemAlloc", 0, 0));
    observe!("version 99000: {:?}", ask("cuMemAlloc", 99_000, 0).0);
    Ok(())
}
