//! The session with the coordinator: registration, requests with tickets, and coming back after
//! the coordinator's restart.
//!
//! One thread reads. Application threads that need an answer wait on a condition variable, outside
//! the gate and holding no lock.

mod crowd;
mod holds;
mod join;
mod page;
pub mod socket;
mod unknown;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use spillway_protocol::message::{FromProcess, Register, ToProcess, outcome};
use spillway_protocol::names;
use spillway_protocol::page::{Desired, Observed, State, state, unswappable};

pub use crate::descriptor::Descriptor;
pub use join::StartError;
pub use page::map;

use crate::lock;

use crowd::Crowd;
use holds::Holds;
use join::handshake;

/// How long a request for growth waits for a coordinator that went away to come back.
const ABSENCE: Duration = Duration::from_secs(30);
/// How long it waits for an answer: a coordinator answers sooner, unless it is stopped.
const PATIENCE: Duration = Duration::from_secs(120);

/// A host segment that the session holds: kept here so that a new coordinator can adopt it.
#[derive(Clone)]
pub struct Segment {
    /// The session's name for it.
    pub id: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// The memfd.
    pub file: Arc<Descriptor>,
}

/// An answer to a ticket.
enum Answer {
    Grow {
        outcome: u32,
        backed: bool,
        text: String,
    },
    Segment {
        segment: Option<Segment>,
        text: String,
    },
    Refreshed,
    Claim {
        covered: bool,
    },
    /// The coordinator went away before it answered.
    Lost,
}

#[derive(Default)]
struct Shared {
    socket: Option<Arc<Descriptor>>,
    answers: HashMap<u64, Option<Answer>>,
    segments: Vec<Segment>,
    observed_file: Option<Arc<Descriptor>>,
    workload: String,
    /// Entry points that the hook table does not know.
    unknown: Vec<String>,
}

/// The outcome of a request for growth.
#[derive(Debug)]
pub enum Grown {
    /// The grants were raised; `backed`: the host pool backs the pageable part.
    Granted { backed: bool },
    /// One line with the numbers.
    Refused(String),
    /// No coordinator answered in time.
    Gone,
}

/// The session.
pub struct Session {
    path: PathBuf,
    register: Register,
    shared: Mutex<Shared>,
    /// What others may import. Locked before `shared`, never after.
    holds: Mutex<Holds>,
    /// The protocol version that the coordinator speaks.
    version: AtomicU32,
    changed: Condvar,
    growths: Crowd,
    claims: Crowd,
    refreshes: Crowd,
    measurement: crowd::Shared,
    tickets: AtomicU64,
    /// The socket that `shared` holds, or null: for a forked child, which can take no lock.
    raw: AtomicPtr<Descriptor>,
    /// The program has closed descriptors of ours: there is no coordinator any more.
    taken: AtomicBool,
    desired: AtomicPtr<Desired>,
    observed: &'static Observed,
    /// Called by the reading thread whenever the desired page may have news.
    on_news: fn(),
}

/// Where the coordinator of this process would be.
#[must_use]
pub fn run_dir() -> PathBuf {
    let get = |name: &str| std::env::var(name).ok();
    names::find_run_dir(
        get(names::ENV_RUN_DIR).as_deref(),
        get("XDG_RUNTIME_DIR").as_deref(),
        |dir| names::session_socket(dir).exists(),
    )
}

impl Session {
    /// Registers this process. The reading thread is started by [`Session::listen`].
    ///
    /// # Errors
    /// Nobody answers on the socket, or the coordinator refuses.
    pub fn start(register: Register, on_news: fn()) -> Result<Self, StartError> {
        Self::start_at(names::session_socket(&run_dir()), register, on_news)
    }

    fn start_at(path: PathBuf, register: Register, on_news: fn()) -> Result<Self, StartError> {
        let joined = handshake(&path, &register, None, &[])?;
        let observed = page::observed(&joined.observed)
            .map_err(|why| StartError::Absent(path.clone(), why))?;
        Ok(Self {
            path,
            register,
            raw: AtomicPtr::new(Arc::as_ptr(&joined.socket).cast_mut()),
            taken: AtomicBool::new(false),
            shared: Mutex::new(Shared {
                socket: Some(joined.socket),
                observed_file: Some(joined.observed),
                workload: joined.workload,
                ..Shared::default()
            }),
            holds: Mutex::default(),
            version: AtomicU32::new(joined.version),
            changed: Condvar::new(),
            growths: Crowd::default(),
            claims: Crowd::default(),
            refreshes: Crowd::default(),
            measurement: crowd::Shared::default(),
            tickets: AtomicU64::new(1),
            desired: AtomicPtr::new(std::ptr::from_ref(joined.desired).cast_mut()),
            observed,
            on_news,
        })
    }

    /// The coordinator's page: the newest one.
    #[must_use]
    pub fn desired(&self) -> &'static Desired {
        // SAFETY: the pointer comes from a mapping that is never undone.
        unsafe { &*self.desired.load(SeqCst) }
    }

    /// In a forked child: the socket is the parent's. Takes no lock, since none can be trusted.
    pub fn close_in_child(&self) {
        let socket = self.raw.swap(std::ptr::null_mut(), SeqCst);
        // SAFETY: null, or what `shared` holds: it is made null before that is let go, and the child
        // has its own copy of the moment of the fork.
        if let Some(socket) = unsafe { socket.as_ref() } {
            socket.close_in_child();
        }
    }

    /// Our own page.
    #[must_use]
    pub fn observed(&self) -> &'static Observed {
        self.observed
    }

    /// The workload's name as the coordinator has it.
    #[must_use]
    pub fn workload(&self) -> String {
        lock(&self.shared).workload.clone()
    }

    /// A coordinator is there.
    #[must_use]
    pub fn connected(&self) -> bool {
        lock(&self.shared).socket.is_some()
    }

    fn send(&self, message: &FromProcess) -> bool {
        // A wake-up says nothing but "look": where the queue is full, one is waiting already. Callers
        // at the gate must not wait for a coordinator that is stopped.
        self.send_waiting(message, !matches!(message, FromProcess::Wake))
    }

    /// Sends; while the coordinator reads nothing it waits, bounded, or gives up at once.
    fn send_waiting(&self, message: &FromProcess, waits: bool) -> bool {
        let Some(fd) = lock(&self.shared).socket.clone() else {
            return false;
        };
        let sent = if waits {
            socket::send(&fd, &message.encode(), &[])
        } else {
            socket::try_send(&fd, &message.encode(), &[])
        };
        if fd.get().is_err() {
            self.program_took_our_descriptors();
            return false;
        }
        sent.is_ok()
    }

    /// The program has closed our descriptors, as daemons close all that they do not know. Nothing can
    /// be asked any more, so the process goes on with what it has, for good. The coordinator will end
    /// the session and empty our host segments; until then the reading thread's wait keeps it open.
    fn program_took_our_descriptors(&self) {
        if self.taken.swap(true, SeqCst) {
            return;
        }
        crate::say::error!(
            "this program closed Spillway's file descriptors: it keeps what it was granted, and is neither swapped nor given more"
        );
        self.observed
            .unswappable
            .fetch_or(unswappable::DETACHED, SeqCst);
        self.forget_socket();
        (self.on_news)();
    }

    /// Memory of this process may be on the host alone.
    fn depends_on_host_memory(&self) -> bool {
        let word = self.observed.state.load(SeqCst);
        matches!(
            State::unpack(word).code,
            state::EVICTING | state::EVICTED | state::RESTORING
        )
    }

    /// Whether host segments still hold what was written to them: bytes by segment id. A coordinator
    /// that ends a session empties its segments; what was read from one with holes may be zeros.
    #[must_use]
    pub fn segments_hold(&self, written: &[(u64, u64)]) -> bool {
        let shared = lock(&self.shared);
        written.iter().all(|&(id, bytes)| {
            let segment = shared.segments.iter().find(|s| s.id == id);
            // One that the program has closed cannot be looked at; the reading thread stands guard
            // then.
            let held = segment.map(|segment| segment.file.held_bytes());
            held.is_none_or(|held| held.map_or(true, |held| held >= bytes))
        })
    }

    /// Tells the coordinator that the observed page has news.
    pub fn wake(&self) {
        self.send(&FromProcess::Wake);
    }

    /// Tells people something, by way of an event.
    pub fn note(&self, text: &str) {
        self.send(&FromProcess::Note {
            text: text.to_owned(),
        });
    }

    /// Sends a request; its answer is waited for or looked for by its ticket. `None`: nobody is there.
    fn order(&self, make: impl Fn(u64) -> FromProcess) -> Option<u64> {
        let ticket = self.tickets.fetch_add(1, SeqCst);
        lock(&self.shared).answers.insert(ticket, None);
        if self.send(&make(ticket)) {
            return Some(ticket);
        }
        lock(&self.shared).answers.remove(&ticket);
        None
    }

    /// Sends a request and waits for its answer, and before that for a place among those of its kind.
    fn ask(&self, crowd: &Crowd, make: impl Fn(u64) -> FromProcess, patience: Duration) -> Answer {
        let until = Instant::now() + patience;
        let Some(_place) = crowd.enter(until) else {
            return Answer::Lost;
        };
        self.order(make)
            .map_or(Answer::Lost, |ticket| self.await_answer(ticket, until))
    }

    fn await_answer(&self, ticket: u64, until: Instant) -> Answer {
        let mut shared = lock(&self.shared);
        loop {
            if let Some(Some(_)) = shared.answers.get(&ticket) {
                return shared
                    .answers
                    .remove(&ticket)
                    .flatten()
                    .unwrap_or(Answer::Lost);
            }
            let now = Instant::now();
            if shared.socket.is_none() || now >= until {
                shared.answers.remove(&ticket);
                return Answer::Lost;
            }
            let slice = until - now;
            shared = self
                .changed
                .wait_timeout(shared, slice.min(Duration::from_secs(1)))
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
    }

    /// Asks for growth. Waits as long as the coordinator does; a coordinator that went away is
    /// waited for, bounded.
    pub fn grow(&self, device: usize, bytes: u64, pageable: u64, no_wait: bool) -> Grown {
        let device = u32::try_from(device).unwrap_or(u32::MAX);
        let no_wait = u32::from(no_wait);
        let start = Instant::now();
        loop {
            match self.ask(
                &self.growths,
                |ticket| FromProcess::Grow {
                    ticket,
                    device,
                    bytes,
                    pageable,
                    no_wait,
                },
                PATIENCE,
            ) {
                Answer::Grow {
                    outcome: outcome::GRANTED,
                    backed,
                    ..
                } => {
                    return Grown::Granted { backed };
                }
                Answer::Grow { text, .. } => return Grown::Refused(text),
                _ if no_wait != 0 || start.elapsed() >= ABSENCE || self.taken.load(SeqCst) => {
                    return Grown::Gone;
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Asks for a host segment. The answer comes when it is populated; it is news, and taken by
    /// [`Session::take_segment`] or [`Session::await_segment`]. `None`: there is no coordinator.
    pub fn order_segment(&self, bytes: u64) -> Option<u64> {
        self.order(|ticket| FromProcess::Segment { ticket, bytes })
    }

    /// The segment that was ordered, if it is there; `None`: not yet.
    pub fn take_segment(&self, ticket: u64) -> Option<Result<Segment, String>> {
        let waits = matches!(lock(&self.shared).answers.get(&ticket), Some(None));
        (!waits).then(|| self.await_segment(ticket, Duration::ZERO))
    }

    /// Waits for the segment that was ordered; one that comes later is given back.
    ///
    /// # Errors
    /// One line that says why there is none.
    pub fn await_segment(&self, ticket: u64, patience: Duration) -> Result<Segment, String> {
        match self.await_answer(ticket, Instant::now() + patience) {
            Answer::Segment {
                segment: Some(segment),
                ..
            } => {
                lock(&self.shared).segments.push(segment.clone());
                Ok(segment)
            }
            Answer::Segment { text, .. } => Err(text),
            _ => Err("no coordinator answered".to_owned()),
        }
    }

    /// Gives a segment back; the caller has unmapped it.
    pub fn release_segment(&self, id: u64) {
        lock(&self.shared).segments.retain(|s| s.id != id);
        self.send(&FromProcess::SegmentRelease { id });
    }

    /// Brings overhead, siblings' use and the host grant up to date; bounded.
    pub fn refresh(&self, measure: bool) {
        let refresh = || {
            let measure = u32::from(measure);
            self.ask(
                &self.refreshes,
                |ticket| FromProcess::Refresh { ticket, measure },
                Duration::from_secs(2),
            );
        };
        if measure {
            self.measurement.run(refresh);
        } else {
            refresh();
        }
    }

    /// The reading thread's life: until the process ends.
    pub fn listen(&self) {
        while !self.taken.load(SeqCst) {
            let socket = lock(&self.shared).socket.clone();
            match socket {
                Some(fd) => {
                    while self.read_one(&fd) {}
                    self.lost();
                }
                None => self.come_back(),
            }
        }
    }

    fn read_one(&self, fd: &Descriptor) -> bool {
        let received = socket::receive(fd);
        if fd.get().is_err() {
            // The socket is closed by now, and the coordinator empties our segments.
            if self.depends_on_host_memory() {
                crate::say::error!(
                    "this program closed Spillway's file descriptors while its memory was on the host: it is lost"
                );
                std::process::abort();
            }
            self.program_took_our_descriptors();
            return false;
        }
        let Ok((packet, mut files)) = received else {
            return false;
        };
        if packet.is_empty() {
            return false;
        }
        self.tell_rest();
        // A message of a later version is skipped, not an end.
        let Ok(message) = ToProcess::decode(&packet) else {
            return true;
        };
        let (ticket, answer) = match message {
            ToProcess::Wake => {
                (self.on_news)();
                return true;
            }
            ToProcess::GrowReply {
                ticket,
                outcome,
                backed,
                text,
            } => (
                ticket,
                Answer::Grow {
                    outcome,
                    backed: backed != 0,
                    text,
                },
            ),
            ToProcess::SegmentReply {
                ticket,
                id,
                bytes,
                text,
            } => {
                let file = files.pop().map(Arc::new);
                let segment = file
                    .filter(|_| bytes > 0)
                    .map(|file| Segment { id, bytes, file });
                (ticket, Answer::Segment { segment, text })
            }
            ToProcess::RefreshReply { ticket } => (ticket, Answer::Refreshed),
            ToProcess::ClaimReply { ticket, covered } => {
                let covered = covered != 0;
                (ticket, Answer::Claim { covered })
            }
            ToProcess::Welcome { .. } | ToProcess::Refused { .. } => return true,
        };
        let segment_came = matches!(answer, Answer::Segment { .. });
        let mut shared = lock(&self.shared);
        if let Some(slot) = shared.answers.get_mut(&ticket) {
            *slot = Some(answer);
        } else if let Answer::Segment {
            segment: Some(segment),
            ..
        } = answer
        {
            // Nobody waits for it any more: give it back.
            drop(shared);
            self.send(&FromProcess::SegmentRelease { id: segment.id });
            return true;
        }
        drop(shared);
        self.changed.notify_all();
        if segment_came {
            (self.on_news)();
        }
        true
    }

    /// After an internal error: nothing is asked any more, and nobody waits for an answer.
    pub fn give_up(&self) {
        self.taken.store(true, SeqCst);
        self.observed
            .unswappable
            .fetch_or(unswappable::DETACHED, SeqCst);
        self.forget_socket();
    }

    fn forget_socket(&self) {
        let mut shared = lock(&self.shared);
        self.raw.store(std::ptr::null_mut(), SeqCst);
        shared.socket = None;
        for slot in shared.answers.values_mut() {
            slot.get_or_insert(Answer::Lost);
        }
        drop(shared);
        self.changed.notify_all();
    }

    fn lost(&self) {
        if self.taken.load(SeqCst) {
            return;
        }
        self.forget_socket();
        crate::say::info!("the coordinator went away; going on with what is granted");
        (self.on_news)();
    }

    /// Tries to join the next coordinator, with growing pauses.
    fn come_back(&self) {
        let mut pause = Duration::from_millis(100);
        let mut said = String::new();
        loop {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(2));
            let (observed, segments, workload) = {
                let shared = lock(&self.shared);
                (
                    shared.observed_file.clone(),
                    shared.segments.clone(),
                    shared.workload.clone(),
                )
            };
            if observed.as_ref().is_some_and(|page| page.get().is_err()) {
                self.program_took_our_descriptors();
                return;
            }
            let old = self.desired();
            let state = State::unpack(self.observed.state.load(SeqCst));
            let register = Register {
                workload,
                resumes: old.instance.load(SeqCst).max(1),
                segments: u32::try_from(segments.len()).unwrap_or(u32::MAX),
                grants: old.devices.iter().map(|d| d.grant.load(SeqCst)).collect(),
                host_grant: old.host_grant.load(SeqCst),
                epoch: state.epoch,
                ..self.register.clone()
            };
            match handshake(&self.path, &register, observed.as_deref(), &segments) {
                Ok(joined) => {
                    let same = joined.desired.instance.load(SeqCst) == old.instance.load(SeqCst);
                    if same && self.depends_on_host_memory() {
                        crate::say::error!(
                            "the coordinator ended this process's session and emptied its host memory while it was swapped out: it is lost"
                        );
                        std::process::abort();
                    }
                    self.rejoined(joined);
                    self.wake();
                    self.changed.notify_all();
                    crate::say::info!("joined the new coordinator");
                    (self.on_news)();
                    return;
                }
                Err(StartError::Refused(text)) => {
                    if said != text {
                        crate::say::warning!("the new coordinator refuses this process: {text}");
                        said = text;
                    }
                    pause = Duration::from_secs(2);
                }
                Err(StartError::Absent(..)) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
