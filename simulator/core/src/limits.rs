//! Sizes that a context sets aside: stacks, the printf buffer, the heap of `malloc`, pending launches.
//!
//! Who says so: the driver's header for when they are taken and that too much is out of memory; the CUDA
//! Programming Guide for the heap, which is taken when a module that uses it is loaded and has its size
//! from then on. That stacks are set aside for every thread that the device can hold has been measured in public more than
//! once; that giving a smaller size gives memory back, too. Nobody has published when the printf
//! buffer is taken, and what a pending launch takes: here at once, and 8 KiB.
//! What the defaults take is part of the context's own memory, all but the heap.

use crate::code::{INVALID_VALUE, OUT_OF_MEMORY, R, UNSUPPORTED_LIMIT};
use crate::config::FRAME;
use crate::shared::Shared;
use crate::sync::lock;
use std::sync::Mutex;

/// `CU_LIMIT_*`.
pub const STACK: usize = 0;
pub const PRINTF: usize = 1;
pub const HEAP: usize = 2;
pub const SYNC_DEPTH: usize = 3;
pub const PENDING: usize = 4;
pub const FETCH: usize = 5;
pub const PERSISTING: usize = 6;
const KNOWN: usize = 7;

const DEFAULTS: [u64; KNOWN] = [1024, 1 << 20, 8 << 20, 0, 2048, 64, 0];

/// Threads that a device holds at once: multiprocessors, and what each of them holds.
pub const MULTIPROCESSORS: u64 = 132;
pub const RESIDENT: u64 = MULTIPROCESSORS * 2048;
/// Local memory of a thread, at most.
const STACK_MAX: u64 = 512 << 10;
const STACK_STEP: u64 = 16;
const LAUNCH: u64 = 8 << 10;
const FETCH_MAX: u64 = 128;

struct State {
    values: [u64; KNOWN],
    /// What is taken for each, in frames.
    taken: [Vec<u32>; KNOWN],
    heap_taken: bool,
}

/// The limits of a context.
pub struct Limits {
    shared: &'static Shared,
    gpu: u32,
    state: Mutex<State>,
}

/// Bytes that a value takes beyond what the default takes.
fn bytes(limit: usize, value: u64) -> Option<u64> {
    let above = value.saturating_sub(DEFAULTS[limit]);
    match limit {
        STACK => above.checked_mul(RESIDENT),
        PRINTF => Some(above),
        PENDING => above.checked_mul(LAUNCH),
        HEAP => Some(value),
        _ => Some(0),
    }
}

impl Limits {
    #[must_use]
    pub fn new(shared: &'static Shared, gpu: u32) -> Self {
        Self {
            shared,
            gpu,
            state: Mutex::new(State {
                values: DEFAULTS,
                taken: Default::default(),
                heap_taken: false,
            }),
        }
    }

    /// What later releases added can only be asked for, and is 0.
    ///
    /// # Errors
    /// `UNSUPPORTED_LIMIT`.
    pub fn get(&self, limit: i32) -> R<u64> {
        let end = self.shared.config().release().limits_end;
        let known = usize::try_from(limit).ok().filter(|_| limit < end);
        let known = known.ok_or(UNSUPPORTED_LIMIT)?;
        Ok(lock(&self.state).values.get(known).copied().unwrap_or(0))
    }

    /// # Errors
    /// `UNSUPPORTED_LIMIT`; `INVALID_VALUE` for more stack than a thread can have, and for a heap that is there
    /// already; `OUT_OF_MEMORY`, and all is as it was.
    pub fn set(&self, limit: i32, value: u64) -> R {
        let limit = usize::try_from(limit)
            .ok()
            // Devices of compute capability 9.0 have no depth of synchronisation.
            .filter(|limit| *limit < KNOWN && *limit != SYNC_DEPTH)
            .ok_or(UNSUPPORTED_LIMIT)?;
        let mut state = lock(&self.state);
        let value = match limit {
            STACK if value > STACK_MAX => return Err(INVALID_VALUE),
            STACK => value.next_multiple_of(STACK_STEP),
            HEAP if state.heap_taken => return Err(INVALID_VALUE),
            FETCH => value.min(FETCH_MAX),
            _ => value,
        };
        if limit != HEAP {
            let wanted = bytes(limit, value).ok_or(OUT_OF_MEMORY)?;
            self.resize(&mut state.taken[limit], wanted)?;
        }
        state.values[limit] = value;
        Ok(())
    }

    /// A kernel with so many bytes of local variables per thread is launched: its stack grows, for good.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn need_stack(&self, local: u64) -> R {
        if local > lock(&self.state).values[STACK] {
            self.set(STACK as i32, local)?;
        }
        Ok(())
    }

    /// A module whose code calls `malloc` is loaded.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn need_heap(&self) -> R {
        let mut state = lock(&self.state);
        if !state.heap_taken {
            let wanted = bytes(HEAP, state.values[HEAP]).ok_or(OUT_OF_MEMORY)?;
            self.resize(&mut state.taken[HEAP], wanted)?;
            state.heap_taken = true;
        }
        Ok(())
    }

    fn resize(&self, frames: &mut Vec<u32>, bytes: u64) -> R {
        let (has, wanted) = (frames.len() as u64, bytes.div_ceil(FRAME));
        if wanted > has {
            frames.extend(self.shared.charge(self.gpu, wanted - has)?);
        } else if wanted < has {
            self.shared
                .release(self.gpu, &frames.split_off(wanted as usize));
        }
        Ok(())
    }

    /// The context ends.
    pub fn let_go(&self) {
        let mut state = lock(&self.state);
        for frames in &mut state.taken {
            self.shared.release(self.gpu, &std::mem::take(frames));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacks_are_for_every_thread_that_the_device_holds() {
        assert_eq!(bytes(STACK, 1024), Some(0));
        assert_eq!(bytes(STACK, 2048), Some(264 << 20));
        assert_eq!(bytes(STACK, 0), Some(0));
        assert_eq!(bytes(HEAP, 8 << 20), Some(8 << 20));
        assert_eq!(bytes(PERSISTING, 1 << 20), Some(0));
        assert_eq!(bytes(PENDING, u64::MAX), None);
    }
}
