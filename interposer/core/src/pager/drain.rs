//! Draining: the gate closed, nobody inside, the devices idle. Bounded by a deadline; past it the
//! gate reopens and nothing has changed.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use spillway_protocol::page::{state, unswappable};

use super::Worker;
use crate::driver::{Status, call};
use crate::gate::{self, CloseError};
use crate::lock;
use crate::runtime::Runtime;
use crate::vmm;

/// Waits for contexts on a thread of its own: the driver's wait has no deadline, so the pager must
/// be able to stop waiting for the waiter.
#[derive(Default)]
pub struct Drainer {
    helper: Option<Helper>,
    /// The helper still waits for an earlier round.
    owed: bool,
}

impl Drainer {
    /// Waits until every context is idle; `None`: not by then.
    fn wait(
        &mut self,
        runtime: &'static Runtime,
        contexts: Vec<usize>,
        until: Instant,
    ) -> Option<Result<(), Status>> {
        if self.helper.is_none() {
            self.helper = spawn(runtime);
        }
        let (requests, answers) = self.helper.as_ref()?;
        let left = || until.saturating_duration_since(Instant::now());
        if self.owed {
            match answers.recv_timeout(left()) {
                Ok(_) => self.owed = false,
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => {
                    (self.helper, self.owed) = (None, false);
                    return None;
                }
            }
        }
        let given_up = Arc::new(AtomicBool::new(false));
        requests.send((contexts, Arc::clone(&given_up))).ok()?;
        match answers.recv_timeout(left()) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => {
                // The gate is about to open: a wait that began now could spoil a capture.
                given_up.store(true, SeqCst);
                self.owed = true;
                None
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.helper = None;
                None
            }
        }
    }
}

/// Contexts to wait for, and whether the pager has stopped waiting for the answer.
type Round = (Vec<usize>, Arc<AtomicBool>);
type Helper = (Sender<Round>, Receiver<Result<(), Status>>);

fn spawn(runtime: &'static Runtime) -> Option<Helper> {
    let (requests, inbox) = channel::<Round>();
    let (outbox, answers) = channel();
    // Spawned by the pager's thread, so it inherits a mask that blocks every signal.
    let thread = std::thread::Builder::new()
        .name("spillway-drain".into())
        .spawn(move || {
            gate::exempt_current_thread();
            super::relax();
            for (contexts, given_up) in inbox {
                let mut outcome = Ok(());
                for context in contexts {
                    outcome = outcome.and(wait_for(runtime, context, &given_up));
                }
                if outbox.send(outcome).is_err() {
                    return;
                }
            }
        });
    thread.ok().map(|_| (requests, answers))
}

/// Waits until a context is idle, or gone. One that is being released may stay, with its work: then
/// it is waited for after that.
fn wait_for(runtime: &Runtime, context: usize, given_up: &AtomicBool) -> Result<(), Status> {
    while !given_up.load(SeqCst) {
        let waited = runtime.using(context, || {
            vmm::in_context(context, || {
                // SAFETY: no pointers are involved.
                unsafe { call::cuCtxSynchronize() }.ok()
            })
        });
        if let Some(answer) = waited {
            return answer;
        }
        if lock(&runtime.contexts).device_of(context).is_none() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Status::NOT_READY)
}

impl Worker {
    /// Closes the gate and waits for the devices. `false`: not drained, the gate is open, and the
    /// command of `epoch` is answered.
    pub(super) fn drain(&mut self, epoch: u64) -> bool {
        let deadline = self.deadline();
        let until = Instant::now() + deadline;
        self.publish(epoch, state::DRAINING);
        let why = match gate::close(deadline) {
            Ok(()) => match self.devices_idle(until) {
                Ok(()) => return true,
                Err(why) => {
                    gate::open();
                    why
                }
            },
            Err(why @ CloseError::AlreadyClosed) => {
                // Nobody but this thread closes it.
                debug_assert!(false, "{why}");
                why.to_string()
            }
            Err(why) => why.to_string(),
        };
        crate::say::info!("busy: {why}");
        if let Some(session) = &self.runtime.session {
            session.note(&format!("busy: {why}"));
        }
        self.runtime.observed.wants.store(0, SeqCst);
        self.publish(epoch, state::BUSY);
        false
    }

    fn devices_idle(&mut self, until: Instant) -> Result<(), String> {
        if !self.runtime.paging {
            return Err("its memory is not movable".to_owned());
        }
        if self.capture_open() {
            return Err("a stream capture is open".to_owned());
        }
        let contexts = lock(&self.runtime.contexts).all();
        match self.drainer.wait(self.runtime, contexts, until) {
            None => Err("work on the GPU did not finish in time".to_owned()),
            Some(Err(why)) => Err(format!(
                "a context is broken or gone (driver error {})",
                why.0
            )),
            Some(Ok(())) => {
                // Everything is finished, so what was freed in stream order is free now.
                self.runtime.reap_deferred();
                let kept = std::mem::take(&mut *lock(&self.runtime.kept));
                for alloc in kept {
                    // By way of its pool, whose figures count it until then.
                    self.runtime.retire(&alloc);
                }
                Ok(())
            }
        }
    }

    /// A stream captures, by our records and by the driver's word: an abandoned capture is asked
    /// away, an invalidated one still counts. Publishes what it finds.
    pub(super) fn capture_open(&self) -> bool {
        let open = lock(&self.runtime.contexts).capturing();
        let mut any = false;
        for (stream, thread) in open {
            // Only a created stream can be asked from here; a default one counts until its end.
            let created = lock(&self.runtime.contexts).context_of_stream(stream);
            let still = created.is_none_or(|context| {
                let asked = self.runtime.using(stream, || {
                    vmm::in_context(context, || Ok(vmm::is_capturing(stream)))
                });
                asked == Some(Ok(true))
            });
            if still {
                any = true;
            } else {
                lock(&self.runtime.contexts).end_capture(stream, thread);
            }
        }
        let reasons = &self.runtime.observed.unswappable;
        if any {
            reasons.fetch_or(unswappable::CAPTURE, SeqCst);
        } else if reasons.load(SeqCst) & unswappable::CAPTURE != 0 {
            reasons.fetch_and(!unswappable::CAPTURE, SeqCst);
        }
        any
    }
}

/// A bound for waits that should be short.
pub(super) const SHORT: Duration = Duration::from_secs(2);
