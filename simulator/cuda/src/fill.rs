//! Memsets.

use crate::abi::exports;
use crate::copy::{self, Range};
use crate::submit::{here, stream, submit, submit_and_wait};
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{INVALID_VALUE, R};
use spillway_simulator_core::exec::{Fill, Op};
use spillway_simulator_core::graph::MEMSET;

/// Checks a fill's range and alignment; false if there is nothing to do.
///
/// # Errors
/// `INVALID_VALUE`.
pub fn check(fill: &Fill) -> R<Option<Range>> {
    let (driver, context) = here()?;
    if fill.width == 0 || fill.height == 0 {
        return Ok(None);
    }
    let element = u64::from(fill.element);
    let row = fill.width.checked_mul(element).ok_or(INVALID_VALUE)?;
    if !fill.target.is_multiple_of(element)
        || fill.height > 1 && (fill.pitch < row || !fill.pitch.is_multiple_of(element))
    {
        return Err(INVALID_VALUE);
    }
    let bytes = (fill.height - 1)
        .checked_mul(fill.pitch)
        .and_then(|b| b.checked_add(row))
        .ok_or(INVALID_VALUE)?;
    match copy::range(driver, fill.target, bytes, context.id)? {
        Range::Pageable => Err(INVALID_VALUE),
        range => Ok(Some(range)),
    }
}

/// Checks and submits a fill.
///
/// # Errors
/// As [`check`], and those of the stream and of a capture.
pub fn run(fill: Fill, on: u64, per_thread: bool, synchronous: bool) -> R {
    let (driver, _) = here()?;
    let stream = stream(on, per_thread)?;
    if synchronous {
        capture::allow_unsafe(driver)?;
        crate::submit::refuse_implicit(&stream)?;
    }
    match check(&fill)? {
        None => Ok(()),
        // A fill of device memory is not waited for, also by the synchronous calls.
        Some(Range::Pinned) if synchronous => submit_and_wait(&stream, MEMSET, Op::Fill(fill)),
        Some(_) => submit(&stream, MEMSET, Op::Fill(fill)).map(|_| ()),
    }
}

/// A fill of `n` elements.
pub fn flat(target: u64, value: u32, element: u32, n: usize) -> Fill {
    Fill {
        target,
        pitch: 0,
        value,
        element,
        width: n as u64,
        height: 1,
    }
}

/// A fill of rows.
pub fn shaped(
    target: u64,
    pitch: usize,
    value: u32,
    element: u32,
    width: usize,
    height: usize,
) -> Fill {
    Fill {
        target,
        pitch: pitch as u64,
        value,
        element,
        width: width as u64,
        height: height as u64,
    }
}

exports! {
    fn cuMemsetD8_v2 / cuMemsetD8_v2_ptds [per_thread] (target: u64, value: u8, n: usize) {
        run(flat(target, u32::from(value), 1, n), 0, per_thread, true)
    }

    fn cuMemsetD16_v2 / cuMemsetD16_v2_ptds [per_thread] (target: u64, value: u16, n: usize) {
        run(flat(target, u32::from(value), 2, n), 0, per_thread, true)
    }

    fn cuMemsetD32_v2 / cuMemsetD32_v2_ptds [per_thread] (target: u64, value: u32, n: usize) {
        run(flat(target, value, 4, n), 0, per_thread, true)
    }

    fn cuMemsetD8Async / cuMemsetD8Async_ptsz [per_thread] (target: u64, value: u8, n: usize, on: u64) {
        run(flat(target, u32::from(value), 1, n), on, per_thread, false)
    }

    fn cuMemsetD16Async / cuMemsetD16Async_ptsz [per_thread] (target: u64, value: u16, n: usize, on: u64) {
        run(flat(target, u32::from(value), 2, n), on, per_thread, false)
    }

    fn cuMemsetD32Async / cuMemsetD32Async_ptsz [per_thread] (target: u64, value: u32, n: usize, on: u64) {
        run(flat(target, value, 4, n), on, per_thread, false)
    }

    fn cuMemsetD2D8_v2 / cuMemsetD2D8_v2_ptds [per_thread] (target: u64, pitch: usize, value: u8, w: usize, h: usize) {
        run(shaped(target, pitch, u32::from(value), 1, w, h), 0, per_thread, true)
    }

    fn cuMemsetD2D16_v2 / cuMemsetD2D16_v2_ptds [per_thread] (target: u64, pitch: usize, value: u16, w: usize, h: usize) {
        run(shaped(target, pitch, u32::from(value), 2, w, h), 0, per_thread, true)
    }

    fn cuMemsetD2D32_v2 / cuMemsetD2D32_v2_ptds [per_thread] (target: u64, pitch: usize, value: u32, w: usize, h: usize) {
        run(shaped(target, pitch, value, 4, w, h), 0, per_thread, true)
    }

    fn cuMemsetD2D8Async / cuMemsetD2D8Async_ptsz [per_thread] (target: u64, pitch: usize, value: u8, w: usize, h: usize, on: u64) {
        run(shaped(target, pitch, u32::from(value), 1, w, h), on, per_thread, false)
    }

    fn cuMemsetD2D16Async / cuMemsetD2D16Async_ptsz [per_thread] (target: u64, pitch: usize, value: u16, w: usize, h: usize, on: u64) {
        run(shaped(target, pitch, u32::from(value), 2, w, h), on, per_thread, false)
    }

    fn cuMemsetD2D32Async / cuMemsetD2D32Async_ptsz [per_thread] (target: u64, pitch: usize, value: u32, w: usize, h: usize, on: u64) {
        run(shaped(target, pitch, value, 4, w, h), on, per_thread, false)
    }
}
