//! Memory that several processes map is charged once: who is charged holds it, and who imports it
//! asks whether somebody does.
//!
//! Promises: what is answered reflects everything that any process had sent before the question, as
//! long as nobody floods; what one session holds is bounded, and so is what all hold together.

use std::collections::{BTreeMap, BTreeSet};

use spillway_arbiter::{DeviceId, MILLISECOND, Nanos, ProcessId};
use spillway_protocol::MAX_HOLDS;
use spillway_protocol::message::ToProcess;

use super::main_loop::now;
use super::session::MAX_GROWTHS;
use super::state::Daemon;

/// Holds of all sessions together. Beyond this whoever has most forgets its oldest.
const MAX_HOLDS_TOTAL: usize = 1 << 20;
/// A question is answered after this long, even if some session always has more to read.
const ANSWER_WITHIN: Nanos = 100 * MILLISECOND;

/// What tells one piece of memory from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Memory {
    /// By a name that is its own.
    Key(DeviceId, u64),
    /// By its size alone.
    Bytes(DeviceId, u64),
}

impl Memory {
    /// As messages have it; key 0 is none.
    #[must_use]
    pub fn new(device: DeviceId, bytes: u64, key: u64) -> Self {
        if key == 0 {
            Self::Bytes(device, bytes)
        } else {
            Self::Key(device, key)
        }
    }

    fn device(self) -> DeviceId {
        match self {
            Self::Key(device, _) | Self::Bytes(device, _) => device,
        }
    }
}

/// What one session holds; the same memory may be held several times.
#[derive(Debug, Default)]
struct Own {
    by_age: BTreeMap<u64, Memory>,
    by_memory: BTreeSet<(Memory, u64)>,
    next: u64,
    forgot: bool,
}

/// Who holds what.
#[derive(Debug, Default)]
pub struct Holds {
    sessions: BTreeMap<ProcessId, Own>,
    everywhere: BTreeMap<Memory, usize>,
    total: usize,
    most: usize,
}

impl Holds {
    /// With bounds of its own, for tests.
    #[cfg(test)]
    fn bounded(most: usize) -> Self {
        Self {
            most,
            ..Self::default()
        }
    }

    /// Adds one. Returns the session that had to forget something for it, if that is its first time.
    pub fn add(&mut self, id: ProcessId, memory: Memory) -> Option<ProcessId> {
        let own = self.sessions.entry(id).or_default();
        own.by_age.insert(own.next, memory);
        own.by_memory.insert((memory, own.next));
        own.next += 1;
        let too_many = own.by_age.len() > MAX_HOLDS;
        *self.everywhere.entry(memory).or_default() += 1;
        self.total += 1;
        let most = if self.most == 0 {
            MAX_HOLDS_TOTAL
        } else {
            self.most
        };
        let heaviest = if too_many {
            id
        } else if self.total > most {
            let by_size = self.sessions.iter().max_by_key(|(_, own)| own.by_age.len());
            by_size.map_or(id, |(id, _)| *id)
        } else {
            return None;
        };
        self.forget_oldest(heaviest)
    }

    fn forget_oldest(&mut self, id: ProcessId) -> Option<ProcessId> {
        let own = self.sessions.get_mut(&id)?;
        let (age, memory) = own.by_age.pop_first()?;
        own.by_memory.remove(&(memory, age));
        let first = !std::mem::replace(&mut own.forgot, true);
        self.count_down(memory);
        first.then_some(id)
    }

    /// Takes one away; one that is not there (or was forgotten) is ignored.
    pub fn remove(&mut self, id: ProcessId, memory: Memory) {
        let Some(own) = self.sessions.get_mut(&id) else {
            return;
        };
        let found = own
            .by_memory
            .range((memory, 0)..=(memory, u64::MAX))
            .next()
            .copied();
        if let Some(entry) = found {
            own.by_memory.remove(&entry);
            own.by_age.remove(&entry.1);
            self.count_down(memory);
        }
    }

    /// A session is over. Whether it held anything.
    pub fn end(&mut self, id: ProcessId) -> bool {
        let all = self.sessions.remove(&id).unwrap_or_default().by_age;
        let held = !all.is_empty();
        for (_, memory) in all {
            self.count_down(memory);
        }
        held
    }

    fn count_down(&mut self, memory: Memory) {
        self.total = self.total.saturating_sub(1);
        if let Some(count) = self.everywhere.get_mut(&memory) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.everywhere.remove(&memory);
            }
        }
    }

    /// Somebody holds it.
    #[must_use]
    pub fn covers(&self, memory: Memory) -> bool {
        self.everywhere.contains_key(&memory)
    }
}

/// A question that is not answered yet.
#[derive(Debug)]
struct Waiting {
    session: ProcessId,
    ticket: u64,
    memory: Memory,
    bytes: u64,
    since: Nanos,
    /// The main loop's pass in which it was read.
    pass: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Claims {
    holds: Holds,
    imported: BTreeMap<ProcessId, Imported>,
    waiting: Vec<Waiting>,
    pass: u64,
    /// In this pass some session had more to read than is read at once.
    pub backlog: bool,
}

impl Claims {
    /// The main loop begins to read again.
    pub fn begin_pass(&mut self) {
        self.pass += 1;
        self.backlog = false;
    }

    /// A question waits for the next pass.
    #[must_use]
    pub fn in_a_hurry(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// A session is over. Whether others may have memory of it, and be left with it.
    pub fn end(&mut self, id: ProcessId) -> bool {
        self.imported.remove(&id);
        self.waiting.retain(|waiting| waiting.session != id);
        self.holds.end(id)
    }
}

/// What a session imported while somebody else was charged for it. It does not say what it lets go of.
#[derive(Debug, Default)]
struct Imported {
    /// In bytes, each time that it was imported.
    memory: BTreeMap<Memory, u64>,
    /// There is more than is known: from before the coordinator's restart, or too much to remember.
    more: bool,
}

impl Claims {
    /// A session is back that imported before the coordinator was restarted.
    pub fn back(&mut self, id: ProcessId) {
        self.imported.entry(id).or_default().more = true;
    }

    fn import(&mut self, id: ProcessId, memory: Memory, bytes: u64) {
        let own = self.imported.entry(id).or_default();
        if own.memory.len() >= MAX_HOLDS {
            let holds = &self.holds;
            own.memory.retain(|memory, _| holds.covers(*memory));
        }
        if own.memory.len() >= MAX_HOLDS {
            own.more = true;
            return;
        }
        let all = own.memory.entry(memory).or_default();
        *all = all.saturating_add(bytes);
    }

    /// The most bytes that a session can have mapped on a device while somebody else is charged for
    /// them.
    #[must_use]
    pub fn covered(&self, id: ProcessId, device: DeviceId) -> u64 {
        let Some(own) = self.imported.get(&id) else {
            return 0;
        };
        if own.more {
            return u64::MAX;
        }
        let here = |(memory, _): &(&Memory, &u64)| {
            memory.device() == device && self.holds.covers(**memory)
        };
        let all = own.memory.iter().filter(here);
        all.fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }
}

impl Daemon {
    /// A device by its number in a session, for `bytes` that can be there.
    fn memory_of(&self, id: ProcessId, device: u32, bytes: u64, key: u64) -> Option<Memory> {
        let pair = self.pages.0.get(&id)?;
        let device = *pair.devices.get(device as usize)?;
        let can_be = (1..=self.devices.get(device)?.gpu.total).contains(&bytes);
        can_be.then(|| Memory::new(device, bytes, key))
    }

    pub(super) fn hold(&mut self, id: ProcessId, device: u32, bytes: u64, key: u64) {
        let Some(memory) = self.memory_of(id, device, bytes, key) else {
            let text = format!("{bytes} bytes on device {device} cannot be held");
            return self.misbehaved(id, &text);
        };
        if let Some(forgot) = self.claims.holds.add(id, memory) {
            self.tell_forgot(forgot);
        }
    }

    fn tell_forgot(&mut self, id: ProcessId) {
        let name = self.name_of_session(id);
        let pid = self.sessions.get(&id).map_or(0, |s| s.identity.pid);
        let text = format!(
            "pid {pid} exports more memory than is kept track of: who imports the oldest of it is charged for it again"
        );
        self.event("note", name.as_deref(), text, &[("pid", pid.into())]);
    }

    pub(super) fn unhold(&mut self, id: ProcessId, device: u32, bytes: u64, key: u64) {
        match self.memory_of(id, device, bytes, key) {
            Some(memory) => {
                self.claims.holds.remove(id, memory);
                self.sample_soon();
            }
            None => {
                let text = format!("{bytes} bytes on device {device} cannot be held");
                self.misbehaved(id, &text);
            }
        }
    }

    pub(super) fn claim(
        &mut self,
        id: ProcessId,
        ticket: u64,
        device: u32,
        (bytes, key): (u64, u64),
    ) {
        let Some(memory) = self.memory_of(id, device, bytes, key) else {
            return self.send_claimed(id, ticket, false);
        };
        let mine = |waiting: &&Waiting| waiting.session == id;
        if self.claims.waiting.iter().filter(mine).count() >= MAX_GROWTHS {
            return self.misbehaved(id, "more claims at once than a process can have threads");
        }
        // Others have sent their words before the program could do anything that depends on them, but
        // this session's socket may have been looked at first.
        let pass = self.claims.pass;
        self.claims.waiting.push(Waiting {
            session: id,
            ticket,
            memory,
            bytes,
            since: now(),
            pass,
        });
    }

    /// Answers the questions whose time has come: everything is read that was sent before them. A
    /// "no" also waits until everybody is back from before a restart.
    pub(super) fn answer_claims(&mut self) {
        if self.claims.waiting.is_empty() {
            return;
        }
        let (time, pass) = (now(), self.claims.pass);
        let adopting = self.adopting_until.is_some();
        let all_read = !self.claims.backlog;
        let holds = &self.claims.holds;
        let mut done = Vec::new();
        self.claims.waiting.retain(|waiting| {
            let covered = holds.covers(waiting.memory);
            let heard = all_read && waiting.pass < pass;
            let late = time.saturating_sub(waiting.since) >= ANSWER_WITHIN;
            let answer = (heard || late) && (covered || !adopting);
            if answer {
                let imported = covered.then_some((waiting.memory, waiting.bytes));
                done.push((waiting.session, waiting.ticket, imported));
            }
            !answer
        });
        for (id, ticket, imported) in done {
            if let Some((memory, bytes)) = imported {
                self.claims.import(id, memory, bytes);
            }
            self.send_claimed(id, ticket, imported.is_some());
        }
    }

    fn send_claimed(&mut self, id: ProcessId, ticket: u64, covered: bool) {
        if let Some(session) = self.sessions.get_mut(&id) {
            let message = ToProcess::ClaimReply {
                ticket,
                covered: u32::from(covered),
            };
            session.send(&message, Vec::new());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ProcessId = ProcessId(16);
    const TWO: ProcessId = ProcessId(18);

    #[test]
    fn memory_is_known_by_its_key_or_by_its_size() {
        let mut holds = Holds::default();
        holds.add(ONE, Memory::new(0, 4096, 7));
        holds.add(ONE, Memory::new(0, 8192, 0));
        assert!(holds.covers(Memory::new(0, 4096, 7)));
        assert!(holds.covers(Memory::new(0, 1, 7)), "the key says it all");
        assert!(!holds.covers(Memory::new(1, 4096, 7)), "another device");
        assert!(!holds.covers(Memory::new(0, 4096, 0)), "it has a key");
        assert!(holds.covers(Memory::new(0, 8192, 0)));
        assert!(!holds.covers(Memory::new(0, 8192, 8)), "it has no key");
    }

    #[test]
    fn the_same_memory_may_be_held_several_times() {
        let mut holds = Holds::default();
        let memory = Memory::new(0, 4096, 0);
        holds.add(ONE, memory);
        holds.add(ONE, memory);
        holds.add(TWO, memory);
        holds.remove(ONE, memory);
        holds.end(TWO);
        assert!(holds.covers(memory));
        holds.remove(ONE, memory);
        assert!(!holds.covers(memory));
        holds.remove(ONE, memory);
        holds.remove(TWO, memory);
        assert_eq!(holds.total, 0);
    }

    #[test]
    fn who_holds_too_much_forgets_its_oldest_and_is_told_of_once() {
        let mut holds = Holds::default();
        for key in 1..=MAX_HOLDS as u64 {
            assert_eq!(holds.add(ONE, Memory::new(0, 1, key)), None);
        }
        assert_eq!(holds.add(ONE, Memory::new(0, 1, 1 << 40)), Some(ONE));
        assert_eq!(holds.add(ONE, Memory::new(0, 1, 2 << 40)), None);
        assert!(!holds.covers(Memory::new(0, 1, 1)));
        assert!(!holds.covers(Memory::new(0, 1, 2)));
        assert!(holds.covers(Memory::new(0, 1, 3)));
        assert_eq!(holds.total, MAX_HOLDS);
        holds.end(ONE);
        assert_eq!((holds.total, holds.everywhere.len()), (0, 0));
    }

    #[test]
    fn where_all_together_hold_too_much_the_heaviest_forgets() {
        let mut holds = Holds::bounded(10);
        for key in 1..=9 {
            holds.add(ONE, Memory::new(0, 1, key));
        }
        assert_eq!(holds.add(TWO, Memory::new(0, 1, 100)), None);
        assert_eq!(holds.add(TWO, Memory::new(0, 1, 101)), Some(ONE));
        assert!(holds.covers(Memory::new(0, 1, 100)));
        assert!(!holds.covers(Memory::new(0, 1, 1)));
    }

    #[test]
    fn what_was_imported_is_covered_while_somebody_holds_it() {
        let mut claims = Claims::default();
        let (by_size, by_key) = (Memory::new(0, 4096, 0), Memory::new(1, 100, 7));
        claims.holds.add(ONE, by_size);
        claims.holds.add(ONE, by_key);
        claims.import(TWO, by_size, 4096);
        claims.import(TWO, by_size, 4096);
        claims.import(TWO, by_key, 100);
        assert_eq!(claims.covered(TWO, 0), 8192, "it may be there twice");
        assert_eq!(claims.covered(TWO, 1), 100);
        assert_eq!(claims.covered(ONE, 0), 0, "it holds its own");
        claims.holds.remove(ONE, by_size);
        assert_eq!((claims.covered(TWO, 0), claims.covered(TWO, 1)), (0, 100));
        claims.back(TWO);
        assert_eq!(claims.covered(TWO, 0), u64::MAX, "nobody knows any more");
        claims.end(TWO);
        assert_eq!(claims.covered(TWO, 0), 0);
    }
}
