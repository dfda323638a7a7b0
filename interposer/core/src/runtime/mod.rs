//! All state of the library in this process, behind one pointer.
//!
//! It begins with the first successful `cuInit` and is never freed: any thread may hold a reference
//! at any time. A forked child forgets the pointer and, should it use CUDA, starts anew.

mod contexts;
mod glance;
mod start;

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use spillway_protocol::page::{Desired, Observed};

pub use contexts::Contexts;
pub use glance::Glance;
pub use start::{monotonic_ns, start};

use crate::deferred::Deferred;
use crate::driver::{Status, call};
use crate::graphs::Graphs;
use crate::handles::Handles;
use crate::heap::{Alloc, Heap};
use crate::hooks::Managed;
use crate::lock;
use crate::meter::Meter;
use crate::overhead::Overhead;
use crate::pager::Pager;
use crate::pools::Pools;
use crate::quota::SmallMeter;
use crate::session::Session;
use crate::shares::Shares;
use crate::standing::Standing;

/// A device of this process.
#[derive(Debug)]
pub struct Device {
    /// `CUdevice`.
    pub ordinal: i32,
    /// `cuDeviceGetUuid_v2`.
    pub uuid: [u8; 16],
    /// As the driver tells it, in bytes.
    pub total: u64,
}

/// The state.
pub struct Runtime {
    /// By ordinal.
    pub devices: Vec<Device>,
    /// Our page; without a coordinator a private one.
    pub observed: &'static Observed,
    /// The grants that hold without a coordinator.
    local: &'static Desired,
    /// The coordinator, if there is one.
    pub session: Option<Session>,
    /// Memory of the application is ours to move: a coordinator, swap on, and a driver that can.
    pub paging: bool,
    /// Quotas are in force: a coordinator or a limit.
    pub limited: bool,
    /// Bookkeeping of the application's allocations.
    pub heap: Mutex<Heap>,
    /// Signalled when a move ends or a teardown ends.
    pub heap_changed: Condvar,
    /// Context teardowns under way; guarded by `heap`'s lock for the order with moves.
    pub teardowns: Mutex<u32>,
    /// Contexts, streams, captures.
    pub contexts: Mutex<Contexts>,
    /// What of them is read without the lock.
    pub glance: Arc<Glance>,
    /// Signalled when a thread of ours is done with a handle of the application.
    pub contexts_changed: Condvar,
    /// Stream-ordered frees whose work is not finished.
    pub deferred: Mutex<Deferred>,
    /// There may be some; set under the lock of `deferred`. The same for `kept`.
    pub has_deferred: AtomicBool,
    /// See `has_deferred`.
    pub has_kept: AtomicBool,
    /// Frees that wait for the end of a capture.
    pub kept: Mutex<Vec<Alloc>>,
    /// Handles, arrays and managed allocations of the application.
    pub handles: Mutex<Handles>,
    /// Per device: the driver's own small allocations.
    pub small: Vec<Mutex<SmallMeter>>,
    /// (owner's device, accessing device) pairs with peer access enabled.
    pub peers: Mutex<Vec<(usize, usize)>>,
    /// The pager's post box.
    pub pager: Pager,
    /// Memory pools that allocations were asked of.
    pub pools: Mutex<Pools>,
    /// Some pool is an own one; some store is the driver's (see [`crate::stores`]): nothing to look at
    /// before that.
    pub has_own_pools: AtomicBool,
    /// See `has_own_pools`.
    pub has_stores: AtomicBool,
    /// Per device: the current pool as the driver's handle; 0: to be asked.
    pub current_pools: Vec<AtomicU64>,
    /// Memory of the driver's pools was freed in stream order, and may not be back yet.
    pub pool_frees: AtomicBool,
    /// Instantiated graphs with memory nodes.
    pub graphs: Mutex<Graphs>,
    /// Per device: what the driver has reserved for graphs.
    pub graph_meters: Vec<Mutex<Meter>>,
    /// Managed memory that is kept on the host.
    pub managed: Mutex<Managed>,
    /// Memory that other processes may map.
    pub shares: Shares,
    /// What the driver takes for itself.
    pub overhead: Overhead,
    /// Some context has been made by the first `cuCtxCreate`.
    pub any_old: AtomicBool,
    /// See [`crate::standing`].
    pub standing: Standing,
    /// The process is exiting: nothing is moved any more.
    pub ending: AtomicBool,
}

static RUNTIME: AtomicPtr<Runtime> = AtomicPtr::new(std::ptr::null_mut());

/// 0: nothing yet; 1: pass-through for good (disabled or forked after use).
static PASSIVE: AtomicU8 = AtomicU8::new(0);

/// The state, once CUDA is in use under Spillway.
#[inline]
#[must_use]
pub fn get() -> Option<&'static Runtime> {
    // SAFETY: null, or a leaked box.
    unsafe { RUNTIME.load(SeqCst).as_ref() }
}

/// Publishes the state.
fn publish(runtime: Box<Runtime>) -> &'static Runtime {
    let leaked: &'static Runtime = Box::leak(runtime);
    RUNTIME.store(std::ptr::from_ref(leaked).cast_mut(), SeqCst);
    leaked
}

impl Runtime {
    /// The page that says what we may use.
    #[inline]
    #[must_use]
    pub fn desired(&self) -> &'static Desired {
        match &self.session {
            Some(session) => session.desired(),
            None => self.local,
        }
    }

    /// The calling thread's current context and its device index.
    ///
    /// # Errors
    /// No context is current, or the driver's own error.
    pub fn current(&self) -> Result<(usize, usize), Status> {
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver fills one handle.
        unsafe { call::cuCtxGetCurrent(&raw mut context) }.ok()?;
        if context.is_null() {
            return Err(Status::INVALID_CONTEXT);
        }
        let context = context as usize;
        if let Some(device) = self.glance.device_of(context) {
            return Ok((context, device));
        }
        {
            let contexts = lock(&self.contexts);
            // What is allocated in a green context is the primary context's.
            let green = contexts.green_behind(context);
            let owner = green.and_then(|green| contexts.green(green));
            let context = owner.map_or(context, |green| green.primary);
            if let Some(device) = contexts.device_of(context) {
                return Ok((context, device));
            }
        }
        let mut ordinal = 0;
        // SAFETY: the driver fills one integer.
        unsafe { call::cuCtxGetDevice(&raw mut ordinal) }.ok()?;
        let device = self.device_index(ordinal).ok_or(Status::INVALID_DEVICE)?;
        lock(&self.contexts).add(context, device, false);
        Ok((context, device))
    }

    /// The current context is one of the first `cuCtxCreate`: today's calls are refused there, by the driver.
    #[must_use]
    pub fn old_interface(&self) -> bool {
        self.any_old.load(SeqCst)
            && self
                .current()
                .is_ok_and(|(context, _)| lock(&self.contexts).is_old(context))
    }

    /// The green context that is current, if one is.
    #[must_use]
    pub fn current_green(&self) -> Option<usize> {
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver fills one handle.
        let asked = unsafe { call::cuCtxGetCurrent(&raw mut context) };
        asked.ok().ok()?;
        lock(&self.contexts).green_behind(context as usize)
    }

    /// The index of a `CUdevice`.
    #[must_use]
    pub fn device_index(&self, ordinal: i32) -> Option<usize> {
        self.devices.iter().position(|d| d.ordinal == ordinal)
    }

    /// Runs driver calls on a context or stream of the application from a thread of ours; `None`: it
    /// is gone or being destroyed. The driver may crash on a handle that another thread destroys,
    /// so destruction waits for us (see [`Runtime::destroying`]).
    pub fn using<T>(&self, handle: usize, run: impl FnOnce() -> T) -> Option<T> {
        if !lock(&self.contexts).try_use(handle) {
            return None;
        }
        let result = run();
        lock(&self.contexts).unuse(handle);
        self.contexts_changed.notify_all();
        Some(result)
    }

    /// Asks streams of the application how far they are; `None`: a capture is open, which that would
    /// spoil.
    pub fn asking<T>(&self, ask: impl FnOnce() -> T) -> Option<T> {
        if !lock(&self.contexts).try_ask() {
            return None;
        }
        let answer = ask();
        lock(&self.contexts).asked();
        self.contexts_changed.notify_all();
        Some(answer)
    }

    /// Begins a capture of the application and notes it. Nobody of ours asks streams from now until it
    /// has ended; who asks now is waited for, which takes microseconds.
    pub fn beginning_capture(
        &self,
        (stream, thread): (usize, u64),
        begin: impl FnOnce() -> Status,
    ) -> Status {
        let until = Instant::now() + Duration::from_secs(1);
        let mut contexts = lock(&self.contexts);
        contexts.tries_capture();
        while contexts.asking() && Instant::now() < until {
            contexts = self
                .contexts_changed
                .wait_timeout(contexts, Duration::from_millis(1))
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
        drop(contexts);
        let status = begin();
        let mut contexts = lock(&self.contexts);
        if status.is_success() {
            contexts.begin_capture(stream, thread);
        }
        contexts.tried_capture();
        status
    }

    /// Destroys a handle of the application, after threads of ours have let go of it. They do
    /// within microseconds, except for one that waits for a kernel that does not end: that wait is
    /// bounded, and the destruction then goes on as it would have without us.
    pub fn destroying(&self, handle: usize, destroy: impl FnOnce() -> Status) -> Status {
        let until = Instant::now() + Duration::from_secs(10);
        let mut contexts = lock(&self.contexts);
        while contexts.going(handle) && Instant::now() < until {
            contexts = self
                .contexts_changed
                .wait_timeout(contexts, Duration::from_millis(100))
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
        drop(contexts);
        let status = destroy();
        lock(&self.contexts).gone(handle);
        self.contexts_changed.notify_all();
        status
    }

    /// The driver has made something with this handle. Waits until a thread that has just destroyed what had the
    /// same one before is through with its books: it would take the new one for the old. That thread only has
    /// memory to release, so this takes moments.
    pub fn await_gone(&self, handle: usize) {
        let until = Instant::now() + Duration::from_secs(10);
        let mut contexts = lock(&self.contexts);
        while contexts.is_going(handle) && Instant::now() < until {
            contexts = self
                .contexts_changed
                .wait_timeout(contexts, Duration::from_millis(100))
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
    }

    /// Begins the teardown of a context: waits for a running move, and keeps the pager from
    /// beginning one until [`Runtime::teardown_ended`].
    pub fn teardown_begun(&self) {
        let mut heap = lock(&self.heap);
        while heap.moving() {
            heap = self
                .heap_changed
                .wait(heap)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        *lock(&self.teardowns) += 1;
    }

    /// See [`Runtime::teardown_begun`].
    pub fn teardown_ended(&self) {
        let heap = lock(&self.heap);
        *lock(&self.teardowns) -= 1;
        drop(heap);
        self.heap_changed.notify_all();
    }

    /// Sets a reason why this process cannot be moved, and tells people once.
    pub fn unswappable(&self, bit: u64, text: &str) {
        if self.observed.unswappable.fetch_or(bit, SeqCst) & bit == 0
            && let Some(session) = &self.session
        {
            session.note(text);
            session.wake();
        }
    }
}

/// `cuInit` in a process that is disabled: pass-through for good.
pub fn set_passive() {
    PASSIVE.store(1, SeqCst);
}

/// Nothing is to be done in this process.
#[must_use]
pub fn passive() -> bool {
    PASSIVE.load(SeqCst) != 0
}

/// In a forked child: forget everything that belongs to the parent.
extern "C" fn forked_child() {
    let parent = RUNTIME.swap(std::ptr::null_mut(), SeqCst);
    // SAFETY: null, or a leaked box; only its descriptor is read.
    if let Some(parent) = unsafe { parent.as_ref() }
        && let Some(session) = &parent.session
    {
        session.close_in_child();
    }
    start::reset_in_child();
}

/// At exit: the gate opens and the pager moves nothing more; teardown never restores.
extern "C" fn exiting() {
    if let Some(runtime) = get() {
        runtime.ending.store(true, SeqCst);
        runtime.pager.poke();
    }
}
