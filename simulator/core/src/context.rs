//! Contexts: what belongs to one, its lasting error, and which one a thread works in.

use crate::classic::Blocks;
use crate::code::{CONTEXT_IS_DESTROYED, INVALID_CONTEXT, R};
use crate::driver::Driver;
use crate::green::Green;
use crate::limits::Limits;
use crate::space::{Physical, fresh_id};
use crate::stream::{Kind, Stream};
use crate::sync::{lock, write};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// A context.
pub struct Context {
    pub id: u64,
    pub gpu: u32,
    pub primary: bool,
    pub flags: AtomicU32,
    /// The first asynchronous failure; every later call answers it until the context is gone.
    pub error: AtomicU32,
    /// Going away: endless work gives up.
    pub closing: AtomicBool,
    pub destroyed: AtomicBool,
    /// Taken while a blocking stream's work is queued, so that implicit order is one order.
    pub order: Mutex<()>,
    streams: Mutex<Vec<(Arc<Stream>, bool)>>,
    legacy: Mutex<Option<Arc<Stream>>>,
    charge: Mutex<Option<Arc<Physical>>>,
    /// Small allocations of this context.
    pub blocks: Mutex<Blocks>,
    /// What `cuCtxSetLimit` sets, and the memory behind it.
    pub limits: Limits,
    /// Made by the first `cuCtxCreate`: addresses and sizes have 32 bits (API version 3010).
    pub old: bool,
    pub cache_config: AtomicU32,
    pub shared_config: AtomicU32,
}

impl Context {
    /// A new context on `gpu`, charged with its memory.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn new(
        driver: &'static Driver,
        id: u64,
        gpu: u32,
        primary: bool,
        flags: u32,
        old: bool,
    ) -> R<Arc<Self>> {
        if old {
            write(&driver.space).reserve_low()?;
        }
        let bytes = driver
            .shared
            .config()
            .context
            .next_multiple_of(crate::config::FRAME);
        let charge = if bytes == 0 {
            None
        } else {
            Some(Physical::charge(driver.shared, gpu, bytes)?)
        };
        let context = Arc::new(Self {
            id,
            gpu,
            primary,
            flags: AtomicU32::new(flags),
            error: AtomicU32::new(0),
            closing: AtomicBool::new(false),
            destroyed: AtomicBool::new(false),
            order: Mutex::new(()),
            streams: Mutex::default(),
            legacy: Mutex::new(None),
            charge: Mutex::new(charge),
            blocks: Mutex::default(),
            limits: Limits::new(driver.shared, gpu),
            old,
            cache_config: AtomicU32::new(0),
            shared_config: AtomicU32::new(0),
        });
        *lock(&context.legacy) = Some(Stream::new(
            1,
            Kind::Legacy,
            false,
            0,
            0,
            Arc::clone(&context),
            None,
        ));
        driver.shared.count_context(gpu, true);
        driver.contexts.insert(id, Arc::clone(&context));
        Ok(context)
    }

    /// Notes the first asynchronous failure.
    pub fn fail(&self, code: u32) {
        let _ = self
            .error
            .compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
    }

    /// # Errors
    /// The lasting error, or `CONTEXT_IS_DESTROYED`.
    pub fn check(&self) -> R {
        if self.destroyed.load(Ordering::Acquire) {
            return Err(CONTEXT_IS_DESTROYED);
        }
        match self.error.load(Ordering::Acquire) {
            0 => Ok(()),
            code => Err(code),
        }
    }

    /// The legacy default stream; `None` once the context is gone.
    #[must_use]
    pub fn legacy(&self) -> Option<Arc<Stream>> {
        lock(&self.legacy).clone()
    }

    /// All streams but the legacy one, those destroyed with work left included.
    #[must_use]
    pub fn streams(&self) -> Vec<Arc<Stream>> {
        lock(&self.streams)
            .iter()
            .map(|s| Arc::clone(&s.0))
            .collect()
    }

    pub fn add_stream(&self, stream: &Arc<Stream>) {
        let mut streams = lock(&self.streams);
        streams.retain(|(stream, closed)| !closed || stream.busy());
        streams.push((Arc::clone(stream), false));
    }

    /// Destroys a stream; what it still has to do is done.
    pub fn close_stream(&self, id: u64) {
        let mut streams = lock(&self.streams);
        for (stream, closed) in streams.iter_mut().filter(|s| s.0.id == id) {
            *closed = true;
            stream.close();
        }
        streams.retain(|(stream, closed)| !closed || stream.busy());
    }

    /// Waits for everything submitted so far.
    pub fn drain(&self) {
        let all = self.streams();
        for stream in all.iter().chain(&self.legacy()) {
            stream.wait(stream.submitted());
        }
    }

    /// Whether everything submitted so far is done.
    #[must_use]
    pub fn idle(&self) -> bool {
        !self
            .streams()
            .iter()
            .chain(&self.legacy())
            .any(|s| s.busy())
    }

    /// Whether a stream of the context captures.
    pub fn capturing(&self) -> Vec<Arc<Stream>> {
        self.streams()
            .into_iter()
            .filter(|s| s.capturing.load(Ordering::Acquire))
            .collect()
    }

    /// Ends the context: work is finished (endless work stops), and all it owns is freed.
    /// Mappings of the VMM calls stay.
    pub fn destroy(&self, driver: &'static Driver) {
        if self.destroyed.swap(true, Ordering::AcqRel) {
            return;
        }
        self.closing.store(true, Ordering::Release);
        self.drain();
        for green in driver.greens.all() {
            if std::ptr::eq(&*green.context, self) {
                green.let_go();
            }
        }
        for stream in self.streams().iter().chain(&self.legacy()) {
            stream.close();
            driver.streams.remove(stream.id);
        }
        lock(&self.streams).clear();
        *lock(&self.legacy) = None;
        driver.modules.retain(|m| m.context != self.id);
        driver.functions.retain(|f| f.module.context != self.id);
        driver.events.retain(|e| e.context != self.id);
        crate::classic::drop_context(driver, self.id);
        write(&driver.host).drop_context(self.id);
        *lock(&self.charge) = None;
        self.limits.let_go();
        driver.contexts.remove(self.id);
        driver.shared.count_context(self.gpu, false);
    }
}

/// The primary context of a device.
#[derive(Default)]
pub struct Primary {
    pub id: u64,
    pub references: u32,
    pub flags: u32,
    pub context: Option<Arc<Context>>,
}

impl Primary {
    /// Gets the context, making it if there is none.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub fn activate(&mut self, driver: &'static Driver, gpu: u32) -> R<Arc<Context>> {
        if let Some(context) = &self.context {
            return Ok(Arc::clone(context));
        }
        if self.id == 0 {
            self.id = fresh_id();
        }
        let context = Context::new(driver, self.id, gpu, true, self.flags, false)?;
        self.context = Some(Arc::clone(&context));
        Ok(context)
    }

    /// One use less; the last one ends the context.
    pub fn release(&mut self, driver: &'static Driver) {
        self.references = self.references.saturating_sub(1);
        if self.references == 0 {
            self.deactivate(driver);
        }
    }

    pub fn deactivate(&mut self, driver: &'static Driver) {
        if let Some(context) = self.context.take() {
            context.destroy(driver);
        }
    }
}

/// What can be current: a context, or its part that a green context is.
#[derive(Clone)]
pub struct Current {
    pub context: Arc<Context>,
    pub green: Option<Arc<Green>>,
}

impl From<Arc<Context>> for Current {
    fn from(context: Arc<Context>) -> Self {
        Self {
            context,
            green: None,
        }
    }
}

impl From<Arc<Green>> for Current {
    fn from(green: Arc<Green>) -> Self {
        Self {
            context: Arc::clone(&green.context),
            green: Some(green),
        }
    }
}

impl Current {
    /// The one of a `CUcontext`.
    #[must_use]
    pub fn of(driver: &Driver, handle: u64) -> Option<Self> {
        driver
            .contexts
            .get(handle)
            .map(Self::from)
            .or_else(|| Green::of_context(driver, handle).map(Self::from))
    }

    /// As a `CUcontext`.
    #[must_use]
    pub fn handle(&self) -> u64 {
        self.green
            .as_ref()
            .map_or(self.context.id, |green| green.context_id)
    }

    /// # Errors
    /// `CONTEXT_IS_DESTROYED`, or the lasting error.
    pub fn check(&self) -> R {
        match &self.green {
            Some(green) => green.check(),
            None => self.context.check(),
        }
    }

    /// Its legacy default stream; `None` once it is gone.
    #[must_use]
    pub fn default_stream(&self) -> Option<Arc<Stream>> {
        match &self.green {
            Some(green) => green.default_stream(),
            None => self.context.legacy(),
        }
    }

    /// All its streams; a primary context's include those of its green contexts.
    #[must_use]
    pub fn streams(&self) -> Vec<Arc<Stream>> {
        match &self.green {
            Some(green) => green.streams(),
            None => {
                let mut all = self.context.streams();
                all.extend(self.context.legacy());
                all
            }
        }
    }
}

/// What belongs to one thread.
#[derive(Default)]
struct Local {
    stack: Vec<Current>,
    streams: HashMap<u64, Arc<Stream>>,
}

impl Drop for Local {
    fn drop(&mut self) {
        if crate::driver::forked() {
            // Locks may be held by threads that are not here.
            std::mem::take(&mut self.streams)
                .into_values()
                .for_each(std::mem::forget);
            std::mem::take(&mut self.stack)
                .into_iter()
                .for_each(std::mem::forget);
            return;
        }
        for stream in self.streams.values() {
            stream.context.close_stream(stream.id);
        }
    }
}

thread_local! {
    static LOCAL: RefCell<Local> = RefCell::default();
}

fn with_local<T>(f: impl FnOnce(&mut Local) -> T) -> R<T> {
    // A thread that is ending has no context any more.
    LOCAL
        .try_with(|local| f(&mut local.borrow_mut()))
        .map_err(|_| INVALID_CONTEXT)
}

/// What is on top of the thread's stack, whatever its state.
#[must_use]
pub fn top_entry() -> Option<Current> {
    let top = with_local(|local| local.stack.last().cloned())
        .ok()
        .flatten()?;
    let context = &top.context;
    if top.green.is_none() && context.primary && context.destroyed.load(Ordering::Acquire) {
        // A primary context that was reset comes back under the same handle.
        let driver = crate::driver::get().ok()?;
        if let Some(context) = driver.contexts.get(context.id) {
            let fresh = Current::from(context);
            let _ = with_local(|local| {
                if let Some(last) = local.stack.last_mut() {
                    *last = fresh.clone();
                }
            });
            return Some(fresh);
        }
    }
    Some(top)
}

/// The context on top of the thread's stack, whatever its state.
#[must_use]
pub fn top() -> Option<Arc<Context>> {
    top_entry().map(|top| top.context)
}

/// The current context, usable.
///
/// # Errors
/// `INVALID_CONTEXT` without one, `CONTEXT_IS_DESTROYED`, or its lasting error.
pub fn current() -> R<Arc<Context>> {
    current_entry().map(|current| current.context)
}

/// As [`current`], with the green context that it may be.
///
/// # Errors
/// As there.
pub fn current_entry() -> R<Current> {
    let current = top_entry().ok_or(INVALID_CONTEXT)?;
    current.check()?;
    Ok(current)
}

/// # Errors
/// `INVALID_CONTEXT` in a thread that is ending.
pub fn push(context: impl Into<Current>) -> R {
    let context = context.into();
    with_local(|local| local.stack.push(context))
}

/// # Errors
/// `INVALID_CONTEXT` if the stack is empty.
pub fn pop() -> R<Current> {
    with_local(|local| local.stack.pop())?.ok_or(INVALID_CONTEXT)
}

/// Replaces the top of the stack; `None` takes it away.
///
/// # Errors
/// `INVALID_CONTEXT` in a thread that is ending.
pub fn set(context: Option<Current>) -> R {
    with_local(|local| {
        local.stack.pop();
        local.stack.extend(context);
    })
}

/// The thread's own default stream in what is current.
///
/// # Errors
/// `INVALID_CONTEXT` in a thread that is ending.
pub fn per_thread_stream(current: &Current) -> R<Arc<Stream>> {
    let (key, context) = (current.handle(), &current.context);
    with_local(|local| {
        local
            .streams
            .retain(|_, s| s.check() != Err(CONTEXT_IS_DESTROYED));
        let known = local
            .streams
            .get(&key)
            .filter(|s| Arc::ptr_eq(&s.context, context));
        if let Some(stream) = known {
            return Arc::clone(stream);
        }
        let stream = Stream::new(
            fresh_id(),
            Kind::Blocking,
            true,
            0,
            0,
            Arc::clone(context),
            current.green.clone(),
        );
        context.add_stream(&stream);
        local.streams.insert(key, Arc::clone(&stream));
        stream
    })
}
