//! Waiting for and writing values in stream order.

use crate::abi::{In, exports};
use crate::submit::{stream, submit};
use spillway_simulator_core::code::{INVALID_VALUE, NOT_SUPPORTED, R};
use spillway_simulator_core::driver;
use spillway_simulator_core::exec::Op;
use spillway_simulator_core::graph::BATCH_MEM_OP;

fn check(at: u64, wide: bool) -> R {
    let driver = driver::get()?;
    let bytes = if wide { 8 } else { 4 };
    if at == 0 || !at.is_multiple_of(bytes) {
        return Err(INVALID_VALUE);
    }
    let context = spillway_simulator_core::context::top().map_or(0, |c| c.id);
    match crate::copy::range(driver, at, bytes, context)? {
        crate::copy::Range::Pageable => Err(INVALID_VALUE),
        _ => Ok(()),
    }
}

fn wait(on: u64, per_thread: bool, at: u64, value: u64, flags: u32, wide: bool) -> R {
    let stream = stream(on, per_thread)?;
    check(at, wide)?;
    // GEQ, EQ, AND, NOR; flushing remote writes is not simulated.
    if flags & !3 != 0 {
        return Err(if flags & !(3 | 1 << 30) == 0 {
            NOT_SUPPORTED
        } else {
            INVALID_VALUE
        });
    }
    submit(
        &stream,
        BATCH_MEM_OP,
        Op::WaitValue {
            at,
            value,
            wide,
            flags,
        },
    )
    .map(|_| ())
}

fn write(on: u64, per_thread: bool, at: u64, value: u64, flags: u32, wide: bool) -> R {
    let stream = stream(on, per_thread)?;
    check(at, wide)?;
    // DEFAULT, NO_MEMORY_BARRIER.
    if flags & !1 != 0 {
        return Err(INVALID_VALUE);
    }
    submit(&stream, BATCH_MEM_OP, Op::WriteValue { at, value, wide }).map(|_| ())
}

/// One entry of a batch: operation, address, value, flags; the rest is padding to six words.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Operation {
    operation: u32,
    address: u64,
    value: u64,
    flags: u32,
    alias: u64,
    padding: u64,
}

fn batch(on: u64, per_thread: bool, count: u32, operations: In<Operation>, flags: u32) -> R {
    if flags != 0 || count > 256 {
        return Err(INVALID_VALUE);
    }
    let operations = operations.list(count as usize)?;
    for o in &operations {
        match o.operation {
            1 => wait(
                on,
                per_thread,
                o.address,
                o.value & 0xffff_ffff,
                o.flags,
                false,
            )?,
            2 => write(
                on,
                per_thread,
                o.address,
                o.value & 0xffff_ffff,
                o.flags,
                false,
            )?,
            4 => wait(on, per_thread, o.address, o.value, o.flags, true)?,
            5 => write(on, per_thread, o.address, o.value, o.flags, true)?,
            // Flushes and barriers: order is total here.
            3 | 6 => {}
            _ => return Err(INVALID_VALUE),
        }
    }
    Ok(())
}

exports! {
    fn cuStreamWaitValue32 / cuStreamWaitValue32_ptsz [per_thread] (on: u64, at: u64, value: u32, flags: u32) {
        wait(on, per_thread, at, u64::from(value), flags, false)
    }

    fn cuStreamWaitValue32_v2 / cuStreamWaitValue32_v2_ptsz [per_thread] (on: u64, at: u64, value: u32, flags: u32) {
        wait(on, per_thread, at, u64::from(value), flags, false)
    }

    fn cuStreamWaitValue64 / cuStreamWaitValue64_ptsz [per_thread] (on: u64, at: u64, value: u64, flags: u32) {
        wait(on, per_thread, at, value, flags, true)
    }

    fn cuStreamWaitValue64_v2 / cuStreamWaitValue64_v2_ptsz [per_thread] (on: u64, at: u64, value: u64, flags: u32) {
        wait(on, per_thread, at, value, flags, true)
    }

    fn cuStreamWriteValue32 / cuStreamWriteValue32_ptsz [per_thread] (on: u64, at: u64, value: u32, flags: u32) {
        write(on, per_thread, at, u64::from(value), flags, false)
    }

    fn cuStreamWriteValue32_v2 / cuStreamWriteValue32_v2_ptsz [per_thread] (on: u64, at: u64, value: u32, flags: u32) {
        write(on, per_thread, at, u64::from(value), flags, false)
    }

    fn cuStreamWriteValue64 / cuStreamWriteValue64_ptsz [per_thread] (on: u64, at: u64, value: u64, flags: u32) {
        write(on, per_thread, at, value, flags, true)
    }

    fn cuStreamWriteValue64_v2 / cuStreamWriteValue64_v2_ptsz [per_thread] (on: u64, at: u64, value: u64, flags: u32) {
        write(on, per_thread, at, value, flags, true)
    }

    fn cuStreamBatchMemOp / cuStreamBatchMemOp_ptsz [per_thread] (on: u64, count: u32, operations: In<Operation>, flags: u32) {
        batch(on, per_thread, count, operations, flags)
    }

    fn cuStreamBatchMemOp_v2 / cuStreamBatchMemOp_v2_ptsz [per_thread] (on: u64, count: u32, operations: In<Operation>, flags: u32) {
        batch(on, per_thread, count, operations, flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::driver::sys;

    #[test]
    fn a_batch_entry_is_as_large_as_in_the_header() {
        assert_eq!(
            size_of::<Operation>(),
            size_of::<sys::CUstreamBatchMemOpParams_union>()
        );
    }
}
