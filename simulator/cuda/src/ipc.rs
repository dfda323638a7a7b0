//! Classic memory shared between processes by handles of 64 bytes.

use crate::abi::{Out, exports};
use crate::submit::here;
use spillway_simulator_core::classic::{self, IMPORTED, Importer};
use spillway_simulator_core::code::{INVALID_CONTEXT, INVALID_VALUE, R};
use spillway_simulator_core::driver;
use spillway_simulator_core::sharing::Name;
use spillway_simulator_core::sync::{lock, read};
use std::sync::Mutex;

/// `CUipcMemHandle`, passed by value.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Handle {
    name: Name,
    /// The slot of the process that exported it, plus one.
    owner: u64,
}

/// A handle that is open here.
struct Open {
    handle: Handle,
    context: u64,
    start: u64,
    count: u32,
}

static OPEN: Mutex<Vec<Open>> = Mutex::new(Vec::new());

fn open(out: Out<u64>, handle: Handle, flags: u32) -> R {
    const LAZY_ENABLE_PEER_ACCESS: u32 = 1;
    out.needed()?;
    let (driver, context) = here()?;
    if flags != LAZY_ENABLE_PEER_ACCESS {
        return Err(INVALID_VALUE);
    }
    if handle.owner == u64::from(driver.shared.slot()) + 1 {
        return Err(INVALID_CONTEXT);
    }
    let mut opened = lock(&OPEN);
    opened.retain(|o| driver.contexts.get(o.context).is_some());
    let known = opened
        .iter_mut()
        .find(|o| o.handle == handle && o.context == context.id);
    if let Some(known) = known {
        known.count += 1;
        return out.set(known.start);
    }
    let start = handle.name.import(driver, &Importer::Context(context.id))?;
    opened.push(Open {
        handle,
        context: context.id,
        start,
        count: 1,
    });
    out.set(start)
}

exports! {
    fn cuIpcGetMemHandle(out: Out<Handle>, address: u64) {
        out.needed()?;
        let (driver, _) = here()?;
        let space = read(&driver.space);
        let allocation = space.allocation(address).filter(|a| a.pool == 0).cloned().ok_or(INVALID_VALUE)?;
        drop(space);
        out.set(Handle {
            name: Name::of(driver, &allocation)?,
            owner: u64::from(driver.shared.slot()) + 1,
        })
    }

    fn cuIpcOpenMemHandle(out: Out<u64>, handle: Handle, flags: u32) {
        open(out, handle, flags)
    }

    fn cuIpcOpenMemHandle_v2(out: Out<u64>, handle: Handle, flags: u32) {
        open(out, handle, flags)
    }

    fn cuIpcCloseMemHandle(address: u64) {
        let (driver, context) = here()?;
        let mut opened = lock(&OPEN);
        let index = opened
            .iter()
            .position(|o| o.start == address && o.context == context.id)
            .ok_or(INVALID_VALUE)?;
        opened[index].count -= 1;
        if opened[index].count > 0 {
            return Ok(());
        }
        opened.swap_remove(index);
        drop(opened);
        for context in driver::get()?.contexts.all() {
            context.drain();
        }
        let allocation = classic::find(driver, address)?;
        if allocation.pool != IMPORTED {
            return Err(INVALID_VALUE);
        }
        classic::free(driver, address, &context.blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_as_large_as_in_the_header() {
        assert_eq!(
            size_of::<Handle>(),
            size_of::<cudarc::driver::sys::CUipcMemHandle_st>()
        );
    }
}
