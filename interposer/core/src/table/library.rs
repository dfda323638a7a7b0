//! The two libraries whose entry points the table lists.

use core::ffi::CStr;

/// Which library an entry point belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::upper_case_acronyms, reason = "spelled as in the rows")]
#[repr(C)]
pub enum Library {
    /// The CUDA driver.
    CUDA,
    /// The management library.
    NVML,
}

impl Library {
    /// The name that programs link against.
    #[must_use]
    pub const fn soname(self) -> &'static CStr {
        match self {
            Self::CUDA => c"libcuda.so.1",
            Self::NVML => c"libnvidia-ml.so.1",
        }
    }

    /// How the file name of a loaded copy begins, whatever its version.
    #[must_use]
    pub const fn file_prefix(self) -> &'static [u8] {
        match self {
            Self::CUDA => b"libcuda.so",
            Self::NVML => b"libnvidia-ml.so",
        }
    }
}
