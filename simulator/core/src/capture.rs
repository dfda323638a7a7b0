//! Stream capture.
//!
//! A capturing stream runs nothing: what is submitted becomes nodes, each behind the stream's
//! frontier. Recording an event in it hands the frontier on; waiting for that event in another
//! stream makes that one capture too.

use crate::code::{
    CAPTURED_EVENT, ILLEGAL_STATE, INVALID_VALUE, R, STREAM_CAPTURE_INVALIDATED,
    STREAM_CAPTURE_ISOLATION, STREAM_CAPTURE_MERGE, STREAM_CAPTURE_UNJOINED,
    STREAM_CAPTURE_UNMATCHED, STREAM_CAPTURE_UNSUPPORTED, STREAM_CAPTURE_WRONG_THREAD,
};
use crate::driver::Driver;
use crate::event::{Event, State};
use crate::exec::Op;
use crate::graph::{Graph, Node};
use crate::space::fresh_id;
use crate::stream::Stream;
use crate::sync::lock;
use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// `CUstreamCaptureMode` values.
pub const GLOBAL: u32 = 0;
pub const THREAD_LOCAL: u32 = 1;
pub const RELAXED: u32 = 2;

/// A capture in progress.
pub struct Capture {
    pub id: u64,
    pub mode: u32,
    thread: u64,
    pub origin: u64,
    pub graph: Arc<Graph>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    invalid: bool,
    streams: Vec<Arc<Stream>>,
}

/// Captures in GLOBAL mode that are in progress.
static GLOBAL_CAPTURES: AtomicUsize = AtomicUsize::new(0);
/// All captures in progress.
static CAPTURES: AtomicUsize = AtomicUsize::new(0);

/// Whether any stream of the process captures: a cheap question for hot paths.
#[must_use]
pub fn any() -> bool {
    CAPTURES.load(Ordering::Acquire) > 0
}

std::thread_local! {
    static MODE: std::cell::Cell<u32> = const { std::cell::Cell::new(GLOBAL) };
    /// Captures other than RELAXED ones that this thread began.
    static OWN_CAPTURES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Swaps the thread's capture mode.
///
/// # Errors
/// `INVALID_VALUE` for an unknown one.
pub fn exchange_mode(mode: u32) -> R<u32> {
    // Driver 580 takes a mode that there is not; it forbids the most here.
    Ok(MODE.replace(if mode > RELAXED { GLOBAL } else { mode }))
}

/// To be asked by every call that might disturb a capture elsewhere.
///
/// # Errors
/// `STREAM_CAPTURE_UNSUPPORTED` while a capture forbids it; that capture is spoilt.
pub fn allow_unsafe(driver: &Driver) -> R {
    let mode = MODE.get();
    let forbidden = match mode {
        RELAXED => false,
        THREAD_LOCAL => OWN_CAPTURES.get() > 0,
        _ => GLOBAL_CAPTURES.load(Ordering::Acquire) > 0 || OWN_CAPTURES.get() > 0,
    };
    if !forbidden {
        return Ok(());
    }
    let me = thread_id();
    for context in driver.contexts.all() {
        for stream in context.capturing() {
            if let Some(capture) = current(&stream)
                && (capture.mode == GLOBAL && mode == GLOBAL
                    || capture.mode != RELAXED && capture.thread == me)
            {
                capture.invalidate();
            }
        }
    }
    Err(STREAM_CAPTURE_UNSUPPORTED)
}

fn thread_id() -> u64 {
    // SAFETY: pthread_self has no preconditions.
    unsafe { libc::pthread_self() as u64 }
}

/// The capture that the stream takes part in.
#[must_use]
pub fn current(stream: &Stream) -> Option<Arc<Capture>> {
    if !stream.capturing.load(Ordering::Acquire) {
        return None;
    }
    lock(&stream.capture).clone()
}

impl Capture {
    pub fn invalidate(&self) {
        lock(&self.inner).invalid = true;
    }

    #[must_use]
    pub fn invalid(&self) -> bool {
        lock(&self.inner).invalid
    }

    fn join(self: &Arc<Self>, stream: &Arc<Stream>, frontier: Vec<usize>) {
        *lock(&stream.capture) = Some(Arc::clone(self));
        *lock(&stream.frontier) = frontier;
        stream.capturing.store(true, Ordering::Release);
        lock(&self.inner).streams.push(Arc::clone(stream));
    }

    /// Adds what was submitted to `stream` as a node.
    ///
    /// # Errors
    /// `STREAM_CAPTURE_INVALIDATED`.
    pub fn record(&self, stream: &Stream, kind: u32, op: Op) -> R<u64> {
        self.record_with(stream, kind, |_, _| Ok(op))
    }

    /// As [`Self::record`], with work that is made knowing the nodes there are and the indices of
    /// those that it follows.
    ///
    /// # Errors
    /// `STREAM_CAPTURE_INVALIDATED`, and those of `op`.
    pub fn record_with(
        &self,
        stream: &Stream,
        kind: u32,
        op: impl FnOnce(&[Node], &[usize]) -> R<Op>,
    ) -> R<u64> {
        if self.invalid() {
            return Err(STREAM_CAPTURE_INVALIDATED);
        }
        let mut frontier = lock(&stream.frontier);
        let mut nodes = lock(&self.graph.nodes);
        let op = op(&nodes, &frontier)?;
        let id = fresh_id();
        let node = Node {
            id,
            kind,
            op,
            after: std::mem::take(&mut *frontier),
        };
        nodes.push(node);
        frontier.push(nodes.len() - 1);
        Ok(id)
    }
}

/// Starts capturing `stream` into a new graph, or into `graph`.
///
/// # Errors
/// `STREAM_CAPTURE_UNSUPPORTED` for the legacy stream, `ILLEGAL_STATE` if it captures already.
pub fn begin(
    driver: &'static Driver,
    stream: &Arc<Stream>,
    mode: u32,
    graph: Option<Arc<Graph>>,
    frontier: Vec<usize>,
) -> R {
    if mode > RELAXED {
        return Err(INVALID_VALUE);
    }
    if stream.kind == crate::stream::Kind::Legacy {
        return Err(STREAM_CAPTURE_UNSUPPORTED);
    }
    if stream.capturing.load(Ordering::Acquire) {
        return Err(ILLEGAL_STATE);
    }
    let capture = Arc::new(Capture {
        id: fresh_id(),
        mode,
        thread: thread_id(),
        origin: stream.id,
        graph: graph.unwrap_or_else(|| Graph::new(driver)),
        inner: Mutex::default(),
    });
    CAPTURES.fetch_add(1, Ordering::AcqRel);
    if mode == GLOBAL {
        GLOBAL_CAPTURES.fetch_add(1, Ordering::AcqRel);
    }
    if mode != RELAXED {
        OWN_CAPTURES.set(OWN_CAPTURES.get() + 1);
    }
    capture.join(stream, frontier);
    Ok(())
}

fn close(capture: &Capture) {
    for stream in lock(&capture.inner).streams.drain(..) {
        stream.capturing.store(false, Ordering::Release);
        *lock(&stream.capture) = None;
        lock(&stream.frontier).clear();
    }
    CAPTURES.fetch_sub(1, Ordering::AcqRel);
    if capture.mode == GLOBAL {
        GLOBAL_CAPTURES.fetch_sub(1, Ordering::AcqRel);
    }
    if capture.mode != RELAXED && capture.thread == thread_id() {
        OWN_CAPTURES.set(OWN_CAPTURES.get().saturating_sub(1));
    }
}

/// Ends the capture that began in `stream`; gives its graph.
///
/// # Errors
/// `ILLEGAL_STATE` if it does not capture, `STREAM_CAPTURE_UNMATCHED` if another stream began,
/// `STREAM_CAPTURE_WRONG_THREAD`, `STREAM_CAPTURE_INVALIDATED`, `STREAM_CAPTURE_UNJOINED` if a
/// stream that joined was not led back.
pub fn end(driver: &Driver, stream: &Arc<Stream>) -> R<Arc<Graph>> {
    let capture = current(stream).ok_or(ILLEGAL_STATE)?;
    if capture.origin != stream.id {
        capture.invalidate();
        return Err(STREAM_CAPTURE_UNMATCHED);
    }
    if capture.mode != RELAXED && capture.thread != thread_id() {
        return Err(STREAM_CAPTURE_WRONG_THREAD);
    }
    let invalid = capture.invalid();
    let joined = joined(&capture, stream);
    close(&capture);
    if invalid || !joined {
        let _ = Graph::forget(driver, capture.graph.id);
        return Err(if invalid {
            STREAM_CAPTURE_INVALIDATED
        } else {
            STREAM_CAPTURE_UNJOINED
        });
    }
    Ok(Arc::clone(&capture.graph))
}

/// Whether everything that other streams added is behind the origin's frontier.
fn joined(capture: &Capture, origin: &Arc<Stream>) -> bool {
    let nodes = lock(&capture.graph.nodes);
    let mut reached: HashSet<usize> = HashSet::new();
    let mut todo = lock(&origin.frontier).clone();
    while let Some(index) = todo.pop() {
        if reached.insert(index) {
            todo.extend(&nodes[index].after);
        }
    }
    let inner = lock(&capture.inner);
    inner
        .streams
        .iter()
        .filter(|s| !Arc::ptr_eq(s, origin))
        .all(|s| lock(&s.frontier).iter().all(|n| reached.contains(n)))
}

/// Recording an event in a capturing stream: it stands for the stream's frontier.
pub fn record_event(capture: &Capture, stream: &Stream, event: &Event) {
    event.set_state(State::Captured(capture.id, lock(&stream.frontier).clone()));
}

/// What waiting for an event means when a capture is involved; false if none is.
///
/// # Errors
/// `STREAM_CAPTURE_ISOLATION` if a capturing stream waits for uncaptured work,
/// `STREAM_CAPTURE_MERGE` if two captures would become one, `CAPTURED_EVENT` if the event's
/// capture is over.
pub fn wait_event(driver: &Driver, stream: &Arc<Stream>, event: &Event) -> R<bool> {
    match (current(stream), event.state()) {
        (None, State::Captured(id, frontier)) => {
            let capture = find(driver, id).ok_or(CAPTURED_EVENT)?;
            if stream.kind == crate::stream::Kind::Legacy {
                capture.invalidate();
                return Err(crate::code::STREAM_CAPTURE_IMPLICIT);
            }
            capture.join(stream, frontier);
            Ok(true)
        }
        (Some(capture), State::Captured(id, frontier)) => {
            if capture.id != id {
                capture.invalidate();
                return Err(STREAM_CAPTURE_MERGE);
            }
            let mut own = lock(&stream.frontier);
            for index in frontier {
                if !own.contains(&index) {
                    own.push(index);
                }
            }
            Ok(true)
        }
        (Some(capture), State::Recorded(_)) => {
            capture.invalidate();
            Err(STREAM_CAPTURE_ISOLATION)
        }
        (Some(_), State::Never) => Ok(true),
        (None, _) => Ok(false),
    }
}

fn find(driver: &Driver, id: u64) -> Option<Arc<Capture>> {
    driver
        .contexts
        .all()
        .iter()
        .flat_map(|c| c.capturing())
        .filter_map(|s| current(&s))
        .find(|c| c.id == id)
}

/// Spoils the captures of a context, as a synchronisation of it does.
///
/// # Errors
/// `STREAM_CAPTURE_UNSUPPORTED` if there was one.
pub fn refuse_in(context: &crate::context::Context) -> R {
    refuse_among(&context.capturing())
}

/// As [`refuse_in`], for some streams.
///
/// # Errors
/// As there.
pub fn refuse_among(streams: &[Arc<Stream>]) -> R {
    let captures: Vec<_> = streams.iter().filter_map(|s| current(s)).collect();
    for capture in &captures {
        capture.invalidate();
    }
    if captures.is_empty() {
        Ok(())
    } else {
        Err(STREAM_CAPTURE_UNSUPPORTED)
    }
}

/// Forgets a capture whose stream is destroyed.
pub fn abandon(stream: &Arc<Stream>) {
    if let Some(capture) = current(stream) {
        if capture.origin == stream.id {
            close(&capture);
        } else {
            capture.invalidate();
        }
    }
}
