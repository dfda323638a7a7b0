//! The pager: a thread that carries out what the coordinator wants, and reports what is.
//!
//! It alone moves memory. Application threads meet it at the gate and in the heap's `moving` flag,
//! nowhere else. It never retains a context and holds no lock over a driver call.

mod activity;
mod copy;
mod drain;
mod evict;
mod host;
mod restore;

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use spillway_protocol::page::{Command, State, command, state};

use crate::driver::call;
use crate::gate;
use crate::lock;
use crate::runtime::{self, Runtime};

use activity::Activity;
use drain::Drainer;
use host::HostMemory;

/// How often the thread looks while the program is active.
const TICK: Duration = Duration::from_millis(50);
/// How often it looks at a program that has been idle for a while.
const SLOW_TICK: Duration = Duration::from_millis(200);
/// A swapped-out process whose coordinator stays away comes back by itself after this.
const ALONE: Duration = Duration::from_secs(20);

/// The post box: others leave word, the thread looks.
#[derive(Default)]
pub struct Pager {
    poked: Mutex<bool>,
    word: Condvar,
}

impl Pager {
    /// Makes the thread look now.
    pub fn poke(&self) {
        *lock(&self.poked) = true;
        self.word.notify_all();
    }

    fn wait(&self, at_most: Duration) {
        let mut poked = lock(&self.poked);
        if !*poked {
            poked = self
                .word
                .wait_timeout(poked, at_most)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *poked = false;
    }
}

/// The desired page has news: called by the session's thread.
pub fn news() {
    if let Some(runtime) = runtime::get() {
        runtime.pager.poke();
    }
}

/// A caller found the gate closed and is about to sleep.
pub fn caller_waits() {
    if let Some(runtime) = runtime::get() {
        runtime.observed.wants.store(1, SeqCst);
        if let Some(session) = &runtime.session {
            session.wake();
        }
        runtime.pager.poke();
    }
}

/// Starts the session's and the pager's threads. They take no signals: those are the program's.
pub fn spawn(runtime: &'static Runtime) {
    let mut all = std::mem::MaybeUninit::uninit();
    let mut before = std::mem::MaybeUninit::uninit();
    // SAFETY: both sets are filled before they are read; the mask is put back below.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let session = std::thread::Builder::new()
        .name("spillway-sess".into())
        .spawn(|| {
            if let Some(session) = &runtime.session {
                let listen = std::panic::AssertUnwindSafe(|| session.listen());
                if std::panic::catch_unwind(listen).is_err() {
                    crate::say::error!(
                        "internal error in the session: going on without a coordinator"
                    );
                    session.give_up();
                    runtime.pager.poke();
                }
            }
        });
    let pager = std::thread::Builder::new()
        .name("spillway-pager".into())
        .spawn(move || {
            gate::exempt_current_thread();
            relax();
            Worker::new(runtime).run();
        });
    // SAFETY: the mask that was in force.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    if session.is_err() || pager.is_err() {
        runtime.unswappable(
            spillway_protocol::page::unswappable::DETACHED,
            "no thread could be started: this process cannot be swapped",
        );
        crate::say::error!("no thread could be started: this process cannot be swapped");
    }
}

/// Puts the calling thread's captures in relaxed mode for good, so that no call of ours ever spoils a
/// capture of the program. For threads of ours.
fn relax() {
    /// `CU_STREAM_CAPTURE_MODE_RELAXED`
    const RELAXED: u32 = 2;
    let mut mode = RELAXED;
    // SAFETY: the driver exchanges one integer.
    let _ = unsafe { call::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
}

/// Where the process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Gate open.
    Resident,
    /// Gate closed, devices idle, nothing moved.
    Drained,
    /// Gate closed, memory on the host.
    Evicted,
}

/// The pager's thread.
struct Worker {
    runtime: &'static Runtime,
    phase: Phase,
    /// Epoch of the last command carried out.
    done: u64,
    host: HostMemory,
    drainer: Drainer,
    activity: Activity,
    since: Instant,
    /// Since when no coordinator has been there while a caller waits.
    alone: Option<Instant>,
    /// How many unknown entry points the coordinator has been told by name.
    told: usize,
}

impl Worker {
    fn new(runtime: &'static Runtime) -> Self {
        let done = State::unpack(runtime.observed.state.load(SeqCst)).epoch;
        Self {
            runtime,
            phase: Phase::Resident,
            done,
            host: HostMemory::default(),
            drainer: Drainer::default(),
            activity: Activity::default(),
            since: Instant::now(),
            alone: None,
            told: 0,
        }
    }

    fn run(&mut self) {
        loop {
            let tick = if self.activity.idle_for() > Duration::from_secs(2) {
                SLOW_TICK
            } else {
                TICK
            };
            self.runtime.pager.wait(tick);
            let turn = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.turn()));
            if turn.is_err() {
                // Wrong bytes are worse than none: if memory is on the host, nobody may go on.
                crate::say::error!(
                    "internal error in the pager; this process cannot be swapped any more"
                );
                if self.phase == Phase::Evicted || lock(&self.runtime.heap).moving() {
                    std::process::abort();
                }
                self.runtime.unswappable(
                    spillway_protocol::page::unswappable::DETACHED,
                    "internal error in the pager: detached",
                );
                gate::open();
                return;
            }
        }
    }

    fn turn(&mut self) {
        let wanted = Command::unpack(self.runtime.desired().command.load(SeqCst));
        if wanted.epoch != self.done {
            self.obey(wanted);
        }
        if self.phase != Phase::Resident {
            self.want_back();
        }
        match self.phase {
            Phase::Resident => {
                self.runtime.reap_deferred();
                for device in 0..self.runtime.devices.len() {
                    self.runtime.look_at_stores(device);
                }
                self.runtime.look_at_descriptors();
                self.runtime.settle_ended();
                self.host.prepare(self.runtime, self.activity.idle_for());
            }
            Phase::Drained => self.reopen_if_forgotten(),
            Phase::Evicted => self.come_back_alone(),
        }
        self.report();
        self.name_unknown();
    }

    /// Names the entry points to the coordinator that came up since the last turn. They are noted where
    /// they are asked for, inside `dlsym`; only here is a socket written to, and no lock held meanwhile.
    fn name_unknown(&mut self) {
        let Some(session) = &self.runtime.session else {
            return;
        };
        let names = crate::entry::unknown_names(self.told);
        self.told += names.len();
        for name in names {
            session.unknown(&name);
        }
    }

    /// Callers that wait now want us back. Looked at on every turn: a caller pokes before it sleeps, so
    /// none is overlooked, whatever it raced with.
    fn want_back(&self) {
        let waiting = u64::from(gate::blocked().waiting > 0);
        if self.runtime.observed.wants.swap(waiting, SeqCst) != waiting
            && let Some(session) = &self.runtime.session
        {
            session.wake();
        }
    }

    /// Publishes how far the command of `epoch` is, and wakes the coordinator.
    fn publish(&self, epoch: u64, code: u8) {
        let state = State { epoch, code }.pack();
        if self.runtime.observed.state.swap(state, SeqCst) == state {
            return;
        }
        if let Some(session) = &self.runtime.session {
            session.wake();
        }
    }

    fn obey(&mut self, wanted: Command) {
        let epoch = wanted.epoch;
        match (wanted.code, self.phase) {
            (command::RUN, Phase::Resident) => self.publish(epoch, state::RESIDENT),
            (command::RUN, Phase::Drained) => self.reopen(epoch, state::RESIDENT),
            (command::RUN, Phase::Evicted) => {
                self.publish(epoch, state::RESTORING);
                if !self.restore() {
                    // Tried again on the next turn, until there is memory or another command.
                    self.runtime.pager.poke();
                    std::thread::sleep(Duration::from_millis(5));
                    return;
                }
                self.reopen(epoch, state::RESIDENT);
            }
            (command::DRAIN, Phase::Resident) if self.drain(epoch) => {
                self.enter(Phase::Drained);
                self.publish(epoch, state::DRAINED);
            }
            (command::DRAIN, Phase::Drained) => self.publish(epoch, state::DRAINED),
            (command::EVICT, Phase::Drained) => self.move_out(epoch),
            (command::EVICT, Phase::Resident) => {
                // What is still missing of host memory is made while the program goes on.
                self.publish(epoch, state::DRAINING);
                // What pools keep unused need not be carried over the link.
                self.runtime.drop_kept(|_| true);
                let wanted = lock(&self.runtime.heap).pageable_bytes();
                match self.host.begin(self.runtime, wanted) {
                    Err(why) => self.failed(epoch, &why),
                    Ok(()) if self.drain(epoch) => self.move_out(epoch),
                    // Busy, which is answered already.
                    Ok(()) => {}
                }
            }
            (command::DRAIN | command::EVICT, Phase::Evicted) => {
                self.publish(epoch, state::EVICTED)
            }
            // Busy, which is answered already; or a command of a later version, not ours to guess.
            _ => {}
        }
        self.done = epoch;
    }

    /// Drained: moves out, or undoes it and goes on.
    fn move_out(&mut self, epoch: u64) {
        self.publish(epoch, state::EVICTING);
        match self.evict() {
            Ok(()) => {
                self.enter(Phase::Evicted);
                self.publish(epoch, state::EVICTED);
            }
            Err(why) => self.failed(epoch, &why),
        }
    }

    /// The eviction is not to be had; everything is on the device, and goes on.
    fn failed(&mut self, epoch: u64, why: &str) {
        crate::say::warning!("eviction undone: {why}");
        if let Some(session) = &self.runtime.session {
            session.note(&format!("eviction undone: {why}"));
        }
        self.reopen(epoch, state::FAILED);
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.since = Instant::now();
        self.alone = None;
        self.want_back();
    }

    fn reopen(&mut self, epoch: u64, code: u8) {
        self.phase = Phase::Resident;
        self.runtime.observed.wants.store(0, SeqCst);
        self.activity.touch();
        self.report();
        gate::open();
        self.publish(epoch, code);
    }

    fn connected(&self) -> bool {
        self.runtime
            .session
            .as_ref()
            .is_some_and(crate::session::Session::connected)
    }

    /// Drained for another process's sake, and nobody says how it goes on.
    fn reopen_if_forgotten(&mut self) {
        let patience = self.deadline() + Duration::from_secs(5);
        if !self.connected() || self.since.elapsed() > patience {
            self.reopen(self.done, state::BUSY);
        }
    }

    fn deadline(&self) -> Duration {
        let ms = self.runtime.desired().drain_deadline_ms.load(SeqCst);
        Duration::from_millis(ms.clamp(10, 600_000))
    }

    /// Swapped out, wanted, and no coordinator: after a while all or nothing, with random pauses.
    fn come_back_alone(&mut self) {
        if self.connected() || gate::blocked().waiting == 0 {
            self.alone = None;
            return;
        }
        let since = *self.alone.get_or_insert_with(Instant::now);
        let jitter = u64::from(std::process::id()) ^ runtime::monotonic_ns() >> 10;
        if since.elapsed() < ALONE + Duration::from_millis(jitter % 3000) {
            return;
        }
        crate::say::warning!(
            "no coordinator for {} s: restoring without one",
            since.elapsed().as_secs()
        );
        if self.restore() {
            self.reopen(self.done, state::RESIDENT);
        } else {
            self.alone = Some(Instant::now() - ALONE + Duration::from_millis(jitter % 2000));
        }
    }

    /// Writes the figures of the observed page.
    fn report(&mut self) {
        let observed = self.runtime.observed;
        let blocked = gate::blocked();
        observed.blocked_calls.store(blocked.waits, SeqCst);
        observed.blocked_ns.store(
            u64::try_from(blocked.waited.as_nanos()).unwrap_or(u64::MAX),
            SeqCst,
        );
        observed
            .unknown_entries
            .store(crate::entry::unknown_entry_points() as u64, SeqCst);
        let capture = self.capture_open();
        self.activity
            .sample(self.runtime, self.phase == Phase::Resident, capture);
    }
}
