//! The driver's result codes.

use crate::table::Library;

/// A `CUresult` or `nvmlReturn_t`, raw: newer drivers answer codes that no enum of today has.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
#[must_use]
pub struct Status(pub i32);

impl Status {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// An argument is out of its range.
    pub const INVALID_VALUE: Self = Self(1);
    /// No memory, or over the limit.
    pub const OUT_OF_MEMORY: Self = Self(2);
    /// `cuInit` has not succeeded in this process.
    pub const NOT_INITIALIZED: Self = Self(3);
    /// The driver is shutting down.
    pub const DEINITIALIZED: Self = Self(4);
    /// No device.
    pub const NO_DEVICE: Self = Self(100);
    /// No such device.
    pub const INVALID_DEVICE: Self = Self(101);
    /// No context is current, or it is gone.
    pub const INVALID_CONTEXT: Self = Self(201);
    /// Not a handle that the driver knows.
    pub const INVALID_HANDLE: Self = Self(400);
    /// The operating system refused.
    pub const OPERATING_SYSTEM: Self = Self(304);
    /// No such symbol, or no such function in this driver.
    pub const NOT_FOUND: Self = Self(500);
    /// Not finished yet.
    pub const NOT_READY: Self = Self(600);
    /// A kernel touched memory that is not mapped.
    pub const ILLEGAL_ADDRESS: Self = Self(700);
    /// The call is not allowed here.
    pub const NOT_PERMITTED: Self = Self(800);
    /// The call is not supported here.
    pub const NOT_SUPPORTED: Self = Self(801);
    /// Not allowed while a stream captures.
    pub const STREAM_CAPTURE_UNSUPPORTED: Self = Self(900);
    /// Something else.
    pub const UNKNOWN: Self = Self(999);
    /// NVML: this function is not in the library.
    pub const NVML_FUNCTION_NOT_FOUND: Self = Self(13);

    /// Whether the call did what it should.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 == 0
    }

    /// `Ok` for success, the code itself otherwise.
    ///
    /// # Errors
    /// Every code but [`Status::SUCCESS`].
    pub const fn ok(self) -> Result<(), Self> {
        if self.is_success() { Ok(()) } else { Err(self) }
    }

    /// What a call of a function that `library` lacks answers.
    pub const fn missing(library: Library) -> Self {
        match library {
            Library::CUDA => Self::NOT_FOUND,
            Library::NVML => Self::NVML_FUNCTION_NOT_FOUND,
        }
    }
}

impl core::fmt::Debug for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Status({})", self.0)
    }
}
