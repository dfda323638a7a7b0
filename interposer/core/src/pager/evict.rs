//! Swap-out: every pageable chunk to the host, then its physical memory back to the device.
//!
//! A chunk is released only after its copy is known to be done. When a part fails, what was moved
//! is brought back before anybody may go on.

use std::sync::PoisonError;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use super::Worker;
use super::copy::{Copies, Direction};
use super::drain::SHORT;
use crate::driver::Status;
use crate::heap::Moving;
use crate::lock;
use crate::vmm;

/// After so long with an error that is not about space, a failed eviction cannot be undone: going on
/// would be with wrong bytes, and waiting would be for ever.
const HOPELESS: Duration = Duration::from_secs(30);

impl Worker {
    /// Takes hold of all pageable blocks; waits, bounded, for context teardowns.
    pub(super) fn begin_move(&self) -> Result<Vec<Moving>, String> {
        let runtime = self.runtime;
        let until = Instant::now() + SHORT;
        let mut heap = lock(&runtime.heap);
        while *lock(&runtime.teardowns) > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("a context is being destroyed".to_owned());
            }
            heap = runtime
                .heap_changed
                .wait_timeout(heap, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        runtime.observed.changes_begun.fetch_add(1, SeqCst);
        Ok(heap.begin_move())
    }

    pub(super) fn end_move(&self, moved: Vec<Moving>) {
        let runtime = self.runtime;
        let dead = lock(&runtime.heap).end_move(moved);
        runtime.heap_changed.notify_all();
        for block in dead {
            runtime.release_block(block);
        }
        runtime.observed.changes_ended.fetch_add(1, SeqCst);
    }

    /// Moves everything to the host. The gate is closed and the devices are idle.
    ///
    /// # Errors
    /// Why not; everything is on the device again.
    pub(super) fn evict(&mut self) -> Result<(), String> {
        if self.runtime.ending.load(SeqCst) {
            return Err("the process is exiting".to_owned());
        }
        let start = Instant::now();
        let wanted = lock(&self.runtime.heap).pageable_bytes();
        self.host.begin(self.runtime, wanted)?;
        let mut moved = self.begin_move()?;
        let total: u64 = moved
            .iter()
            .flat_map(|m| &m.chunks)
            .filter(|c| c.handle != 0)
            .map(|c| c.bytes)
            .sum();
        let outcome = self.copy_out(&mut moved);
        if let Err(why) = outcome {
            self.undo(&mut moved);
            self.end_move(moved);
            return Err(format!("the driver answers {}", why.0));
        }
        self.end_move(moved);
        let observed = self.runtime.observed;
        observed.bytes_out.fetch_add(total, SeqCst);
        observed.swaps_out.fetch_add(1, SeqCst);
        observed.last_out_ns.store(nanos(start.elapsed()), SeqCst);
        crate::say::debug!(
            "{} moved to the host in {:?}",
            spillway_protocol::format_bytes(total),
            start.elapsed()
        );
        Ok(())
    }

    fn copy_out(&mut self, moved: &mut [Moving]) -> Result<(), Status> {
        let mut copies = Copies::new(Direction::Out);
        let outcome = self.copy_out_with(moved, &mut copies);
        if outcome.is_err() {
            copies.abandon(&mut self.host);
        }
        outcome
    }

    fn copy_out_with(
        &mut self,
        moved: &mut [Moving],
        copies: &mut Copies<(usize, usize)>,
    ) -> Result<(), Status> {
        for block in 0..moved.len() {
            for chunk in 0..moved[block].chunks.len() {
                let part = &mut moved[block];
                let (context, base) = (part.context, part.base);
                if part.chunks[chunk].handle == 0 {
                    continue;
                }
                let pieces = self.host.take(part.chunks[chunk].bytes);
                if pieces.iter().map(|p| p.bytes).sum::<u64>() != part.chunks[chunk].bytes {
                    return Err(Status::OUT_OF_MEMORY);
                }
                part.chunks[chunk].host = pieces;
                let done = copies.add(
                    &mut self.host,
                    context,
                    base,
                    &part.chunks[chunk],
                    (block, chunk),
                )?;
                self.let_go(moved, done);
            }
        }
        let done = copies.finish(&mut self.host)?;
        self.let_go(moved, done);
        Ok(())
    }

    /// Releases chunks whose copies are done.
    fn let_go(&self, moved: &mut [Moving], done: Vec<(usize, usize)>) {
        for (block, chunk) in done {
            let part = &mut moved[block];
            let device = &self.runtime.observed.devices[part.device];
            let chunk = &mut part.chunks[chunk];
            vmm::unback(part.base, chunk);
            chunk.handle = 0;
            crate::take_off(&device.resident, chunk.bytes);
            self.runtime
                .observed
                .host_bytes
                .fetch_add(chunk.bytes, SeqCst);
        }
    }

    /// Brings back what a failed eviction had moved. It must succeed before anybody may go on: the
    /// memory was ours a moment ago, so it waits for it as long as it takes.
    fn undo(&mut self, moved: &mut [Moving]) {
        for chunk in moved
            .iter_mut()
            .flat_map(|m| &mut m.chunks)
            .filter(|c| c.handle != 0)
        {
            chunk.host.clear();
        }
        let mut pause = Duration::from_millis(5);
        let begun = Instant::now();
        while let Err(why) = self.copy_in(moved) {
            if why != Status::OUT_OF_MEMORY && begun.elapsed() > HOPELESS {
                crate::say::error!(
                    "memory could not be brought back (driver error {}): its content is lost",
                    why.0
                );
                std::process::abort();
            }
            crate::say::warning!(
                "bringing memory back: the driver answers {}; trying again",
                why.0
            );
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }
}

/// A duration for the observed page.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
