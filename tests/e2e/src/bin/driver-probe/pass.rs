//! Memory of a pool that is handed on.

use std::ffi::c_void;

use super::{Cuda, Handle};

/// `CUmemPoolProps`.
#[repr(C)]
struct PoolProps {
    kind: u32,
    handle_types: u32,
    location_type: u32,
    location: i32,
    windows: usize,
    rest: [u64; 8],
}

impl Cuda {
    /// From a pool that others may import. Its memory is imported under a second address, which is freed again.
    pub fn pass(&self, bytes: usize) -> Result<u64, i32> {
        let fine = |code: i32| if code == 0 { Ok(()) } else { Err(code) };
        let props = PoolProps {
            kind: 1,
            handle_types: 1,
            location_type: 1,
            location: 0,
            windows: 0,
            rest: [0; 8],
        };
        let (mut pool, mut again, mut file) = (0usize, 0usize, -1i32);
        let (mut at, mut other) = (0u64, 0u64);
        let mut data = Handle([0; 64]);
        fine(
            call!(self.0, "cuMemPoolCreate", &raw mut pool => *mut usize, &raw const props => *const PoolProps),
        )?;
        fine(
            call!(self.0, "cuMemPoolExportToShareableHandle", &raw mut file => *mut i32, pool => usize,
            1 => u32, 0 => u64),
        )?;
        fine(
            call!(self.0, "cuMemPoolImportFromShareableHandle", &raw mut again => *mut usize,
            usize::try_from(file).unwrap_or(0) => usize, 1 => u32, 0 => u64),
        )?;
        fine(
            call!(self.0, "cuMemAllocFromPoolAsync", &raw mut at => *mut u64, bytes => usize,
            pool => usize, 0 => usize),
        )?;
        fine(call!(self.0, "cuMemPoolExportPointer", &raw mut data => *mut Handle, at => u64))?;
        fine(
            call!(self.0, "cuMemPoolImportPointer", &raw mut other => *mut u64, again => usize,
            &raw mut data => *mut Handle),
        )?;
        fine(call!(self.0, "cuMemFreeAsync", other => u64, 0 => usize))?;
        fine(call!(self.0, "cuCtxSynchronize",))?;
        Ok(at)
    }
}
