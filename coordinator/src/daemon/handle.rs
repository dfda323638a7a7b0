//! [`Control`] for other threads: requests to the main loop, answered over channels.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, sync_channel};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

use crate::model::{Control, ControlError, Done, Event, Metrics, Status};

/// The main loop answers within milliseconds; if it does not for this long, it is ending.
const ANSWER: Duration = Duration::from_secs(10);

/// Wakes the main loop from any thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// A new one.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new() -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(EventFd::from_value_and_flags(0, flags)?)))
    }

    /// Wakes it. A counter that is full wakes it as well.
    pub fn wake(&self) {
        let _ = self.0.write(1);
    }

    /// Forgets all wake-ups so far.
    pub fn clear(&self) {
        let _ = self.0.read();
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What another thread wants of the main loop.
#[derive(Debug)]
pub enum Request {
    /// Status and counters.
    Metrics(SyncSender<Metrics>),
    /// Events.
    Subscribe(SyncSender<(Vec<Event>, Receiver<Event>)>),
    /// Evict or restore.
    Operate {
        /// Chosen by the handle.
        operation: u64,
        /// The workload.
        name: String,
        /// Else restore.
        evict: bool,
        /// Answered at most once.
        reply: SyncSender<Result<Done, ControlError>>,
    },
    /// Nobody waits for this operation any more.
    Forget(u64),
}

/// See the module.
#[derive(Debug)]
pub struct Handle {
    requests: Mutex<Sender<Request>>,
    waker: Waker,
    operations: AtomicU64,
}

impl Handle {
    /// A handle whose requests arrive at the other end of `requests`.
    #[must_use]
    pub fn new(requests: Sender<Request>, waker: Waker) -> Self {
        Self {
            requests: Mutex::new(requests),
            waker,
            operations: AtomicU64::new(0),
        }
    }

    fn send(&self, request: Request) -> Result<(), ControlError> {
        let sent = self.requests.lock().send(request);
        self.waker.wake();
        sent.map_err(|_| ending())
    }

    fn operate(&self, name: &str, evict: bool, timeout: Duration) -> Result<Done, ControlError> {
        let operation = self.operations.fetch_add(1, Relaxed);
        let (reply, answer) = sync_channel(1);
        self.send(Request::Operate {
            operation,
            name: name.to_owned(),
            evict,
            reply,
        })?;
        match answer.recv_timeout(timeout) {
            Ok(result) => result,
            Err(RecvTimeoutError::Disconnected) => Err(ending()),
            Err(RecvTimeoutError::Timeout) => {
                let _ = self.send(Request::Forget(operation));
                let what = if evict { "evicted" } else { "restored" };
                Err(ControlError::Timeout(format!(
                    "{name} was not {what} within {} s; see `spillway status` for what it waits for",
                    timeout.as_secs_f64()
                )))
            }
        }
    }
}

fn ending() -> ControlError {
    ControlError::Unavailable("spillwayd is ending".to_owned())
}

impl Control for Handle {
    fn status(&self) -> Status {
        self.metrics().status
    }

    fn metrics(&self) -> Metrics {
        let (reply, answer) = sync_channel(1);
        match self.send(Request::Metrics(reply)) {
            Ok(()) => answer.recv_timeout(ANSWER).unwrap_or_default(),
            Err(_) => Metrics::default(),
        }
    }

    fn subscribe(&self) -> (Vec<Event>, Receiver<Event>) {
        let (reply, answer) = sync_channel(1);
        let sent = self.send(Request::Subscribe(reply));
        sent.ok()
            .and_then(|()| answer.recv_timeout(ANSWER).ok())
            .unwrap_or_else(|| (Vec::new(), sync_channel(1).1))
    }

    fn evict(&self, name: &str, timeout: Duration) -> Result<Done, ControlError> {
        self.operate(name, true, timeout)
    }

    fn restore(&self, name: &str, timeout: Duration) -> Result<Done, ControlError> {
        self.operate(name, false, timeout)
    }
}
