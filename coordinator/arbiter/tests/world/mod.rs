//! A world around the arbiter: processes that do as they are told (or not), pages, and time.
//!
//! The world keeps its own account of who physically holds what, apart from the arbiter's ledger,
//! and checks after every event that the devices hold it and that no limit was passed.

#![allow(dead_code, reason = "each test program uses a part of this")]

use std::collections::BTreeMap;

use spillway_arbiter::*;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// How a process behaves when it is told something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Does it, after its swap time.
    Normal,
    /// Answers nothing.
    Stopped,
    /// Cannot become idle.
    NeverIdle,
    /// Cannot move its memory.
    Failing,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Share {
    pub grant: u64,
    pub used: u64,
    pub pinned: u64,
    pub overhead: u64,
}

#[derive(Debug)]
pub struct Process {
    pub workload: WorkloadId,
    pub name: String,
    pub shares: BTreeMap<DeviceId, Share>,
    /// Submits all the time, or wants to.
    pub busy: bool,
    pub wants: bool,
    pub in_flight: bool,
    pub last_active: Nanos,
    pub unswappable: bool,
    pub mode: Mode,
    pub swap_time: Nanos,
    /// What it was told and has not finished.
    pub order: Option<(Order, u64, Nanos)>,
    /// The gate: drained or evicted.
    pub closed: bool,
    pub on_host: bool,
    pub swaps_out: u64,
    pub swaps_in: u64,
    /// Time spent resident and open.
    pub ran: Nanos,
}

#[derive(Default)]
pub struct FakePages(pub BTreeMap<ProcessId, Process>);

impl FakePages {
    fn share(&self, process: ProcessId, device: DeviceId) -> Share {
        self.0
            .get(&process)
            .and_then(|p| p.shares.get(&device))
            .copied()
            .unwrap_or_default()
    }
}

impl Pages for FakePages {
    fn used(&self, process: ProcessId, device: DeviceId) -> u64 {
        self.share(process, device).used
    }

    fn pinned(&self, process: ProcessId, device: DeviceId) -> u64 {
        self.share(process, device).pinned
    }

    fn activity(&self, process: ProcessId) -> Activity {
        self.0
            .get(&process)
            .map_or_else(Activity::default, |p| Activity {
                in_flight: p.in_flight,
                last_active: p.last_active,
                wants: p.wants,
                unswappable: p.unswappable,
            })
    }

    fn raise_grant(&mut self, process: ProcessId, device: DeviceId, to: u64) {
        if let Some(share) = self
            .0
            .get_mut(&process)
            .and_then(|p| p.shares.get_mut(&device))
        {
            assert!(to >= share.grant, "a raised grant is higher");
            share.grant = to;
        }
    }

    fn lower_grant(&mut self, process: ProcessId, device: DeviceId, target: u64) -> u64 {
        let share = self
            .0
            .get_mut(&process)
            .and_then(|p| p.shares.get_mut(&device))
            .expect("only known shares are lowered");
        share.grant = target.max(share.used).min(share.grant);
        share.grant
    }
}

pub struct World {
    pub arbiter: Arbiter,
    pub pages: FakePages,
    pub config: Config,
    pub now: Nanos,
    pub rooms: Vec<u64>,
    pub answers: BTreeMap<(ProcessId, u64), Outcome>,
    pub asked: BTreeMap<(ProcessId, u64), (DeviceId, u64, u64, bool)>,
    pub operations: BTreeMap<OperationId, Result<bool, String>>,
    pub notes: Vec<(Nanos, WorkloadId, Note)>,
    pub killed: Vec<ProcessId>,
    pub dead: Vec<(DeviceId, u64, u64)>,
    /// Overhead was measured beyond what fits; then only the arbiter's own doing is checked.
    pub overcommitted: bool,
    next: u64,
}

impl World {
    pub fn new(config: Config, rooms: &[u64]) -> Self {
        Self {
            arbiter: Arbiter::new(config, rooms),
            pages: FakePages::default(),
            config,
            now: 100 * SECOND,
            rooms: rooms.to_vec(),
            answers: BTreeMap::new(),
            asked: BTreeMap::new(),
            operations: BTreeMap::new(),
            notes: Vec::new(),
            killed: Vec::new(),
            dead: Vec::new(),
            overcommitted: false,
            next: 1,
        }
    }

    /// Without slack, so that figures are what was asked for.
    pub fn exact(rooms: &[u64]) -> Self {
        let config = Config {
            slack: 0,
            ..Config::default()
        };
        Self::new(config, rooms)
    }

    pub fn spec(name: &str, request: u64, limit: u64, devices: &[DeviceId]) -> WorkloadSpec {
        let quota = Quota { request, limit };
        WorkloadSpec {
            name: name.to_owned(),
            priority: 0,
            never: false,
            quotas: devices.iter().map(|d| (*d, quota)).collect(),
        }
    }

    /// A workload of one process on device 0.
    pub fn start(&mut self, name: &str, request: u64, limit: u64) -> ProcessId {
        self.start_spec(Self::spec(name, request, limit, &[0]))
    }

    pub fn start_spec(&mut self, spec: WorkloadSpec) -> ProcessId {
        let devices: Vec<DeviceId> = spec.quotas.keys().copied().collect();
        let workload = self
            .arbiter
            .add_workload(self.now, spec, true)
            .expect("the requests fit");
        self.join(workload, &devices)
    }

    pub fn join(&mut self, workload: WorkloadId, devices: &[DeviceId]) -> ProcessId {
        self.join_as(workload, devices, None)
    }

    pub fn join_as(
        &mut self,
        workload: WorkloadId,
        devices: &[DeviceId],
        resume: Option<Resume>,
    ) -> ProcessId {
        let id = ProcessId(self.next);
        self.next += 1;
        let name = self.arbiter.spec(workload).expect("there").name.clone();
        let on_host = resume.as_ref().is_some_and(|r| r.evicted);
        self.pages.0.insert(
            id,
            Process {
                workload,
                name,
                shares: devices.iter().map(|d| (*d, Share::default())).collect(),
                busy: false,
                wants: false,
                in_flight: false,
                last_active: 0,
                unswappable: false,
                mode: Mode::Normal,
                swap_time: 50 * MILLISECOND,
                order: None,
                closed: on_host,
                on_host,
                swaps_out: 0,
                swaps_in: 0,
                ran: 0,
            },
        );
        self.arbiter
            .add_process(self.now, &mut self.pages, id, workload, devices, resume);
        self.settle();
        id
    }

    pub fn workload(&self, process: ProcessId) -> WorkloadId {
        self.pages.0[&process].workload
    }

    pub fn process(&mut self, id: ProcessId) -> &mut Process {
        self.pages.0.get_mut(&id).expect("alive")
    }

    /// Starts or stops submitting.
    pub fn busy(&mut self, id: ProcessId, busy: bool) {
        self.process(id).busy = busy;
        self.breathe();
        self.tick();
    }

    /// Asks for pageable memory; takes it if it is granted at once.
    pub fn grow(&mut self, id: ProcessId, bytes: u64) -> u64 {
        self.grow_on(id, 0, bytes, 0, false)
    }

    pub fn grow_on(
        &mut self,
        id: ProcessId,
        device: DeviceId,
        bytes: u64,
        pinned: u64,
        no_wait: bool,
    ) -> u64 {
        let ticket = self.next;
        self.next += 1;
        self.asked
            .insert((id, ticket), (device, bytes, pinned, no_wait));
        let growth = Growth {
            process: id,
            ticket,
            device,
            bytes,
            pinned,
            no_wait,
        };
        self.arbiter.grow(self.now, &mut self.pages, growth);
        self.settle();
        ticket
    }

    /// The memory of a growth that must be granted at once.
    pub fn take(&mut self, id: ProcessId, bytes: u64) {
        let ticket = self.grow(id, bytes);
        assert_eq!(
            self.answer(id, ticket),
            Some(Outcome::Granted),
            "taking {bytes}"
        );
    }

    pub fn answer(&self, id: ProcessId, ticket: u64) -> Option<Outcome> {
        self.answers.get(&(id, ticket)).cloned()
    }

    pub fn granted(&self, id: ProcessId, ticket: u64) -> bool {
        self.answer(id, ticket) == Some(Outcome::Granted)
    }

    pub fn free(&mut self, id: ProcessId, device: DeviceId, bytes: u64) {
        let share = self
            .process(id)
            .shares
            .get_mut(&device)
            .expect("its device");
        share.used -= bytes;
        share.pinned = share.pinned.min(share.used);
    }

    pub fn overhead(&mut self, id: ProcessId, device: DeviceId, bytes: u64) {
        self.process(id)
            .shares
            .get_mut(&device)
            .expect("its device")
            .overhead = bytes;
        self.arbiter.set_overhead(id, device, bytes);
        self.tick();
    }

    pub fn evict(&mut self, id: ProcessId) -> OperationId {
        let operation = OperationId(self.next);
        self.next += 1;
        let workload = self.workload(id);
        self.arbiter
            .evict(self.now, &mut self.pages, workload, operation);
        self.settle();
        operation
    }

    pub fn restore(&mut self, id: ProcessId) -> OperationId {
        let operation = OperationId(self.next);
        self.next += 1;
        let workload = self.workload(id);
        self.arbiter
            .restore(self.now, &mut self.pages, workload, operation);
        self.settle();
        operation
    }

    /// The process dies; what it held stays away until [`World::give_back`].
    pub fn kill(&mut self, id: ProcessId) {
        let returning = self.arbiter.remove_process(self.now, &mut self.pages, id);
        self.dead.extend(returning);
        self.pages.0.remove(&id);
        self.settle();
    }

    pub fn give_back(&mut self) {
        for (device, number, _) in std::mem::take(&mut self.dead) {
            self.arbiter
                .returned(self.now, &mut self.pages, device, number);
        }
        self.settle();
    }

    pub fn tick(&mut self) {
        self.arbiter.tick(self.now, &mut self.pages);
        self.settle();
    }

    pub fn millis(&mut self, millis: u64) {
        let end = self.now + millis * MILLISECOND;
        while self.now < end {
            let step = (5 * MILLISECOND).min(end - self.now);
            self.now += step;
            for process in self.pages.0.values_mut() {
                if !process.closed {
                    process.ran += step;
                }
            }
            self.breathe();
            self.work();
            self.tick();
        }
    }

    /// Waits until something is so; panics if it is not within `millis`.
    pub fn until(&mut self, millis: u64, what: &str, so: impl Fn(&Self) -> bool) -> u64 {
        let began = self.now;
        while !so(self) {
            assert!(
                self.now - began < millis * MILLISECOND,
                "not within {millis} ms: {what}; waiting: {:?}",
                self.waiting()
            );
            self.millis(5);
        }
        (self.now - began) / MILLISECOND
    }

    pub fn waiting(&self) -> Vec<(String, String)> {
        self.arbiter
            .workload_ids()
            .filter_map(|id| {
                let view = self.arbiter.view(self.now, id)?;
                let name = self.arbiter.spec(id)?.name.clone();
                view.waiting_for.map(|why| (name, why))
            })
            .collect()
    }

    pub fn waits_for(&self, id: ProcessId) -> Option<String> {
        self.arbiter.view(self.now, self.workload(id))?.waiting_for
    }

    pub fn phase(&self, id: ProcessId) -> Phase {
        self.arbiter
            .view(self.now, self.workload(id))
            .expect("there")
            .phase
    }

    pub fn resident(&self, id: ProcessId) -> bool {
        self.phase(id) == Phase::Resident
    }

    pub fn swaps_out(&self, id: ProcessId) -> u64 {
        self.pages.0[&id].swaps_out
    }

    /// Busy processes submit where they can and wait where they cannot.
    fn breathe(&mut self) {
        let now = self.now;
        for process in self.pages.0.values_mut() {
            process.wants = process.busy && process.closed;
            process.in_flight = process.busy && !process.closed;
            if process.in_flight {
                process.last_active = now;
            }
        }
    }

    /// Processes carry out what is due.
    fn work(&mut self) {
        let due: Vec<ProcessId> = self
            .pages
            .0
            .iter()
            .filter(|(_, p)| p.mode != Mode::Stopped)
            .filter(|(_, p)| p.order.is_some_and(|(_, _, at)| at <= self.now))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let process = self.process(id);
            let Some((order, epoch, _)) = process.order.take() else {
                continue;
            };
            let leaves = matches!(order, Order::Drain | Order::Evict) && !process.on_host;
            let report = match (order, process.mode) {
                (_, Mode::NeverIdle) if leaves => Report::Busy,
                (Order::Evict, Mode::Failing) if leaves => Report::Failed,
                (Order::Run, _) => {
                    if process.on_host {
                        process.swaps_in += 1;
                    }
                    process.on_host = false;
                    process.closed = false;
                    Report::Resident
                }
                (Order::Drain, _) => {
                    process.closed = true;
                    Report::Drained
                }
                (Order::Evict, _) => {
                    if !process.on_host {
                        process.swaps_out += 1;
                    }
                    process.closed = true;
                    process.on_host = true;
                    Report::Evicted
                }
            };
            if matches!(report, Report::Busy | Report::Failed) {
                process.closed = false;
            }
            self.breathe();
            self.arbiter
                .report(self.now, &mut self.pages, id, epoch, report);
            self.settle();
        }
    }

    /// Carries out the arbiter's actions and checks everything.
    pub fn settle(&mut self) {
        loop {
            let actions = self.arbiter.take_actions();
            if actions.is_empty() {
                break;
            }
            for action in actions {
                self.apply(action);
            }
        }
        self.check();
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Order {
                process,
                epoch,
                order,
            } => {
                let now = self.now;
                let Some(at) = self.pages.0.get_mut(&process) else {
                    return;
                };
                let takes = match order {
                    Order::Drain => MILLISECOND,
                    Order::Run if !at.on_host => MILLISECOND,
                    _ => at.swap_time,
                };
                // The restore takes its memory from the first moment on.
                if order == Order::Run && at.on_host {
                    at.on_host = false;
                    at.swaps_in += 1;
                }
                at.order = Some((order, epoch, now + takes));
            }
            Action::Grown {
                process,
                ticket,
                outcome,
            } => {
                let (device, bytes, pinned, no_wait) = self.asked[&(process, ticket)];
                if outcome == Outcome::Granted
                    && let Some(share) = self
                        .pages
                        .0
                        .get_mut(&process)
                        .and_then(|p| p.shares.get_mut(&device))
                {
                    // Who does not wait may be told "granted" for what another thread has just been
                    // granted, too; it finds out when it reserves.
                    let fits = share.used + bytes <= share.grant;
                    assert!(fits || no_wait, "granted is granted");
                    if fits {
                        share.used += bytes;
                        share.pinned += pinned;
                    }
                }
                let before = self.answers.insert((process, ticket), outcome);
                assert_eq!(before, None, "one answer per request");
            }
            Action::OperatorDone { operation, result } => {
                assert_eq!(self.operations.insert(operation, result), None);
            }
            Action::Kill { process } => self.killed.push(process),
            Action::Note { workload, note } => self.notes.push((self.now, workload, note)),
        }
    }

    /// The world's own account: what could be on each device at this moment.
    pub fn physical(&self, device: DeviceId) -> u64 {
        let live: u64 = self
            .pages
            .0
            .values()
            .filter_map(|p| p.shares.get(&device).map(|share| (p, share)))
            .map(|(p, share)| {
                let own = if p.on_host { share.pinned } else { share.grant };
                own + share.overhead
            })
            .sum();
        live + self
            .dead
            .iter()
            .filter(|(at, _, _)| *at == device)
            .map(|(_, _, bytes)| bytes)
            .sum::<u64>()
    }

    pub fn check(&self) {
        for (device, room) in self.rooms.iter().enumerate() {
            let physical = self.physical(device);
            let charged = self.arbiter.charged(device);
            assert!(
                physical <= charged,
                "the ledger forgets: {physical} held, {charged} charged"
            );
            if !self.overcommitted {
                assert!(charged <= *room, "{charged} charged of {room}");
            }
        }
        for (id, process) in &self.pages.0 {
            for (device, share) in &process.shares {
                let (grant, overhead) = self.arbiter.account(*id, *device);
                assert_eq!((grant, overhead), (share.grant, share.overhead));
                assert!(share.used <= share.grant, "used within the grant");
            }
        }
        for workload in self.arbiter.workload_ids() {
            let view = self.arbiter.view(self.now, workload).expect("there");
            for share in view.shares {
                if share.overhead < share.quota.limit && !self.overcommitted {
                    assert!(
                        share.grant + share.overhead <= share.quota.limit.max(share.overhead),
                        "limit of {} passed: {share:?}",
                        self.arbiter.spec(workload).expect("there").name
                    );
                }
            }
        }
    }
}
