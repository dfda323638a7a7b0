//! The one cache line that every call reads.

use crate::driver::{Slot, stubs};
use crate::table::sig;
use core::sync::atomic::{AtomicIsize, AtomicU32};

/// State bit: closed, callers wait.
pub const CLOSED: u32 = 1;
/// State bit: the kernel has no `membarrier` for us, so every caller fences.
pub const FENCED: u32 = 2;

/// State, the threads' word, and the addresses that are called most: 64 bytes, written hardly ever.
#[repr(C, align(64))]
pub struct Line {
    /// 0 when open; see [`CLOSED`] and [`FENCED`]. Also the futex that waiting callers sleep on.
    pub state: AtomicU32,
    /// Where a thread's word is, relative to its thread pointer; 0 until [`super::start`] has run.
    pub offset: AtomicIsize,
    /// The slots of the rows marked `hot`.
    pub hot: Hot,
}

/// The slots of the rows marked `hot` in the table.
#[allow(non_snake_case, missing_docs, reason = "named after the entry points")]
#[repr(C)]
pub struct Hot {
    pub cuLaunchKernel: Slot<sig::cuLaunchKernel>,
    pub cuLaunchKernelEx: Slot<sig::cuLaunchKernelEx>,
    pub cuMemcpyAsync: Slot<sig::cuMemcpyAsync>,
    pub cuMemcpyHtoDAsync_v2: Slot<sig::cuMemcpyHtoDAsync_v2>,
    pub cuMemcpyDtoHAsync_v2: Slot<sig::cuMemcpyDtoHAsync_v2>,
    pub cuMemcpyDtoDAsync_v2: Slot<sig::cuMemcpyDtoDAsync_v2>,
}

const _: () = assert!(size_of::<Line>() == 64, "one cache line");

/// The gate.
pub static LINE: Line = Line {
    state: AtomicU32::new(0),
    offset: AtomicIsize::new(0),
    hot: Hot {
        cuLaunchKernel: Slot::new(stubs::cuLaunchKernel as *mut ()),
        cuLaunchKernelEx: Slot::new(stubs::cuLaunchKernelEx as *mut ()),
        cuMemcpyAsync: Slot::new(stubs::cuMemcpyAsync as *mut ()),
        cuMemcpyHtoDAsync_v2: Slot::new(stubs::cuMemcpyHtoDAsync_v2 as *mut ()),
        cuMemcpyDtoHAsync_v2: Slot::new(stubs::cuMemcpyDtoHAsync_v2 as *mut ()),
        cuMemcpyDtoDAsync_v2: Slot::new(stubs::cuMemcpyDtoDAsync_v2 as *mut ()),
    },
};
