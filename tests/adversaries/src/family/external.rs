//! External memory, and pools that are handed on as descriptors and pointers: within one process, which has all of
//! it but by other names.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use crate::driver::{
    Address, Code, Handle, cuCtxSynchronize, cuDestroyExternalMemory,
    cuExternalMemoryGetMappedBuffer, cuImportExternalMemory, cuMemAllocFromPoolAsync, cuMemFree_v2,
    cuMemFreeAsync, cuMemPoolCreate, cuMemPoolDestroy, cuMemPoolExportPointer,
    cuMemPoolExportToShareableHandle, cuMemPoolImportFromShareableHandle, cuMemPoolImportPointer,
    cuMemPoolTrimTo,
};
use crate::family::physical::Exported;
use crate::stage::Stage;
use crate::types::{ExternalBuffer, ExternalMemory, POSIX_FD, PoolProperties, PoolShare};
use crate::way::{Way, attempt};

/// `CU_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD`.
const OPAQUE_FD: u32 = 1;

/// Exported, released, imported as external memory, mapped. The import takes the descriptor.
struct External {
    mapped: bool,
    /// Destroyed at once: only the buffer keeps the memory.
    destroyed: bool,
}

impl Way for External {
    type Held = (Handle, Address);

    fn take(&mut self, bytes: u64) -> Result<Self::Held, Code> {
        let descriptor = Exported.take(bytes)?;
        let description = ExternalMemory {
            kind: OPAQUE_FD,
            descriptor: descriptor.as_raw_fd(),
            bytes,
            ..ExternalMemory::default()
        };
        let mut memory = 0;
        let code = cuImportExternalMemory(&mut memory, &description);
        if !code.is_ok() {
            return Err(code);
        }
        // The driver has it now.
        let _ = descriptor.into_raw_fd();
        let mut at = 0;
        if self.mapped {
            let buffer = ExternalBuffer {
                bytes,
                ..ExternalBuffer::default()
            };
            let code = cuExternalMemoryGetMappedBuffer(&mut at, memory, &buffer);
            if !code.is_ok() {
                cuDestroyExternalMemory(memory);
                return Err(code);
            }
        }
        if self.destroyed {
            let code = cuDestroyExternalMemory(memory);
            if !code.is_ok() {
                return Err(code);
            }
        }
        Ok((memory, at))
    }

    fn give(&mut self, (memory, at): Self::Held) -> Code {
        let freed = if at != 0 {
            cuMemFree_v2(at)
        } else {
            Code::SUCCESS
        };
        if self.destroyed {
            return freed;
        }
        cuDestroyExternalMemory(memory)
    }
}

/// A pool that can be handed on; memory from it, and the same memory by its second name.
struct Passed {
    pool: Handle,
    again: Handle,
}

impl Passed {
    fn new() -> Result<Self, Code> {
        let mut passed = Self { pool: 0, again: 0 };
        let code = cuMemPoolCreate(&mut passed.pool, &PoolProperties::device(0, POSIX_FD));
        if !code.is_ok() {
            return Err(code);
        }
        let mut descriptor: i32 = -1;
        let out = (&raw mut descriptor).cast();
        let code = cuMemPoolExportToShareableHandle(out, passed.pool, POSIX_FD, 0);
        if !code.is_ok() {
            return Err(code);
        }
        // SAFETY: the driver has just opened it for us.
        let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let number = usize::try_from(owned.as_raw_fd()).unwrap_or(0);
        cuMemPoolImportFromShareableHandle(&mut passed.again, number, POSIX_FD, 0).then(passed)
    }
}

impl Way for Passed {
    type Held = (Address, Address);

    fn take(&mut self, bytes: u64) -> Result<Self::Held, Code> {
        let (mut at, mut other) = (0, 0);
        let code = cuMemAllocFromPoolAsync(&mut at, bytes as usize, self.pool, 0);
        if !code.is_ok() {
            return Err(code);
        }
        let mut share = PoolShare([0; 64]);
        let mut code = cuMemPoolExportPointer(&mut share, at);
        if code.is_ok() {
            code = cuMemPoolImportPointer(&mut other, self.again, &share);
        }
        if !code.is_ok() {
            cuMemFreeAsync(at, 0);
            cuCtxSynchronize();
        }
        code.then((at, other))
    }

    fn give(&mut self, (at, other): Self::Held) -> Code {
        let code = cuMemFreeAsync(other, 0);
        cuCtxSynchronize();
        let freed = cuMemFreeAsync(at, 0);
        if code.is_ok() { freed } else { code }
    }

    fn settle(&mut self) {
        cuCtxSynchronize();
        cuMemPoolTrimTo(self.pool, 0);
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        cuMemPoolDestroy(self.again);
        cuMemPoolDestroy(self.pool);
    }
}

/// See the module.
pub fn run(stage: &Stage) {
    for (name, mapped, destroyed) in [
        ("external memory", false, false),
        ("external memory, mapped", true, false),
        ("external memory, mapped and destroyed", true, true),
    ] {
        attempt(stage, name, External { mapped, destroyed });
    }
    match Passed::new() {
        Ok(passed) => attempt(stage, "pool handed on", passed),
        Err(code) => stage.skip(
            "pool handed on",
            &format!("handing a pool on: the driver answers {}", code.0),
        ),
    }
}
