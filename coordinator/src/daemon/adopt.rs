//! Taking in a process that was there before this coordinator: its page, its segments, its grants.
//!
//! What it brings along is checked before it is believed: files for their seals and sizes, figures
//! against what can be. Until it is in, its segments are left alone: they may hold its only copy.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use spillway_arbiter::{DeviceId, ProcessId, Resume};
use spillway_protocol::message::{FromProcess, Register};
use spillway_protocol::page::{Observed, State, state};
use spillway_protocol::{MAX_SEGMENT, MAX_SEGMENTS};

use super::pool::Segment;
use super::register::Refusal;
use super::session::{Adopting, Stage};
use super::shared::{Shared, check_file};
use super::socket::Packet;
use super::state::Daemon;

/// Epochs beyond this are refused: they would not fit their word for long.
const MAX_EPOCH: u64 = 1 << 48;

impl Daemon {
    pub(super) fn begin_adoption(
        &mut self,
        id: ProcessId,
        register: Register,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        let (Some(page), true) = (descriptors.pop(), descriptors.is_empty()) else {
            return Err((
                "malformed",
                "a resumption brings one descriptor, its observed page".to_owned(),
            ));
        };
        if register.segments as usize > MAX_SEGMENTS {
            return Err((
                "malformed",
                format!("{} segments are too many", register.segments),
            ));
        }
        if register.epoch > MAX_EPOCH {
            return Err((
                "malformed",
                format!("the epoch {} is too large", register.epoch),
            ));
        }
        let observed = Shared::adopt(page).map_err(|text| ("malformed", text))?;
        let left = register.segments;
        let adopting = Adopting {
            register,
            observed,
            segments: BTreeMap::new(),
        };
        if left == 0 {
            return self.finish_adoption(id, adopting);
        }
        if let Some(session) = self.sessions.get_mut(&id) {
            session.stage = Stage::Adopting(Box::new(adopting));
        }
        Ok(())
    }

    /// A segment from before a restart.
    pub(super) fn adopt_packet(&mut self, id: ProcessId, packet: Packet) {
        let result = self.adopt(id, packet);
        if let Err((reason, text)) = result {
            self.refuse(id, reason, &text);
        }
    }

    fn adopt(&mut self, id: ProcessId, packet: Packet) -> Result<(), Refusal> {
        let message = FromProcess::decode(&packet.bytes)
            .map_err(|error| ("malformed", format!("malformed message: {error}")))?;
        let FromProcess::Adopt { id: segment, bytes } = message else {
            return Err((
                "malformed",
                "segments were announced: send them first".to_owned(),
            ));
        };
        let mut descriptors = packet.descriptors;
        let (Some(file), true) = (descriptors.pop(), descriptors.is_empty()) else {
            return Err((
                "malformed",
                "a segment comes with one descriptor".to_owned(),
            ));
        };
        if bytes == 0 || bytes > MAX_SEGMENT {
            return Err(("malformed", format!("a segment of {bytes} bytes cannot be")));
        }
        check_file(&file, bytes)
            .map_err(|why| ("malformed", format!("segment {segment} {why}")))?;
        let counter = Arc::clone(self.pool.counter());
        let Some(session) = self.sessions.get_mut(&id) else {
            return Ok(());
        };
        let Stage::Adopting(adopting) = &mut session.stage else {
            return Ok(());
        };
        if adopting.segments.contains_key(&segment) {
            return Err(("malformed", format!("segment {segment} came twice")));
        }
        adopting
            .segments
            .insert(segment, Segment::adopt(file, bytes, &counter));
        if adopting.segments.len() < adopting.register.segments as usize {
            return Ok(());
        }
        match std::mem::replace(&mut session.stage, Stage::New) {
            Stage::Adopting(adopting) => self.finish_adoption(id, *adopting),
            _ => Ok(()),
        }
    }

    fn finish_adoption(&mut self, id: ProcessId, adopting: Adopting) -> Result<(), Refusal> {
        let register = adopting.register.clone();
        self.finish(id, &register, Some(adopting))
    }

    /// What a resumed process has in the pool: what it says, but no less than its segments hold and
    /// no more than one segment above that.
    pub(super) fn adopted_host_grant(&mut self, register: &Register, resumed: bool) -> u64 {
        if !resumed {
            return 0;
        }
        // No more than it may use of all its devices together, whatever it says.
        let totals = register.devices.iter().filter_map(|device| {
            let at = self.devices.iter().find(|at| at.gpu.uuid == device.uuid)?;
            Some(at.gpu.total)
        });
        let most = totals.fold(0u64, u64::saturating_add);
        let grant = register.host_grant.min(most);
        self.pool.adopt(grant);
        grant
    }
}

/// What a process holds, from what it says and from its page, each word read once.
pub(super) fn resume_of(
    register: &Register,
    observed: &Shared<Observed>,
    devices: &[DeviceId],
) -> Resume {
    let state = State::unpack(observed.state.load(SeqCst));
    Resume {
        epoch: register.epoch,
        evicted: state.code == state::EVICTED,
        evicting: state.code == state::EVICTING,
        grants: devices
            .iter()
            .zip(&register.grants)
            .map(|(device, grant)| (*device, *grant))
            .collect(),
    }
}
