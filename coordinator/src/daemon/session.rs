//! One connection of a process.
//!
//! Promises: sending never blocks and never holds more than a bounded number of packets; a process
//! that does not read is disconnected, and nobody else notices.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use spillway_arbiter::{Nanos, WorkloadId};
use spillway_protocol::message::{Register, ToProcess};

use super::identity::Identity;
use super::pool::Segment;
use super::shared::Shared;
use super::socket;

/// Packets that may wait for a process that does not read. The socket itself holds some hundred more.
const MAX_QUEUED: usize = 256;
/// Growths that one process may have unanswered: each is a thread of its that waits.
pub const MAX_GROWTHS: usize = 256;
/// Segments that one process may have ordered and not received.
pub const MAX_ORDERED: usize = 64;
/// Events of its own choosing that one process may cause in [`NOTE_PERIOD`]: notes, and changes of
/// whether it can be swapped.
const MAX_NOTES: u32 = 20;
/// See [`MAX_NOTES`].
const NOTE_PERIOD: Nanos = 10 * spillway_arbiter::SECOND;

/// How far a session is.
#[derive(Debug)]
pub enum Stage {
    /// Nothing was heard yet.
    New,
    /// Its registration waits until the processes from before a restart are back.
    Held(Box<Register>),
    /// Resumes, and hands its segments over.
    Adopting(Box<Adopting>),
    /// Registered.
    Live(Box<Live>),
}

/// A resumption that is not complete.
#[derive(Debug)]
pub struct Adopting {
    /// What it said.
    pub register: Register,
    /// Its page.
    pub observed: Shared<spillway_protocol::page::Observed>,
    /// What it handed over so far.
    pub segments: BTreeMap<u64, Segment>,
}

/// A registered process.
#[derive(Debug)]
pub struct Live {
    /// Its workload.
    pub workload: WorkloadId,
    /// Its host memory.
    pub segments: BTreeMap<u64, Segment>,
    /// Id of the next segment.
    pub next_segment: u64,
    /// Segments ordered and not delivered, and their bytes.
    pub ordered: (usize, u64),
    /// Bytes of the pool that are reserved for it.
    pub host_grant: u64,
    /// The host grant up to this level is left alone until then.
    pub host_promise: (u64, Nanos),
    /// May be swapped: its host memory is reserved.
    pub swap: bool,
    /// Growths under way: whether the pool backs them.
    pub backed: BTreeMap<u64, bool>,
    /// The last state word that the arbiter was told.
    pub seen_state: u64,
    /// The last reasons for not being swappable.
    pub seen_unswappable: u64,
    /// The process has sent its first wake-up: it looks at its new pages.
    pub awake: bool,
    /// When it last asked for its overhead to be measured, if no sample has begun since.
    pub measure_asked: Option<Nanos>,
    /// That nothing is known of its overhead was said.
    pub overhead_unknown_said: bool,
    /// Events in this period, which began then.
    pub notes: (u32, Nanos),
}

impl Live {
    /// Whether one more event of the process's own choosing is told. Who says too much is heard no
    /// more for a while: others' events are not to be pushed out.
    pub fn may_speak(&mut self, time: Nanos) -> bool {
        if time.saturating_sub(self.notes.1) >= NOTE_PERIOD {
            self.notes = (0, time);
        }
        self.notes.0 = self.notes.0.saturating_add(1);
        self.notes.0 <= MAX_NOTES
    }
}

/// See the module.
#[derive(Debug)]
pub struct Session {
    /// When it connected.
    pub opened: Nanos,
    /// Who it is.
    pub identity: Identity,
    /// How far it is.
    pub stage: Stage,
    /// To be closed, and why; set once.
    pub end: Option<String>,
    /// The process did not end it: it was sent away.
    pub sent_away: bool,
    /// Whether epoll was asked to tell when it can be written.
    pub watches_write: bool,
    socket: OwnedFd,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    wake: Vec<u8>,
}

impl Session {
    /// A new connection.
    #[must_use]
    pub fn new(socket: OwnedFd, identity: Identity, opened: Nanos) -> Self {
        Self {
            opened,
            identity,
            stage: Stage::New,
            end: None,
            sent_away: false,
            watches_write: false,
            socket,
            queue: VecDeque::new(),
            wake: ToProcess::Wake.encode(),
        }
    }

    /// What the process is ended by; `None`: the kernel has no such thing.
    #[must_use]
    pub fn pidfd(&self) -> Option<&OwnedFd> {
        self.identity.pidfd.as_ref()
    }

    /// The registered process, if it is one.
    pub fn live(&mut self) -> Option<&mut Live> {
        match &mut self.stage {
            Stage::Live(live) => Some(live),
            _ => None,
        }
    }

    /// The same, to look at.
    #[must_use]
    pub fn as_live(&self) -> Option<&Live> {
        match &self.stage {
            Stage::Live(live) => Some(live),
            _ => None,
        }
    }

    /// Sends a message, or queues it.
    pub fn send(&mut self, message: &ToProcess, descriptors: Vec<OwnedFd>) {
        if self.end.is_some() {
            return;
        }
        self.queue.push_back((message.encode(), descriptors));
        self.flush();
        if self.queue.len() > MAX_QUEUED {
            self.sent_away = true;
            self.end("does not read its messages");
        }
    }

    /// Wakes the process. Wake-ups say nothing but "look", so that one in the queue is enough.
    pub fn wake(&mut self) {
        let waits = self
            .queue
            .back()
            .is_some_and(|(bytes, _)| *bytes == self.wake);
        if !waits {
            self.send(&ToProcess::Wake, Vec::new());
        }
    }

    /// Sends what waits, as far as the socket takes it.
    pub fn flush(&mut self) {
        while let Some((bytes, descriptors)) = self.queue.front() {
            match socket::write(self.socket.as_fd(), bytes, descriptors) {
                Ok(true) => {
                    self.queue.pop_front();
                }
                Ok(false) => return,
                Err(_) => {
                    self.end("has closed its socket");
                    return;
                }
            }
        }
    }

    /// Something waits to be sent.
    #[must_use]
    pub fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Refuses the registration, or whatever the process did, and closes the session.
    pub fn refuse(&mut self, text: &str) {
        self.send(
            &ToProcess::Refused {
                text: text.to_owned(),
            },
            Vec::new(),
        );
        self.sent_away |= self.end.is_none();
        self.end(text);
    }

    /// Marks the session to be closed.
    pub fn end(&mut self, why: &str) {
        if self.end.is_none() {
            self.end = Some(why.to_owned());
            self.queue.clear();
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
