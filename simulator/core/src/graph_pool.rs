//! The physical memory of graphs: a pool per GPU that launches take from.
//!
//! - A launch or an upload takes frames from its GPU's graph pool, which grows when they do not do.
//!   Graphs that run in order may have the same frames behind different addresses.
//! - Frames stay in the pool, and mapped, until a trim; not in use are those that no launch
//!   under way uses and no allocation that outlived its launch lies in.
//! - An allocation that its graph does not free is *live* after the launch, until a free by
//!   another graph, by `cuMemFree` or by `cuMemFreeAsync`.
//!
//! What is live is decided when calls are made, in their order; work only finds what was mapped.

use crate::code::{INVALID_VALUE, R};
use crate::config::{FRAME, GPUS_MAX};
use crate::driver::Driver;
use crate::exec::Op;
use crate::graph_memory::{GRAPH, GraphAlloc, Unit};
use crate::space::{Physical, Region, fresh_id};
use crate::stream::Stream;
use crate::sync::{lock, write};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// The work that last used something.
#[derive(Clone)]
struct Use {
    /// Exec whose launch it was; 0 for a free in a stream.
    by: u64,
    stream: Arc<Stream>,
    /// `u64::MAX` while it is being submitted.
    sequence: u64,
}

impl Use {
    fn over(&self) -> bool {
        self.sequence != u64::MAX && self.stream.reached(self.sequence)
    }
}

fn over(last: Option<&Use>) -> bool {
    last.is_none_or(Use::over)
}

/// A frame of a graph pool.
struct Frame {
    physical: Arc<Physical>,
    /// Units that it is mapped for.
    mapped: u32,
    /// Units among them with live allocations.
    live: u32,
    last: Option<Use>,
}

/// A unit with memory behind it.
struct Assigned {
    unit: Arc<Unit>,
    frames: Vec<u64>,
    /// The exec that it belongs to; 0 if that is gone.
    exec: u64,
    /// Allocations in it that are live.
    live: u32,
    last: Option<Use>,
}

#[derive(Default)]
struct Gpu {
    frames: HashMap<u64, Frame>,
    used_high: u64,
    reserved_high: u64,
}

impl Gpu {
    fn used(&self) -> u64 {
        self.frames.values().filter(|f| f.mapped > 0).count() as u64 * FRAME
    }

    fn reserved(&self) -> u64 {
        self.frames.len() as u64 * FRAME
    }

    fn note_highs(&mut self) {
        self.used_high = self.used_high.max(self.used());
        self.reserved_high = self.reserved_high.max(self.reserved());
    }
}

/// The graph pools of all GPUs.
#[derive(Default)]
pub struct Pools {
    gpus: [Gpu; GPUS_MAX],
    units: HashMap<u64, Assigned>,
    live: HashMap<u64, Arc<GraphAlloc>>,
}

impl Pools {
    /// Takes the memory from behind a unit; the frames stay in the pool.
    fn unassign(&mut self, driver: &Driver, start: u64) -> Option<Arc<Unit>> {
        let assigned = self.units.remove(&start)?;
        let mut space = write(&driver.space);
        let gone: Vec<_> = (0..assigned.frames.len() as u64)
            .filter_map(|i| space.regions.remove(&(start + i * FRAME)))
            .collect();
        drop(space);
        drop(gone);
        for id in &assigned.frames {
            if let Some(frame) = self.gpus[assigned.unit.gpu as usize].frames.get_mut(id) {
                frame.mapped -= 1;
            }
        }
        Some(assigned.unit)
    }

    /// Ends the life of a live allocation.
    fn end(&mut self, start: u64, last: Option<&Use>) -> Option<Arc<Unit>> {
        let alloc = self.live.remove(&start)?;
        let unit = Arc::clone(&alloc.unit);
        let assigned = self.units.get_mut(&unit.start)?;
        assigned.live -= 1;
        assigned.last = last.cloned().or(assigned.last.take());
        for id in &assigned.frames {
            if let Some(frame) = self.gpus[unit.gpu as usize].frames.get_mut(id) {
                frame.live -= u32::from(assigned.live == 0);
                frame.last = last.cloned().or(frame.last.take());
            }
        }
        Some(unit)
    }

    fn begin(&mut self, alloc: &Arc<GraphAlloc>) {
        let unit = &alloc.unit;
        if let Some(assigned) = self.units.get_mut(&unit.start) {
            assigned.live += 1;
            for id in &assigned.frames {
                if let Some(frame) = self.gpus[unit.gpu as usize].frames.get_mut(id) {
                    frame.live += u32::from(assigned.live == 1);
                }
            }
            self.live.insert(alloc.start, Arc::clone(alloc));
        }
    }

    /// Whether nothing keeps the memory behind a unit but pending work, which `mine` is the last of.
    fn unused(&self, start: u64, mine: impl Fn(&Use) -> bool) -> bool {
        self.units.get(&start).is_some_and(|a| {
            a.exec == 0 && a.live == 0 && a.last.as_ref().is_none_or(|l| l.over() || mine(l))
        })
    }
}

/// What the allocation and free nodes of an instantiated graph come to.
pub struct ExecMemory {
    driver: &'static Driver,
    id: u64,
    units: Vec<Arc<Unit>>,
    /// Allocations that the graph does not free itself.
    escaping: Vec<Arc<GraphAlloc>>,
    /// Addresses of other graphs' allocations that it frees.
    foreign: Vec<u64>,
}

/// What a launch waits for besides its stream, and keeps until it is done.
#[derive(Default)]
pub struct Hold {
    pub after: Vec<(Arc<Stream>, u64)>,
    _units: Vec<Arc<Unit>>,
}

impl ExecMemory {
    /// Sums up a graph's nodes, children's included; `None` if it has no memory nodes.
    #[must_use]
    pub fn of(driver: &'static Driver, ops: &[Op]) -> Option<Arc<Self>> {
        let mut freed = HashSet::new();
        let mut foreign = Vec::new();
        let mut allocs: Vec<&Arc<GraphAlloc>> = Vec::new();
        for op in ops {
            match op {
                Op::GraphAlloc(alloc) => allocs.push(alloc),
                Op::GraphFree { own: Some(key), .. } => {
                    freed.insert(*key);
                }
                Op::GraphFree { start, own: None } => foreign.push(*start),
                _ => {}
            }
        }
        if allocs.is_empty() && foreign.is_empty() {
            return None;
        }
        let mut seen = HashSet::new();
        let units = allocs
            .iter()
            .filter(|a| seen.insert(a.unit.start))
            .map(|a| Arc::clone(&a.unit))
            .collect();
        let escaping: Vec<_> = allocs
            .into_iter()
            .filter(|a| !freed.contains(&a.key))
            .cloned()
            .collect();
        // A child's free of its parent's allocation is none of another graph's.
        foreign.retain(|start| !escaping.iter().any(|a| a.start == *start));
        Some(Arc::new(Self {
            driver,
            id: fresh_id(),
            units,
            escaping,
            foreign,
        }))
    }

    /// Gets memory for a launch in `stream`, or only for an upload.
    ///
    /// # Errors
    /// `INVALID_VALUE` if an allocation of an earlier launch is live still (unless `auto_free`) or one
    /// that the graph frees is not; `OUT_OF_MEMORY`. Nothing has changed then.
    pub fn acquire(&self, stream: &Arc<Stream>, upload: bool, auto_free: bool) -> R<Hold> {
        let driver = self.driver;
        let mut pools = lock(&driver.graph_pools);
        let alive: Vec<u64> = self
            .escaping
            .iter()
            .map(|a| a.start)
            .filter(|start| pools.live.contains_key(start))
            .collect();
        let missing = self.foreign.iter().any(|s| !pools.live.contains_key(s));
        if !upload && (!alive.is_empty() && !auto_free || missing) {
            return Err(INVALID_VALUE);
        }
        let usage = Use {
            by: self.id,
            stream: Arc::clone(stream),
            sequence: u64::MAX,
        };
        let mut hold = Hold::default();
        self.assign(&mut pools, &usage, &mut hold)?;
        if !upload {
            for start in &alive {
                pools.end(*start, None);
            }
            for start in &self.foreign {
                hold._units.extend(pools.end(*start, Some(&usage)));
            }
            for alloc in &self.escaping {
                pools.begin(alloc);
            }
        }
        for gpu in &mut pools.gpus {
            gpu.note_highs();
        }
        Ok(hold)
    }

    /// Puts frames behind all units.
    fn assign(&self, pools: &mut Pools, usage: &Use, hold: &mut Hold) -> R {
        let stream = &usage.stream;
        let fits = |frame: &Frame| {
            frame.last.as_ref().is_none_or(|last| {
                last.over() || last.by == self.id || Arc::ptr_eq(&last.stream, stream)
            })
        };
        let mut taken: HashSet<u64> = HashSet::new();
        let mut needing: Vec<&Arc<Unit>> = Vec::new();
        for unit in &self.units {
            let Some(assigned) = pools.units.get(&unit.start) else {
                needing.push(unit);
                continue;
            };
            let frames = &pools.gpus[unit.gpu as usize].frames;
            let good = assigned
                .frames
                .iter()
                .filter_map(|id| frames.get(id))
                .all(|f| fits(f) && (f.live == 0 || assigned.live > 0));
            if good || !over(assigned.last.as_ref()) {
                // Under way elsewhere: then it is waited for.
                for last in assigned
                    .frames
                    .iter()
                    .filter_map(|id| frames.get(id)?.last.as_ref())
                {
                    if last.sequence != u64::MAX && !last.over() {
                        hold.after.push((Arc::clone(&last.stream), last.sequence));
                    }
                }
                taken.extend(&assigned.frames);
            } else {
                needing.push(unit);
            }
        }
        // All or nothing: chosen first, changed then.
        let mut chosen: Vec<(&Arc<Unit>, Vec<u64>, u64)> = Vec::new();
        let mut fresh = [0_u64; GPUS_MAX];
        for unit in needing {
            let gpu = &pools.gpus[unit.gpu as usize];
            let n = unit.length / FRAME;
            let mut free: Vec<(u32, u64)> = gpu
                .frames
                .iter()
                .filter(|(id, f)| f.live == 0 && fits(f) && !taken.contains(*id))
                .map(|(id, f)| (f.mapped, *id))
                .collect();
            free.sort_unstable();
            let ids: Vec<u64> = free.iter().take(n as usize).map(|f| f.1).collect();
            taken.extend(&ids);
            let more = n - ids.len() as u64;
            fresh[unit.gpu as usize] += more;
            chosen.push((unit, ids, more));
        }
        let mut new: Vec<Vec<Arc<Physical>>> = Vec::new();
        for (gpu, n) in fresh.iter().enumerate() {
            new.push(Physical::singles(self.driver, gpu as u32, *n)?);
        }
        for (unit, mut ids, more) in chosen {
            pools.unassign(self.driver, unit.start);
            let gpu = unit.gpu as usize;
            for physical in new[gpu].drain(..more as usize) {
                ids.push(physical.id);
                let frame = Frame {
                    physical,
                    mapped: 0,
                    live: 0,
                    last: None,
                };
                pools.gpus[gpu].frames.insert(ids[ids.len() - 1], frame);
            }
            let mut space = write(&self.driver.space);
            for (index, id) in ids.iter().enumerate() {
                if let Some(frame) = pools.gpus[gpu].frames.get_mut(id) {
                    frame.mapped += 1;
                    let region = Region {
                        length: FRAME,
                        physical: Arc::clone(&frame.physical),
                        access: unit.access,
                        host_access: 0,
                        vmm: false,
                        pool: GRAPH,
                    };
                    space
                        .regions
                        .insert(unit.start + index as u64 * FRAME, region);
                }
            }
            let assigned = Assigned {
                unit: Arc::clone(unit),
                frames: ids,
                exec: self.id,
                live: 0,
                last: None,
            };
            pools.units.insert(unit.start, assigned);
        }
        self.mark(pools, usage);
        Ok(())
    }

    fn mark(&self, pools: &mut Pools, usage: &Use) {
        for unit in &self.units {
            if let Some(assigned) = pools.units.get_mut(&unit.start) {
                assigned.exec = self.id;
                assigned.last = Some(usage.clone());
                for id in &assigned.frames {
                    if let Some(frame) = pools.gpus[unit.gpu as usize].frames.get_mut(id) {
                        frame.last = Some(usage.clone());
                    }
                }
            }
        }
    }

    /// Says which number the launch got in its stream; 0 if it was not submitted after all.
    pub fn submitted(&self, stream: &Arc<Stream>, sequence: u64) {
        let mut pools = lock(&self.driver.graph_pools);
        pools.settle(self.id, stream, sequence);
        if sequence == 0 {
            let mut units = Vec::new();
            for alloc in &self.escaping {
                units.extend(pools.end(alloc.start, None));
            }
            drop(pools);
            drop(units);
        }
    }
}

impl Pools {
    /// Fills in the number of a use that has just been submitted.
    fn settle(&mut self, by: u64, stream: &Arc<Stream>, sequence: u64) {
        let mine = |last: &mut Option<Use>| {
            if let Some(last) = last
                .as_mut()
                .filter(|l| l.by == by && l.sequence == u64::MAX && Arc::ptr_eq(&l.stream, stream))
            {
                last.sequence = sequence;
            }
        };
        self.units.values_mut().for_each(|a| mine(&mut a.last));
        for gpu in &mut self.gpus {
            gpu.frames.values_mut().for_each(|f| mine(&mut f.last));
        }
    }
}

impl Drop for ExecMemory {
    fn drop(&mut self) {
        // Launches keep the exec's memory: none is under way any more.
        let mut pools = lock(&self.driver.graph_pools);
        let mut units = Vec::new();
        for unit in &self.units {
            if let Some(assigned) = pools.units.get_mut(&unit.start)
                && assigned.exec == self.id
            {
                assigned.exec = 0;
                if pools.unused(unit.start, |last| last.by == self.id) {
                    units.extend(pools.unassign(self.driver, unit.start));
                }
            }
        }
        drop(pools);
        // Their destructors take locks of their own.
        drop(units);
    }
}

/// Frees a live allocation whose work is done.
///
/// # Errors
/// `INVALID_VALUE` if nothing live starts there.
pub fn free_now(driver: &'static Driver, start: u64) -> R {
    let mut pools = lock(&driver.graph_pools);
    let unit = pools.end(start, None).ok_or(INVALID_VALUE)?;
    let gone = pools
        .unused(unit.start, |_| true)
        .then(|| pools.unassign(driver, unit.start));
    drop(pools);
    drop((unit, gone));
    Ok(())
}

/// Frees a live allocation behind the work of `stream`.
///
/// # Errors
/// `INVALID_VALUE` if nothing live starts there.
pub fn free_async(driver: &'static Driver, stream: &Arc<Stream>, start: u64) -> R {
    let by = fresh_id();
    let usage = Use {
        by,
        stream: Arc::clone(stream),
        sequence: u64::MAX,
    };
    let unit = lock(&driver.graph_pools)
        .end(start, Some(&usage))
        .ok_or(INVALID_VALUE)?;
    let op = Op::GraphSettle { unit, by };
    let sequence = stream.submit(driver, op);
    lock(&driver.graph_pools).settle(by, stream, sequence.unwrap_or(0));
    sequence.map(|_| ())
}

/// The moment at which a queued free takes effect.
pub fn finish_free(driver: &Driver, unit: &Arc<Unit>, by: u64) {
    let mut pools = lock(&driver.graph_pools);
    let gone = pools
        .unused(unit.start, |last| last.by == by)
        .then(|| pools.unassign(driver, unit.start));
    drop(pools);
    drop(gone);
}

/// Gives the memory that no launch and no live allocation uses back to the device.
pub fn trim(driver: &Driver, gpu: u32) {
    let mut pools = lock(&driver.graph_pools);
    let idle: Vec<u64> = pools
        .units
        .iter()
        .filter(|(_, a)| a.unit.gpu == gpu && a.live == 0 && over(a.last.as_ref()))
        .map(|(start, _)| *start)
        .collect();
    let units: Vec<_> = idle
        .into_iter()
        .map(|start| pools.unassign(driver, start))
        .collect();
    let frames = &mut pools.gpus[gpu as usize].frames;
    let ids: Vec<u64> = frames
        .iter()
        .filter(|(_, f)| f.mapped == 0 && f.live == 0 && over(f.last.as_ref()))
        .map(|(id, _)| *id)
        .collect();
    let gone: Vec<_> = ids.iter().filter_map(|id| frames.remove(id)).collect();
    // The device has the memory back before the figure falls: who reads it may rely on it.
    let gone: Vec<_> = gone.into_iter().map(|frame| frame.last).collect();
    drop(pools);
    drop((units, gone));
}

/// `CUgraphMem_attribute`: used and reserved, now and at most.
///
/// # Errors
/// `INVALID_VALUE` for an unknown one.
pub fn attribute(driver: &Driver, gpu: u32, which: u32) -> R<u64> {
    let pools = lock(&driver.graph_pools);
    let gpu = &pools.gpus[gpu as usize];
    Ok(match which {
        0 => gpu.used(),
        1 => gpu.used_high,
        2 => gpu.reserved(),
        3 => gpu.reserved_high,
        _ => return Err(INVALID_VALUE),
    })
}

/// Resets a high watermark to the present figure.
///
/// # Errors
/// `INVALID_VALUE` for another attribute or another value than 0.
pub fn reset(driver: &Driver, gpu: u32, which: u32, value: u64) -> R {
    let mut pools = lock(&driver.graph_pools);
    let gpu = &mut pools.gpus[gpu as usize];
    match (which, value) {
        (1, 0) => gpu.used_high = gpu.used(),
        (3, 0) => gpu.reserved_high = gpu.reserved(),
        _ => return Err(INVALID_VALUE),
    }
    Ok(())
}
