//! Copies in batches: while one batch is on the link, the one before it is finished off.

use std::collections::VecDeque;

use super::host::HostMemory;
use crate::driver::{Status, call};
use crate::heap::Chunk;
use crate::vmm;

/// Bytes of a batch: enough to keep the link busy while the batch before is unmapped.
const BATCH: u64 = 64 << 20;
/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`
const QUIET: u32 = 3;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Device to host.
    Out,
    /// Host to device.
    In,
}

/// Copies on the way, oldest first: the event, and what the caller knows them by.
pub struct Copies<T> {
    direction: Direction,
    flying: VecDeque<(usize, usize, Vec<T>)>,
    batch: Vec<T>,
    batch_bytes: u64,
    context: usize,
}

impl<T> Copies<T> {
    /// Nothing is on the way.
    pub fn new(direction: Direction) -> Self {
        Self {
            direction,
            flying: VecDeque::new(),
            batch: Vec::new(),
            batch_bytes: 0,
            context: 0,
        }
    }

    /// Puts one chunk's copy on its context's stream. Returns what has finished meanwhile.
    ///
    /// # Errors
    /// The driver's; what is on the way stays so until [`Copies::finish`].
    pub fn add(
        &mut self,
        host: &mut HostMemory,
        context: usize,
        base: u64,
        chunk: &Chunk,
        key: T,
    ) -> Result<Vec<T>, Status> {
        let mut done = Vec::new();
        if self.batch_bytes >= BATCH || (context != self.context && !self.batch.is_empty()) {
            done = self.close_batch(host)?;
        }
        self.context = context;
        vmm::in_context(context, || {
            let stream = host.stream(context)? as *mut _;
            let mut device = base + chunk.offset;
            for piece in &chunk.host {
                let address = host.address(piece);
                let bytes = usize::try_from(piece.bytes).unwrap_or(0);
                // SAFETY: the piece is host memory of ours, the device range is mapped, and both
                // stay until the event after this copy has been waited for.
                let copied = unsafe {
                    match self.direction {
                        Direction::Out => {
                            call::cuMemcpyDtoHAsync_v2(address, device, bytes, stream)
                        }
                        Direction::In => call::cuMemcpyHtoDAsync_v2(device, address, bytes, stream),
                    }
                };
                let copied = if copied == Status::INVALID_CONTEXT {
                    // A context of the first `cuCtxCreate`: what has one version only works there, too.
                    let (from, to) = match self.direction {
                        Direction::Out => (device, address as u64),
                        Direction::In => (address as u64, device),
                    };
                    // SAFETY: as above.
                    unsafe { call::cuMemcpyAsync(to, from, bytes, stream) }
                } else {
                    copied
                };
                copied.ok()?;
                device += piece.bytes;
            }
            Ok(())
        })?;
        self.batch_bytes += chunk.bytes;
        self.batch.push(key);
        Ok(done)
    }

    /// Ends the batch with an event and waits for the batch before it.
    fn close_batch(&mut self, host: &mut HostMemory) -> Result<Vec<T>, Status> {
        if !self.batch.is_empty() {
            let context = self.context;
            let event = vmm::in_context(context, || {
                let stream = host.stream(context)?;
                let mut event = std::ptr::null_mut();
                // SAFETY: the driver fills one handle and records it in a stream of ours.
                unsafe {
                    call::cuEventCreate(&raw mut event, QUIET).ok()?;
                    call::cuEventRecord(event, stream as *mut _).ok()?;
                }
                Ok(event as usize)
            })?;
            self.batch_bytes = 0;
            self.flying
                .push_back((event, context, std::mem::take(&mut self.batch)));
        }
        if self.flying.len() > 1 {
            self.wait_oldest()
        } else {
            Ok(Vec::new())
        }
    }

    fn wait_oldest(&mut self) -> Result<Vec<T>, Status> {
        let Some((event, context, keys)) = self.flying.front_mut().map(|f| (f.0, f.1, &mut f.2))
        else {
            return Ok(Vec::new());
        };
        vmm::in_context(context, || {
            // SAFETY: an event of ours, destroyed once below.
            unsafe { call::cuEventSynchronize(event as *mut _) }.ok()?;
            // SAFETY: as above.
            let _ = unsafe { call::cuEventDestroy_v2(event as *mut _) };
            Ok(())
        })?;
        let keys = std::mem::take(keys);
        self.flying.pop_front();
        Ok(keys)
    }

    /// Waits for all that is on the way.
    ///
    /// # Errors
    /// The driver's; nothing may be assumed of what was on the way, but it is not running any more.
    pub fn finish(&mut self, host: &mut HostMemory) -> Result<Vec<T>, Status> {
        let mut done = self.close_batch(host)?;
        while !self.flying.is_empty() {
            done.extend(self.wait_oldest()?);
        }
        Ok(done)
    }

    /// After an error: waits until nothing of ours runs, whatever came of it.
    pub fn abandon(&mut self, host: &mut HostMemory) {
        let contexts: Vec<usize> = self
            .flying
            .iter()
            .map(|f| f.1)
            .chain(std::iter::once(self.context))
            .collect();
        for context in contexts.into_iter().filter(|&c| c != 0) {
            let _ = vmm::in_context(context, || {
                let stream = host.stream(context)?;
                // SAFETY: a stream of ours.
                unsafe { call::cuStreamSynchronize(stream as *mut _) }.ok()
            });
        }
        self.flying.clear();
        self.batch.clear();
    }
}
