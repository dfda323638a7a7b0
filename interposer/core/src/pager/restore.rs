//! Swap-in: physical memory for every chunk on the host, at the same addresses, then its content.
//!
//! All or nothing: after a failure everything that was on the host before still is.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use super::Worker;
use super::copy::{Copies, Direction};
use super::evict::nanos;
use crate::driver::{Status, call};
use crate::heap::Moving;
use crate::lock;
use crate::vmm;

impl Worker {
    /// Brings everything back. `false`: not now; nothing has changed.
    pub(super) fn restore(&mut self) -> bool {
        let start = Instant::now();
        let Ok(mut moved) = self.begin_move() else {
            return false;
        };
        let total: u64 = moved
            .iter()
            .flat_map(|m| &m.chunks)
            .filter(|c| c.handle == 0)
            .map(|c| c.bytes)
            .sum();
        let outcome = self.copy_in(&mut moved);
        self.end_move(moved);
        let observed = self.runtime.observed;
        match outcome {
            Ok(()) => {
                observed.bytes_in.fetch_add(total, SeqCst);
                observed.swaps_in.fetch_add(1, SeqCst);
                observed.last_in_ns.store(nanos(start.elapsed()), SeqCst);
                true
            }
            Err(why) => {
                if why != Status::OUT_OF_MEMORY {
                    crate::say::warning!("restore: the driver answers {}; trying again", why.0);
                    std::thread::sleep(std::time::Duration::from_millis(200));
                }
                false
            }
        }
    }

    /// Backs, maps and fills every chunk without physical memory.
    pub(super) fn copy_in(&mut self, moved: &mut [Moving]) -> Result<(), Status> {
        let absent: Vec<(usize, usize)> = moved
            .iter()
            .enumerate()
            .flat_map(|(b, m)| {
                m.chunks
                    .iter()
                    .enumerate()
                    .map(move |(c, chunk)| (b, c, chunk))
            })
            .filter(|(_, _, chunk)| chunk.handle == 0)
            .map(|(b, c, _)| (b, c))
            .collect();
        // Before, since reading from a hole fills it; after, for what came meanwhile.
        self.insist_on_host_memory(moved, &absent);
        let mut copies = Copies::new(Direction::In);
        let outcome = self.fill(moved, &mut copies);
        self.insist_on_host_memory(moved, &absent);
        if let Err(why) = outcome {
            copies.abandon(&mut self.host);
            for (block, chunk) in absent {
                let part = &mut moved[block];
                let chunk = &mut part.chunks[chunk];
                if chunk.handle != 0 {
                    vmm::unback(part.base, chunk);
                    chunk.handle = 0;
                    let device = &self.runtime.observed.devices[part.device];
                    crate::take_off(&device.resident, chunk.bytes);
                }
            }
            return Err(why);
        }
        for (block, chunk) in absent {
            let chunk = &mut moved[block].chunks[chunk];
            if !chunk.host.is_empty() {
                crate::take_off(&self.runtime.observed.host_bytes, chunk.bytes);
                chunk.host.clear();
            }
        }
        Ok(())
    }

    /// Ends the process if host memory that holds its only bytes was emptied: wrong bytes are worse than
    /// none.
    fn insist_on_host_memory(&self, moved: &[Moving], chunks: &[(usize, usize)]) {
        if let Some(session) = &self.runtime.session
            && !session.segments_hold(&self.written(moved, chunks))
        {
            crate::say::error!(
                "the coordinator emptied this process's host memory while it was swapped out: it is lost"
            );
            std::process::abort();
        }
    }

    /// How much of each host segment, by its id, these chunks fill.
    fn written(&self, moved: &[Moving], chunks: &[(usize, usize)]) -> Vec<(u64, u64)> {
        let mut written = BTreeMap::<u64, u64>::new();
        for &(block, chunk) in chunks {
            for piece in &moved[block].chunks[chunk].host {
                *written.entry(self.host.id_of(piece)).or_default() += piece.bytes;
            }
        }
        written.into_iter().collect()
    }

    /// New physical memory has the default attributes.
    fn set_attributes_again(&self) {
        /// `CU_POINTER_ATTRIBUTE_SYNC_MEMOPS`
        const SYNC_MEMOPS: u32 = 6;
        let on = 1u32;
        let pointers: Vec<u64> = lock(&self.runtime.heap)
            .sync_memops()
            .iter()
            .copied()
            .collect();
        for ptr in pointers {
            // SAFETY: the driver reads one integer; the memory is mapped.
            let _ =
                unsafe { call::cuPointerSetAttribute((&raw const on).cast(), SYNC_MEMOPS, ptr) };
        }
    }

    fn fill(
        &mut self,
        moved: &mut [Moving],
        copies: &mut Copies<(usize, usize)>,
    ) -> Result<(), Status> {
        for (block, part) in moved.iter_mut().enumerate() {
            let absent: Vec<usize> = part
                .chunks
                .iter()
                .enumerate()
                .filter(|(_, c)| c.handle == 0)
                .map(|(i, _)| i)
                .collect();
            if absent.is_empty() {
                continue;
            }
            let ordinal = self.runtime.devices[part.device].ordinal;
            let access = self.runtime.access_of(part.device);
            vmm::back_in_place(ordinal, part.base, &mut part.chunks, &access)?;
            let bytes: u64 = absent.iter().map(|&i| part.chunks[i].bytes).sum();
            self.runtime.observed.devices[part.device]
                .resident
                .fetch_add(bytes, SeqCst);
            for index in absent {
                let chunk = &part.chunks[index];
                copies.add(
                    &mut self.host,
                    part.context,
                    part.base,
                    chunk,
                    (block, index),
                )?;
            }
        }
        copies.finish(&mut self.host)?;
        self.set_attributes_again();
        Ok(())
    }
}
