//! Green contexts, and the parts of a device that they are made of. What came after 13.0 (work queues, splits by
//! a list of groups) is not there.

use crate::abi::{In, Out, exports};
use crate::context::entry_of;
use crate::device::device;
use crate::event::{record_all, wait_all};
use crate::stream;
use spillway_simulator_core::code::{
    CONTEXT_IS_DESTROYED, INVALID_CONTEXT, INVALID_DEVICE, INVALID_RESOURCE_CONFIGURATION,
    INVALID_RESOURCE_TYPE, INVALID_VALUE, R,
};
use spillway_simulator_core::context::{self, Current};
use spillway_simulator_core::driver;
use spillway_simulator_core::green::{Green, PARTITION, Part};
use spillway_simulator_core::limits::MULTIPROCESSORS;
use spillway_simulator_core::space::fresh_id;
use std::sync::Arc;

/// `CU_DEV_RESOURCE_TYPE_SM`, the only type so far.
const SM: u32 = 1;
/// `CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING`; the other flag asks for large clusters.
const ALONE: u32 = 1;
const SPLIT_FLAGS: u32 = 3;
/// `CU_GREEN_CTX_DEFAULT_STREAM`, which is required.
const DEFAULT_STREAM: u32 = 1;
const NON_BLOCKING: u32 = 1;
/// Marks what this driver has filled in.
const MARK: u32 = 0x5350_534d;

/// `CUdevResource`. The first words after the type are the driver's own.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Resource {
    kind: u32,
    mark: u32,
    gpu: u32,
    first: u32,
    split: [u32; 2],
    padding: [u32; 18],
    count: u32,
    least: u32,
    together: u32,
    rest: [u32; 9],
}

const _: () = assert!(size_of::<Resource>() == 144 && std::mem::offset_of!(Resource, count) == 96);

impl Resource {
    fn of(part: &Part) -> Self {
        Self {
            kind: if part.count == 0 { 0 } else { SM },
            mark: MARK,
            gpu: part.gpu,
            first: part.first,
            split: [part.split as u32, (part.split >> 32) as u32],
            padding: [0; 18],
            count: part.count,
            least: PARTITION,
            together: PARTITION,
            rest: [0; 9],
        }
    }

    /// The part that the driver has described in it.
    fn part(&self) -> R<Part> {
        if self.kind != SM {
            return Err(INVALID_RESOURCE_TYPE);
        }
        let end = u64::from(self.first) + u64::from(self.count);
        if self.mark != MARK || self.count == 0 || end > MULTIPROCESSORS {
            return Err(INVALID_VALUE);
        }
        Ok(Part {
            gpu: self.gpu,
            first: self.first,
            count: self.count,
            split: u64::from(self.split[0]) | u64::from(self.split[1]) << 32,
        })
    }
}

fn whole(gpu: u32) -> Part {
    Part {
        gpu,
        first: 0,
        count: MULTIPROCESSORS as u32,
        split: 0,
    }
}

fn answer(out: Out<Resource>, kind: u32, part: &Part) -> R {
    out.needed()?;
    if kind != SM {
        return Err(INVALID_RESOURCE_TYPE);
    }
    out.set(Resource::of(part))
}

/// The part of a green context may be split again.
fn own(green: &Green) -> Part {
    Part {
        split: 0,
        ..green.part
    }
}

fn green(handle: u64) -> R<Arc<Green>> {
    let driver = driver::get()?;
    driver.greens.get(handle).ok_or(INVALID_CONTEXT)
}

exports! {
    fn cuDeviceGetDevResource(ordinal: i32, out: Out<Resource>, kind: u32) {
        let (_, gpu) = device(ordinal)?;
        answer(out, kind, &whole(gpu))
    }

    fn cuCtxGetDevResource(handle: u64, out: Out<Resource>, kind: u32) {
        let driver = driver::get()?;
        let current = if handle == 0 { None } else { Some(entry_of(driver, handle)?) };
        let current = current.ok_or(INVALID_CONTEXT)?;
        match &current.green {
            Some(green) => answer(out, kind, &own(green)),
            None => answer(out, kind, &whole(current.context.gpu)),
        }
    }

    fn cuGreenCtxGetDevResource(handle: u64, out: Out<Resource>, kind: u32) {
        answer(out, kind, &own(&*green(handle)?))
    }

    fn cuDevSmResourceSplitByCount(
        result: Out<Resource>, groups: Out<u32>, from: In<Resource>, rest: Out<Resource>, flags: u32, least: u32,
    ) {
        driver::get()?;
        groups.needed()?;
        let part = from.get()?.part()?;
        if flags & !SPLIT_FLAGS != 0 || least > part.count {
            return Err(INVALID_VALUE);
        }
        let most = if result.is_null() { u32::MAX } else { In::<u32>::of(groups.raw() as u64).get()? };
        let (made, remains) = part.split(least, flags & ALONE != 0, most)?;
        if !result.is_null() {
            for (index, group) in made.iter().enumerate() {
                result.set_at(index, Resource::of(group))?;
            }
        }
        rest.offer(Resource::of(&remains));
        groups.set(made.len() as u32)
    }

    fn cuDevResourceGenerateDesc(out: Out<u64>, resources: In<Resource>, count: u32) {
        let driver = driver::get()?;
        out.needed()?;
        let parts = resources.list(count as usize)?.iter().map(Resource::part).collect::<R<Vec<_>>>()?;
        let first = parts.first().ok_or(INVALID_VALUE)?;
        let of_one_split = |part: &Part| part.split != 0 && part.split == first.split && part.gpu == first.gpu;
        if count > 1 && !parts.iter().all(of_one_split) {
            return Err(INVALID_RESOURCE_CONFIGURATION);
        }
        let sum = parts.iter().map(|part| part.count).sum();
        let id = fresh_id();
        driver.descriptions.insert(id, Arc::new(Part { count: sum, ..*first }));
        out.set(id)
    }

    fn cuGreenCtxCreate(out: Out<u64>, description: u64, ordinal: i32, flags: u32) {
        out.needed()?;
        let (driver, gpu) = device(ordinal)?;
        let part = driver.descriptions.get(description).ok_or(INVALID_VALUE)?;
        if flags != DEFAULT_STREAM {
            return Err(INVALID_VALUE);
        }
        if part.gpu != gpu {
            return Err(INVALID_DEVICE);
        }
        out.set(Green::new(driver, *part)?.id)
    }

    fn cuGreenCtxDestroy(handle: u64) {
        green(handle)?.destroy(driver::get()?);
        Ok(())
    }

    fn cuCtxFromGreenCtx(out: Out<u64>, handle: u64) {
        let green = green(handle)?;
        out.set(green.context_id)
    }

    fn cuGreenCtxGetId(handle: u64, out: Out<u64>) {
        let green = if handle == 0 {
            driver::get()?;
            context::top_entry().and_then(|current| current.green).ok_or(INVALID_CONTEXT)?
        } else {
            green(handle)?
        };
        if green.check() == Err(CONTEXT_IS_DESTROYED) {
            return Err(CONTEXT_IS_DESTROYED);
        }
        out.set(green.number)
    }

    fn cuGreenCtxRecordEvent(handle: u64, event: u64) {
        record_all(&Current::from(green(handle)?), event)
    }

    fn cuGreenCtxWaitEvent(handle: u64, event: u64) {
        wait_all(&Current::from(green(handle)?), event)
    }

    fn cuGreenCtxStreamCreate(out: Out<u64>, handle: u64, flags: u32, priority: i32) {
        out.needed()?;
        let current = Current::from(green(handle)?);
        current.check()?;
        if flags != NON_BLOCKING {
            return Err(INVALID_VALUE);
        }
        stream::make(out, &current, flags, priority)
    }

    fn cuStreamGetGreenCtx(handle: u64, out: Out<u64>) {
        out.set(crate::submit::stream(handle, false)?.green_id())
    }
}
