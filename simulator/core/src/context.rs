//! Contexts: what belongs to one, its lasting error, and which one a thread works in.

use crate::classic::Blocks;
use crate::code::{CONTEXT_IS_DESTROYED, INVALID_CONTEXT, R};
use crate::driver::Driver;
use crate::space::{Physical, fresh_id};
use crate::stream::{Kind, Stream};
use crate::sync::{lock, write};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
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
    /// `cuCtxSetLimit` values.
    pub limits: [AtomicU64; 16],
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
    ) -> R<Arc<Self>> {
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
        let limits: [AtomicU64; 16] = Default::default();
        for (limit, value) in limits
            .iter()
            .zip([1024_u64, 1 << 20, 8 << 20, 0, 2048, 64, 0])
        {
            limit.store(value, Ordering::Relaxed);
        }
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
            limits,
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
        let context = Context::new(driver, self.id, gpu, true, self.flags)?;
        self.context = Some(Arc::clone(&context));
        Ok(context)
    }

    pub fn deactivate(&mut self, driver: &'static Driver) {
        if let Some(context) = self.context.take() {
            context.destroy(driver);
        }
    }
}

/// What belongs to one thread.
#[derive(Default)]
struct Local {
    stack: Vec<Arc<Context>>,
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

/// The context on top of the thread's stack, whatever its state.
#[must_use]
pub fn top() -> Option<Arc<Context>> {
    let top = with_local(|local| local.stack.last().cloned())
        .ok()
        .flatten()?;
    if top.primary && top.destroyed.load(Ordering::Acquire) {
        // A primary context that was reset comes back under the same handle.
        let driver = crate::driver::get().ok()?;
        if let Some(context) = driver.contexts.get(top.id) {
            let _ = with_local(|local| {
                if let Some(last) = local.stack.last_mut() {
                    *last = Arc::clone(&context);
                }
            });
            return Some(context);
        }
    }
    Some(top)
}

/// The current context, usable.
///
/// # Errors
/// `INVALID_CONTEXT` without one, `CONTEXT_IS_DESTROYED`, or its lasting error.
pub fn current() -> R<Arc<Context>> {
    let context = top().ok_or(INVALID_CONTEXT)?;
    context.check()?;
    Ok(context)
}

/// # Errors
/// `INVALID_CONTEXT` in a thread that is ending.
pub fn push(context: Arc<Context>) -> R {
    with_local(|local| local.stack.push(context))
}

/// # Errors
/// `INVALID_CONTEXT` if the stack is empty.
pub fn pop() -> R<Arc<Context>> {
    with_local(|local| local.stack.pop())?.ok_or(INVALID_CONTEXT)
}

/// Replaces the top of the stack; `None` takes it away.
///
/// # Errors
/// `INVALID_CONTEXT` in a thread that is ending.
pub fn set(context: Option<Arc<Context>>) -> R {
    with_local(|local| {
        local.stack.pop();
        local.stack.extend(context);
    })
}

/// The thread's own default stream in `context`.
///
/// # Errors
/// `INVALID_CONTEXT` in a thread that is ending.
pub fn per_thread_stream(context: &Arc<Context>) -> R<Arc<Stream>> {
    with_local(|local| {
        local
            .streams
            .retain(|_, s| !s.context.destroyed.load(Ordering::Acquire));
        let known = local
            .streams
            .get(&context.id)
            .filter(|s| Arc::ptr_eq(&s.context, context));
        if let Some(stream) = known {
            return Arc::clone(stream);
        }
        let stream = Stream::new(fresh_id(), Kind::Blocking, true, 0, 0, Arc::clone(context));
        context.add_stream(&stream);
        local.streams.insert(context.id, Arc::clone(&stream));
        stream
    })
}
