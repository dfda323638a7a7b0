//! The device, its context, and an empty kernel: what every bench needs first.

use std::ffi::CStr;
use std::ptr::null_mut;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::driver::{Both, Handle, check};

/// A kernel that does nothing, for every device since compute capability 5.0.
const NOTHING: &CStr = c"
.version 6.0
.target sm_50
.address_size 64
.visible .entry nothing()
{
    ret;
}
";

/// The first device, ready for work.
pub struct Device {
    /// The driver's functions.
    pub both: Both,
    /// `CUdevice`
    pub ordinal: i32,
    /// Its primary context.
    pub context: Handle,
    /// As the driver calls it.
    pub name: String,
    /// CUDA version of the driver.
    pub version: i32,
}

// SAFETY: function addresses and handles of the driver, which any thread may use.
unsafe impl Sync for Device {}

impl Device {
    /// Starts CUDA as a program does, and makes the first device's primary context current.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn start() -> Result<Self> {
        let both = Both::open()?;
        let driver = &both.hooked;
        let (mut ordinal, mut version) = (0, 0);
        let mut context = null_mut();
        let mut name = [0; 128];
        // SAFETY: the driver fills the objects that it is given.
        unsafe {
            check("cuInit", (driver.cuInit)(0))?;
            check(
                "cuDriverGetVersion",
                (driver.cuDriverGetVersion)(&raw mut version),
            )?;
            check("cuDeviceGet", (driver.cuDeviceGet)(&raw mut ordinal, 0))?;
            check(
                "cuDeviceGetName",
                (driver.cuDeviceGetName)(name.as_mut_ptr(), 127, ordinal),
            )?;
            check(
                "cuDevicePrimaryCtxRetain",
                (driver.cuDevicePrimaryCtxRetain)(&raw mut context, ordinal),
            )?;
            check("cuCtxSetCurrent", (driver.cuCtxSetCurrent)(context))?;
        }
        // SAFETY: zeroed, and the driver writes at most 127 bytes.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            both,
            ordinal,
            context,
            name,
            version,
        })
    }

    /// What every figure says of where it is from.
    #[must_use]
    pub fn describe(&self) -> Map<String, Value> {
        let preload = std::env::var("LD_PRELOAD").unwrap_or_default();
        let preload = preload.rsplit('/').next().unwrap_or_default();
        let mut map = Map::new();
        map.insert("preload".into(), json!(preload));
        map.insert("driver".into(), json!(self.name));
        map.insert("driver_version".into(), json!(self.version));
        map.insert("replaced".into(), json!(self.both.replaced));
        map
    }

    /// Makes the device's context the calling thread's.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as the process.
        check("cuCtxSetCurrent", unsafe {
            (self.both.hooked.cuCtxSetCurrent)(self.context)
        })
    }

    /// Loads the empty kernel.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn kernel(&self) -> Result<Handle> {
        let (mut module, mut function) = (null_mut(), null_mut());
        let driver = &self.both.hooked;
        // SAFETY: PTX text that ends with a null, and places for the driver's answers.
        unsafe {
            check(
                "cuModuleLoadData",
                (driver.cuModuleLoadData)(&raw mut module, NOTHING.as_ptr().cast()),
            )?;
            check(
                "cuModuleGetFunction",
                (driver.cuModuleGetFunction)(&raw mut function, module, c"nothing".as_ptr()),
            )?;
        }
        Ok(function)
    }
}
