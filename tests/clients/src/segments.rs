//! Where a caching allocator's segments come from: plain allocations, expandable segments, stream order.

use std::collections::BTreeMap;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DriverError, sys};

use crate::caching::Source;

/// The part of an expandable segment that is mapped at once is a multiple of this.
const PAGE: u64 = 2 << 20;

/// What the calling thread may do while one of its streams captures is everything: as PyTorch does around its calls
/// of the driver's allocator, which a capture would forbid.
///
/// # Errors
/// What the driver says.
pub fn relaxed<T>(call: impl FnOnce() -> Result<T, DriverError>) -> Result<T, DriverError> {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: a place of ours for the mode that was.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result()?;
    let done = call();
    // SAFETY: as above; the mode that was.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result()?;
    done
}

/// `cuMemAlloc` for each.
pub struct Plain {
    pub stream: Arc<CudaStream>,
}

impl Source for Plain {
    fn get(&mut self, bytes: u64) -> Result<u64, DriverError> {
        let mut at = 0;
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        // SAFETY: a place of ours for the address.
        relaxed(|| unsafe { sys::cuMemAlloc_v2(&raw mut at, size) }.result())?;
        Ok(at)
    }

    fn put(&mut self, at: u64, _: u64) -> Result<(), DriverError> {
        // SAFETY: from `get`, once.
        unsafe { sys::cuMemFree_v2(at) }.result()
    }

    fn joins(&self) -> bool {
        false
    }

    fn wait(&mut self) -> Result<(), DriverError> {
        self.stream.synchronize()
    }
}

/// `expandable_segments:True`: one large range of addresses, into which physical memory is mapped piece by piece.
pub struct Expandable {
    stream: Arc<CudaStream>,
    device: i32,
    at: u64,
    bytes: u64,
    /// Pieces: where, how long, and the handle behind it.
    mapped: BTreeMap<u64, (u64, u64)>,
}

impl Expandable {
    /// Reserves a little more than the whole device has.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(stream: Arc<CudaStream>, device: i32) -> Result<Self, DriverError> {
        let (mut free, mut total, mut at) = (0, 0, 0);
        // SAFETY: places of ours.
        unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }.result()?;
        let bytes = (total as u64 / 8 * 9).next_multiple_of(PAGE);
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        // SAFETY: a place of ours for the address.
        unsafe { sys::cuMemAddressReserve(&raw mut at, size, 0, 0, 0) }.result()?;
        Ok(Self {
            stream,
            device,
            at,
            bytes,
            mapped: BTreeMap::new(),
        })
    }

    /// The first hole that is large enough.
    fn hole(&self, bytes: u64) -> Option<u64> {
        let mut at = self.at;
        for (&start, &(len, _)) in &self.mapped {
            if start - at >= bytes {
                return Some(at);
            }
            at = start + len;
        }
        (self.at + self.bytes - at >= bytes).then_some(at)
    }
}

impl Source for Expandable {
    fn get(&mut self, bytes: u64) -> Result<u64, DriverError> {
        let at = self
            .hole(bytes)
            .ok_or(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY))?;
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        let location = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.device,
        };
        // SAFETY: plain fields, for all of which zero is a value.
        let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
        properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location = location;
        let access = sys::CUmemAccessDesc {
            location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        let mut handle = 0;
        relaxed(|| {
            // SAFETY: a place of ours and properties that the driver reads during the call.
            unsafe { sys::cuMemCreate(&raw mut handle, size, &raw const properties, 0) }
                .result()?;
            // SAFETY: a hole of our range, a handle of the same size, access for the device it lies on.
            let mapped = unsafe { sys::cuMemMap(at, size, 0, handle, 0) }.result();
            if mapped.is_err() {
                // SAFETY: the handle from above, mapped nowhere.
                let _ = unsafe { sys::cuMemRelease(handle) };
                return mapped;
            }
            // SAFETY: as above.
            unsafe { sys::cuMemSetAccess(at, size, &raw const access, 1) }.result()
        })?;
        self.mapped.insert(at, (bytes, handle));
        Ok(at)
    }

    fn put(&mut self, at: u64, _: u64) -> Result<(), DriverError> {
        let Some((bytes, handle)) = self.mapped.remove(&at) else {
            return Ok(());
        };
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        // SAFETY: what `get` mapped, once; nothing uses it, see `wait`.
        unsafe { sys::cuMemUnmap(at, size) }.result()?;
        // SAFETY: its handle, once.
        unsafe { sys::cuMemRelease(handle) }.result()
    }

    fn joins(&self) -> bool {
        true
    }

    fn wait(&mut self) -> Result<(), DriverError> {
        self.stream.synchronize()
    }
}

impl Drop for Expandable {
    fn drop(&mut self) {
        let pieces: Vec<u64> = self.mapped.keys().copied().collect();
        for at in pieces {
            let _ = self.put(at, 0);
        }
        let size = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        // SAFETY: the range from `new`, with nothing mapped in it.
        let _ = unsafe { sys::cuMemAddressFree(self.at, size) };
    }
}

/// `backend:cudaMallocAsync`: the driver's own pool, which keeps everything that is freed.
///
/// # Errors
/// What the driver says.
pub fn keep_everything(device: i32) -> Result<sys::CUmemoryPool, DriverError> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: a place of ours.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, device) }.result()?;
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a u64.
    unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()) }.result()?;
    Ok(pool)
}
