//! Device allocations of either kind, and their checks.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError, result};

use crate::device::Device;

/// How an allocation is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stream-ordered: `cuMemAllocAsync`, as cudarc allocates by itself.
    Ordered,
    /// Plain: `cuMemAlloc`, as most programs do.
    Plain,
}

impl Kind {
    /// Alternating, so that a program has both.
    #[must_use]
    pub fn alternate(number: usize) -> Kind {
        if number.is_multiple_of(2) {
            Kind::Ordered
        } else {
            Kind::Plain
        }
    }
}

/// An allocation on the device, freed when dropped.
pub struct Memory {
    /// Taken only by `drop`.
    slice: Option<CudaSlice<u8>>,
    kind: Kind,
    address: u64,
    bytes: u64,
}

impl Memory {
    /// Allocates; what the memory holds is not defined.
    ///
    /// # Errors
    /// What the driver says.
    pub fn new(stream: &Arc<CudaStream>, kind: Kind, bytes: u64) -> Result<Memory, DriverError> {
        let len = usize::try_from(bytes).unwrap_or(usize::MAX);
        let slice = match kind {
            // SAFETY: bytes are read only after they were written, by copies or kernels.
            Kind::Ordered => unsafe { stream.alloc::<u8>(len)? },
            Kind::Plain => {
                stream.context().bind_to_thread()?;
                // SAFETY: a new allocation of `len` bytes, owned by the slice until `drop` takes it back.
                unsafe {
                    let address = result::malloc_sync(len)?;
                    stream.upgrade_device_ptr::<u8>(address, len)
                }
            }
        };
        let address = slice.device_ptr(stream).0;
        Ok(Memory {
            slice: Some(slice),
            kind,
            address,
            bytes,
        })
    }

    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whole 32-bit words, as the kernels count.
    #[must_use]
    pub fn words(&self) -> u64 {
        self.bytes / 4
    }

    /// Copies host bytes to the start of the allocation and waits.
    ///
    /// # Errors
    /// What the driver says.
    pub fn write(&mut self, stream: &Arc<CudaStream>, bytes: &[u8]) -> Result<(), DriverError> {
        if let Some(slice) = &mut self.slice {
            stream.memcpy_htod(bytes, slice)?;
        }
        stream.synchronize()
    }

    /// Copies bytes from the start of the allocation to the host and waits.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read(&self, stream: &Arc<CudaStream>, out: &mut [u8]) -> Result<(), DriverError> {
        if let Some(slice) = &self.slice {
            stream.memcpy_dtoh(&slice.slice(..out.len()), out)?;
        }
        stream.synchronize()
    }

    /// Whether the driver still knows this allocation at its address, with its size.
    ///
    /// # Errors
    /// What the driver says, which for an unknown address is an error too.
    pub fn unmoved(&self, device: &Device) -> Result<bool, DriverError> {
        let (base, bytes) = device.range(self.address)?;
        Ok(base == self.address && bytes >= self.bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some(slice) = self.slice.take() else {
            return;
        };
        if self.kind == Kind::Plain {
            let context = slice.context().clone();
            let address = slice.leak();
            context.record_err(context.bind_to_thread());
            // SAFETY: made by malloc_sync in `new`, leaked just now, so nobody else frees it.
            context.record_err(unsafe { result::free_sync(address) });
        }
    }
}

/// Checksums of many allocations by one pass of launches and one copy back.
///
/// # Errors
/// What the driver says.
pub fn checksums(
    device: &Device,
    stream: &Arc<CudaStream>,
    parts: impl Iterator<Item = (u64, u64)>,
) -> Result<Vec<u64>, DriverError> {
    let parts: Vec<(u64, u64)> = parts.collect();
    let results = stream.alloc_zeros::<u64>(parts.len().max(1))?;
    let at = results.device_ptr(stream).0;
    for (number, (address, words)) in parts.iter().enumerate() {
        device.checksum(stream, *address, *words, at + 8 * number as u64)?;
    }
    let mut sums = vec![0; parts.len()];
    stream.memcpy_dtoh(&results.slice(..parts.len()), &mut sums)?;
    stream.synchronize()?;
    Ok(sums)
}
