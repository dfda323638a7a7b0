//! The table of entry points: what exists, what it does, and what this library does with it.
//!
//! [`ROWS`] and [`NVML_ROWS`] describe, [`sig`] has the C signature of every row as a type. The rows
//! themselves are in `rows.rs` and `nvml_rows.rs`; everything else (slots, wrappers, exports) expands
//! from them.

#[macro_use]
pub mod rows;
#[macro_use]
pub mod nvml_rows;
#[macro_use]
mod cudarc_names;
mod abi;
mod interop;
mod library;
#[cfg(test)]
mod tests;

pub use abi::{CUipcEventHandle, CUipcMemHandle, CUmemLocation};
pub use interop::is_interop;
pub use library::Library;

/// What an entry point does above all. One per row; further effects are [`Mark`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "spelled as in the rows")]
pub enum Class {
    /// Gives device memory to the application.
    allocates,
    /// Takes device memory back.
    frees,
    /// Edits mappings or access, without taking memory.
    maps,
    /// Puts work on the GPU that may touch memory.
    submits,
    /// Takes or touches device memory without being an allocation or work.
    needs_residency,
    /// Tells about memory or devices.
    reports,
    /// Crosses a process or API border.
    shares,
    /// Builds, captures or asks about graphs.
    capture,
    /// Start-up and look-up of entry points.
    loader,
    /// None of these.
    none,
}

/// A further property of an entry point. The names of classes are marks too: what the row does besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "spelled as in the rows")]
pub enum Mark {
    /// Stream 0 is the calling thread's own; the entry point also takes streams.
    ptsz,
    /// Works on the calling thread's default stream; the entry point takes no stream.
    ptds,
    /// Declared for 32-bit device pointers (CUDA 2 and 3).
    legacy,
    /// May make the driver take device memory of its own, or move managed memory to a device.
    takes,
    /// May make the driver give such memory back.
    gives,
    /// Pins or allocates host memory.
    host,
    /// Orders or waits for work, and submits none that touches memory.
    orders,
    /// Also class `allocates`.
    allocates,
    /// Also class `frees`.
    frees,
    /// Also class `maps`.
    maps,
    /// Also class `submits`.
    submits,
    /// Also class `reports`.
    reports,
    /// Also class `shares`.
    shares,
    /// Also class `capture`.
    capture,
    /// Also class `loader`.
    loader,
}

/// What this library does with an entry point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "spelled as in the rows")]
pub enum How {
    /// Exported: forwards through the gate, real address in the gate's cache line.
    hot,
    /// Exported: forwards through the gate.
    gated,
    /// Exported: a function in [`crate::hooks`] answers.
    custom,
    /// Exported: [`crate::entry`] answers.
    entry,
    /// Not exported; called by this library itself.
    slot,
    /// Not exported, not called.
    off,
}

impl How {
    /// Whether the name is an export of `libspillway.so`.
    #[must_use]
    pub const fn is_exported(self) -> bool {
        matches!(self, Self::hot | Self::gated | Self::custom | Self::entry)
    }
}

/// One entry point.
#[derive(Debug)]
pub struct Row {
    /// The name it is exported by.
    pub name: &'static str,
    /// `name` with its terminating zero.
    pub symbol: &'static core::ffi::CStr,
    /// What `cuGetProcAddress` calls it, with its terminating zero.
    pub base: &'static core::ffi::CStr,
    /// The CUDA version (`1000 * major + 10 * minor`) of this exact signature; 0 for NVML.
    pub version: i32,
    /// The library that has it.
    pub library: Library,
    /// What it does above all.
    pub class: Class,
    /// What it does besides.
    pub marks: &'static [Mark],
    /// What this library does with it.
    pub how: How,
}

impl Row {
    /// Whether this is the variant for per-thread default streams.
    #[must_use]
    pub fn is_per_thread(&self) -> bool {
        self.marks.contains(&Mark::ptsz) || self.marks.contains(&Mark::ptds)
    }
}

/// A name as a C string, checked when compiled.
macro_rules! c_name {
    ($name:ident) => {
        match core::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("a name with a zero inside"),
        }
    };
}

macro_rules! describe {
    ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
       [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
        &[$(Row {
            name: stringify!($name),
            symbol: c_name!($name),
            base: c_name!($base),
            version: $version,
            library: Library::$library,
            class: Class::$class,
            marks: &[$(Mark::$mark),*],
            how: How::$how,
        }),*]
    };
}

/// Every name of cuda.h 13.5, sorted.
pub static ROWS: &[Row] = driver_rows!(describe);
/// The NVML names of interest, sorted.
pub static NVML_ROWS: &[Row] = nvml_rows!(describe);

/// The C signature of every row.
pub mod sig {
    #![allow(non_camel_case_types, reason = "spelled as in cuda.h")]
    use super::{CUipcEventHandle, CUipcMemHandle, CUmemLocation};
    use crate::driver::Status;
    use core::ffi::{c_char, c_void};

    macro_rules! signatures {
        ($library:ident $($how:ident $class:ident $name:ident = $base:ident $version:literal
           [$($mark:ident)*] ($($argument:ident: $type:ty),*);)*) => {
            $(
                #[doc = concat!("`", stringify!($name), "`")]
                pub type $name = unsafe extern "C" fn($($type),*) -> Status;
            )*
        };
    }
    driver_rows!(signatures);
    nvml_rows!(signatures);
}

/// The row with exactly this exported name.
#[must_use]
pub fn find(name: &[u8]) -> Option<(usize, &'static Row)> {
    let rows = if name.starts_with(b"nvml") {
        NVML_ROWS
    } else {
        ROWS
    };
    let index = rows
        .binary_search_by(|row| row.name.as_bytes().cmp(name))
        .ok()?;
    Some((index, &rows[index]))
}
