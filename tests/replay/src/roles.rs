//! What each argument of each call means to the player. A call that is not here is left out, by name.
//!
//! One word per argument:
//!
//! | word | meaning |
//! | --- | --- |
//! | `n` | a number, as recorded |
//! | `0`, `1` | that number, whatever was recorded |
//! | `h` | a handle of the trace |
//! | `d` | an address of device memory |
//! | `p` | an address of device or host memory |
//! | `H` | an address of host memory that was allocated or registered with the driver |
//! | `src:I`, `dst:I` | host memory that is read, written; argument I is its size |
//! | `psrc:I`, `pdst:I` | the same, of device or host memory |
//! | `>h` | a new handle |
//! | `>d:I` | a new address; argument I is its size |
//! | `>H:I` | the same, of host memory |
//! | `>a:I` | another address, for the device, of the host memory of argument I |
//! | `reg:I` | host memory that becomes registered; argument I is its size |
//! | `>t` | a number that the program is told, and that is compared |
//! | `>f` | the same, of memory that is free: compared within [`FREE_WITHIN`](crate::compare) |
//! | `>b:I`, `>b16` | bytes that the program is told; argument I is how many |
//! | `>v:I` | an attribute of the address of argument I, argument 1 is which |
//! | `>r:I` | an address that is told; compared by its distance from the address of argument I |
//! | `>-` | a result that is not compared |
//! | `io` | four bytes, read and written |
//! | `blk` | a structure without handles and addresses, as recorded |
//! | `ptx`, `len` | an image of code: the simulator's own kernels; its size |
//! | `fn` | the name of a kernel: one of those |
//! | `params` | parameters of a kernel: of that one |
//! | `cb` | a function of the program: one that does nothing |

/// Calls that are played by another one, with its arguments, where they differ in what only the program has.
const AS_ANOTHER: &[(&str, &str)] = &[
    ("cuModuleLoad", "cuModuleLoadData"),
    ("cuModuleLoadFatBinary", "cuModuleLoadData"),
    ("cuLinkAddData", "cuLinkAddData_v2"),
    ("cuLibraryLoadFromFile", "cuLibraryLoadData"),
];

/// The table: names with the same roles share a line.
const ROLES: &[(&str, &str)] = &[
    // Start, devices.
    ("cuInit", "n"),
    (
        "cuDriverGetVersion cuDeviceGetCount cuCtxGetFlags cuCtxGetDevice cuModuleGetLoadingMode cuCtxGetCacheConfig",
        ">t",
    ),
    ("cuDeviceGet cuDeviceTotalMem_v2 cuCtxGetLimit", ">t n"),
    ("cuDeviceGetAttribute cuDeviceCanAccessPeer", ">t n n"),
    ("cuDeviceComputeCapability", ">t >t n"),
    ("cuDeviceGetP2PAttribute", ">t n n n"),
    ("cuDeviceGetName cuDeviceGetPCIBusId", ">b:1 n n"),
    ("cuDeviceGetUuid cuDeviceGetUuid_v2", ">b16 n"),
    // Contexts.
    (
        "cuDevicePrimaryCtxRetain cuDeviceGetDefaultMemPool cuDeviceGetMemPool cuStreamCreate cuEventCreate cuGraphCreate",
        ">h n",
    ),
    (
        "cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxReset cuDevicePrimaryCtxReset_v2 cuDeviceGraphMemTrim cuCtxSetCacheConfig",
        "n",
    ),
    (
        "cuDevicePrimaryCtxSetFlags cuDevicePrimaryCtxSetFlags_v2 cuCtxSetLimit",
        "n n",
    ),
    ("cuDevicePrimaryCtxGetState", "n >t >t"),
    ("cuCtxCreate_v2", ">h n n"),
    ("cuCtxCreate_v3", ">h 0 0 n n"),
    ("cuCtxCreate_v4", ">h 0 n n"),
    ("cuCtxGetCurrent cuCtxPopCurrent_v2", ">h"),
    (
        "cuCtxDestroy_v2 cuCtxSetCurrent cuCtxPushCurrent_v2 cuCtxDisablePeerAccess cuCtxSynchronize_v2",
        "h",
    ),
    ("cuCtxEnablePeerAccess", "h n"),
    ("cuCtxGetApiVersion", "h >t"),
    ("cuCtxGetId", "h >-"),
    ("cuCtxSynchronize", ""),
    ("cuCtxGetStreamPriorityRange", ">t >t"),
    // Memory.
    ("cuMemGetInfo_v2", ">f >t"),
    ("cuMemAlloc_v2", ">d:1 n"),
    ("cuMemAllocPitch_v2", ">d:2 >t n n n"),
    ("cuMemAllocManaged", ">d:1 n n"),
    ("cuMemAllocAsync cuMemAllocAsync_ptsz", ">d:1 n h"),
    (
        "cuMemAllocFromPoolAsync cuMemAllocFromPoolAsync_ptsz",
        ">d:1 n h h",
    ),
    ("cuMemFree_v2", "d"),
    ("cuMemFreeAsync cuMemFreeAsync_ptsz", "d h"),
    ("cuMemGetAddressRange_v2", ">r:2 >t d"),
    ("cuPointerGetAttribute", ">v:2 n p"),
    ("cuMemHostAlloc", ">H:1 n n"),
    ("cuMemAllocHost_v2", ">H:1 n"),
    ("cuMemFreeHost cuMemHostUnregister", "H"),
    ("cuMemHostRegister_v2", "reg:1 n n"),
    ("cuMemHostGetDevicePointer_v2", ">a:1 H n"),
    ("cuMemHostGetFlags", ">t H"),
    ("cuMemAdvise", "d n n n"),
    ("cuMemAdvise_v2", "d n n n"),
    ("cuMemPrefetchAsync cuMemPrefetchAsync_ptsz", "d n n h"),
    (
        "cuMemPrefetchAsync_v2 cuMemPrefetchAsync_v2_ptsz",
        "d n n n h",
    ),
    (
        "cuStreamAttachMemAsync cuStreamAttachMemAsync_ptsz",
        "h d n n",
    ),
    // Pools.
    ("cuDeviceSetMemPool", "n h"),
    ("cuMemPoolCreate", ">h blk"),
    ("cuMemPoolSetAttribute", "h n blk"),
    ("cuMemPoolGetAttribute", "h n >-"),
    ("cuMemPoolTrimTo", "h n"),
    ("cuMemPoolSetAccess", "h blk n"),
    // Mapped memory.
    ("cuMemGetAllocationGranularity", ">t blk n"),
    ("cuMemAddressReserve", ">d:1 n n 0 n"),
    ("cuMemAddressFree cuMemUnmap", "d n"),
    ("cuMemCreate", ">h n blk n"),
    ("cuMemMap", "d n n h n"),
    ("cuMemSetAccess", "d n blk n"),
    ("cuMemRetainAllocationHandle", ">h d"),
    // Copies.
    ("cuMemcpyHtoD_v2 cuMemcpyHtoD_v2_ptds", "d src:2 n"),
    (
        "cuMemcpyHtoDAsync_v2 cuMemcpyHtoDAsync_v2_ptsz",
        "d src:2 n h",
    ),
    ("cuMemcpyDtoH_v2 cuMemcpyDtoH_v2_ptds", "dst:2 d n"),
    (
        "cuMemcpyDtoHAsync_v2 cuMemcpyDtoHAsync_v2_ptsz",
        "dst:2 d n h",
    ),
    ("cuMemcpyDtoD_v2 cuMemcpyDtoD_v2_ptds", "d d n"),
    ("cuMemcpyDtoDAsync_v2 cuMemcpyDtoDAsync_v2_ptsz", "d d n h"),
    ("cuMemcpy cuMemcpy_ptds", "pdst:2 psrc:2 n"),
    ("cuMemcpyAsync cuMemcpyAsync_ptsz", "pdst:2 psrc:2 n h"),
    ("cuMemcpyPeer", "d h d h n"),
    ("cuMemcpyPeerAsync cuMemcpyPeerAsync_ptsz", "d h d h n h"),
    (
        "cuMemsetD8_v2 cuMemsetD8_v2_ptds cuMemsetD16_v2 cuMemsetD16_v2_ptds cuMemsetD32_v2 cuMemsetD32_v2_ptds",
        "d n n",
    ),
    (
        "cuMemsetD8Async cuMemsetD8Async_ptsz cuMemsetD16Async cuMemsetD16Async_ptsz cuMemsetD32Async cuMemsetD32Async_ptsz",
        "d n n h",
    ),
    (
        "cuMemsetD2D8_v2 cuMemsetD2D16_v2 cuMemsetD2D32_v2",
        "d n n n n",
    ),
    (
        "cuMemsetD2D8Async cuMemsetD2D16Async cuMemsetD2D32Async",
        "d n n n n h",
    ),
    // Streams and events.
    ("cuStreamCreateWithPriority", ">h n n"),
    (
        "cuStreamDestroy_v2 cuStreamSynchronize cuStreamSynchronize_ptsz cuStreamQuery cuStreamQuery_ptsz cuEventSynchronize cuEventQuery cuEventDestroy_v2",
        "h",
    ),
    (
        "cuStreamWaitEvent cuStreamWaitEvent_ptsz cuEventRecordWithFlags cuEventRecordWithFlags_ptsz",
        "h h n",
    ),
    (
        "cuStreamGetFlags cuStreamGetFlags_ptsz cuStreamGetPriority cuStreamGetPriority_ptsz cuStreamIsCapturing cuStreamIsCapturing_ptsz cuStreamGetDevice cuStreamGetDevice_ptsz",
        "h >t",
    ),
    ("cuStreamGetId cuStreamGetId_ptsz", "h >-"),
    ("cuStreamGetCtx cuStreamGetCtx_ptsz", "h >h"),
    (
        "cuStreamGetCaptureInfo_v2 cuStreamGetCaptureInfo_v2_ptsz",
        "h >t >- 0 0 0",
    ),
    (
        "cuStreamGetCaptureInfo_v3 cuStreamGetCaptureInfo_v3_ptsz",
        "h >t >- 0 0 0 0",
    ),
    ("cuEventRecord cuEventRecord_ptsz", "h h"),
    ("cuEventElapsedTime cuEventElapsedTime_v2", ">- h h"),
    ("cuLaunchHostFunc cuLaunchHostFunc_ptsz", "h cb 0"),
    ("cuStreamAddCallback cuStreamAddCallback_ptsz", "h cb 0 n"),
    // Code.
    ("cuModuleLoadData", ">h ptx"),
    ("cuModuleLoadDataEx", ">h ptx 0 0 0"),
    (
        "cuModuleUnload cuLibraryUnload cuMemRelease cuMemPoolDestroy cuLinkDestroy cuFuncLoad",
        "h",
    ),
    ("cuModuleGetFunction cuLibraryGetKernel", ">h h fn"),
    ("cuLibraryLoadData", ">h ptx 0 0 0 0 0 0"),
    (
        "cuLibraryGetModule cuKernelGetFunction cuFuncGetModule cuKernelGetLibrary",
        ">h h",
    ),
    ("cuFuncGetAttribute", ">- n h"),
    ("cuKernelGetAttribute", ">- n h n"),
    ("cuFuncIsLoaded", ">- h"),
    ("cuFuncSetCacheConfig", "h n"),
    ("cuOccupancyMaxActiveBlocksPerMultiprocessor", ">- h n n"),
    (
        "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
        ">- h n n n",
    ),
    ("cuOccupancyMaxPotentialBlockSize", ">- >- h 0 n n"),
    ("cuLinkCreate_v2", "0 0 0 >h"),
    ("cuLinkAddData_v2", "h 1 ptx len 0 0 0 0"),
    ("cuLinkComplete", "h >- >-"),
    (
        "cuLaunchKernel cuLaunchKernel_ptsz",
        "h n n n n n n 0 h params 0",
    ),
    (
        "cuLaunchCooperativeKernel cuLaunchCooperativeKernel_ptsz",
        "h n n n n n n 0 h params",
    ),
    ("cuGetErrorName cuGetErrorString", "n >-"),
    // Graphs.
    (
        "cuStreamBeginCapture_v2 cuStreamBeginCapture_v2_ptsz",
        "h n",
    ),
    ("cuStreamEndCapture cuStreamEndCapture_ptsz", "h >h"),
    ("cuThreadExchangeStreamCaptureMode", "io"),
    ("cuGraphInstantiateWithFlags", ">h h n"),
    ("cuGraphInstantiate_v2", ">h h 0 0 0"),
    ("cuGraphClone", ">h h"),
    (
        "cuGraphLaunch cuGraphLaunch_ptsz cuGraphUpload cuGraphUpload_ptsz",
        "h h",
    ),
    ("cuGraphExecDestroy cuGraphDestroy", "h"),
    ("cuGraphGetNodes", "h 0 >t"),
    ("cuGraphExecGetFlags", "h >t"),
    ("cuDeviceGetGraphMemAttribute", "n n >-"),
    // Arrays.
    ("cuArrayCreate_v2 cuArray3DCreate_v2", ">h blk"),
    ("cuArrayDestroy", "h"),
    ("cuMemcpyHtoA_v2", "h n src:3 n"),
    ("cuMemcpyAtoH_v2", "dst:3 h n n"),
];

/// A role, and the number after its colon.
pub type Role = (&'static str, usize);

/// How a recorded call is played: by which entry point, and what its arguments are. `None`: it is left out.
#[must_use]
pub fn find(name: &str) -> Option<(&'static str, Vec<Role>)> {
    let other = AS_ANOTHER.iter().find(|(from, _)| *from == name);
    let name = other.map_or(name, |(_, to)| to);
    ROLES.iter().find_map(|(names, roles)| {
        let name = names.split(' ').find(|one| *one == name)?;
        let roles = roles
            .split_whitespace()
            .map(|word| match word.split_once(':') {
                Some((role, index)) => (role, index.parse().unwrap_or(0)),
                None => (word, 0),
            });
        Some((name, roles.collect()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_name_has_one_line_and_known_roles() {
        const KNOWN: &str = "n 0 1 h d p H src dst psrc pdst >h >d >H >a reg >t >f >b >b16 >v >r >- io blk ptx \
                             len fn params cb";
        let mut names = BTreeSet::new();
        for (line, _) in ROLES {
            for name in line.split(' ') {
                assert!(names.insert(name), "{name} twice");
                let (_, roles) = find(name).expect(name);
                for (role, index) in &roles {
                    assert!(
                        KNOWN.split_whitespace().any(|known| known == *role),
                        "{name}: {role}"
                    );
                    assert!(*index < roles.len(), "{name}: {role}:{index}");
                }
            }
        }
        for (from, to) in AS_ANOTHER {
            assert!(!names.contains(from) && names.contains(to), "{from}");
        }
    }

    /// A call whose arguments are counted wrong here would be left out.
    #[test]
    fn arguments_are_as_many_as_in_the_librarys_table() {
        const ROWS: &str = include_str!("../../../interposer/core/src/table/rows.rs");
        let mut count = 0;
        for line in ROWS.lines() {
            let Some((before, _)) = line.split_once(" = ") else {
                continue;
            };
            let name = before.rsplit(' ').next().unwrap_or_default();
            let Some((_, roles)) = find(name) else {
                continue;
            };
            // Argument by argument: name, colon, type.
            let arguments = line.rsplit_once('(').map_or("", |(_, arguments)| arguments);
            assert_eq!(arguments.matches(": ").count(), roles.len(), "{name}");
            count += 1;
        }
        assert!(count > 180, "{count} of the table's names were found");
    }
}
