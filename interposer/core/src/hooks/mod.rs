//! The hand-written hooks, one function per `custom` row of the table, named like it.
//!
//! Each is called by the export of that name inside [`crate::entry::shield`], outside the gate, with the
//! real function (always callable) before the application's arguments.

#![allow(non_snake_case, reason = "named after the entry points")]
#![allow(clippy::missing_safety_doc, reason = "the driver's own rules for each call")]

use crate::driver::Status;
use crate::table::sig;
use core::ffi::c_void;

/// Hooks that add nothing yet: the real function answers.
macro_rules! pass_through {
    ($($name:ident ($($argument:ident: $type:ty),*);)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`")]
            #[inline]
            pub unsafe fn $name(real: sig::$name, $($argument: $type),*) -> Status {
                // SAFETY: the application's own call.
                unsafe { real($($argument),*) }
            }
        )*
    };
}

pass_through! {
    cuArray3DCreate (pHandle: *mut *mut c_void, pAllocateArray: *const c_void);
    cuArray3DCreate_v2 (pHandle: *mut *mut c_void, pAllocateArray: *const c_void);
    cuArrayCreate (pHandle: *mut *mut c_void, pAllocateArray: *const c_void);
    cuArrayCreate_v2 (pHandle: *mut *mut c_void, pAllocateArray: *const c_void);
    cuArrayDestroy (hArray: *mut c_void);
    cuCtxCreate (pctx: *mut *mut c_void, flags: u32, dev: i32);
    cuCtxCreate_v2 (pctx: *mut *mut c_void, flags: u32, dev: i32);
    cuCtxCreate_v3 (pctx: *mut *mut c_void, paramsArray: *mut c_void, numParams: i32, flags: u32, dev: i32);
    cuCtxCreate_v4 (pctx: *mut *mut c_void, ctxCreateParams: *mut c_void, flags: u32, dev: i32);
    cuCtxDestroy (ctx: *mut c_void);
    cuCtxDestroy_v2 (ctx: *mut c_void);
    cuCtxDetach (ctx: *mut c_void);
    cuCtxDisablePeerAccess (peerContext: *mut c_void);
    cuCtxEnablePeerAccess (peerContext: *mut c_void, Flags: u32);
    cuDevicePrimaryCtxRelease (dev: i32);
    cuDevicePrimaryCtxRelease_v2 (dev: i32);
    cuDevicePrimaryCtxReset (dev: i32);
    cuDevicePrimaryCtxReset_v2 (dev: i32);
    cuDevicePrimaryCtxRetain (pctx: *mut *mut c_void, dev: i32);
    cuDeviceTotalMem (bytes: *mut u32, dev: i32);
    cuDeviceTotalMem_v2 (bytes: *mut usize, dev: i32);
    cuGetExportTable (ppExportTable: *mut *const c_void, pExportTableId: *const c_void);
    cuGreenCtxStreamCreate (phStream: *mut *mut c_void, greenCtx: *mut c_void, flags: u32, priority: i32);
    cuInit (Flags: u32);
    cuIpcGetMemHandle (pHandle: *mut c_void, dptr: u64);
    cuMemAlloc (dptr: *mut u32, bytesize: u32);
    cuMemAllocAsync (dptr: *mut u64, bytesize: usize, hStream: *mut c_void);
    cuMemAllocAsync_ptsz (dptr: *mut u64, bytesize: usize, hStream: *mut c_void);
    cuMemAllocFromPoolAsync (dptr: *mut u64, bytesize: usize, pool: *mut c_void, hStream: *mut c_void);
    cuMemAllocFromPoolAsync_ptsz (dptr: *mut u64, bytesize: usize, pool: *mut c_void, hStream: *mut c_void);
    cuMemAllocManaged (dptr: *mut u64, bytesize: usize, flags: u32);
    cuMemAllocPitch (dptr: *mut u32, pPitch: *mut u32, WidthInBytes: u32, Height: u32, ElementSizeBytes: u32);
    cuMemAllocPitch_v2 (dptr: *mut u64, pPitch: *mut usize, WidthInBytes: usize, Height: usize, ElementSizeBytes: u32);
    cuMemAlloc_v2 (dptr: *mut u64, bytesize: usize);
    cuMemCreate (handle: *mut u64, size: usize, prop: *const c_void, flags: u64);
    cuMemFree (dptr: u32);
    cuMemFreeAsync (dptr: u64, hStream: *mut c_void);
    cuMemFreeAsync_ptsz (dptr: u64, hStream: *mut c_void);
    cuMemFree_v2 (dptr: u64);
    cuMemGetAddressRange (pbase: *mut u32, psize: *mut u32, dptr: u32);
    cuMemGetAddressRange_v2 (pbase: *mut u64, psize: *mut usize, dptr: u64);
    cuMemGetInfo (free: *mut u32, total: *mut u32);
    cuMemGetInfo_v2 (free: *mut usize, total: *mut usize);
    cuMemRelease (handle: u64);
    cuMemRetainAllocationHandle (handle: *mut u64, addr: *mut c_void);
    cuMipmappedArrayCreate (pHandle: *mut *mut c_void, pMipmappedArrayDesc: *const c_void, numMipmapLevels: u32);
    cuMipmappedArrayDestroy (hMipmappedArray: *mut c_void);
    cuPointerGetAttribute (data: *mut c_void, attribute: u32, ptr: u64);
    cuPointerGetAttributes (numAttributes: u32, attributes: *mut u32, data: *mut *mut c_void, ptr: u64);
    cuPointerSetAttribute (value: *const c_void, attribute: u32, ptr: u64);
    cuStreamBeginCapture (hStream: *mut c_void);
    cuStreamBeginCaptureToCig (hStream: *mut c_void, streamCigCaptureParams: *mut c_void);
    cuStreamBeginCaptureToCig_ptsz (hStream: *mut c_void, streamCigCaptureParams: *mut c_void);
    cuStreamBeginCaptureToGraph (hStream: *mut c_void, hGraph: *mut c_void, dependencies: *const *mut c_void, dependencyData: *const c_void, numDependencies: usize, mode: u32);
    cuStreamBeginCaptureToGraph_ptsz (hStream: *mut c_void, hGraph: *mut c_void, dependencies: *const *mut c_void, dependencyData: *const c_void, numDependencies: usize, mode: u32);
    cuStreamBeginCapture_ptsz (hStream: *mut c_void);
    cuStreamBeginCapture_v2 (hStream: *mut c_void, mode: u32);
    cuStreamBeginCapture_v2_ptsz (hStream: *mut c_void, mode: u32);
    cuStreamBeginRecaptureToGraph (hStream: *mut c_void, mode: u32, hGraph: *mut c_void, callbackFunc: *mut c_void, userData: *mut c_void);
    cuStreamBeginRecaptureToGraph_ptsz (hStream: *mut c_void, mode: u32, hGraph: *mut c_void, callbackFunc: *mut c_void, userData: *mut c_void);
    cuStreamCreate (phStream: *mut *mut c_void, Flags: u32);
    cuStreamCreateWithPriority (phStream: *mut *mut c_void, flags: u32, priority: i32);
    cuStreamDestroy (hStream: *mut c_void);
    cuStreamDestroy_v2 (hStream: *mut c_void);
    cuStreamEndCapture (hStream: *mut c_void, phGraph: *mut *mut c_void);
    cuStreamEndCaptureToCig (hStream: *mut c_void);
    cuStreamEndCaptureToCig_ptsz (hStream: *mut c_void);
    cuStreamEndCapture_ptsz (hStream: *mut c_void, phGraph: *mut *mut c_void);
    nvmlDeviceGetMemoryInfo (device: *mut c_void, memory: *mut c_void);
    nvmlDeviceGetMemoryInfo_v2 (device: *mut c_void, memory: *mut c_void);
}
