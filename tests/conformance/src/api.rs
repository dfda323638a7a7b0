//! The driver's public functions, found by name in `libcuda.so.1` and `libnvidia-ml.so.1` when first called.
//!
//! Signatures are written from the headers' documentation with plain integers for enums and handles: what a
//! driver returns is never put into a closed enum. A function that the driver does not export answers
//! [`Code::ABSENT`].
//!
//! The functions are safe to name but pass on whatever addresses they are given: this program exists to hand a
//! driver right and wrong arguments, each case in a process of its own, so a crash is a failed case.
#![allow(non_snake_case)]
// The table is the driver's, not the cases': a name may wait for its case.
#![allow(dead_code)]
// The driver decides how many arguments its functions have.
#![allow(clippy::too_many_arguments)]

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

/// A device address.
pub type Dptr = u64;
/// Any object of the driver: context, stream, event, module, function, graph, pool. Zero is null.
pub type Handle = usize;
/// A memory handle of `cuMemCreate`.
pub type MemHandle = u64;

/// What a driver function returned: any number, known to us or not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code(pub i32);

macro_rules! codes {
    ($($name:ident = $value:literal;)*) => {
        impl Code {
            $(pub const $name: Code = Code($value);)*
        }
        impl fmt::Debug for Code {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    $($value => f.write_str(concat!(stringify!($name), "(", stringify!($value), ")")),)*
                    other => write!(f, "{other}"),
                }
            }
        }
    };
}

codes! {
    ABSENT = -1;
    SUCCESS = 0;
    INVALID_VALUE = 1;
    OUT_OF_MEMORY = 2;
    NOT_INITIALIZED = 3;
    NO_DEVICE = 100;
    INVALID_DEVICE = 101;
    INVALID_IMAGE = 200;
    INVALID_CONTEXT = 201;
    UNSUPPORTED_LIMIT = 215;
    INVALID_PTX = 218;
    UNSUPPORTED_PTX_VERSION = 222;
    INVALID_HANDLE = 400;
    ILLEGAL_STATE = 401;
    NOT_FOUND = 500;
    NOT_READY = 600;
    ILLEGAL_ADDRESS = 700;
    PEER_ACCESS_ALREADY_ENABLED = 704;
    PEER_ACCESS_NOT_ENABLED = 705;
    CONTEXT_IS_DESTROYED = 709;
    HOST_MEMORY_ALREADY_REGISTERED = 712;
    HOST_MEMORY_NOT_REGISTERED = 713;
    NOT_PERMITTED = 800;
    NOT_SUPPORTED = 801;
    STREAM_CAPTURE_UNSUPPORTED = 900;
    STREAM_CAPTURE_INVALIDATED = 901;
    STREAM_CAPTURE_MERGE = 902;
    STREAM_CAPTURE_UNMATCHED = 903;
    STREAM_CAPTURE_UNJOINED = 904;
    STREAM_CAPTURE_ISOLATION = 905;
    STREAM_CAPTURE_IMPLICIT = 906;
    CAPTURED_EVENT = 907;
    STREAM_CAPTURE_WRONG_THREAD = 908;
    INVALID_RESOURCE_TYPE = 914;
    INVALID_RESOURCE_CONFIGURATION = 915;
}

impl Code {
    pub fn is_ok(self) -> bool {
        self.0 == 0
    }
}

/// A library opened once for the life of the process.
struct Library {
    handle: usize,
}

impl Library {
    fn open(name: &CStr) -> Library {
        // SAFETY: `name` is a C string; the library stays open for the life of the process.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        Library {
            handle: handle as usize,
        }
    }

    fn symbol(&self, name: &CStr) -> *mut c_void {
        if self.handle == 0 {
            return std::ptr::null_mut();
        }
        // SAFETY: the handle came from dlopen and is never closed; `name` is a C string.
        unsafe { libc::dlsym(self.handle as *mut c_void, name.as_ptr()) }
    }
}

fn cuda() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| Library::open(c"libcuda.so.1"))
}

fn nvml() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| Library::open(c"libnvidia-ml.so.1"))
}

/// Whether `libcuda.so.1` could be opened at all.
pub fn driver_found() -> bool {
    cuda().handle != 0
}

/// Whether `libnvidia-ml.so.1` could be opened at all.
pub fn nvml_found() -> bool {
    nvml().handle != 0
}

/// Where the file that answers for the driver lies, to say what was tested.
pub fn driver_path() -> Option<String> {
    let symbol = exported("cuInit");
    if symbol == 0 {
        return None;
    }
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: `symbol` is an address in a loaded library and `info` is ours to fill.
    let found = unsafe { libc::dladdr(symbol as *const c_void, &raw mut info) };
    if found == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr gave a C string that lives as long as the library, which is never closed.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(name.to_string_lossy().into_owned())
}

/// The address that the driver library exports under `name`, or 0.
pub fn exported(name: &str) -> usize {
    let name = std::ffi::CString::new(name).unwrap_or_default();
    cuda().symbol(&name) as usize
}

fn find(slot: &AtomicPtr<c_void>, library: &Library, name: &'static str) -> *mut c_void {
    let known = slot.load(Relaxed);
    if !known.is_null() {
        return known;
    }
    let name = CStr::from_bytes_with_nul(name.as_bytes()).unwrap_or(c"");
    let found = library.symbol(name);
    slot.store(found, Relaxed);
    found
}

macro_rules! functions {
    ($library:ident: $($name:ident($($arg:ident: $ty:ty),* $(,)?);)*) => {$(
        pub fn $name($($arg: $ty),*) -> Code {
            static SLOT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
            let address = find(&SLOT, $library(), concat!(stringify!($name), "\0"));
            if address.is_null() {
                return Code::ABSENT;
            }
            // SAFETY: the exported function of this name has this C signature; references are valid for the
            // call, and what else is passed is the case's business (see the module's doc).
            unsafe {
                let function: unsafe extern "C" fn($($ty),*) -> i32 = std::mem::transmute(address);
                Code(function($($arg),*))
            }
        }
    )*};
}

/// Calls a kernel-launch function by its address, for addresses that `cuGetProcAddress` returned.
pub fn call_launch(address: usize, launch: &Launch) -> Code {
    type Function = unsafe extern "C" fn(
        Handle,
        u32,
        u32,
        u32,
        u32,
        u32,
        u32,
        u32,
        Handle,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> i32;
    // SAFETY: the driver gave this address for `cuLaunchKernel`; the parameters live in `launch`.
    unsafe {
        let function: Function = std::mem::transmute(address);
        let (g, b) = (launch.grid, launch.block);
        Code(function(
            launch.function,
            g.0,
            g.1,
            g.2,
            b.0,
            b.1,
            b.2,
            launch.shared_bytes,
            launch.stream,
            launch.params,
            launch.extra,
        ))
    }
}

/// Calls a function of the shape `f(*mut u64, usize)` by its address (`cuMemAlloc`).
pub fn call_alloc(address: usize, out: &mut Dptr, bytes: usize) -> Code {
    // SAFETY: the driver gave this address for `cuMemAlloc` at version 3020.
    unsafe {
        let function: unsafe extern "C" fn(&mut Dptr, usize) -> i32 = std::mem::transmute(address);
        Code(function(out, bytes))
    }
}

/// Calls a function of the shape `f(handle)` by its address (`cuStreamQuery` and the like).
pub fn call_handle(address: usize, handle: Handle) -> Code {
    // SAFETY: the driver gave this address for a function of one handle.
    unsafe {
        let function: unsafe extern "C" fn(Handle) -> i32 = std::mem::transmute(address);
        Code(function(handle))
    }
}

/// The arguments of one launch.
#[derive(Clone, Copy)]
pub struct Launch {
    pub function: Handle,
    pub grid: (u32, u32, u32),
    pub block: (u32, u32, u32),
    pub shared_bytes: u32,
    pub stream: Handle,
    pub params: *mut *mut c_void,
    pub extra: *mut *mut c_void,
}

pub type HostFn = extern "C" fn(*mut c_void);
pub type StreamCallback = extern "C" fn(Handle, i32, *mut c_void);

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Location {
    pub kind: i32,
    pub id: i32,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllocationProp {
    pub kind: i32,
    pub handle_types: i32,
    pub location: Location,
    pub win32: usize,
    pub compression: u8,
    pub rdma_capable: u8,
    pub usage: u16,
    pub reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccessDesc {
    pub location: Location,
    pub flags: i32,
}

/// `CUmemPoolProps`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PoolProps {
    pub kind: i32,
    pub handle_types: i32,
    pub location: Location,
    pub win32: usize,
    pub max_bytes: usize,
    pub usage: u16,
    pub reserved: [[u8; 27]; 2],
}

/// `CUdevResource`, of type SM.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevResource {
    pub kind: u32,
    pub internal: [u8; 92],
    pub count: u32,
    pub rest: [u32; 11],
}

impl Default for DevResource {
    fn default() -> Self {
        Self {
            kind: 0,
            internal: [0; 92],
            count: 0,
            rest: [0; 11],
        }
    }
}

/// `CUDA_ARRAY_DESCRIPTOR` of before 3.2.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct OldArray {
    pub width: u32,
    pub height: u32,
    pub format: u32,
    pub channels: u32,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Copy2d {
    pub src_x_bytes: usize,
    pub src_y: usize,
    pub src_kind: i32,
    pub src_host: usize,
    pub src_device: Dptr,
    pub src_array: Handle,
    pub src_pitch: usize,
    pub dst_x_bytes: usize,
    pub dst_y: usize,
    pub dst_kind: i32,
    pub dst_host: usize,
    pub dst_device: Dptr,
    pub dst_array: Handle,
    pub dst_pitch: usize,
    pub width_bytes: usize,
    pub height: usize,
}

/// `CUDA_MEMCPY3D`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Copy3d {
    pub src_x_bytes: usize,
    pub src_y: usize,
    pub src_z: usize,
    pub src_lod: usize,
    pub src_kind: i32,
    pub src_host: usize,
    pub src_device: Dptr,
    pub src_array: Handle,
    pub reserved0: usize,
    pub src_pitch: usize,
    pub src_height: usize,
    pub dst_x_bytes: usize,
    pub dst_y: usize,
    pub dst_z: usize,
    pub dst_lod: usize,
    pub dst_kind: i32,
    pub dst_host: usize,
    pub dst_device: Dptr,
    pub dst_array: Handle,
    pub reserved1: usize,
    pub dst_pitch: usize,
    pub dst_height: usize,
    pub width_bytes: usize,
    pub height: usize,
    pub depth: usize,
}

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LaunchConfig {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub stream: Handle,
    pub attributes: usize,
    pub attribute_count: u32,
}

/// `CUDA_KERNEL_NODE_PARAMS` (the `_v2` layout).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KernelNodeParams {
    pub function: Handle,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub params: *mut *mut c_void,
    pub extra: *mut *mut c_void,
    pub kernel: Handle,
    pub context: Handle,
}

/// `CUDA_MEM_ALLOC_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AllocNodeParams {
    pub pool: PoolProps,
    pub access: usize,
    pub access_count: usize,
    pub bytes: usize,
    pub address: Dptr,
}

/// `CUDA_MEMSET_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MemsetNodeParams {
    pub address: Dptr,
    pub pitch: usize,
    pub value: u32,
    pub element: u32,
    pub width: usize,
    pub height: usize,
}

/// `CUgraphNodeParams`: the kind, then the kind's own structure.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NodeParams {
    pub kind: i32,
    pub reserved: [i32; 3],
    pub rest: [u64; 30],
}

/// `CUDA_ARRAY_DESCRIPTOR`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FlatShape {
    pub width: usize,
    pub height: usize,
    pub format: u32,
    pub channels: u32,
}

/// `CUDA_ARRAY3D_DESCRIPTOR`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArrayShape {
    pub width: usize,
    pub height: usize,
    pub depth: usize,
    pub format: u32,
    pub channels: u32,
    pub flags: u32,
}

/// `CUDA_ARRAY_MEMORY_REQUIREMENTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MemoryRequirements {
    pub bytes: usize,
    pub alignment: usize,
    pub reserved: [u32; 4],
}

/// `CUDA_ARRAY_SPARSE_PROPERTIES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SparseProperties {
    pub tile: [u32; 3],
    pub tail_first: u32,
    pub tail_bytes: u64,
    pub flags: u32,
    pub reserved: [u32; 4],
}

/// `CUarrayMapInfo`, for a range of a level.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ArrayMapping {
    pub kind: i32,
    pub resource: Handle,
    pub part_kind: i32,
    /// Eight bytes from here on are aligned.
    pub padding: i32,
    pub level: u32,
    pub layer: u32,
    pub at: [u32; 3],
    pub extent: [u32; 3],
    pub operation: i32,
    pub handle_kind: i32,
    pub memory: MemHandle,
    pub offset: u64,
    pub devices: u32,
    pub flags: u32,
    pub reserved: [u32; 2],
}

/// `CUDA_EXTERNAL_MEMORY_HANDLE_DESC`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ExternalMemory {
    pub kind: i32,
    /// The first member of a union of 16 bytes.
    pub fd: i64,
    pub handle_rest: u64,
    pub bytes: u64,
    pub flags: u32,
    pub reserved: [u32; 16],
}

/// `CUDA_EXTERNAL_MEMORY_BUFFER_DESC`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ExternalBuffer {
    pub offset: u64,
    pub bytes: u64,
    pub flags: u32,
    pub reserved: [u32; 16],
}

/// `CUmulticastObjectProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MulticastProp {
    pub devices: u32,
    pub bytes: usize,
    pub handle_types: u64,
    pub flags: u64,
}

/// `CUmemPoolPtrExportData`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PoolPointer(pub [u8; 64]);

/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcHandle(pub [u8; 64]);

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct NvmlMemory {
    pub total: u64,
    pub free: u64,
    pub used: u64,
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct NvmlMemoryV2 {
    pub version: u32,
    pub total: u64,
    pub reserved: u64,
    pub free: u64,
    pub used: u64,
}

/// `nvmlProcessInfo_t` (the layout of `_v2` and `_v3`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct NvmlProcess {
    pub pid: u32,
    pub used_bytes: u64,
    pub gpu_instance: u32,
    pub compute_instance: u32,
}

functions! { cuda:
    cuInit(flags: u32);
    cuDriverGetVersion(version: &mut i32);
    cuDeviceGet(device: &mut i32, ordinal: i32);
    cuDeviceGetCount(count: &mut i32);
    cuDeviceGetName(name: *mut c_char, bytes: i32, device: i32);
    cuDeviceTotalMem_v2(bytes: &mut usize, device: i32);
    cuDeviceGetAttribute(value: &mut i32, attribute: i32, device: i32);
    cuDeviceGetUuid(uuid: &mut [u8; 16], device: i32);
    cuDeviceGetUuid_v2(uuid: &mut [u8; 16], device: i32);
    cuDeviceGetPCIBusId(text: *mut c_char, bytes: i32, device: i32);
    cuDeviceGetByPCIBusId(device: &mut i32, text: *const c_char);
    cuDeviceGetDefaultMemPool(pool: &mut Handle, device: i32);
    cuDeviceGetMemPool(pool: &mut Handle, device: i32);
    cuDeviceSetMemPool(device: i32, pool: Handle);
    cuDeviceGetGraphMemAttribute(device: i32, attribute: i32, value: &mut u64);
    cuDeviceSetGraphMemAttribute(device: i32, attribute: i32, value: &u64);
    cuDeviceGraphMemTrim(device: i32);
    cuDeviceCanAccessPeer(can: &mut i32, device: i32, peer: i32);
    cuDevicePrimaryCtxRetain(context: &mut Handle, device: i32);
    cuDevicePrimaryCtxRelease_v2(device: i32);
    cuDevicePrimaryCtxReset_v2(device: i32);
    cuDevicePrimaryCtxReset(device: i32);
    cuDevicePrimaryCtxSetFlags_v2(device: i32, flags: u32);
    cuDevicePrimaryCtxGetState(device: i32, flags: &mut u32, active: &mut i32);
    cuGetErrorName(code: i32, text: &mut *const c_char);
    cuGetErrorString(code: i32, text: &mut *const c_char);
    cuGetProcAddress(symbol: *const c_char, address: &mut usize, version: i32, flags: u64);
    cuGetProcAddress_v2(symbol: *const c_char, address: &mut usize, version: i32, flags: u64, status: Option<&mut i32>);

    cuCtxCreate(context: &mut Handle, flags: u32, device: i32);
    cuCtxCreate_v2(context: &mut Handle, flags: u32, device: i32);
    cuCtxDestroy_v2(context: Handle);
    cuCtxGetCurrent(context: &mut Handle);
    cuCtxSetCurrent(context: Handle);
    cuCtxPushCurrent_v2(context: Handle);
    cuCtxPopCurrent_v2(context: Option<&mut Handle>);
    cuCtxGetDevice(device: &mut i32);
    cuCtxGetFlags(flags: &mut u32);
    cuCtxGetId(context: Handle, id: &mut u64);
    cuCtxGetApiVersion(context: Handle, version: &mut u32);
    cuCtxGetLimit(value: &mut usize, limit: i32);
    cuCtxSetLimit(limit: i32, value: usize);
    cuCtxGetStreamPriorityRange(least: &mut i32, greatest: &mut i32);
    cuCtxSynchronize();
    cuCtxEnablePeerAccess(peer: Handle, flags: u32);
    cuCtxDisablePeerAccess(peer: Handle);

    cuMemGetInfo(free: &mut u32, total: &mut u32);
    cuMemAlloc(address: &mut u32, bytes: u32);
    cuMemAllocPitch(address: &mut u32, pitch: &mut u32, width: u32, height: u32, element: u32);
    cuMemFree(address: u32);
    cuMemGetAddressRange(base: &mut u32, size: &mut u32, address: u32);
    cuMemcpyHtoD(dst: u32, src: *const u8, bytes: u32);
    cuMemcpyDtoH(dst: *mut u8, src: u32, bytes: u32);
    cuMemcpyDtoD(dst: u32, src: u32, bytes: u32);
    cuMemsetD8(dst: u32, value: u8, count: u32);
    cuArrayCreate(array: &mut Handle, shape: &OldArray);

    cuDeviceGetDevResource(device: i32, resource: &mut DevResource, kind: u32);
    cuCtxGetDevResource(context: Handle, resource: &mut DevResource, kind: u32);
    cuGreenCtxGetDevResource(green: Handle, resource: &mut DevResource, kind: u32);
    cuDevSmResourceSplitByCount(result: *mut DevResource, groups: &mut u32, from: &DevResource, rest: *mut DevResource, flags: u32, least: u32);
    cuDevResourceGenerateDesc(description: &mut Handle, resources: *const DevResource, count: u32);
    cuGreenCtxCreate(green: &mut Handle, description: Handle, device: i32, flags: u32);
    cuGreenCtxDestroy(green: Handle);
    cuCtxFromGreenCtx(context: &mut Handle, green: Handle);
    cuGreenCtxRecordEvent(green: Handle, event: Handle);
    cuGreenCtxWaitEvent(green: Handle, event: Handle);
    cuGreenCtxStreamCreate(stream: &mut Handle, green: Handle, flags: u32, priority: i32);
    cuStreamGetGreenCtx(stream: Handle, green: &mut Handle);
    cuStreamGetCtx_v2(stream: Handle, context: &mut Handle, green: &mut Handle);

    cuMemGetInfo_v2(free: &mut usize, total: &mut usize);
    cuMemAlloc_v2(address: Option<&mut Dptr>, bytes: usize);
    cuMemAllocPitch_v2(address: &mut Dptr, pitch: &mut usize, width: usize, height: usize, element: u32);
    cuMemFree_v2(address: Dptr);
    cuMemGetAddressRange_v2(base: Option<&mut Dptr>, bytes: Option<&mut usize>, address: Dptr);
    cuMemAllocManaged(address: &mut Dptr, bytes: usize, flags: u32);
    cuMemPrefetchAsync(address: Dptr, bytes: usize, device: i32, stream: Handle);
    cuMemPrefetchAsync_v2(address: Dptr, bytes: usize, location: Location, flags: u32, stream: Handle);
    cuMemAdvise(address: Dptr, bytes: usize, advice: i32, device: i32);
    cuMemAdvise_v2(address: Dptr, bytes: usize, advice: i32, location: Location);
    cuMemRangeGetAttribute(value: *mut c_void, value_bytes: usize, attribute: i32, address: Dptr, bytes: usize);
    cuMemRangeGetAttributes(values: *mut *mut c_void, value_bytes: *mut usize, attributes: *mut i32, n: usize,
        address: Dptr, bytes: usize);
    cuMemAllocHost_v2(address: &mut usize, bytes: usize);
    cuMemFreeHost(address: usize);
    cuMemHostAlloc(address: &mut usize, bytes: usize, flags: u32);
    cuMemHostGetDevicePointer_v2(address: &mut Dptr, host: usize, flags: u32);
    cuMemHostGetFlags(flags: &mut u32, host: usize);
    cuMemHostRegister_v2(address: usize, bytes: usize, flags: u32);
    cuMemHostUnregister(address: usize);

    cuMemcpy(dst: Dptr, src: Dptr, bytes: usize);
    cuMemcpyAsync(dst: Dptr, src: Dptr, bytes: usize, stream: Handle);
    cuMemcpyHtoD_v2(dst: Dptr, src: *const u8, bytes: usize);
    cuMemcpyDtoH_v2(dst: *mut u8, src: Dptr, bytes: usize);
    cuMemcpyDtoD_v2(dst: Dptr, src: Dptr, bytes: usize);
    cuMemcpyHtoDAsync_v2(dst: Dptr, src: *const u8, bytes: usize, stream: Handle);
    cuMemcpyDtoHAsync_v2(dst: *mut u8, src: Dptr, bytes: usize, stream: Handle);
    cuMemcpyDtoDAsync_v2(dst: Dptr, src: Dptr, bytes: usize, stream: Handle);
    cuMemcpyPeer(dst: Dptr, dst_context: Handle, src: Dptr, src_context: Handle, bytes: usize);
    cuMemcpy2D_v2(copy: &Copy2d);
    cuMemcpy2DUnaligned_v2(copy: &Copy2d);
    cuMemcpy2DAsync_v2(copy: &Copy2d, stream: Handle);
    cuMemcpy3D_v2(copy: &Copy3d);
    cuMemsetD8_v2(address: Dptr, value: u8, n: usize);
    cuMemsetD16_v2(address: Dptr, value: u16, n: usize);
    cuMemsetD32_v2(address: Dptr, value: u32, n: usize);
    cuMemsetD8Async(address: Dptr, value: u8, n: usize, stream: Handle);
    cuMemsetD16Async(address: Dptr, value: u16, n: usize, stream: Handle);
    cuMemsetD32Async(address: Dptr, value: u32, n: usize, stream: Handle);
    cuMemsetD2D8_v2(address: Dptr, pitch: usize, value: u8, width: usize, height: usize);
    cuMemsetD2D16_v2(address: Dptr, pitch: usize, value: u16, width: usize, height: usize);
    cuMemsetD2D32_v2(address: Dptr, pitch: usize, value: u32, width: usize, height: usize);

    cuPointerGetAttribute(value: *mut c_void, attribute: i32, address: Dptr);
    cuPointerGetAttributes(n: u32, attributes: *mut i32, values: *mut *mut c_void, address: Dptr);
    cuPointerSetAttribute(value: *const c_void, attribute: i32, address: Dptr);

    cuMemGetAllocationGranularity(bytes: &mut usize, prop: &AllocationProp, option: i32);
    cuMemAddressReserve(address: &mut Dptr, bytes: usize, alignment: usize, hint: Dptr, flags: u64);
    cuMemAddressFree(address: Dptr, bytes: usize);
    cuMemCreate(handle: &mut MemHandle, bytes: usize, prop: &AllocationProp, flags: u64);
    cuMemRelease(handle: MemHandle);
    cuMemMap(address: Dptr, bytes: usize, offset: usize, handle: MemHandle, flags: u64);
    cuMemUnmap(address: Dptr, bytes: usize);
    cuMemSetAccess(address: Dptr, bytes: usize, access: *const AccessDesc, n: usize);
    cuMemGetAccess(flags: &mut u64, location: &Location, address: Dptr);
    cuMemRetainAllocationHandle(handle: &mut MemHandle, address: Dptr);
    cuMemGetAllocationPropertiesFromHandle(prop: &mut AllocationProp, handle: MemHandle);
    cuMemExportToShareableHandle(out: *mut c_void, handle: MemHandle, kind: i32, flags: u64);
    cuMemImportFromShareableHandle(handle: &mut MemHandle, os_handle: usize, kind: i32);
    cuArrayCreate_v2(array: &mut Handle, shape: &FlatShape);
    cuArray3DCreate_v2(array: &mut Handle, shape: &ArrayShape);
    cuArray3DGetDescriptor_v2(shape: &mut ArrayShape, array: Handle);
    cuArrayDestroy(array: Handle);
    cuArrayGetMemoryRequirements(wanted: &mut MemoryRequirements, array: Handle, device: i32);
    cuArrayGetSparseProperties(tiles: &mut SparseProperties, array: Handle);
    cuMipmappedArrayCreate(array: &mut Handle, shape: &ArrayShape, levels: u32);
    cuMipmappedArrayGetLevel(level: &mut Handle, array: Handle, at: u32);
    cuMipmappedArrayDestroy(array: Handle);
    cuMipmappedArrayGetMemoryRequirements(wanted: &mut MemoryRequirements, array: Handle, device: i32);
    cuMipmappedArrayGetSparseProperties(tiles: &mut SparseProperties, array: Handle);
    cuMemMapArrayAsync(list: &ArrayMapping, n: u32, stream: Handle);
    cuImportExternalMemory(memory: &mut Handle, wanted: &ExternalMemory);
    cuExternalMemoryGetMappedBuffer(address: &mut Dptr, memory: Handle, wanted: &ExternalBuffer);
    cuDestroyExternalMemory(memory: Handle);
    cuMulticastGetGranularity(bytes: &mut usize, prop: &MulticastProp, option: i32);
    cuMulticastCreate(object: &mut MemHandle, prop: &MulticastProp);
    cuMulticastAddDevice(object: MemHandle, device: i32);
    cuMulticastBindMem(object: MemHandle, offset: usize, memory: MemHandle, from: usize, bytes: usize, flags: u64);
    cuMulticastBindAddr(object: MemHandle, offset: usize, address: Dptr, bytes: usize, flags: u64);
    cuMulticastUnbind(object: MemHandle, device: i32, offset: usize, bytes: usize);
    cuIpcGetMemHandle(handle: &mut IpcHandle, address: Dptr);
    cuIpcOpenMemHandle_v2(address: &mut Dptr, handle: IpcHandle, flags: u32);
    cuIpcCloseMemHandle(address: Dptr);

    cuMemAllocAsync(address: &mut Dptr, bytes: usize, stream: Handle);
    cuMemFreeAsync(address: Dptr, stream: Handle);
    cuMemAllocFromPoolAsync(address: &mut Dptr, bytes: usize, pool: Handle, stream: Handle);
    cuMemPoolCreate(pool: &mut Handle, props: &PoolProps);
    cuMemPoolDestroy(pool: Handle);
    cuMemPoolTrimTo(pool: Handle, keep_bytes: usize);
    cuMemPoolGetAttribute(pool: Handle, attribute: i32, value: *mut c_void);
    cuMemPoolSetAttribute(pool: Handle, attribute: i32, value: *mut c_void);
    cuMemPoolSetAccess(pool: Handle, access: *const AccessDesc, n: usize);
    cuMemPoolExportToShareableHandle(out: *mut c_void, pool: Handle, kind: i32, flags: u64);
    cuMemPoolImportFromShareableHandle(pool: &mut Handle, os_handle: usize, kind: i32, flags: u64);
    cuMemPoolExportPointer(data: &mut PoolPointer, address: Dptr);
    cuMemPoolImportPointer(address: &mut Dptr, pool: Handle, data: &PoolPointer);
    cuMemGetDefaultMemPool(pool: &mut Handle, location: &Location, kind: i32);
    cuMemGetMemPool(pool: &mut Handle, location: &Location, kind: i32);
    cuMemSetMemPool(location: &Location, kind: i32, pool: Handle);
    cuMemPoolGetAccess(flags: &mut i32, pool: Handle, location: &Location);

    cuStreamCreate(stream: Option<&mut Handle>, flags: u32);
    cuStreamCreateWithPriority(stream: &mut Handle, flags: u32, priority: i32);
    cuStreamDestroy_v2(stream: Handle);
    cuStreamQuery(stream: Handle);
    cuStreamQuery_ptsz(stream: Handle);
    cuStreamSynchronize(stream: Handle);
    cuStreamSynchronize_ptsz(stream: Handle);
    cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32);
    cuStreamGetFlags(stream: Handle, flags: &mut u32);
    cuStreamGetPriority(stream: Handle, priority: &mut i32);
    cuStreamGetCtx(stream: Handle, context: &mut Handle);
    cuStreamGetId(stream: Handle, id: &mut u64);
    cuStreamAddCallback(stream: Handle, callback: StreamCallback, user: *mut c_void, flags: u32);
    cuStreamWaitValue32_v2(stream: Handle, address: Dptr, value: u32, flags: u32);
    cuStreamWriteValue32_v2(stream: Handle, address: Dptr, value: u32, flags: u32);
    cuStreamWaitValue64_v2(stream: Handle, address: Dptr, value: u64, flags: u32);
    cuStreamWriteValue64_v2(stream: Handle, address: Dptr, value: u64, flags: u32);
    cuLaunchHostFunc(stream: Handle, function: HostFn, user: *mut c_void);
    cuMemsetD32Async_ptsz(address: Dptr, value: u32, n: usize, stream: Handle);

    cuEventCreate(event: &mut Handle, flags: u32);
    cuEventDestroy_v2(event: Handle);
    cuEventRecord(event: Handle, stream: Handle);
    cuEventQuery(event: Handle);
    cuEventSynchronize(event: Handle);
    cuEventElapsedTime(milliseconds: &mut f32, start: Handle, end: Handle);

    cuStreamBeginCapture_v2(stream: Handle, mode: i32);
    cuStreamEndCapture(stream: Handle, graph: &mut Handle);
    cuStreamIsCapturing(stream: Handle, status: &mut i32);
    cuStreamGetCaptureInfo_v2(stream: Handle, status: &mut i32, id: &mut u64, graph: usize, dependencies: usize, n: usize);
    cuThreadExchangeStreamCaptureMode(mode: &mut i32);
    cuGraphCreate(graph: &mut Handle, flags: u32);
    cuGraphDestroy(graph: Handle);
    cuGraphAddKernelNode_v2(node: &mut Handle, graph: Handle, dependencies: *const Handle, n: usize, params: &KernelNodeParams);
    cuGraphAddEmptyNode(node: &mut Handle, graph: Handle, dependencies: *const Handle, n: usize);
    cuGraphAddMemAllocNode(node: &mut Handle, graph: Handle, dependencies: *const Handle, n: usize, params: &mut AllocNodeParams);
    cuGraphAddMemFreeNode(node: &mut Handle, graph: Handle, dependencies: *const Handle, n: usize, address: Dptr);
    cuGraphAddMemsetNode(node: &mut Handle, graph: Handle, dependencies: *const Handle, n: usize, params: &MemsetNodeParams, context: Handle);
    cuGraphAddChildGraphNode(node: &mut Handle, graph: Handle, dependencies: *const Handle, n: usize, child: Handle);
    cuGraphAddNode(node: &mut Handle, graph: Handle, dependencies: *const Handle, n: usize, params: &mut NodeParams);
    cuGraphMemAllocNodeGetParams(node: Handle, params: &mut AllocNodeParams);
    cuGraphMemFreeNodeGetParams(node: Handle, address: &mut Dptr);
    cuGraphChildGraphNodeGetGraph(node: Handle, graph: &mut Handle);
    cuGraphNodeGetType(node: Handle, kind: &mut i32);
    cuGraphClone(clone: &mut Handle, graph: Handle);
    cuGraphUpload(exec: Handle, stream: Handle);
    cuGraphGetNodes(graph: Handle, nodes: *mut Handle, n: &mut usize);
    cuGraphInstantiateWithFlags(exec: &mut Handle, graph: Handle, flags: u64);
    cuGraphLaunch(exec: Handle, stream: Handle);
    cuGraphExecDestroy(exec: Handle);

    cuModuleLoadData(module: &mut Handle, image: *const c_void);
    cuModuleLoadDataEx(module: &mut Handle, image: *const c_void, n: u32, options: *mut i32, values: *mut *mut c_void);
    cuModuleUnload(module: Handle);
    cuModuleGetFunction(function: &mut Handle, module: Handle, name: *const c_char);
    cuModuleGetGlobal_v2(address: Option<&mut Dptr>, bytes: Option<&mut usize>, module: Handle, name: *const c_char);
    cuModuleGetLoadingMode(mode: &mut i32);
    cuLinkCreate_v2(n: u32, options: *mut i32, values: *mut *mut c_void, link: &mut Handle);
    cuLinkAddData_v2(link: Handle, kind: i32, data: *const c_void, bytes: usize, name: *const c_char, n: u32, options: *mut i32, values: *mut *mut c_void);
    cuLinkComplete(link: Handle, image: &mut *const c_void, bytes: &mut usize);
    cuLinkDestroy(link: Handle);
    cuLibraryLoadData(library: &mut Handle, image: *const c_void, jit: usize, jit_values: usize, n_jit: u32, options: usize, values: usize, n: u32);
    cuLibraryUnload(library: Handle);
    cuLibraryGetKernel(kernel: &mut Handle, library: Handle, name: *const c_char);
    cuLibraryGetModule(module: &mut Handle, library: Handle);
    cuKernelGetFunction(function: &mut Handle, kernel: Handle);
    cuFuncGetAttribute(value: &mut i32, attribute: i32, function: Handle);
    cuFuncGetModule(module: &mut Handle, function: Handle);
    cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks: &mut i32, function: Handle, threads: i32, shared_bytes: usize);
    cuLaunchKernel(function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared_bytes: u32,
        stream: Handle, params: *mut *mut c_void, extra: *mut *mut c_void);
    cuLaunchKernel_ptsz(function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared_bytes: u32,
        stream: Handle, params: *mut *mut c_void, extra: *mut *mut c_void);
    cuLaunchKernelEx(config: &LaunchConfig, function: Handle, params: *mut *mut c_void, extra: *mut *mut c_void);
    cuLaunchCooperativeKernel(function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32,
        shared_bytes: u32, stream: Handle, params: *mut *mut c_void);
}

/// `nvmlProcessInfo_v1_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct NvmlProcessV1 {
    pub pid: u32,
    pub used_bytes: u64,
}

functions! { nvml:
    nvmlSystemGetCudaDriverVersion_v2(version: &mut i32);
    nvmlDeviceGetComputeRunningProcesses(device: Handle, n: &mut u32, processes: *mut NvmlProcessV1);
    nvmlDeviceGetComputeRunningProcesses_v2(device: Handle, n: &mut u32, processes: *mut NvmlProcess);
    nvmlDeviceGetGraphicsRunningProcesses(device: Handle, n: &mut u32, processes: *mut NvmlProcessV1);
    nvmlDeviceGetGraphicsRunningProcesses_v3(device: Handle, n: &mut u32, processes: *mut NvmlProcess);
    nvmlDeviceGetMPSComputeRunningProcesses(device: Handle, n: &mut u32, processes: *mut NvmlProcessV1);
    nvmlDeviceGetMPSComputeRunningProcesses_v3(device: Handle, n: &mut u32, processes: *mut NvmlProcess);
    nvmlInit_v2();
    nvmlShutdown();
    nvmlDeviceGetCount_v2(count: &mut u32);
    nvmlDeviceGetHandleByIndex_v2(index: u32, device: &mut Handle);
    nvmlDeviceGetHandleByUUID(uuid: *const c_char, device: &mut Handle);
    nvmlDeviceGetUUID(device: Handle, text: *mut c_char, bytes: u32);
    nvmlDeviceGetMemoryInfo(device: Handle, memory: &mut NvmlMemory);
    nvmlDeviceGetMemoryInfo_v2(device: Handle, memory: &mut NvmlMemoryV2);
    nvmlDeviceGetComputeRunningProcesses_v3(device: Handle, n: &mut u32, processes: *mut NvmlProcess);
}
