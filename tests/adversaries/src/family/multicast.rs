//! Multicast objects: a binding keeps memory whose handle is released.

use crate::driver::{
    Code, cuMemRelease, cuMulticastAddDevice, cuMulticastBindMem, cuMulticastCreate,
    cuMulticastUnbind,
};
use crate::family::physical::create;
use crate::stage::Stage;
use crate::types::Multicast;
use crate::way::{Way, attempt};

/// Bound, and its own handle released or not.
struct Bound {
    release: bool,
}

impl Way for Bound {
    type Held = (u64, u64, u64);

    fn take(&mut self, bytes: u64) -> Result<Self::Held, Code> {
        let size = bytes as usize;
        let mut object = 0;
        let properties = Multicast {
            devices: 1,
            bytes: size,
            handle_types: 0,
            flags: 0,
        };
        let mut code = cuMulticastCreate(&mut object, &properties);
        if !code.is_ok() {
            return Err(code);
        }
        code = cuMulticastAddDevice(object, 0);
        let memory = if code.is_ok() {
            create(bytes, 0)
        } else {
            Err(code)
        };
        let memory = match memory {
            Ok(memory) => memory,
            Err(code) => {
                cuMemRelease(object);
                return Err(code);
            }
        };
        code = cuMulticastBindMem(object, 0, memory, 0, size, 0);
        if !code.is_ok() {
            cuMemRelease(memory);
            cuMemRelease(object);
            return Err(code);
        }
        if self.release {
            cuMemRelease(memory);
        }
        Ok((object, memory, bytes))
    }

    fn give(&mut self, (object, memory, bytes): Self::Held) -> Code {
        let code = cuMulticastUnbind(object, 0, 0, bytes as usize);
        if !self.release {
            cuMemRelease(memory);
        }
        let released = cuMemRelease(object);
        if code.is_ok() { released } else { code }
    }
}

/// See the module.
pub fn run(stage: &Stage) {
    attempt(stage, "bound", Bound { release: false });
    attempt(stage, "bound, handle released", Bound { release: true });
}
