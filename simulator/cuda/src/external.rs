//! External memory: what another API, here `cuMemCreate`, exported as a descriptor.

use crate::abi::{In, Out, exports, take_descriptor};
use crate::layout::{ExternalBuffer, ExternalMemory};
use crate::submit::here;
use spillway_simulator_core::classic::{self, Importer};
use spillway_simulator_core::code::{INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED};
use spillway_simulator_core::driver::Registry;
use spillway_simulator_core::space::Physical;
use std::sync::{Arc, LazyLock};

const OPAQUE_FD: u32 = 1;

struct Imported {
    context: u64,
    physical: Arc<Physical>,
    bytes: u64,
}

static IMPORTED: LazyLock<Registry<Imported>> = LazyLock::new(Registry::default);

exports! {
    fn cuImportExternalMemory(out: Out<u64>, descriptor: In<ExternalMemory>) {
        out.needed()?;
        let (driver, context) = here()?;
        let wanted = descriptor.get()?;
        if wanted.kind != OPAQUE_FD {
            // Other kinds come from systems that are not here.
            return Err(if (2..=9).contains(&wanted.kind) { NOT_SUPPORTED } else { INVALID_VALUE });
        }
        let fd = wanted.handle[0] as i32;
        let physical = Physical::import(driver.shared, fd).map_err(|_| INVALID_HANDLE)?;
        if wanted.flags & !1 != 0 || wanted.bytes == 0 || wanted.bytes > physical.bytes() {
            return Err(INVALID_VALUE);
        }
        let id = physical.id;
        IMPORTED.insert(id, Arc::new(Imported { context: context.id, physical, bytes: wanted.bytes }));
        out.set(id)?;
        take_descriptor(fd);
        Ok(())
    }

    fn cuExternalMemoryGetMappedBuffer(out: Out<u64>, id: u64, descriptor: In<ExternalBuffer>) {
        out.needed()?;
        let (driver, _) = here()?;
        let memory = IMPORTED.get(id).ok_or(INVALID_HANDLE)?;
        let wanted = descriptor.get()?;
        let inside = wanted.offset.checked_add(wanted.bytes).is_some_and(|end| end <= memory.bytes);
        if wanted.flags != 0 || !inside {
            return Err(INVALID_VALUE);
        }
        let importer = Importer::External(memory.context);
        out.set(classic::import(driver, &importer, Arc::clone(&memory.physical), wanted.offset, wanted.bytes)?)
    }

    fn cuDestroyExternalMemory(id: u64) {
        here()?;
        IMPORTED.remove(id).map(|_| ()).ok_or(INVALID_HANDLE)
    }
}
