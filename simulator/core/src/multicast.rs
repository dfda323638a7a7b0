//! Multicast objects: teams of GPUs, and the memory that is bound to them.
//!
//! Only lifetimes are modelled: a binding keeps its memory. Work cannot use the addresses that an object is
//! mapped at; only instructions that the built-in kernels do not have may do that anyway.

use crate::code::{ILLEGAL_STATE, INVALID_DEVICE, INVALID_VALUE, R};
use crate::config::FRAME;
use crate::physical::Physical;
use crate::sync::lock;
use std::sync::{Arc, Mutex};

/// What the object's offsets and sizes are multiples of.
pub const GRANULARITY: u64 = FRAME;

struct Binding {
    gpu: u32,
    offset: u64,
    length: u64,
    _memory: Arc<Physical>,
}

#[derive(Default)]
struct State {
    gpus: Vec<u32>,
    bindings: Vec<Binding>,
}

/// The inside of a multicast object.
pub struct Multicast {
    pub length: u64,
    members: usize,
    state: Mutex<State>,
}

impl Multicast {
    #[must_use]
    pub fn new(length: u64, members: usize) -> Self {
        Self {
            length,
            members,
            state: Mutex::default(),
        }
    }

    /// Takes a GPU into the team.
    ///
    /// # Errors
    /// `INVALID_DEVICE` if it is in it, `INVALID_VALUE` if the team is complete.
    pub fn add(&self, gpu: u32) -> R {
        let mut state = lock(&self.state);
        if state.gpus.contains(&gpu) {
            return Err(INVALID_DEVICE);
        }
        if state.gpus.len() == self.members {
            return Err(INVALID_VALUE);
        }
        state.gpus.push(gpu);
        Ok(())
    }

    /// Whether the team is complete, as binding and mapping need it.
    ///
    /// # Errors
    /// `ILLEGAL_STATE` if not.
    pub fn complete(&self) -> R {
        if lock(&self.state).gpus.len() == self.members {
            Ok(())
        } else {
            Err(ILLEGAL_STATE)
        }
    }

    /// Binds `length` bytes of a member's memory from `from` on at `offset`.
    ///
    /// # Errors
    /// `ILLEGAL_STATE` before the team is complete, `INVALID_DEVICE` for memory of another GPU,
    /// `INVALID_VALUE` for a range that is not in both, not aligned or bound already.
    pub fn bind(&self, offset: u64, memory: &Arc<Physical>, from: u64, length: u64) -> R {
        self.complete()?;
        let inside = |at: u64, all: u64| at.checked_add(length).is_some_and(|end| end <= all);
        let aligned = [offset, from, length]
            .iter()
            .all(|n| n.is_multiple_of(GRANULARITY));
        if length == 0 || !aligned || !inside(offset, self.length) || !inside(from, memory.bytes())
        {
            return Err(INVALID_VALUE);
        }
        let mut state = lock(&self.state);
        let gpu = memory
            .gpu()
            .filter(|gpu| state.gpus.contains(gpu))
            .ok_or(INVALID_DEVICE)?;
        let taken = state
            .bindings
            .iter()
            .any(|b| b.gpu == gpu && b.offset < offset + length && offset < b.offset + b.length);
        if taken {
            return Err(INVALID_VALUE);
        }
        state.bindings.push(Binding {
            gpu,
            offset,
            length,
            _memory: Arc::clone(memory),
        });
        Ok(())
    }

    /// Takes bindings of a GPU away that lie in the range.
    ///
    /// # Errors
    /// `INVALID_DEVICE` if the GPU is no member, `INVALID_VALUE` if nothing, or a part of a binding, lies there.
    pub fn unbind(&self, gpu: u32, offset: u64, length: u64) -> R {
        let mut state = lock(&self.state);
        if !state.gpus.contains(&gpu) {
            return Err(INVALID_DEVICE);
        }
        let end = offset.checked_add(length).ok_or(INVALID_VALUE)?;
        let within = |b: &Binding| b.gpu == gpu && b.offset >= offset && b.offset + b.length <= end;
        let touches = |b: &Binding| b.gpu == gpu && b.offset < end && offset < b.offset + b.length;
        let part = state.bindings.iter().any(|b| touches(b) && !within(b));
        if part || !state.bindings.iter().any(within) {
            return Err(INVALID_VALUE);
        }
        let gone: Vec<Binding> = state.bindings.extract_if(.., |b| within(b)).collect();
        drop(state);
        drop(gone);
        Ok(())
    }
}
