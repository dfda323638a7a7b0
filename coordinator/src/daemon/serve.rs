//! A registered process's messages.
//!
//! Promises: whatever a process sends, the worst that happens is that its own session ends with a
//! line that says why.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;

use spillway_arbiter::{Growth, MILLISECOND, Nanos, ProcessId};
use spillway_protocol::message::{FromProcess, ToProcess, outcome};
use spillway_protocol::page::{State, lower_grant};
use spillway_protocol::{GRANULE, MAX_ENTRY_POINTS, MAX_SEGMENT, MAX_SEGMENTS, format_bytes};

use super::apply::report;
use super::main_loop::now;
use super::pool::Made;
use super::session::{Live, MAX_GROWTHS, MAX_ORDERED};
use super::socket::Packet;
use super::state::{Daemon, Refreshing};

/// For how long host memory is left to who was told of it: as long as the arbiter leaves a grant.
const HOST_PROMISE: Nanos = 20 * MILLISECOND;

/// What a process holds of its host grant, or was promised and is about to take.
fn promised_host(live: &Live, pageable: u64, growing: u64) -> u64 {
    let (level, until) = live.host_promise;
    let promised = if now() < until { level } else { 0 };
    pageable.saturating_add(growing).max(promised)
}

impl Daemon {
    /// One packet of a registered process.
    pub(super) fn serve_packet(&mut self, id: ProcessId, packet: Packet) {
        if packet.cut {
            return self.misbehaved(id, "the message is longer than any can be");
        }
        if !packet.descriptors.is_empty() {
            return self.misbehaved(id, "the message brings descriptors that it must not have");
        }
        match FromProcess::decode(&packet.bytes) {
            Err(error) => self.misbehaved(id, &format!("malformed message: {error}")),
            Ok(FromProcess::Register(_)) => self.misbehaved(id, "registered twice"),
            Ok(FromProcess::Adopt { .. }) => {
                self.misbehaved(id, "a segment to adopt that was not announced");
            }
            Ok(FromProcess::Grow {
                ticket,
                device,
                bytes,
                pageable,
                no_wait,
            }) => self.grow(id, ticket, device, (bytes, pageable), no_wait != 0),
            Ok(FromProcess::Segment { ticket, bytes }) => self.segment(id, ticket, bytes),
            Ok(FromProcess::SegmentRelease { id: segment }) => self.release(id, segment),
            Ok(FromProcess::Refresh { ticket, measure }) => self.refresh(id, ticket, measure != 0),
            Ok(FromProcess::Wake) => self.woken(id),
            Ok(FromProcess::Note { text }) => self.note(id, &text),
            Ok(FromProcess::Hold { device, bytes, key }) => self.hold(id, device, bytes, key),
            Ok(FromProcess::Unhold { device, bytes, key }) => self.unhold(id, device, bytes, key),
            Ok(FromProcess::Claim {
                ticket,
                device,
                bytes,
                key,
            }) => self.claim(id, ticket, device, (bytes, key)),
            Ok(FromProcess::Unknown { name }) => self.unknown(id, &name),
        }
    }

    /// Ends a session that does not keep to the protocol.
    pub(super) fn misbehaved(&mut self, id: ProcessId, text: &str) {
        let workload = self.name_of_session(id);
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.refuse(text);
        let pid = session.identity.pid;
        let text = format!("session of pid {pid} closed: {text}");
        self.event("refused", workload.as_deref(), text, &[("pid", pid.into())]);
    }

    fn grow(
        &mut self,
        id: ProcessId,
        ticket: u64,
        device: u32,
        (bytes, pageable): (u64, u64),
        no_wait: bool,
    ) {
        if self.arbiter.growths_of(id) >= MAX_GROWTHS {
            return self.misbehaved(id, "more growths at once than a process can have threads");
        }
        let found = self
            .pages
            .0
            .get(&id)
            .and_then(|pair| pair.devices.get(device as usize).copied());
        let (Some(device), true) = (found, pageable <= bytes && bytes > 0) else {
            let text = format!("{bytes} bytes, {pageable} of them pageable, on device {device}");
            return self.send_grown(id, ticket, outcome::INVALID, false, text);
        };
        let backed = self.back(id, device, bytes, pageable);
        if let Some(live) = self.sessions.get_mut(&id).and_then(|s| s.live()) {
            live.backed.insert(ticket, backed);
        }
        let growth = Growth {
            process: id,
            ticket,
            device,
            bytes,
            pinned: if backed { bytes - pageable } else { bytes },
            no_wait,
        };
        self.arbiter.grow(now(), &mut self.pages, growth);
    }

    /// Reserves host memory for a growth, taking back what others reserved and do not use. `false`:
    /// there is none, or the process is never moved; then the growth will be pinned.
    fn back(&mut self, id: ProcessId, device: usize, bytes: u64, pageable: u64) -> bool {
        let Some(live) = self.sessions.get(&id).and_then(|s| s.as_live()) else {
            return false;
        };
        let (swap, has, workload) = (live.swap, live.host_grant, live.workload);
        if !swap {
            return false;
        }
        let limit = self
            .arbiter
            .spec(workload)
            .and_then(|spec| spec.quotas.get(&device))
            .map_or(0, |quota| quota.limit);
        let Some(pair) = self.pages.0.get(&id) else {
            return false;
        };
        // What will be refused anyway gets no host memory.
        if bytes > limit {
            return true;
        }
        let base = promised_host(live, pair.pageable(), self.arbiter.growing(id));
        let wanted = base.saturating_add(pageable);
        let more = wanted.saturating_sub(has);
        if more > 0 && !self.pool.reserve(more) {
            // Pinned memory stays pinned: rather ask somebody to ask again.
            let found = [true, false].into_iter().any(|keeps_promises| {
                self.gather_host(id, more, keeps_promises);
                self.pool.reserve(more)
            });
            if !found {
                return false;
            }
        }
        let grant = has.saturating_add(more);
        if let Some(live) = self.sessions.get_mut(&id).and_then(|s| s.live()) {
            live.host_grant = grant;
            live.host_promise = (wanted, now() + HOST_PROMISE);
        }
        if let Some(pair) = self.pages.0.get(&id) {
            pair.desired.host_grant.store(grant, SeqCst);
        }
        true
    }

    /// A granted growth: its host memory is left alone for a moment, and where the pool has plenty
    /// there is as much of it as of the device, so that one question is enough for both.
    pub(super) fn host_granted(&mut self, id: ProcessId) {
        let Some(live) = self.sessions.get_mut(&id).and_then(|s| s.live()) else {
            return;
        };
        let Some(pair) = self.pages.0.get(&id) else {
            return;
        };
        live.host_promise.1 = now() + HOST_PROMISE;
        let more = pair.granted().saturating_sub(live.host_grant);
        let plenty = self.pool.capacity() / 8 * 7;
        if live.swap && more > 0 && self.pool.reserved().saturating_add(more) <= plenty {
            self.pool.reserve(more);
            live.host_grant += more;
            pair.desired.host_grant.store(live.host_grant, SeqCst);
        }
    }

    /// Takes back host memory that others have reserved and do not use.
    fn gather_host(&mut self, asking: ProcessId, wanted: u64, keeps_promises: bool) {
        let mut taken = 0;
        for (id, session) in &mut self.sessions {
            if taken >= wanted {
                return;
            }
            let Some(live) = session.live().filter(|live| live.awake && *id != asking) else {
                continue;
            };
            let Some(pair) = self.pages.0.get(id) else {
                continue;
            };
            let growing = self.arbiter.growing(*id);
            let needed = if keeps_promises {
                promised_host(live, pair.pageable(), growing)
            } else {
                pair.pageable().saturating_add(growing)
            };
            if needed >= live.host_grant {
                continue;
            }
            let target = needed.max(live.host_grant.saturating_sub(wanted - taken));
            let stands = lower_grant(&pair.desired.host_grant, &pair.observed.pageable, target)
                .min(live.host_grant);
            let freed = live.host_grant - stands;
            live.host_grant = stands;
            self.pool.release(freed);
            taken += freed;
        }
    }

    /// Answers a growth.
    pub(super) fn send_grown(
        &mut self,
        id: ProcessId,
        ticket: u64,
        outcome: u32,
        backed: bool,
        text: String,
    ) {
        if let Some(session) = self.sessions.get_mut(&id) {
            let message = ToProcess::GrowReply {
                ticket,
                outcome,
                backed: u32::from(backed),
                text,
            };
            session.send(&message, Vec::new());
        }
    }

    fn segment(&mut self, id: ProcessId, ticket: u64, bytes: u64) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        let Some(live) = session.live() else {
            return;
        };
        let held: u64 = live
            .segments
            .values()
            .map(super::pool::Segment::bytes)
            .sum();
        let text = if bytes == 0 || bytes > MAX_SEGMENT || !bytes.is_multiple_of(GRANULE) {
            format!("a segment of {bytes} bytes cannot be")
        } else if live.segments.len() + live.ordered.0 >= MAX_SEGMENTS
            || live.ordered.0 >= MAX_ORDERED
        {
            "too many segments".to_owned()
        } else if held + live.ordered.1 + bytes > live.host_grant.saturating_add(MAX_SEGMENT) {
            format!(
                "segments of {} and {} more exceed the {} reserved for this process",
                format_bytes(held + live.ordered.1),
                format_bytes(bytes),
                format_bytes(live.host_grant)
            )
        } else {
            live.ordered.0 += 1;
            live.ordered.1 += bytes;
            self.workshop.order(id, ticket, bytes);
            return;
        };
        let message = ToProcess::SegmentReply {
            ticket,
            id: 0,
            bytes: 0,
            text,
        };
        session.send(&message, Vec::new());
    }

    /// A segment was made, for whoever ordered it; if that one is gone, it is emptied again.
    pub(super) fn deliver(&mut self, made: Made) {
        let Made {
            session: id,
            ticket,
            bytes,
            result,
        } = made;
        let live = self.sessions.get_mut(&id).and_then(|s| s.live());
        let Some(live) = live else {
            if let Ok(segment) = result {
                self.workshop.discard(segment);
            }
            return;
        };
        live.ordered.0 = live.ordered.0.saturating_sub(1);
        live.ordered.1 = live.ordered.1.saturating_sub(bytes);
        let copy = result.and_then(|segment| {
            segment
                .as_fd()
                .try_clone_to_owned()
                .map(|file| (segment, file))
                .map_err(|error| format!("spillwayd has no descriptors left: {error}"))
        });
        let (message, descriptors) = match copy {
            Ok((segment, file)) => {
                let number = live.next_segment;
                live.next_segment = number.wrapping_add(1);
                live.segments.insert(number, segment);
                let message = ToProcess::SegmentReply {
                    ticket,
                    id: number,
                    bytes,
                    text: String::new(),
                };
                (message, vec![file])
            }
            Err(text) => {
                let message = ToProcess::SegmentReply {
                    ticket,
                    id: 0,
                    bytes: 0,
                    text,
                };
                (message, Vec::new())
            }
        };
        if let Some(session) = self.sessions.get_mut(&id) {
            session.send(&message, descriptors);
        }
    }

    fn release(&mut self, id: ProcessId, segment: u64) {
        let live = self.sessions.get_mut(&id).and_then(|s| s.live());
        match live.and_then(|live| live.segments.remove(&segment)) {
            Some(segment) => self.workshop.discard(segment),
            None => self.misbehaved(id, &format!("released segment {segment}, which it has not")),
        }
    }

    fn refresh(&mut self, id: ProcessId, ticket: u64, measure: bool) {
        if measure {
            if self.refreshing.iter().filter(|r| r.session == id).count() >= MAX_GROWTHS {
                return self
                    .misbehaved(id, "more refreshes at once than a process can have threads");
            }
            self.refreshing.push(Refreshing {
                session: id,
                ticket,
                since: now(),
            });
            if let Some(live) = self.sessions.get_mut(&id).and_then(|s| s.live()) {
                live.measure_asked = Some(now());
            }
            self.ask_sample();
            return;
        }
        self.refreshed(id, ticket);
    }

    /// Brings a process's page up to date and says so.
    pub(super) fn refreshed(&mut self, id: ProcessId, ticket: u64) {
        let workload = self
            .sessions
            .get(&id)
            .and_then(|s| s.as_live())
            .map(|l| l.workload);
        if let Some(workload) = workload {
            self.publish_shares(workload);
        }
        if let Some(session) = self.sessions.get_mut(&id) {
            session.send(&ToProcess::RefreshReply { ticket }, Vec::new());
        }
    }

    fn woken(&mut self, id: ProcessId) {
        self.news.insert(id);
        let live = self.sessions.get_mut(&id).and_then(|s| s.live());
        if let Some(live) = live
            && !live.awake
        {
            live.awake = true;
            self.arbiter.set_live(now(), &mut self.pages, id);
        }
    }

    /// Tells the arbiter what a process reports, if it is new.
    pub(super) fn look(&mut self, id: ProcessId) {
        let Some(pair) = self.pages.0.get(&id) else {
            return;
        };
        let word = pair.observed.state.load(SeqCst);
        let unswappable = pair.observed.unswappable.load(SeqCst);
        let Some(live) = self.sessions.get_mut(&id).and_then(|s| s.live()) else {
            return;
        };
        let new_state = std::mem::replace(&mut live.seen_state, word) != word;
        let before = std::mem::replace(&mut live.seen_unswappable, unswappable);
        let tell = unswappable != before && live.may_speak(now());
        if tell {
            self.tell_swappable(id, unswappable);
        }
        if new_state {
            let state = State::unpack(word);
            self.arbiter
                .report(now(), &mut self.pages, id, state.epoch, report(state.code));
        }
    }

    fn tell_swappable(&mut self, id: ProcessId, bits: u64) {
        let Some(name) = self.name_of_session(id) else {
            return;
        };
        let text = super::view::unswappable_text(bits).map_or_else(
            || format!("{name} can be swapped again"),
            |why| format!("{name} is not swappable: {why}"),
        );
        self.event("swappable", Some(&name), text, &[("reasons", bits.into())]);
    }

    /// An entry point of the driver that the process's hook table does not know. Few are kept of a
    /// workload, and each is told once: a driver of the next version has some dozens.
    fn unknown(&mut self, id: ProcessId, entry_point: &str) {
        let live = self.sessions.get(&id).and_then(|s| s.as_live());
        let Some(state) = live.and_then(|live| self.workloads.get_mut(&live.workload)) else {
            return;
        };
        let full = state.unknown_names.len() >= MAX_ENTRY_POINTS;
        if full || !state.unknown_names.insert(entry_point.to_owned()) {
            return;
        }
        let name = state.name.clone();
        let text = format!(
            "{name} asked for {entry_point}, an entry point of the driver that libspillway.so does not know: unless strict mode refuses it, memory that it allocates is not counted"
        );
        let numbers = [("entry_point", entry_point.into())];
        self.event("unknown_entry_point", Some(&name), text, &numbers);
    }

    fn note(&mut self, id: ProcessId, text: &str) {
        let time = now();
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        let pid = session.identity.pid;
        let Some(live) = session.live() else {
            return;
        };
        if !live.may_speak(time) {
            return;
        }
        let clean: String = text.chars().filter(|c| !c.is_control()).collect();
        let name = self.name_of_session(id);
        self.event("note", name.as_deref(), clean, &[("pid", pid.into())]);
    }
}
