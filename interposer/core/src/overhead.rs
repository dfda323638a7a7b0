//! What the driver takes for itself, contexts and code, against the limit.
//!
//! Overhead is measured, not asked for: the coordinator reads what the driver shows for this process. Far
//! from the limit that happens in the background. Near it, a call that makes the driver take memory is
//! measured at once, before and after; what turns out to pass the limit is undone and refused.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use spillway_protocol::page::FLAG_SIBLINGS;
use spillway_protocol::{GRANULE, granules_up};

use crate::driver::{Status, call};
use crate::gate;
use crate::idle::AT_MOST;
use crate::lock;
use crate::runtime::Runtime;
use crate::standing::{FAR, is_loaded};
use crate::vmm;

/// Closer to the limit than this, overhead is measured at once, in bytes.
const NEAR: u64 = 64 << 20;
/// Functions that are looked after at once; beyond it the oldest are given up.
const PENDING_AT_MOST: usize = 4096;
/// Near the limit, a process with imports, or one of several of a workload, is measured again after this long,
/// in nanoseconds.
const INHERIT_AGAIN: u64 = 20_000_000;
/// How long the end of a module waits for a load of its functions.
const PATIENCE: Duration = Duration::from_secs(10);

/// A function that the program has asked for and whose code the driver may not have loaded yet.
#[derive(Clone, Copy, Debug)]
struct Function {
    function: usize,
    context: usize,
}

#[derive(Debug, Default)]
struct Pending {
    /// By module or library.
    functions: HashMap<usize, Vec<Function>>,
    count: usize,
    /// Threads that have taken functions out and load them.
    loading: u32,
}

/// What may still grow.
#[derive(Debug, Default)]
pub struct Overhead {
    pending: Mutex<Pending>,
    loaded: Condvar,
    any_pending: AtomicBool,
    /// The driver may have taken something since the last measurement.
    stale: AtomicBool,
    /// When it was measured last, in nanoseconds of the monotonic clock.
    measured: AtomicU64,
    /// Memory was imported: it is this workload's to answer for once nobody else is charged for it.
    imports: AtomicBool,
    /// What a context has cost so far at most, in bytes, over all devices.
    context_cost: AtomicU64,
    /// The same for a green context.
    green_cost: AtomicU64,
}

impl Runtime {
    /// Bytes between what this workload has on a device, overhead included, and its limit; negative:
    /// beyond it.
    pub fn headroom(&self, device: usize) -> i64 {
        let desired = &self.desired().devices[device];
        let limit = desired.limit.load(SeqCst);
        let gone = self.observed.devices[device].used.load(SeqCst)
            + desired.overhead.load(SeqCst)
            + desired.others.load(SeqCst);
        i64::try_from(limit).unwrap_or(i64::MAX) - i64::try_from(gone).unwrap_or(i64::MAX)
    }

    /// Has the coordinator measure what the driver took for itself, and waits for it, bounded.
    pub fn measure_now(&self) {
        if let Some(session) = &self.session {
            self.overhead.stale.store(false, SeqCst);
            for device in 0..self.devices.len() {
                // What they gave back since somebody looked would be missing from what the driver shows.
                self.look_at_stores(device);
            }
            session.refresh(true);
            self.overhead
                .measured
                .store(crate::runtime::monotonic_ns(), SeqCst);
        }
    }

    /// The driver may have taken or given back something for itself: measured when somebody asks.
    pub fn overhead_changed(&self) {
        self.overhead.stale.store(true, SeqCst);
    }

    /// Memory was imported that this process may be left with.
    pub fn imports(&self) {
        self.overhead.imports.store(true, SeqCst);
    }

    /// Others may have left memory to this process since the last measurement.
    fn may_inherit(&self) -> bool {
        self.overhead.imports.load(SeqCst) && self.measured_long_ago()
    }

    /// The last measurement is more than some milliseconds old.
    pub fn measured_long_ago(&self) -> bool {
        let now = crate::runtime::monotonic_ns();
        now.saturating_sub(self.overhead.measured.load(SeqCst)) > INHERIT_AGAIN
    }

    /// Whether this workload is beyond its limit on a device. It can be by memory that others
    /// shared with it and that it was left with; then it gets no more of that kind either.
    pub fn is_full(&self, device: usize) -> bool {
        if self.session.is_none() {
            return false;
        }
        if self.may_inherit() {
            self.measure_now();
        }
        // Code that the driver loaded late may be beyond the limit, too, and must not stop who only shares.
        self.headroom(device) < -signed(NEAR)
    }

    /// Measures if something may have changed since the last time.
    pub fn measure_if_changed(&self) {
        if self.overhead.stale.load(SeqCst) {
            self.measure_now();
        }
    }

    /// Runs a driver call that makes the driver take memory for itself, inside the gate. `least`: what it
    /// will take at the least, where that is known.
    pub fn taking_overhead(
        &self,
        device: usize,
        least: u64,
        make: impl FnOnce() -> Status,
        undo: impl FnOnce(),
    ) -> Status {
        let near = |runtime: &Self| runtime.headroom(device) < signed(NEAR.max(least));
        let watched = self.session.is_some() && near(self);
        if watched {
            self.measure_now();
            if self.headroom(device) < signed(least) && self.give_back_spare(device) {
                self.measure_now();
            }
            if self.headroom(device) < signed(least) {
                self.observed.refused.fetch_add(1, SeqCst);
                return Status::OUT_OF_MEMORY;
            }
        }
        let inside = gate::enter();
        let status = make();
        drop(inside);
        if !status.is_success() {
            return status;
        }
        if !watched {
            self.overhead.stale.store(true, SeqCst);
            return status;
        }
        self.measure_now();
        if self.headroom(device) < 0 {
            undo();
            self.measure_now();
            self.observed.refused.fetch_add(1, SeqCst);
            return Status::OUT_OF_MEMORY;
        }
        status
    }

    /// Whether the driver may take so many bytes more for itself; measured, if that is near.
    pub fn fits_overhead(&self, device: usize, bytes: u64) -> bool {
        if self.headroom(device) >= signed(bytes.saturating_add(NEAR)) {
            return true;
        }
        self.measure_now();
        if self.headroom(device) < signed(bytes) && self.give_back_spare(device) {
            self.measure_now();
        }
        let fits = self.headroom(device) >= signed(bytes);
        if !fits {
            self.observed.refused.fetch_add(1, SeqCst);
        }
        fits
    }

    /// The least that a further context takes, as far as one has been measured.
    pub fn context_cost(&self) -> u64 {
        self.overhead.context_cost.load(SeqCst)
    }

    /// The least that a further green context takes: no more than a context, until one has been measured.
    pub fn green_cost(&self) -> u64 {
        match self.overhead.green_cost.load(SeqCst) {
            0 => self.context_cost(),
            cost => cost,
        }
    }

    /// As [`Runtime::context_made`], for a green context.
    pub fn green_made(&self, device: usize, before: u64) {
        let now = self.desired().devices[device].overhead.load(SeqCst);
        let cost = now.saturating_sub(before);
        self.overhead.green_cost.fetch_max(cost, SeqCst);
    }

    /// A context was made on a device where the overhead had been `before`; it has been measured since.
    pub fn context_made(&self, device: usize, before: u64) {
        let now = self.desired().devices[device].overhead.load(SeqCst);
        let cost = now.saturating_sub(before);
        self.overhead.context_cost.fetch_max(cost, SeqCst);
        // Only the first: later ones share some of what the driver takes.
        let told = &self.observed.devices[device].context;
        let _ = told.compare_exchange(0, cost, SeqCst, SeqCst);
    }

    /// Reserves what the first context of this process on a device will take, as far as another process of
    /// the workload has shown it, until it is measured. Returns the bytes; they are pinned.
    ///
    /// # Errors
    /// The workload has no room for it.
    pub fn reserve_context(&self, device: usize) -> Result<u64, ()> {
        let desired = &self.desired().devices[device];
        let cost = granules_up(desired.context.load(SeqCst));
        if cost > 0 {
            self.reserve(device, cost, false)?;
        }
        Ok(cost)
    }

    /// Other processes of the workload may have made the driver take something since the last measurement.
    fn may_have_grown(&self) -> bool {
        self.desired().flags.load(SeqCst) & FLAG_SIBLINGS != 0 && self.measured_long_ago()
    }

    /// The program has asked for a function of a module. Its code may be loaded by its first launch, which
    /// nobody here could refuse.
    pub fn function_found(&self, module: usize, function: usize) {
        if is_loaded(function) {
            return;
        }
        self.overhead.stale.store(true, SeqCst);
        let Ok((context, _)) = self.current() else {
            return;
        };
        let mut pending = lock(&self.overhead.pending);
        if pending.count >= PENDING_AT_MOST {
            return;
        }
        let of = pending.functions.entry(module).or_default();
        if of.iter().all(|known| known.function != function) {
            of.push(Function { function, context });
            pending.count += 1;
            self.overhead.any_pending.store(true, SeqCst);
        }
    }

    /// A module, or what has functions like one, is about to end: nobody loads its functions any more.
    pub fn module_ends(&self, module: usize) {
        let mut pending = lock(&self.overhead.pending);
        if let Some(gone) = pending.functions.remove(&module) {
            pending.count -= gone.len();
        }
        self.await_loads(pending);
    }

    /// The same for all modules of a context.
    pub fn modules_end_with(&self, context: usize) {
        if !self.overhead.any_pending.load(SeqCst) {
            return;
        }
        let mut pending = lock(&self.overhead.pending);
        for of in pending.functions.values_mut() {
            of.retain(|function| function.context != context);
        }
        pending.functions.retain(|_, of| !of.is_empty());
        pending.count = pending.functions.values().map(Vec::len).sum();
        self.await_loads(pending);
    }

    fn await_loads(&self, mut pending: std::sync::MutexGuard<'_, Pending>) {
        let until = Instant::now() + PATIENCE;
        while pending.loading > 0 && Instant::now() < until {
            pending = self
                .overhead
                .loaded
                .wait_timeout(pending, Duration::from_millis(10))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Before `bytes` are reserved on a device: if that comes near the limit, what the driver will take for
    /// the program's functions is taken now, and measured, so that it is in the account. Returns the bytes that
    /// could not be taken, and have to stay free: stacks do not grow while work runs or a stream captures.
    #[must_use]
    pub fn settle_overhead(&self, device: usize, bytes: u64) -> u64 {
        let stacks = self.stacks_to_come(device);
        let reach = if self.overhead.any_pending.load(SeqCst) {
            FAR
        } else {
            NEAR
        };
        let near = bytes.saturating_add(reach).saturating_add(stacks);
        if self.session.is_none() || self.headroom(device) >= signed(near) {
            return 0;
        }
        if stacks > 0 && self.grow_stacks(device, Duration::ZERO) {
            self.overhead.stale.store(true, SeqCst);
        }
        self.measure_lingering(device);
        if self.overhead.any_pending.load(SeqCst) {
            self.load_pending(device);
            self.measure_now();
        } else if self.overhead.stale.load(SeqCst) || self.may_inherit() || self.may_have_grown() {
            self.measure_now();
        }
        let left = self.stacks_to_come(device);
        if left == 0 || self.headroom(device) >= signed(bytes.saturating_add(left)) {
            return left;
        }
        // It fits only if the stacks take less than is reckoned for them.
        if !self.glance.capturing() && self.grow_stacks(device, AT_MOST) {
            self.measure_now();
        }
        self.stacks_to_come(device)
    }

    fn load_pending(&self, device: usize) {
        while self.headroom(device) >= signed(GRANULE) {
            // Taken inside the gate, so that the end of its module waits for a driver call at most.
            let inside = gate::enter();
            let Some(Function { function, context }) = self.take_pending(device) else {
                break;
            };
            let _ = vmm::in_context(context, || {
                // SAFETY: its module is alive: the end of a module waits for us.
                unsafe { call::cuFuncLoad(function as *mut _) }.ok()?;
                self.loaded_late(context, device, function);
                Ok(())
            });
            lock(&self.overhead.pending).loading -= 1;
            self.overhead.loaded.notify_all();
            drop(inside);
        }
    }

    /// Takes one function of a device out, to be loaded; counted as loading until the caller is done.
    fn take_pending(&self, device: usize) -> Option<Function> {
        let contexts = lock(&self.contexts);
        let mut pending = lock(&self.overhead.pending);
        let mut taken = None;
        for of in pending.functions.values_mut() {
            let here = |f: &Function| contexts.device_of(f.context) == Some(device);
            if let Some(at) = of.iter().position(here) {
                taken = Some(of.swap_remove(at));
                break;
            }
        }
        pending.functions.retain(|_, of| !of.is_empty());
        if taken.is_some() {
            pending.count -= 1;
            pending.loading += 1;
        }
        self.overhead.any_pending.store(pending.count > 0, SeqCst);
        taken
    }
}

/// For sums that may be negative.
pub fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
