//! From the first packet of a session to its Welcome.
//!
//! Promises: who a process is was told by the kernel. A workload's name is bound to the control group
//! and user of its first process; nobody else joins it, and nobody widens it. What a process brings
//! along from before a restart is taken by [`super::adopt`].

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use spillway_arbiter::{
    DeviceId, Order, ProcessId, Quota, WorkloadId, WorkloadSpec, effective_quota,
};
use spillway_protocol::message::{FromProcess, Register, ToProcess};
use spillway_protocol::names::valid_workload_name;
use spillway_protocol::page::{Command, FLAG_SIBLINGS};
use spillway_protocol::{MAX_NAME, PROTOCOL_VERSION, PROTOCOL_VERSION_OLDEST, format_bytes};

use super::adopt::resume_of;
use super::apply::code;
use super::gpus::format_uuid;
use super::main_loop::now;
use super::pages::Pair;
use super::pool::Segment;
use super::sampler::Target;
use super::session::{Adopting, Live, Stage};
use super::shared::Shared;
use super::socket::Packet;
use super::state::{Counters, Daemon, WorkloadState};

/// Sessions of one user; far more than one node has GPU processes.
const MAX_SESSIONS_PER_USER: usize = 1024;
/// The kind of the first message on the wire, and where its version is. Fixed for all versions.
const REGISTER_KIND: u32 = 1;

/// Why a registration is refused: a word for counting, and a line for the process.
pub(super) type Refusal = (&'static str, String);

impl Daemon {
    /// The first packet of a session.
    pub(super) fn register_packet(&mut self, id: ProcessId, packet: Packet) {
        if FromProcess::decode(&packet.bytes) == Ok(FromProcess::Wake) {
            // `spillway run` and `spillway doctor` ask whether a coordinator answers: it does, and
            // that is worth neither an event nor a count.
            if let Some(session) = self.sessions.get_mut(&id) {
                session.refuse("register first");
            }
            return;
        }
        if let Err((reason, text)) = self.first(id, packet) {
            self.refuse(id, reason, &text);
        }
    }

    fn first(&mut self, id: ProcessId, packet: Packet) -> Result<(), Refusal> {
        check_version(&packet.bytes)?;
        let message = FromProcess::decode(&packet.bytes)
            .map_err(|error| ("malformed", format!("malformed registration: {error}")))?;
        let FromProcess::Register(register) = message else {
            return Err(("malformed", "register first".to_owned()));
        };
        if !register.workload.is_empty() && !valid_workload_name(&register.workload) {
            return Err((
                "malformed",
                format!(
                    "SPILLWAY_WORKLOAD={:?} is no name: write 1 to {MAX_NAME} letters, digits and . _ - / : beginning with a letter or digit",
                    register.workload
                ),
            ));
        }
        let uid = self.sessions[&id].identity.uid;
        let same_user = |session: &&super::session::Session| session.identity.uid == uid;
        if self.sessions.values().filter(same_user).count() > MAX_SESSIONS_PER_USER {
            return Err((
                "busy",
                format!("user {uid} has {MAX_SESSIONS_PER_USER} sessions already"),
            ));
        }
        if register.resumes != 0 {
            return self.begin_adoption(id, register, packet.descriptors);
        }
        if !packet.descriptors.is_empty() {
            return Err((
                "malformed",
                "a first registration brings no descriptors".to_owned(),
            ));
        }
        if self.adopting_until.is_some() {
            // Those that hold something already come first.
            if let Some(session) = self.sessions.get_mut(&id) {
                session.stage = Stage::Held(Box::new(register));
            }
            return Ok(());
        }
        self.finish(id, &register, None)
    }

    /// Goes on with the registrations that were held back.
    pub(super) fn register_held(&mut self) {
        let ids: Vec<ProcessId> = self.sessions.keys().copied().collect();
        for id in ids {
            let Some(session) = self.sessions.get_mut(&id) else {
                continue;
            };
            if !matches!(session.stage, Stage::Held(_)) {
                continue;
            }
            if let Stage::Held(register) = std::mem::replace(&mut session.stage, Stage::New)
                && let Err((reason, text)) = self.finish(id, &register, None)
            {
                self.refuse(id, reason, &text);
            }
        }
    }

    pub(super) fn finish(
        &mut self,
        id: ProcessId,
        register: &Register,
        adopting: Option<Adopting>,
    ) -> Result<(), Refusal> {
        let resumed = adopting.is_some();
        let devices = self.find_devices(register)?;
        let quotas = self.quotas(register, &devices)?;
        let workload = self.find_workload(id, register, quotas, resumed)?;
        let result = self.welcome(id, register, workload, devices, adopting);
        if result.is_err() && self.arbiter.processes_of(workload).is_empty() {
            self.workloads.remove(&workload);
            self.arbiter.remove_empty(workload);
        }
        result
    }

    fn find_devices(&self, register: &Register) -> Result<Vec<DeviceId>, Refusal> {
        let mut found = Vec::new();
        for device in &register.devices {
            let index = self
                .devices
                .iter()
                .position(|at| at.gpu.uuid == device.uuid)
                .ok_or_else(|| {
                    let served: Vec<String> = self
                        .devices
                        .iter()
                        .map(|at| format_uuid(&at.gpu.uuid))
                        .collect();
                    let text = format!(
                        "device {} is not served here; served: {}",
                        format_uuid(&device.uuid),
                        served.join(", ")
                    );
                    ("device", text)
                })?;
            if found.contains(&index) {
                let text = format!("device {} is listed twice", format_uuid(&device.uuid));
                return Err(("malformed", text));
            }
            found.push(index);
        }
        Ok(found)
    }

    fn quotas(
        &self,
        register: &Register,
        devices: &[DeviceId],
    ) -> Result<BTreeMap<DeviceId, Quota>, Refusal> {
        let mut quotas = BTreeMap::new();
        for device in devices {
            let total = self.devices[*device].gpu.total;
            let quota = effective_quota(
                register.request.map(|amount| amount.of(total)),
                register.limit.map(|amount| amount.of(total)),
                !register.swap,
                self.arbiter.room(*device),
            )
            .map_err(|text| ("quota", text))?;
            quotas.insert(*device, quota);
        }
        Ok(quotas)
    }

    /// The workload that the process belongs to, made if need be.
    fn find_workload(
        &mut self,
        id: ProcessId,
        register: &Register,
        quotas: BTreeMap<DeviceId, Quota>,
        resumed: bool,
    ) -> Result<WorkloadId, Refusal> {
        let identity = &self.sessions[&id].identity;
        let name = if register.workload.is_empty() {
            identity
                .container
                .clone()
                .unwrap_or_else(|| own_name(&identity.command, identity.pid))
        } else {
            register.workload.clone()
        };
        if let Some(existing) = self.arbiter.find(&name) {
            self.check_joins(id, register, existing, &name, &quotas)?;
            self.arbiter
                .add_devices(existing, quotas, !resumed)
                .map_err(|text| ("quota", format!("workload {name}: {text}")))?;
            return Ok(existing);
        }
        let (uid, cgroup) = (identity.uid, identity.cgroup.clone());
        let spec = WorkloadSpec {
            name: name.clone(),
            priority: register.priority,
            never: !register.swap,
            quotas,
        };
        let workload = self
            .arbiter
            .add_workload(now(), spec, !resumed)
            .map_err(|text| ("quota", format!("workload {name}: {text}")))?;
        let state = WorkloadState {
            name,
            uid,
            cgroup,
            since: now(),
            active: 0,
            metrics: crate::model::WorkloadMetrics::default(),
            unknown_names: std::collections::BTreeSet::new(),
            gone: Counters::default(),
            moved_before: (0, 0),
        };
        self.workloads.insert(workload, state);
        Ok(workload)
    }

    fn check_joins(
        &self,
        id: ProcessId,
        register: &Register,
        workload: WorkloadId,
        name: &str,
        quotas: &BTreeMap<DeviceId, Quota>,
    ) -> Result<(), Refusal> {
        let identity = &self.sessions[&id].identity;
        let (Some(owner), Some(spec)) =
            (self.workloads.get(&workload), self.arbiter.spec(workload))
        else {
            return Ok(());
        };
        if owner.uid != identity.uid {
            let text = format!(
                "workload {name} belongs to user {}, and this process to user {}: choose another SPILLWAY_WORKLOAD",
                owner.uid, identity.uid
            );
            return Err(("identity", text));
        }
        if owner.cgroup != identity.cgroup {
            let text = format!(
                "workload {name} belongs to another container or control group: choose another SPILLWAY_WORKLOAD"
            );
            return Err(("identity", text));
        }
        let claims = |what: &str, variable: &str, asked: u64, has: u64| {
            let text = format!(
                "workload {name} has a {what} of {} since its first process, and this one asks for {}: unset {variable}, or end the workload first",
                format_bytes(has),
                format_bytes(asked)
            );
            Err(("quota", text))
        };
        for (device, quota) in quotas {
            let Some(has) = spec.quotas.get(device) else {
                continue;
            };
            // Values that were not set claim nothing.
            if register.request.is_some() && quota.request > has.request {
                return claims("request", "SPILLWAY_REQUEST", quota.request, has.request);
            }
            if register.limit.is_some() && quota.limit > has.limit {
                return claims("limit", "SPILLWAY_LIMIT", quota.limit, has.limit);
            }
        }
        if !register.swap && !spec.never {
            let text = format!(
                "workload {name} is swappable since its first process: unset SPILLWAY_SWAP, or end the workload first"
            );
            return Err(("quota", text));
        }
        Ok(())
    }

    fn welcome(
        &mut self,
        id: ProcessId,
        register: &Register,
        workload: WorkloadId,
        devices: Vec<DeviceId>,
        adopting: Option<Adopting>,
    ) -> Result<(), Refusal> {
        let no_memory =
            |error: nix::Error| ("busy", format!("spillwayd cannot make a page: {error}"));
        let desired = Shared::desired().map_err(no_memory)?;
        let resumed = adopting.is_some();
        let (observed, mut segments) = match adopting {
            Some(adopting) => (adopting.observed, adopting.segments),
            None => (Shared::observed().map_err(no_memory)?, BTreeMap::new()),
        };
        let duplicate = |file: &dyn AsFdDyn| {
            file.as_fd_dyn().try_clone_to_owned().map_err(|error| {
                (
                    "busy",
                    format!("spillwayd has no descriptors left: {error}"),
                )
            })
        };
        let descriptors = vec![duplicate(&desired)?, duplicate(&observed)?];
        let resume = resumed.then(|| resume_of(register, &observed, &devices));
        desired.instance.store(self.instance, SeqCst);
        let deadline = u64::try_from(self.options.drain_deadline.as_millis()).unwrap_or(u64::MAX);
        desired.drain_deadline_ms.store(deadline, SeqCst);
        if let Some(spec) = self.arbiter.spec(workload) {
            for (index, device) in devices.iter().enumerate() {
                let quota = spec.quotas.get(device).copied().unwrap_or_default();
                desired.devices[index].limit.store(quota.limit, SeqCst);
                desired.devices[index].request.store(quota.request, SeqCst);
            }
        }
        segments.values_mut().for_each(Segment::settle);
        let host_grant = self.adopted_host_grant(register, resumed);
        desired.host_grant.store(host_grant, SeqCst);
        let observed = Arc::new(observed);
        let target = Target {
            page: Arc::clone(&observed),
            devices: devices.clone(),
        };
        let pair = Pair {
            desired,
            observed,
            devices: devices.clone(),
        };
        self.pages.0.insert(id, pair);
        self.sampler.targets.lock().insert(id, target);
        let next_segment = segments
            .keys()
            .max()
            .map_or(1, |last| last.saturating_add(1));
        let live = Live {
            workload,
            segments,
            next_segment,
            ordered: (0, 0),
            host_grant,
            host_promise: (0, 0),
            swap: register.swap,
            backed: BTreeMap::new(),
            seen_state: 0,
            seen_unswappable: 0,
            awake: !resumed,
            measure_asked: None,
            overhead_unknown_said: false,
            notes: (0, 0),
        };
        if let Some(session) = self.sessions.get_mut(&id) {
            session.stage = Stage::Live(Box::new(live));
        }
        let (order, epoch) =
            self.arbiter
                .add_process(now(), &mut self.pages, id, workload, &devices, resume);
        self.store_command(id, order, epoch);
        if resumed {
            self.claims.back(id);
        }
        self.publish_shares(workload);
        let name = self.name(workload);
        if let Some(session) = self.sessions.get_mut(&id) {
            let message = ToProcess::Welcome {
                version: register.version.min(PROTOCOL_VERSION),
                instance: self.instance,
                workload: name.clone(),
            };
            session.send(&message, descriptors);
            let (pid, uid) = (session.identity.pid, session.identity.uid);
            let command = session.identity.command.clone();
            let verb = if resumed {
                "came back to"
            } else {
                "registered as"
            };
            let text = format!("{command} (pid {pid}) {verb} {name}");
            let kind = if resumed { "resumed" } else { "registered" };
            self.event(
                kind,
                Some(&name),
                text,
                &[("pid", pid.into()), ("uid", uid.into())],
            );
        }
        Ok(())
    }

    /// Publishes an order.
    pub(super) fn store_command(&self, id: ProcessId, order: Order, epoch: u64) {
        if let Some(pair) = self.pages.0.get(&id) {
            let command = Command {
                epoch,
                code: code(order),
            };
            pair.desired.command.store(command.pack(), SeqCst);
        }
    }

    /// Tells each process of a workload what the others use, and that there are others.
    pub(super) fn publish_shares(&self, workload: WorkloadId) {
        let processes = self.arbiter.processes_of(workload);
        let flags = if processes.len() > 1 {
            FLAG_SIBLINGS
        } else {
            0
        };
        for id in &processes {
            let Some(pair) = self.pages.0.get(id) else {
                continue;
            };
            pair.desired.flags.store(flags, SeqCst);
            for device in &pair.devices {
                let (mut others, mut context) = (0u64, 0u64);
                for other in processes.iter().filter(|other| *other != id) {
                    let (grant, overhead) = self.arbiter.account(*other, *device);
                    let (used, cost) = self
                        .pages
                        .0
                        .get(other)
                        .and_then(|pair| pair.observed(*device))
                        .map_or((0, 0), |at| (at.used.load(SeqCst), at.context.load(SeqCst)));
                    others = others
                        .saturating_add(used.min(grant))
                        .saturating_add(overhead);
                    // No more than the driver shows for it.
                    context = context.max(cost.min(overhead));
                }
                let (_, overhead) = self.arbiter.account(*id, *device);
                if let Some(at) = pair.desired(*device) {
                    at.others.store(others, SeqCst);
                    at.context.store(context, SeqCst);
                    at.overhead.store(overhead, SeqCst);
                }
            }
        }
    }
}

/// `AsFd` behind a reference, for pages of either kind.
trait AsFdDyn {
    fn as_fd_dyn(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl<T: AsFd> AsFdDyn for T {
    fn as_fd_dyn(&self) -> std::os::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

fn check_version(packet: &[u8]) -> Result<(), Refusal> {
    let word = |at: usize| {
        packet
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u32::from_le_bytes)
    };
    match (word(0), word(4)) {
        (Some(REGISTER_KIND), Some(version))
            if !(PROTOCOL_VERSION_OLDEST..=PROTOCOL_VERSION).contains(&version) =>
        {
            let remedy = if version > PROTOCOL_VERSION {
                "update spillwayd"
            } else {
                "update libspillway.so"
            };
            let text = format!(
                "this library speaks version {version} of the session protocol, spillwayd {PROTOCOL_VERSION_OLDEST} to {PROTOCOL_VERSION}: {remedy}"
            );
            Err(("version", text))
        }
        _ => Ok(()),
    }
}

/// A name for a process that has none and is in no container.
fn own_name(command: &str, pid: i32) -> String {
    let clean: String = command
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') {
                c
            } else {
                '_'
            }
        })
        .collect();
    let clean = clean.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    let clean = if clean.is_empty() { "process" } else { clean };
    format!("{clean}-{pid}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_nameless_processes_are_valid() {
        for command in ["python3", "", "-x", "a b/c", "äöü", "(sd-pam)"] {
            let name = own_name(command, 12);
            assert!(valid_workload_name(&name), "{command:?} became {name:?}");
        }
    }

    #[test]
    fn versions_are_checked_before_anything_else_is_read() {
        let mut packet = REGISTER_KIND.to_le_bytes().to_vec();
        packet.extend(99u32.to_le_bytes());
        packet.extend(b"whatever a later version puts here");
        let (reason, text) = check_version(&packet).expect_err("refused");
        assert_eq!(reason, "version");
        assert!(
            text.contains("99") && text.contains("update spillwayd"),
            "{text}"
        );
        assert!(check_version(&[1, 0]).is_ok(), "left to the decoder");
    }
}
