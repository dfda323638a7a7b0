//! A device with the project's kernels loaded.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DriverError, LaunchConfig, PushKernelArg, sys,
};
use cudarc::nvrtc::Ptx;

/// The kernels: real PTX for a GPU, recognised by name on the simulator.
const PTX: &str = include_str!("../../../simulator/kernels/spillway.ptx");

/// Whether the driver said that there is not enough memory.
#[must_use]
pub fn is_out_of_memory(error: &DriverError) -> bool {
    error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

/// A device's primary context and the kernels in it. Shared by threads, each with a stream of its own.
#[derive(Clone)]
pub struct Device {
    pub context: Arc<CudaContext>,
    fill: CudaFunction,
    checksum: CudaFunction,
    spin: CudaFunction,
}

impl Device {
    /// # Errors
    /// What the driver says; kernels that do not load are an error of the driver too.
    pub fn open(ordinal: usize) -> Result<Device, DriverError> {
        let context = CudaContext::new(ordinal)?;
        let module = context.load_module(Ptx::from_src(PTX))?;
        Ok(Device {
            fill: module.load_function("fill_u32")?,
            checksum: module.load_function("checksum_u32")?,
            spin: module.load_function("spin_ns")?,
            context,
        })
    }

    /// A non-blocking stream.
    ///
    /// # Errors
    /// What the driver says.
    pub fn stream(&self) -> Result<Arc<CudaStream>, DriverError> {
        self.context.new_stream()
    }

    /// Writes `value` to `words` words at `address`, in stream order.
    ///
    /// # Errors
    /// What the driver says of the launch.
    pub fn fill(
        &self,
        stream: &CudaStream,
        address: u64,
        words: u64,
        value: u32,
    ) -> Result<(), DriverError> {
        let mut launch = stream.launch_builder(&self.fill);
        launch.arg(&address).arg(&words).arg(&value);
        // SAFETY: the kernel takes (u64, u64, u32) and writes `words` words at `address`, an allocation of the
        // caller that large; a wrong one is a fault on the device and an error later.
        unsafe { launch.launch(shape(words)) }.map(|_| ())
    }

    /// Adds the checksum of `words` words at `address` to the 64-bit number at `out`, in stream order.
    ///
    /// # Errors
    /// What the driver says of the launch.
    pub fn checksum(
        &self,
        stream: &CudaStream,
        address: u64,
        words: u64,
        out: u64,
    ) -> Result<(), DriverError> {
        let mut launch = stream.launch_builder(&self.checksum);
        launch.arg(&address).arg(&words).arg(&out);
        // SAFETY: the kernel takes (u64, u64, u64), reads `words` words at `address` and adds to 8 bytes at `out`.
        unsafe { launch.launch(shape(words)) }.map(|_| ())
    }

    /// Keeps the device busy for `ns` nanoseconds, in stream order.
    ///
    /// # Errors
    /// What the driver says of the launch.
    pub fn spin(&self, stream: &CudaStream, ns: u64) -> Result<(), DriverError> {
        let mut launch = stream.launch_builder(&self.spin);
        launch.arg(&ns);
        let one = LaunchConfig {
            grid_dim: (1, 1, 1),
            block_dim: (1, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the kernel takes one u64 and touches no memory.
        unsafe { launch.launch(one) }.map(|_| ())
    }

    /// The driver's base address and size of the allocation around `address`, as any program may ask.
    ///
    /// # Errors
    /// What the driver says.
    pub fn range(&self, address: u64) -> Result<(u64, u64), DriverError> {
        self.context.bind_to_thread()?;
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: both places are ours; the address is only looked up.
        unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, address) }.result()?;
        Ok((base, bytes as u64))
    }
}

/// Enough threads for the words, no more than a GPU runs at once; the kernels' loops stride by the grid.
fn shape(words: u64) -> LaunchConfig {
    let blocks = u32::try_from(words.div_ceil(256).clamp(1, 1024)).unwrap_or(1);
    LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (256, 1, 1),
        shared_mem_bytes: 0,
    }
}
