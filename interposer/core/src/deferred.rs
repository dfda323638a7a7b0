//! Stream-ordered frees: memory that is free in its stream's order, but not yet for everybody.
//!
//! Each waits with an event. The same stream may have it again at once, for the same rounded size;
//! anybody else once the event is done.

use crate::driver::{Status, call};
use crate::heap::{Alloc, Place, small_size};
use crate::lock;
use crate::runtime::Runtime;

/// `CU_EVENT_DISABLE_TIMING`
const DISABLE_TIMING: u32 = 2;
/// Entries that an allocation looks through for one to reuse: bounds its cost.
const LOOK: usize = 64;

/// One free that waits.
struct Entry {
    alloc: Alloc,
    /// 0 once the stream is gone.
    stream: usize,
    event: usize,
}

/// All that wait, oldest first.
#[derive(Default)]
pub struct Deferred {
    entries: Vec<Entry>,
}

/// What a reuse must agree on.
fn rounded(alloc: &Alloc) -> u64 {
    match alloc.place {
        Place::Slab(_) => small_size(alloc.bytes),
        _ => spillway_protocol::granules_up(alloc.bytes),
    }
}

impl Runtime {
    /// Gives memory back once `stream` has come this far. The stream's context must be current.
    /// `name`: under which name the same stream may reuse it; 0: not.
    ///
    /// # Errors
    /// The driver's, when the stream is no stream; the memory is then given back after a wait for
    /// its whole context.
    pub fn defer(&self, alloc: Alloc, stream: usize, name: usize) -> Result<(), Status> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the driver fills one handle, and records it in the application's stream.
        let recorded = unsafe {
            call::cuEventCreate(&raw mut event, DISABLE_TIMING)
                .ok()
                .and_then(|()| call::cuEventRecord(event, stream as *mut _).ok())
        };
        if let Err(why) = recorded {
            if !event.is_null() {
                // SAFETY: made above.
                let _ = unsafe { call::cuEventDestroy_v2(event) };
            }
            let waited = self.wait_idle(alloc.context);
            self.finish(&alloc);
            return waited.and(Err(why));
        }
        lock(&self.deferred).entries.push(Entry {
            alloc,
            stream: name,
            event: event as usize,
        });
        Ok(())
    }

    /// Reuses a free of the same stream: in stream order it is free already.
    pub fn reuse(&self, stream: usize, context: usize, bytes: u64) -> Option<u64> {
        let small = bytes < crate::heap::SMALL;
        let wanted = if small {
            small_size(bytes)
        } else {
            spillway_protocol::granules_up(bytes)
        };
        let entry = {
            let mut deferred = lock(&self.deferred);
            let found = deferred.entries.iter().take(LOOK).position(|e| {
                e.stream == stream
                    && e.alloc.context == context
                    && e.alloc.place != Place::Driver
                    && matches!(e.alloc.place, Place::Slab(_)) == small
                    && rounded(&e.alloc) == wanted
            })?;
            deferred.entries.remove(found)
        };
        // SAFETY: an event of ours.
        let _ = unsafe { call::cuEventDestroy_v2(entry.event as *mut _) };
        Some(lock(&self.heap).revive(entry.alloc, bytes))
    }

    /// Gives back what is finished.
    pub fn reap_deferred(&self) {
        self.reap(|_| true, false);
    }

    /// Waits for what was freed on a device and gives it back; `false`: there was nothing.
    pub fn wait_for_deferred(&self, device: usize) -> bool {
        self.reap(|alloc| alloc.device == device, true)
    }

    fn reap(&self, which: impl Fn(&Alloc) -> bool, wait: bool) -> bool {
        let (picked, rest): (Vec<Entry>, Vec<Entry>) = {
            let mut deferred = lock(&self.deferred);
            if deferred.entries.is_empty() {
                return false;
            }
            std::mem::take(&mut deferred.entries)
                .into_iter()
                .partition(|e| which(&e.alloc))
        };
        lock(&self.deferred).entries.extend(rest);
        let (mut unfinished, mut any) = (Vec::new(), false);
        self.relaxed(|| {
            for entry in picked {
                let event = entry.event as *mut _;
                // SAFETY: an event of ours, not destroyed before its entry is.
                let status = unsafe {
                    if wait {
                        call::cuEventSynchronize(event)
                    } else {
                        call::cuEventQuery(event)
                    }
                };
                if status == Status::NOT_READY {
                    unfinished.push(entry);
                    continue;
                }
                // Done, or the context is broken or gone: nothing runs in it any more.
                // SAFETY: as above.
                let _ = unsafe { call::cuEventDestroy_v2(event) };
                self.finish(&entry.alloc);
                any = true;
            }
        });
        if !unfinished.is_empty() {
            let mut deferred = lock(&self.deferred);
            unfinished.append(&mut deferred.entries);
            deferred.entries = unfinished;
        }
        any
    }

    /// A stream is gone: its handle may come back for another.
    pub fn forget_stream(&self, stream: usize) {
        for entry in &mut lock(&self.deferred).entries {
            if entry.stream == stream {
                entry.stream = 0;
            }
        }
    }

    /// A context is gone, with its events.
    pub fn forget_deferred_of(&self, context: usize) {
        let gone: Vec<Entry> = {
            let mut deferred = lock(&self.deferred);
            let all = std::mem::take(&mut deferred.entries);
            let (gone, kept) = all.into_iter().partition(|e| e.alloc.context == context);
            deferred.entries = kept;
            gone
        };
        for entry in gone {
            self.finish(&entry.alloc);
        }
    }

    /// Runs driver calls that a capture of another thread would forbid, in relaxed mode.
    pub fn relaxed<T>(&self, run: impl FnOnce() -> T) -> T {
        /// `CU_STREAM_CAPTURE_MODE_RELAXED`
        const RELAXED: u32 = 2;
        if !lock(&self.contexts).any_capture() {
            return run();
        }
        let mut mode = RELAXED;
        // SAFETY: the driver exchanges one integer.
        let exchanged = unsafe { call::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        let result = run();
        if exchanged.is_success() {
            // SAFETY: as above; it puts back what was there.
            let _ = unsafe { call::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        }
        result
    }
}
