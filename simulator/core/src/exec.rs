//! What a stream's thread does when work comes to its turn. Every access to memory is looked up
//! in the address space at that moment, a piece at a time.

use crate::code::{ILLEGAL_ADDRESS, R};
use crate::context::Context;
use crate::driver::Driver;
use crate::engine::{self, Direction};
use crate::event::{Event, Marker, State};
use crate::graph::{self, Graph};
use crate::graph_memory::{GraphAlloc, Unit};
use crate::graph_pool;
use crate::kernels::{self, Launch};
use crate::pool;
use crate::sync::{now_ns, read};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// A copy of `depth` slices of `height` rows of `width` bytes. Addresses are unified: each is a
/// device address if the space holds it, else one of this process.
#[derive(Clone, Debug)]
pub struct Copy {
    pub source: u64,
    pub source_pitch: u64,
    pub source_slice: u64,
    pub target: u64,
    pub target_pitch: u64,
    pub target_slice: u64,
    pub width: u64,
    pub height: u64,
    pub depth: u64,
    /// Pageable source bytes, taken at the call.
    pub staged: Option<Arc<Vec<u8>>>,
}

impl Copy {
    /// A copy of `bytes` in one piece.
    #[must_use]
    pub fn linear(source: u64, target: u64, bytes: u64) -> Self {
        Self {
            source,
            source_pitch: bytes,
            source_slice: bytes,
            target,
            target_pitch: bytes,
            target_slice: bytes,
            width: bytes,
            height: 1,
            depth: 1,
            staged: None,
        }
    }
}

/// A fill of `height` rows of `width` elements.
#[derive(Clone, Debug)]
pub struct Fill {
    pub target: u64,
    pub pitch: u64,
    pub value: u32,
    /// Bytes of one element: 1, 2 or 4.
    pub element: u32,
    pub width: u64,
    pub height: u64,
}

/// A function of the application to be called from a stream.
#[derive(Clone, Copy, Debug)]
pub enum Callback {
    /// `cuLaunchHostFunc`.
    Host(extern "C" fn(*mut c_void), usize),
    /// `cuStreamAddCallback`: also gets the stream and its status.
    Stream(extern "C" fn(u64, u32, *mut c_void), usize),
}

/// Comparison of a wait for a value, by the low bits of its flags.
fn satisfied(flags: u32, seen: u64, value: u64, wide: bool) -> bool {
    match flags & 3 {
        0 if wide => seen.wrapping_sub(value) as i64 >= 0,
        0 => (seen as u32).wrapping_sub(value as u32) as i32 >= 0,
        1 => seen == value,
        2 => seen & value != 0,
        _ => {
            (if wide {
                !(seen | value)
            } else {
                u64::from(!(seen as u32 | value as u32))
            }) != 0
        }
    }
}

/// One unit of work in a stream.
#[derive(Clone)]
pub enum Op {
    Empty,
    Copy(Copy),
    Fill(Fill),
    Kernel(Arc<Launch>),
    Callback(Callback),
    Record(Arc<Marker>),
    /// A graph's record node: a new record of the event each time it runs.
    RecordEvent(Arc<Event>),
    Wait(Arc<Marker>),
    WaitValue {
        at: u64,
        value: u64,
        wide: bool,
        flags: u32,
    },
    WriteValue {
        at: u64,
        value: u64,
        wide: bool,
    },
    /// The end of the stream-ordered allocation of that id.
    Free {
        start: u64,
        id: u64,
    },
    /// A graph's launch.
    Graph(Arc<graph::Launch>),
    /// A graph inside another: a node only, its own nodes run.
    Child(Arc<Graph>),
    /// Nodes whose effect the launch has prepared.
    GraphAlloc(Arc<GraphAlloc>),
    GraphFree {
        start: u64,
        /// The allocation that it ends, if it is one of the same graph.
        own: Option<u64>,
    },
    /// The end of an allocation of a graph, queued in a stream.
    GraphSettle {
        unit: Arc<Unit>,
        by: u64,
    },
}

/// Where work runs.
pub struct Work<'a> {
    pub driver: &'static Driver,
    pub context: &'a Context,
    pub stream: u64,
}

const PIECE: u64 = 4 << 20;

impl Work<'_> {
    /// Whether endless work should give up: its context goes away or has failed.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.context.closing.load(Ordering::Acquire)
            || self.context.error.load(Ordering::Acquire) != 0
    }

    fn host(&self, address: u64, length: u64) -> R<(*mut u8, u64)> {
        let table = read(&self.driver.host);
        let region = table
            .find(address)
            .filter(|r| r.pinned_for(self.context.id))
            .ok_or(ILLEGAL_ADDRESS)?;
        Ok((
            address as *mut u8,
            length.min(region.start + region.length - address),
        ))
    }

    /// Calls `f` with each contiguous piece of the range, as a kernel of this device sees it.
    ///
    /// # Errors
    /// `ILLEGAL_ADDRESS` at the first piece that is not there or not allowed.
    pub fn each_run(
        &self,
        mut at: u64,
        mut length: u64,
        writes: bool,
        mut f: impl FnMut(*mut u8, u64),
    ) -> R {
        while length > 0 {
            let want = length.min(PIECE);
            let space = read(&self.driver.space);
            let (piece, n) = if space.holds(at) {
                space.translate(at, want, Some(self.context.gpu), writes)?
            } else {
                self.host(at, want)?
            };
            f(piece, n);
            drop(space);
            at += n;
            length -= n;
        }
        Ok(())
    }

    /// As [`Self::each_run`] over two ranges at once: the first is read, the second also written.
    ///
    /// # Errors
    /// `ILLEGAL_ADDRESS`.
    pub fn each_pair(
        &self,
        mut from: u64,
        mut to: u64,
        mut length: u64,
        mut f: impl FnMut(*const u8, *mut u8, u64),
    ) -> R {
        while length > 0 {
            let want = length.min(PIECE);
            let space = read(&self.driver.space);
            let look = |at: u64, writes: bool| {
                if space.holds(at) {
                    space.translate(at, want, Some(self.context.gpu), writes)
                } else {
                    self.host(at, want)
                }
            };
            let (source, a) = look(from, false)?;
            let (target, b) = look(to, true)?;
            let n = a.min(b);
            f(source, target, n);
            drop(space);
            from += n;
            to += n;
            length -= n;
        }
        Ok(())
    }

    /// One row of a copy, by the copy engine.
    fn copy_row(&self, mut source: u64, mut target: u64, mut length: u64) -> R {
        while length > 0 {
            let space = read(&self.driver.space);
            let (from_device, to_device) = (space.holds(source), space.holds(target));
            let direction = match (from_device, to_device) {
                (false, true) => Some(Direction::HostToDevice),
                (true, false) => Some(Direction::DeviceToHost),
                _ => None,
            };
            drop(space);
            let want = length.min(PIECE);
            let piece = || -> R<u64> {
                let space = read(&self.driver.space);
                let look = |at: u64, device: bool, writes: bool| {
                    if device {
                        space.translate(at, want, None, writes)
                    } else {
                        Ok((at as *mut u8, want))
                    }
                };
                let (from, a) = look(source, from_device, false)?;
                let (to, b) = look(target, to_device, true)?;
                let n = a.min(b);
                // SAFETY: device pieces were just looked up and stay mapped while the space is
                // held; host pieces are the application's promise, as with a real driver. The two
                // may overlap.
                unsafe { std::ptr::copy(from, to, n as usize) };
                Ok(n)
            };
            let n = match direction {
                Some(direction) => {
                    engine::transfer(self.driver, self.context.gpu, direction, want, piece)?
                }
                None => piece()?,
            };
            source += n;
            target += n;
            length -= n;
        }
        Ok(())
    }

    fn copy(&self, copy: &Copy) -> R {
        let source = copy
            .staged
            .as_ref()
            .map_or(copy.source, |bytes| bytes.as_ptr() as u64);
        let dense = |pitch: u64, slice: u64| {
            (copy.height == 1 || pitch == copy.width)
                && (copy.depth == 1 || slice == copy.width * copy.height)
        };
        if dense(copy.source_pitch, copy.source_slice)
            && dense(copy.target_pitch, copy.target_slice)
        {
            return self.copy_row(source, copy.target, copy.width * copy.height * copy.depth);
        }
        for slice in 0..copy.depth {
            for row in 0..copy.height {
                self.copy_row(
                    source + slice * copy.source_slice + row * copy.source_pitch,
                    copy.target + slice * copy.target_slice + row * copy.target_pitch,
                    copy.width,
                )?;
            }
        }
        Ok(())
    }

    fn fill(&self, fill: &Fill) -> R {
        let bytes = fill.value.to_le_bytes();
        let element = fill.element as usize;
        for row in 0..fill.height {
            self.each_run(
                fill.target + row * fill.pitch,
                fill.width * u64::from(fill.element),
                true,
                |piece, n| {
                    // SAFETY: `each_run` gives `n` mapped, writable bytes; pieces end at element
                    // borders because addresses are multiples of the element.
                    unsafe {
                        if element == 1 || bytes[..element].iter().all(|b| *b == bytes[0]) {
                            piece.write_bytes(bytes[0], n as usize);
                        } else {
                            for at in (0..n as usize).step_by(element) {
                                piece
                                    .add(at)
                                    .copy_from_nonoverlapping(bytes.as_ptr(), element);
                            }
                        }
                    }
                },
            )?;
        }
        Ok(())
    }

    fn load(&self, at: u64, wide: bool) -> R<u64> {
        let mut seen = 0;
        self.each_run(at, if wide { 8 } else { 4 }, false, |piece, _| {
            // SAFETY: mapped, readable, aligned: checked when the operation was submitted.
            seen = unsafe {
                if wide {
                    AtomicU64::from_ptr(piece.cast()).load(Ordering::Acquire)
                } else {
                    u64::from(AtomicU32::from_ptr(piece.cast()).load(Ordering::Acquire))
                }
            };
        })?;
        Ok(seen)
    }

    /// Runs one unit of work to its end.
    ///
    /// # Errors
    /// What the context gets as its lasting error.
    pub fn run(&self, op: &Op) -> R {
        match op {
            Op::Empty | Op::Child(_) | Op::GraphAlloc(_) | Op::GraphFree { .. } => Ok(()),
            Op::Copy(copy) => self.copy(copy),
            Op::Fill(fill) => self.fill(fill),
            Op::Kernel(launch) => kernels::run(launch, self),
            Op::Callback(callback) => {
                crate::driver::in_callback(|| match callback {
                    Callback::Host(f, data) => f(*data as *mut c_void),
                    Callback::Stream(f, data) => f(self.stream, 0, *data as *mut c_void),
                });
                Ok(())
            }
            Op::Record(marker) => {
                marker.set(now_ns());
                Ok(())
            }
            Op::RecordEvent(event) => {
                let marker = Arc::<Marker>::default();
                marker.set(now_ns());
                event.set_state(State::Recorded(marker));
                Ok(())
            }
            Op::Wait(marker) => {
                marker.wait();
                Ok(())
            }
            Op::WaitValue {
                at,
                value,
                wide,
                flags,
            } => {
                while !satisfied(*flags, self.load(*at, *wide)?, *value, *wide) && !self.stopped() {
                    std::thread::sleep(Duration::from_micros(50));
                }
                Ok(())
            }
            Op::WriteValue { at, value, wide } => {
                self.each_run(*at, if *wide { 8 } else { 4 }, true, |piece, _| {
                    // SAFETY: mapped, writable, aligned: checked when the operation was submitted.
                    unsafe {
                        if *wide {
                            AtomicU64::from_ptr(piece.cast()).store(*value, Ordering::Release);
                        } else {
                            AtomicU32::from_ptr(piece.cast())
                                .store(*value as u32, Ordering::Release);
                        }
                    }
                })
            }
            Op::Free { start, id } => {
                pool::finish_free(self.driver, *start, *id);
                Ok(())
            }
            Op::GraphSettle { unit, by } => {
                graph_pool::finish_free(self.driver, unit, *by);
                Ok(())
            }
            Op::Graph(launch) => {
                for (stream, sequence) in &launch.hold.after {
                    stream.wait(*sequence);
                }
                launch.plan.ops.iter().try_for_each(|op| self.run(op))
            }
        }
    }

    /// What must happen even though the context has failed: nobody may wait for ever.
    pub fn skip(&self, op: &Op) {
        match op {
            Op::Record(marker) => marker.set(now_ns()),
            Op::Callback(Callback::Stream(f, data)) => {
                let error = self.context.error.load(Ordering::Acquire);
                crate::driver::in_callback(|| f(self.stream, error, *data as *mut c_void));
            }
            Op::Free { start, id } => pool::finish_free(self.driver, *start, *id),
            Op::GraphSettle { unit, by } => graph_pool::finish_free(self.driver, unit, *by),
            Op::Graph(launch) => launch.plan.ops.iter().for_each(|op| self.skip(op)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_compare_as_documented() {
        assert!(satisfied(0, 5, 5, false));
        assert!(!satisfied(0, 4, 5, false));
        // Cyclic: just past the wrap counts as later.
        assert!(satisfied(0, 1, u64::from(u32::MAX), false));
        assert!(satisfied(1, 7, 7, true));
        assert!(!satisfied(1, 7, 8, true));
        assert!(satisfied(2, 6, 2, false));
        assert!(!satisfied(2, 4, 2, false));
        assert!(!satisfied(3, u64::from(u32::MAX), 0, false));
        assert!(satisfied(3, 0xf0, 0x0e, false));
    }
}
