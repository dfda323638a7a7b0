//! Copies of every shape, synchronous and not.
//!
//! Ranges are checked when the call is made (known memory, inside one allocation, not across a
//! registration's border) and again, by the work itself, when the copy runs.

use crate::abi::{In, bytes, exports};
use crate::array;
use crate::layout::{ARRAY, Copy2d, Copy3d, DEVICE, HOST, Side3d, UNIFIED};
use crate::submit::{here, stream, submit, submit_and_wait};
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{INVALID_CONTEXT, INVALID_VALUE, R};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::exec::{Copy, Op};
use spillway_simulator_core::graph::MEMCPY;
use spillway_simulator_core::sync::read;
use std::sync::Arc;

/// What kind of memory a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    Device,
    Pinned,
    Pageable,
}

/// Looks at a range of unified addresses.
///
/// # Errors
/// `INVALID_VALUE` for null, for device addresses that nothing was ever allocated or reserved
/// at, for ranges that leave their allocation, and for the border of a registration.
pub fn range(driver: &Driver, at: u64, length: u64, context: u64) -> R<Range> {
    let end = at.checked_add(length).ok_or(INVALID_VALUE)?;
    if at == 0 {
        return Err(INVALID_VALUE);
    }
    let space = read(&driver.space);
    if !space.holds(at) {
        drop(space);
        let pinned = read(&driver.host).pinned(at, length, context)?;
        return Ok(if pinned {
            Range::Pinned
        } else {
            Range::Pageable
        });
    }
    let limit = match space.allocation(at) {
        Some(allocation) => allocation.start + allocation.length,
        None => space
            .reservation(at)
            .map(|(start, length)| start + length)
            .ok_or(INVALID_VALUE)?,
    };
    if end > limit {
        Err(INVALID_VALUE)
    } else {
        Ok(Range::Device)
    }
}

fn extent(pitch: u64, slice: u64, copy: &Copy) -> u64 {
    (copy.depth - 1) * slice + (copy.height - 1) * pitch + copy.width
}

/// Which memory the caller says each side is; `None` leaves it to the address.
#[derive(Clone, Copy)]
pub struct Sides {
    pub source: Option<bool>,
    pub target: Option<bool>,
}

pub const ANY: Sides = Sides {
    source: None,
    target: None,
};
pub const TO_DEVICE: Sides = Sides {
    source: Some(false),
    target: Some(true),
};
pub const TO_HOST: Sides = Sides {
    source: Some(true),
    target: Some(false),
};
pub const WITHIN: Sides = Sides {
    source: Some(true),
    target: Some(true),
};

/// How to wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The call returns when the copy is done, unless it stays on the device.
    Synchronous,
    Asynchronous,
}

/// Sources larger than this are not staged in one piece; the call waits for the copy instead.
const STAGE_MAX: u64 = 64 << 20;

/// Checks and submits a copy.
///
/// # Errors
/// `INVALID_VALUE`, those of the stream, those of a capture.
pub fn run(mut copy: Copy, sides: Sides, on: u64, per_thread: bool, wait: Wait) -> R {
    let (driver, context) = here()?;
    let stream = stream(on, per_thread)?;
    if wait == Wait::Synchronous {
        capture::allow_unsafe(driver)?;
        crate::submit::refuse_implicit(&stream)?;
    }
    if copy.width == 0 || copy.height == 0 || copy.depth == 0 {
        return Ok(());
    }
    let (source_bytes, target_bytes) = (
        extent(copy.source_pitch, copy.source_slice, &copy),
        extent(copy.target_pitch, copy.target_slice, &copy),
    );
    let source = range(driver, copy.source, source_bytes, context.id)?;
    let target = range(driver, copy.target, target_bytes, context.id)?;
    // Where the call names a device address, pageable memory is none.
    if sides.source == Some(true) && source == Range::Pageable
        || sides.target == Some(true) && target == Range::Pageable
    {
        return Err(INVALID_VALUE);
    }
    let capturing = capture::current(&stream).is_some();
    if wait == Wait::Synchronous {
        if source == Range::Device && target == Range::Device {
            return submit(&stream, MEMCPY, Op::Copy(copy)).map(|_| ());
        }
        return submit_and_wait(&stream, MEMCPY, Op::Copy(copy));
    }
    if capturing {
        return submit(&stream, MEMCPY, Op::Copy(copy)).map(|_| ());
    }
    match (source, target) {
        (_, Range::Pageable) => submit_and_wait(&stream, MEMCPY, Op::Copy(copy)),
        (Range::Pageable, _) if source_bytes > STAGE_MAX => {
            submit_and_wait(&stream, MEMCPY, Op::Copy(copy))
        }
        (Range::Pageable, _) => {
            copy.staged = Some(Arc::new(bytes(copy.source, source_bytes as usize)));
            submit(&stream, MEMCPY, Op::Copy(copy)).map(|_| ())
        }
        _ => submit(&stream, MEMCPY, Op::Copy(copy)).map(|_| ()),
    }
}

/// A copy without a shape.
///
/// # Errors
/// As [`run`].
pub fn linear(
    source: u64,
    target: u64,
    bytes: usize,
    sides: Sides,
    on: u64,
    per_thread: bool,
    wait: Wait,
) -> R {
    run(
        Copy::linear(source, target, bytes as u64),
        sides,
        on,
        per_thread,
        wait,
    )
}

/// One side of a shaped copy: address, pitch, slice, whether the caller says it is device memory.
fn side(side: &Side3d, width: u64, rows: u64) -> R<(u64, u64, u64, Option<bool>)> {
    if side.lod != 0 {
        return Err(INVALID_VALUE);
    }
    let (base, pitch, slice, device) = match side.kind {
        ARRAY => {
            let (base, pitch, slice) = array::storage(side.array)?;
            (base, pitch, slice, Some(true))
        }
        kind => {
            let pitch = if side.pitch == 0 {
                width + side.x as u64
            } else {
                side.pitch as u64
            };
            let rows = if side.height == 0 {
                rows + side.y as u64
            } else {
                side.height as u64
            };
            let (base, device) = match kind {
                HOST => (side.host, Some(false)),
                DEVICE => (side.device, Some(true)),
                UNIFIED => (side.device, None),
                _ => return Err(INVALID_VALUE),
            };
            if pitch < side.x as u64 + width {
                return Err(INVALID_VALUE);
            }
            (base, pitch, pitch * rows, device)
        }
    };
    Ok((
        base + side.z as u64 * slice + side.y as u64 * pitch + side.x as u64,
        pitch,
        slice,
        device,
    ))
}

/// A shaped copy from its description.
///
/// # Errors
/// `INVALID_VALUE` for what cannot be.
pub fn shaped(copy: &Copy3d) -> R<(Copy, Sides)> {
    let (width, height, depth) = (copy.width as u64, copy.height as u64, copy.depth as u64);
    let (source, source_pitch, source_slice, from) = side(&copy.source, width, height)?;
    let (target, target_pitch, target_slice, to) = side(&copy.target, width, height)?;
    let copy = Copy {
        source,
        source_pitch,
        source_slice,
        target,
        target_pitch,
        target_slice,
        width,
        height,
        depth,
        staged: None,
    };
    Ok((
        copy,
        Sides {
            source: from,
            target: to,
        },
    ))
}

fn flat(copy: &Copy2d) -> Copy3d {
    let side = |s: &crate::layout::Side2d| Side3d {
        x: s.x,
        y: s.y,
        z: 0,
        lod: 0,
        kind: s.kind,
        host: s.host,
        device: s.device,
        array: s.array,
        context: 0,
        pitch: s.pitch,
        height: 0,
    };
    Copy3d {
        source: side(&copy.source),
        target: side(&copy.target),
        width: copy.width,
        height: copy.height,
        depth: 1,
    }
}

/// A copy with a shape.
///
/// # Errors
/// As [`shaped`] and [`run`].
pub fn run_shaped(copy: &Copy3d, on: u64, per_thread: bool, wait: Wait) -> R {
    let (copy, sides) = shaped(copy)?;
    run(copy, sides, on, per_thread, wait)
}

fn peers(from: u64, to: u64) -> R {
    let driver = driver::get()?;
    let known = |context: u64| driver.contexts.get(context).is_some();
    if known(from) && known(to) {
        Ok(())
    } else {
        Err(INVALID_CONTEXT)
    }
}

use Wait::{Asynchronous, Synchronous};

exports! {
    fn cuMemcpy / cuMemcpy_ptds [per_thread] (target: u64, source: u64, n: usize) {
        linear(source, target, n, ANY, 0, per_thread, Synchronous)
    }

    fn cuMemcpyAsync / cuMemcpyAsync_ptsz [per_thread] (target: u64, source: u64, n: usize, on: u64) {
        linear(source, target, n, ANY, on, per_thread, Asynchronous)
    }

    fn cuMemcpyHtoD_v2 / cuMemcpyHtoD_v2_ptds [per_thread] (target: u64, source: u64, n: usize) {
        linear(source, target, n, TO_DEVICE, 0, per_thread, Synchronous)
    }

    fn cuMemcpyHtoDAsync_v2 / cuMemcpyHtoDAsync_v2_ptsz [per_thread] (target: u64, source: u64, n: usize, on: u64) {
        linear(source, target, n, TO_DEVICE, on, per_thread, Asynchronous)
    }

    fn cuMemcpyDtoH_v2 / cuMemcpyDtoH_v2_ptds [per_thread] (target: u64, source: u64, n: usize) {
        linear(source, target, n, TO_HOST, 0, per_thread, Synchronous)
    }

    fn cuMemcpyDtoHAsync_v2 / cuMemcpyDtoHAsync_v2_ptsz [per_thread] (target: u64, source: u64, n: usize, on: u64) {
        linear(source, target, n, TO_HOST, on, per_thread, Asynchronous)
    }

    fn cuMemcpyDtoD_v2 / cuMemcpyDtoD_v2_ptds [per_thread] (target: u64, source: u64, n: usize) {
        linear(source, target, n, WITHIN, 0, per_thread, Synchronous)
    }

    fn cuMemcpyDtoDAsync_v2 / cuMemcpyDtoDAsync_v2_ptsz [per_thread] (target: u64, source: u64, n: usize, on: u64) {
        linear(source, target, n, WITHIN, on, per_thread, Asynchronous)
    }

    fn cuMemcpyPeer / cuMemcpyPeer_ptds [per_thread] (target: u64, to: u64, source: u64, from: u64, n: usize) {
        peers(from, to)?;
        linear(source, target, n, WITHIN, 0, per_thread, Synchronous)
    }

    fn cuMemcpyPeerAsync / cuMemcpyPeerAsync_ptsz [per_thread] (
        target: u64, to: u64, source: u64, from: u64, n: usize, on: u64,
    ) {
        peers(from, to)?;
        linear(source, target, n, WITHIN, on, per_thread, Asynchronous)
    }

    fn cuMemcpy2D_v2 / cuMemcpy2D_v2_ptds [per_thread] (copy: In<Copy2d>) {
        run_shaped(&flat(&copy.get()?), 0, per_thread, Synchronous)
    }

    fn cuMemcpy2DUnaligned_v2 / cuMemcpy2DUnaligned_v2_ptds [per_thread] (copy: In<Copy2d>) {
        run_shaped(&flat(&copy.get()?), 0, per_thread, Synchronous)
    }

    fn cuMemcpy2DAsync_v2 / cuMemcpy2DAsync_v2_ptsz [per_thread] (copy: In<Copy2d>, on: u64) {
        run_shaped(&flat(&copy.get()?), on, per_thread, Asynchronous)
    }

    fn cuMemcpy3D_v2 / cuMemcpy3D_v2_ptds [per_thread] (copy: In<Copy3d>) {
        run_shaped(&copy.get()?, 0, per_thread, Synchronous)
    }

    fn cuMemcpy3DAsync_v2 / cuMemcpy3DAsync_v2_ptsz [per_thread] (copy: In<Copy3d>, on: u64) {
        run_shaped(&copy.get()?, on, per_thread, Asynchronous)
    }

    fn cuMemcpy3DPeer / cuMemcpy3DPeer_ptds [per_thread] (copy: In<Copy3d>) {
        let copy = copy.get()?;
        peers(copy.source.context, copy.target.context)?;
        run_shaped(&copy, 0, per_thread, Synchronous)
    }

    fn cuMemcpy3DPeerAsync / cuMemcpy3DPeerAsync_ptsz [per_thread] (copy: In<Copy3d>, on: u64) {
        let copy = copy.get()?;
        peers(copy.source.context, copy.target.context)?;
        run_shaped(&copy, on, per_thread, Asynchronous)
    }

    fn cuMemcpyHtoA_v2 / cuMemcpyHtoA_v2_ptds [per_thread] (array: u64, offset: usize, source: u64, n: usize) {
        linear(source, array::storage(array)?.0 + offset as u64, n, ANY, 0, per_thread, Synchronous)
    }

    fn cuMemcpyAtoH_v2 / cuMemcpyAtoH_v2_ptds [per_thread] (target: u64, array: u64, offset: usize, n: usize) {
        linear(array::storage(array)?.0 + offset as u64, target, n, ANY, 0, per_thread, Synchronous)
    }

    fn cuMemcpyDtoA_v2 / cuMemcpyDtoA_v2_ptds [per_thread] (array: u64, offset: usize, source: u64, n: usize) {
        linear(source, array::storage(array)?.0 + offset as u64, n, WITHIN, 0, per_thread, Synchronous)
    }

    fn cuMemcpyAtoD_v2 / cuMemcpyAtoD_v2_ptds [per_thread] (target: u64, array: u64, offset: usize, n: usize) {
        linear(array::storage(array)?.0 + offset as u64, target, n, WITHIN, 0, per_thread, Synchronous)
    }
}
