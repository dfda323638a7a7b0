//! Which address stands for which row: the cdylib's exports, as it hands them over.

use crate::table::{self, Row};
use core::ffi::CStr;

/// The addresses of the exports, by row; null for rows without one. The plain library exports what is
/// hooked, the strict one every name of the driver's.
pub struct Exports {
    /// One per row of [`table::ROWS`].
    pub driver: &'static [*const ()],
    /// One per row of [`table::NVML_ROWS`].
    pub nvml: &'static [*const ()],
}

// SAFETY: addresses of functions, never changed.
unsafe impl Sync for Exports {}

impl Exports {
    /// The row and the export of this exact name, if there is one.
    #[must_use]
    pub fn find(&self, name: &CStr) -> Option<(&'static Row, *const ())> {
        let (index, row) = table::find(name.to_bytes())?;
        let exports = match row.library {
            table::Library::CUDA => self.driver,
            table::Library::NVML => self.nvml,
        };
        let export = *exports.get(index)?;
        (!export.is_null()).then_some((row, export))
    }
}
