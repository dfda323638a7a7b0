//! The driver's functions by name, found in `libcuda.so.1` as any program finds them, with plain integers
//! for enums and handles.
//!
//! They are safe to name and pass on whatever addresses they are given: an adversary's mistakes are its own,
//! it runs in a process of its own. A function that the driver does not export answers [`Code::ABSENT`].
#![allow(non_snake_case)]
// The driver decides how many arguments its functions have.
#![allow(clippy::too_many_arguments)]

use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use crate::types::{
    AccessDescriptor, AllocationProperties, Array2, Array3, Array3Old, ArrayOld, ExternalBuffer,
    ExternalMemory, IpcHandle, Location, MemAllocNode, Multicast, PoolProperties, PoolShare,
};

/// A device address.
pub type Address = u64;
/// Any object of the driver: context, stream, event, module, graph, pool. Zero is null.
pub type Handle = usize;

/// What a driver function returned: any number, known to us or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub i32);

impl Code {
    pub const ABSENT: Self = Self(-1);
    pub const SUCCESS: Self = Self(0);
    pub const OUT_OF_MEMORY: Self = Self(2);
    pub const NOT_SUPPORTED: Self = Self(801);

    pub fn is_ok(self) -> bool {
        self == Self::SUCCESS
    }

    /// The driver, or this release of it, does not have it.
    pub fn is_missing(self) -> bool {
        self == Self::ABSENT || self == Self::NOT_SUPPORTED
    }

    /// `Ok` with a value if it is success.
    pub fn then<T>(self, value: T) -> Result<T, Code> {
        if self.is_ok() { Ok(value) } else { Err(self) }
    }
}

/// The name's address in `libcuda.so.1`, or null.
pub fn symbol(name: &CStr) -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let library = *LIBRARY.get_or_init(|| {
        // SAFETY: a C string; the library stays open for the life of the process.
        unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) as usize }
    });
    if library == 0 {
        return std::ptr::null_mut();
    }
    // SAFETY: a handle from dlopen that is never closed, and a C string.
    unsafe { libc::dlsym(library as *mut c_void, name.as_ptr()) }
}

macro_rules! functions {
    ($(fn $name:ident($($arg:ident: $type:ty),*);)*) => {$(
        pub fn $name($($arg: $type),*) -> Code {
            static AT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
            let mut at = AT.load(Relaxed);
            if at.is_null() {
                const NAME: &str = concat!(stringify!($name), "\0");
                at = symbol(CStr::from_bytes_with_nul(NAME.as_bytes()).unwrap_or_default());
                if at.is_null() {
                    return Code::ABSENT;
                }
                AT.store(at, Relaxed);
            }
            // SAFETY: the driver's function of this name takes these arguments; see the module for what
            // they point to.
            Code(unsafe {
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> i32>(at)($($arg),*)
            })
        }
    )*};
}

functions! {
    fn cuInit(flags: u32);
    fn cuDriverGetVersion(version: &mut i32);
    fn cuDeviceGetCount(count: &mut i32);
    fn cuDeviceGetAttribute(value: &mut i32, attribute: i32, device: i32);
    fn cuDeviceTotalMem_v2(bytes: &mut usize, device: i32);
    fn cuDeviceGetUuid(uuid: &mut [u8; 16], device: i32);
    fn cuDevicePrimaryCtxRetain(context: &mut Handle, device: i32);
    fn cuDevicePrimaryCtxRelease_v2(device: i32);
    fn cuDevicePrimaryCtxReset_v2(device: i32);
    fn cuCtxSetCurrent(context: Handle);
    fn cuCtxSynchronize();
    fn cuCtxCreate(context: &mut Handle, flags: u32, device: i32);
    fn cuCtxCreate_v2(context: &mut Handle, flags: u32, device: i32);
    fn cuCtxDestroy_v2(context: Handle);
    fn cuCtxPopCurrent_v2(context: &mut Handle);
    fn cuCtxSetLimit(limit: u32, value: usize);
    fn cuCtxGetLimit(value: &mut usize, limit: u32);
    fn cuMemGetInfo_v2(free: &mut usize, total: &mut usize);

    fn cuMemAlloc_v2(at: &mut Address, bytes: usize);
    fn cuMemGetInfo(free: &mut u32, total: &mut u32);
    fn cuMemAlloc(at: &mut u32, bytes: u32);
    fn cuMemAllocPitch_v2(at: &mut Address, pitch: &mut usize, width: usize, height: usize, element: u32);
    fn cuMemAllocPitch(at: &mut u32, pitch: &mut u32, width: u32, height: u32, element: u32);
    fn cuMemFree_v2(at: Address);
    fn cuMemFree(at: u32);
    fn cuMemAllocManaged(at: &mut Address, bytes: usize, flags: u32);
    fn cuMemPrefetchAsync(at: Address, bytes: usize, device: i32, stream: Handle);
    fn cuMemPrefetchAsync_v2(at: Address, bytes: usize, to: Location, flags: u32, stream: Handle);
    fn cuMemAdvise(at: Address, bytes: usize, advice: u32, device: i32);
    fn cuMemAdvise_v2(at: Address, bytes: usize, advice: u32, to: Location);
    fn cuMemHostAlloc(at: &mut *mut c_void, bytes: usize, flags: u32);
    fn cuMemFreeHost(at: *mut c_void);
    fn cuMemsetD8_v2(at: Address, value: u8, count: usize);
    fn cuMemsetD32_v2(at: Address, value: u32, count: usize);
    fn cuMemsetD32Async(at: Address, value: u32, count: usize, stream: Handle);
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: Address, bytes: usize);
    fn cuMemcpyHtoD_v2(to: Address, from: *const c_void, bytes: usize);

    fn cuMemCreate(handle: &mut u64, bytes: usize, properties: &AllocationProperties, flags: u64);
    fn cuMemRelease(handle: u64);
    fn cuMemAddressReserve(at: &mut Address, bytes: usize, alignment: usize, hint: Address, flags: u64);
    fn cuMemAddressFree(at: Address, bytes: usize);
    fn cuMemMap(at: Address, bytes: usize, offset: usize, handle: u64, flags: u64);
    fn cuMemUnmap(at: Address, bytes: usize);
    fn cuMemSetAccess(at: Address, bytes: usize, access: &AccessDescriptor, count: usize);
    fn cuMemRetainAllocationHandle(handle: &mut u64, at: Address);
    fn cuMemExportToShareableHandle(out: *mut c_void, handle: u64, kind: u32, flags: u64);
    fn cuMemImportFromShareableHandle(handle: &mut u64, descriptor: usize, kind: u32);
    fn cuMemGetHandleForAddressRange(out: *mut c_void, at: Address, bytes: usize, kind: u32, flags: u64);

    fn cuMemAllocAsync(at: &mut Address, bytes: usize, stream: Handle);
    fn cuMemAllocAsync_ptsz(at: &mut Address, bytes: usize, stream: Handle);
    fn cuMemAllocFromPoolAsync(at: &mut Address, bytes: usize, pool: Handle, stream: Handle);
    fn cuMemAllocFromPoolAsync_ptsz(at: &mut Address, bytes: usize, pool: Handle, stream: Handle);
    fn cuMemFreeAsync(at: Address, stream: Handle);
    fn cuMemFreeAsync_ptsz(at: Address, stream: Handle);
    fn cuDeviceGetDefaultMemPool(pool: &mut Handle, device: i32);
    fn cuDeviceGetMemPool(pool: &mut Handle, device: i32);
    fn cuDeviceSetMemPool(device: i32, pool: Handle);
    fn cuMemPoolCreate(pool: &mut Handle, properties: &PoolProperties);
    fn cuMemPoolDestroy(pool: Handle);
    fn cuMemPoolSetAttribute(pool: Handle, attribute: u32, value: &u64);
    fn cuMemPoolGetAttribute(pool: Handle, attribute: u32, value: &mut u64);
    fn cuMemPoolTrimTo(pool: Handle, keep: usize);
    fn cuMemPoolExportToShareableHandle(out: *mut c_void, pool: Handle, kind: u32, flags: u64);
    fn cuMemPoolImportFromShareableHandle(pool: &mut Handle, descriptor: usize, kind: u32, flags: u64);
    fn cuMemPoolExportPointer(out: &mut PoolShare, at: Address);
    fn cuMemPoolImportPointer(at: &mut Address, pool: Handle, share: &PoolShare);

    fn cuArrayCreate_v2(array: &mut Handle, shape: &Array2);
    fn cuArrayCreate(array: &mut Handle, shape: &ArrayOld);
    fn cuArray3DCreate_v2(array: &mut Handle, shape: &Array3);
    fn cuArray3DCreate(array: &mut Handle, shape: &Array3Old);
    fn cuArrayDestroy(array: Handle);
    fn cuMipmappedArrayCreate(array: &mut Handle, shape: &Array3, levels: u32);
    fn cuMipmappedArrayDestroy(array: Handle);

    fn cuStreamCreate(stream: &mut Handle, flags: u32);
    fn cuStreamDestroy_v2(stream: Handle);
    fn cuStreamSynchronize(stream: Handle);
    fn cuStreamBeginCapture_v2(stream: Handle, mode: u32);
    fn cuStreamEndCapture(stream: Handle, graph: &mut Handle);
    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32);
    fn cuEventCreate(event: &mut Handle, flags: u32);
    fn cuEventDestroy_v2(event: Handle);
    fn cuEventRecord(event: Handle, stream: Handle);
    fn cuGraphCreate(graph: &mut Handle, flags: u32);
    fn cuGraphDestroy(graph: Handle);
    fn cuGraphAddMemAllocNode(node: &mut Handle, graph: Handle, after: *const Handle, count: usize, params: &mut MemAllocNode);
    fn cuGraphAddMemFreeNode(node: &mut Handle, graph: Handle, after: *const Handle, count: usize, at: Address);
    fn cuGraphInstantiateWithFlags(exec: &mut Handle, graph: Handle, flags: u64);
    fn cuGraphExecDestroy(exec: Handle);
    fn cuGraphUpload(exec: Handle, stream: Handle);
    fn cuGraphLaunch(exec: Handle, stream: Handle);
    fn cuDeviceGraphMemTrim(device: i32);
    fn cuDeviceGetGraphMemAttribute(device: i32, attribute: u32, value: &mut u64);
    fn cuDeviceSetGraphMemAttribute(device: i32, attribute: u32, value: &mut u64);

    fn cuMulticastCreate(handle: &mut u64, properties: &Multicast);
    fn cuMulticastAddDevice(handle: u64, device: i32);
    fn cuMulticastBindMem(handle: u64, offset: usize, memory: u64, memory_offset: usize, bytes: usize, flags: u64);
    fn cuMulticastUnbind(handle: u64, device: i32, offset: usize, bytes: usize);
    fn cuMulticastGetGranularity(bytes: &mut usize, properties: &Multicast, option: u32);

    fn cuIpcGetMemHandle(handle: &mut IpcHandle, at: Address);
    fn cuIpcOpenMemHandle_v2(at: &mut Address, handle: IpcHandle, flags: u32);
    fn cuIpcCloseMemHandle(at: Address);
    fn cuImportExternalMemory(memory: &mut Handle, description: &ExternalMemory);
    fn cuExternalMemoryGetMappedBuffer(at: &mut Address, memory: Handle, buffer: &ExternalBuffer);
    fn cuDestroyExternalMemory(memory: Handle);

    fn cuModuleLoadData(module: &mut Handle, image: *const c_void);
    fn cuModuleUnload(module: Handle);
    fn cuModuleGetFunction(function: &mut Handle, module: Handle, name: *const c_char);
    fn cuLibraryLoadData(library: &mut Handle, code: *const c_void, options: *const c_void, values: *const c_void, count: u32, library_options: *const c_void, library_values: *const c_void, library_count: u32);
    fn cuLibraryUnload(library: Handle);
    fn cuLibraryGetModule(module: &mut Handle, library: Handle);
    fn cuLaunchKernel(function: Handle, x: u32, y: u32, z: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: Handle, values: *const *const c_void, extra: *const c_void);
    fn cuGetProcAddress(name: *const c_char, at: &mut *mut c_void, version: i32, flags: u64);
    fn cuGetProcAddress_v2(name: *const c_char, at: &mut *mut c_void, version: i32, flags: u64, found: *mut i32);

    fn cuDeviceGetDevResource(device: i32, resource: *mut c_void, kind: u32);
    fn cuDevSmResourceSplitByCount(result: *mut c_void, groups: &mut u32, from: *const c_void, rest: *mut c_void, flags: u32, least: u32);
    fn cuDevResourceGenerateDesc(description: &mut Handle, resources: *const c_void, count: u32);
    fn cuGreenCtxCreate(context: &mut Handle, description: Handle, device: i32, flags: u32);
    fn cuGreenCtxDestroy(context: Handle);
    fn cuCtxFromGreenCtx(context: &mut Handle, green: Handle);
    fn cuGreenCtxStreamCreate(stream: &mut Handle, green: Handle, flags: u32, priority: i32);
}
