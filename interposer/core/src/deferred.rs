//! Stream-ordered frees: memory that is free in its stream's order, but not yet for everybody.
//!
//! Each waits with an event. The same stream may have it again at once, for the same rounded size;
//! anybody else once the event is done. What the driver frees itself stays charged as long.

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use crate::driver::{Status, call};
use crate::heap::{Alloc, Place, small_size};
use crate::idle::{AT_MOST, comes};
use crate::lock;
use crate::pools::rounded;
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
    /// The context of the event.
    context: usize,
    event: usize,
    /// By the clock of [`Deferred`].
    born: u64,
}

/// All that wait, oldest first.
#[derive(Default)]
pub struct Deferred {
    entries: Vec<Entry>,
    /// Threads that have taken entries out to look at them.
    looking: u32,
    /// Counts ends of streams and contexts.
    clock: u64,
    /// When streams and contexts ended while somebody was looking: what was taken out before has to
    /// learn of it when it comes back, since the same handle may stand for another by then.
    ended_streams: HashMap<usize, u64>,
    ended_contexts: HashMap<usize, u64>,
}

impl Deferred {
    fn ended(&mut self, handle: usize, context: bool) {
        self.clock += 1;
        if self.looking > 0 {
            let ends = if context {
                &mut self.ended_contexts
            } else {
                &mut self.ended_streams
            };
            ends.insert(handle, self.clock);
        }
    }

    /// Takes back what was looked at and is not finished. Returns allocations whose event is gone with
    /// its context: they are finished; and those that went with their own context.
    fn put_back(&mut self, unfinished: Vec<Entry>) -> (Vec<Alloc>, Vec<Alloc>) {
        let since = |ends: &HashMap<usize, u64>, handle, born| {
            ends.get(&handle).is_some_and(|&ended| ended > born)
        };
        let (mut kept, mut finished) = (Vec::with_capacity(unfinished.len()), Vec::new());
        let mut gone = Vec::new();
        for mut entry in unfinished {
            if since(&self.ended_contexts, entry.alloc.context, entry.born) {
                // The memory went with its context.
                gone.push(entry.alloc);
                continue;
            }
            if since(&self.ended_contexts, entry.context, entry.born) {
                finished.push(entry.alloc);
                continue;
            }
            if since(&self.ended_streams, entry.stream, entry.born) {
                entry.stream = 0;
            }
            kept.push(entry);
        }
        kept.append(&mut self.entries);
        self.entries = kept;
        self.looking -= 1;
        if self.looking == 0 {
            self.ended_streams.clear();
            self.ended_contexts.clear();
        }
        (finished, gone)
    }
}

/// An event of ours that is done once a stream has come as far as now.
pub fn record(stream: usize) -> Result<usize, Status> {
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
        return Err(why);
    }
    Ok(event as usize)
}

impl Runtime {
    /// Gives memory back once `stream` has come this far. `context` is the stream's, and current.
    /// `name`: under which name the same stream may reuse it; 0: not.
    ///
    /// # Errors
    /// The driver's, when the stream is no stream; the memory then stays the program's.
    pub fn defer(
        &self,
        alloc: Alloc,
        stream: usize,
        name: usize,
        context: usize,
    ) -> Result<(), Status> {
        match record(stream) {
            Ok(event) => self.wait_with(alloc, event, name, context),
            Err(why) => {
                lock(&self.heap).put_back(alloc);
                return Err(why);
            }
        }
        Ok(())
    }

    /// The driver frees memory of its own once `stream` has come as far as now: so long it stays charged. Otherwise
    /// as [`Runtime::defer`].
    pub fn defer_charge(&self, alloc: Alloc, stream: usize, context: usize) {
        match record(stream) {
            Ok(event) => self.wait_with(alloc, event, 0, context),
            // Nothing runs any more, or nobody can tell.
            Err(_) => self.finish(&alloc),
        }
    }

    fn wait_with(&self, alloc: Alloc, event: usize, stream: usize, context: usize) {
        let mut deferred = lock(&self.deferred);
        let born = deferred.clock;
        deferred.entries.push(Entry {
            alloc,
            stream,
            context,
            event,
            born,
        });
        self.has_deferred.store(true, SeqCst);
    }

    /// Reuses a free of the same stream into the same pool: in stream order it is free already.
    pub fn reuse(&self, stream: usize, context: usize, pool: u64, bytes: u64) -> Option<u64> {
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
                    && e.context == context
                    && e.alloc.pool == pool
                    && !e.alloc.place.is_drivers()
                    && matches!(e.alloc.place, Place::Slab(_)) == small
                    && rounded(&e.alloc) == wanted
            })?;
            deferred.entries.remove(found)
        };
        // SAFETY: an event of ours.
        let _ = unsafe { call::cuEventDestroy_v2(entry.event as *mut _) };
        Some(lock(&self.heap).revive(entry.alloc, bytes))
    }

    /// Gives back what is finished, as far as the pools do not keep it.
    pub fn reap_deferred(&self) {
        self.reap(|_| true, None);
        if !self.has_own_pools.load(SeqCst) {
            return;
        }
        let over = lock(&self.pools).over_threshold();
        for alloc in &over {
            self.leave(alloc);
        }
    }

    /// Waits for what was freed on a device and gives it back; `false`: there was nothing, or the work before it
    /// goes on for longer than [`AT_MOST`].
    pub fn wait_for_deferred(&self, device: usize) -> bool {
        let until = Instant::now() + AT_MOST;
        self.await_lookers(until)
            | self.reap(|alloc| alloc.device == device, Some(until))
            | self.settle_ended()
            | self.await_settled()
            | self.wait_for_pools()
    }

    /// Waits for threads that look at frees now, and may be giving some of them back; `false`: there were none.
    fn await_lookers(&self, until: Instant) -> bool {
        let none = || lock(&self.deferred).looking == 0;
        !none() && comes(until, none)
    }

    /// Waits for stream-ordered frees of the driver's own, which its pools give back afterwards;
    /// `false`: there were none. Not while a stream captures, which that would spoil.
    fn wait_for_pools(&self) -> bool {
        if !self.pool_frees.load(SeqCst) || self.glance.capturing() {
            return false;
        }
        self.synchronized() == Some(Ok(())) && self.pool_frees.swap(false, SeqCst)
    }

    /// `wait`: until when what is not finished is waited for.
    fn reap(&self, which: impl Fn(&Alloc) -> bool, wait: Option<Instant>) -> bool {
        if !self.has_deferred.load(SeqCst) {
            return false;
        }
        let picked: Vec<Entry> = {
            let mut deferred = lock(&self.deferred);
            if deferred.entries.is_empty() {
                self.has_deferred.store(false, SeqCst);
                return false;
            }
            let (picked, rest) = std::mem::take(&mut deferred.entries)
                .into_iter()
                .partition(|e| which(&e.alloc));
            deferred.entries = rest;
            deferred.looking += 1;
            picked
        };
        let (mut unfinished, mut any) = (Vec::new(), false);
        self.relaxed(|| {
            for entry in picked {
                // Neither the event nor the memory may go with a context meanwhile.
                let finished = self.using(entry.alloc.context, || {
                    self.using(entry.context, || {
                        let event = entry.event as *mut _;
                        let done = || {
                            // SAFETY: an event of ours, not destroyed before its entry is.
                            let status = unsafe { call::cuEventQuery(event) };
                            status != Status::NOT_READY
                        };
                        if !wait.map_or_else(done, |until| comes(until, done)) {
                            return false;
                        }
                        // Done, or the context is broken: nothing runs in it any more.
                        // SAFETY: as above.
                        let _ = unsafe { call::cuEventDestroy_v2(event) };
                        self.retire(&entry.alloc);
                        true
                    })
                });
                if finished == Some(Some(true)) {
                    any = true;
                } else {
                    unfinished.push(entry);
                }
            }
        });
        let (finished, gone) = {
            let mut deferred = lock(&self.deferred);
            let done = deferred.put_back(unfinished);
            self.has_deferred
                .store(!deferred.entries.is_empty(), SeqCst);
            done
        };
        for alloc in &finished {
            self.retire(alloc);
        }
        for alloc in &gone {
            lock(&self.pools).gone(alloc);
            if alloc.place.is_drivers() {
                self.finish(alloc);
            }
        }
        any || !finished.is_empty()
    }

    /// A stream is gone: its handle may come back for another.
    pub fn forget_stream(&self, stream: usize) {
        let mut deferred = lock(&self.deferred);
        deferred.ended(stream, false);
        for entry in &mut deferred.entries {
            if entry.stream == stream {
                entry.stream = 0;
            }
        }
    }

    /// A context is gone, with its events.
    pub fn forget_deferred_of(&self, context: usize) {
        let gone: Vec<Entry> = {
            let mut deferred = lock(&self.deferred);
            deferred.ended(context, true);
            let all = std::mem::take(&mut deferred.entries);
            let (gone, kept) = all
                .into_iter()
                .partition(|e| e.alloc.context == context || e.context == context);
            deferred.entries = kept;
            gone
        };
        for entry in gone {
            self.finish(&entry.alloc);
            lock(&self.pools).gone(&entry.alloc);
        }
    }

    /// Runs driver calls that a capture of another thread would forbid, in relaxed mode: always, since one
    /// may begin at any moment.
    pub fn relaxed<T>(&self, run: impl FnOnce() -> T) -> T {
        /// `CU_STREAM_CAPTURE_MODE_RELAXED`
        const RELAXED: u32 = 2;
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
