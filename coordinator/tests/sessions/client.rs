//! A process as the library would be one, as far as the daemon can tell: it speaks the protocol over
//! a real socket and shares real pages; it has no device.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::socket::{ControlMessage, MsgFlags, SockType, UnixAddr, sendmsg};
use spillway_coordinator::api::client::connect_unix;
use spillway_protocol::message::{DeviceInfo, FromProcess, Register, ToProcess};
use spillway_protocol::page::{
    Command, Desired, OBSERVED_MAGIC, Observed, PAGE_BYTES, State, command, reserve, state,
};
use spillway_protocol::{Amount, PROTOCOL_VERSION, names};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A mapped file.
pub struct Map {
    at: NonNull<std::ffi::c_void>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Map {}

impl Map {
    pub fn new(file: &impl AsFd, bytes: usize, prot: ProtFlags) -> nix::Result<Self> {
        let len = NonZeroUsize::new(bytes).expect("not zero");
        // SAFETY: a fresh mapping.
        let at = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self { at, bytes })
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped with this length.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast().as_ptr(), self.bytes) }
    }

    fn page<T>(&self) -> &T {
        assert!(size_of::<T>() <= self.bytes);
        // SAFETY: large enough, and only used for the pages, which are atomics alone.
        unsafe { self.at.cast().as_ref() }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        let _ = unsafe { munmap(self.at, self.bytes) };
    }
}

/// The device that `--fake-device` number `index` is.
pub fn device(index: u8) -> DeviceInfo {
    let mut uuid = [0; 16];
    uuid[15] = index;
    DeviceInfo {
        uuid,
        total_bytes: 4 * GIB,
    }
}

pub fn register(workload: &str, request: u64, limit: u64) -> Register {
    Register {
        version: PROTOCOL_VERSION,
        workload: workload.to_owned(),
        request: (request > 0).then_some(Amount::Bytes(request)),
        limit: (limit > 0).then_some(Amount::Bytes(limit)),
        priority: 0,
        swap: true,
        resumes: 0,
        segments: 0,
        grants: vec![0],
        host_grant: 0,
        epoch: 0,
        devices: vec![device(0)],
    }
}

/// A bare session socket.
pub struct Wire {
    pub socket: OwnedFd,
}

impl Wire {
    pub fn connect(run_dir: &Path) -> Self {
        let end = Instant::now() + PATIENCE;
        loop {
            match connect_unix(&names::session_socket(run_dir), SockType::SeqPacket) {
                Ok(socket) => return Self { socket },
                Err(error) => assert!(Instant::now() < end, "no session: {error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn send_raw(&self, bytes: &[u8], files: &[RawFd]) -> nix::Result<usize> {
        let rights = [ControlMessage::ScmRights(files)];
        let control: &[ControlMessage<'_>] = if files.is_empty() { &[] } else { &rights };
        sendmsg::<UnixAddr>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
    }

    pub fn send(&self, message: &FromProcess) {
        self.send_raw(&message.encode(), &[]).expect("sent");
    }

    /// The next message; `None`: the daemon has closed the session, or said nothing in time.
    pub fn receive(&self, patience: Duration) -> Option<(ToProcess, Vec<OwnedFd>)> {
        let end = Instant::now() + patience;
        loop {
            match spillway_coordinator::daemon::testing::read(self.socket.as_fd()) {
                Ok(Some((bytes, files))) => {
                    let message = ToProcess::decode(&bytes).expect("the daemon speaks well");
                    return Some((message, files));
                }
                Ok(None) => {}
                Err(_) => return None,
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::from(millis.max(1)));
        }
    }

    /// The text of a refusal, after which the session is closed.
    pub fn refusal(&self) -> String {
        let text = match self.receive(PATIENCE) {
            Some((ToProcess::Refused { text }, _)) => text,
            other => panic!("not refused but {other:?}"),
        };
        assert!(self.receive(PATIENCE).is_none(), "closed after a refusal");
        text
    }
}

/// Memory that the process got.
pub struct Segment {
    pub id: u64,
    pub bytes: u64,
    pub file: OwnedFd,
}

/// A registered process.
pub struct Process {
    pub wire: Wire,
    pub instance: u64,
    pub workload: String,
    pub desired_file: OwnedFd,
    pub observed_file: OwnedFd,
    desired: Map,
    observed: Map,
    pub segments: Vec<Segment>,
    register: Register,
    waiting: VecDeque<(ToProcess, Vec<OwnedFd>)>,
    ticket: u64,
}

impl Process {
    pub fn start(run_dir: &Path, register: Register) -> Self {
        Self::try_start(run_dir, register).expect("registered")
    }

    /// Registers, or returns the text of the refusal.
    pub fn try_start(run_dir: &Path, register: Register) -> Result<Self, String> {
        let wire = Wire::connect(run_dir);
        wire.send(&FromProcess::Register(register.clone()));
        Self::welcomed(wire, register, Vec::new())
    }

    fn welcomed(wire: Wire, register: Register, segments: Vec<Segment>) -> Result<Self, String> {
        let (instance, workload, mut files) = match wire.receive(PATIENCE) {
            Some((
                ToProcess::Welcome {
                    version,
                    instance,
                    workload,
                },
                files,
            )) => {
                assert_eq!(version, register.version);
                (instance, workload, files)
            }
            Some((ToProcess::Refused { text }, _)) => return Err(text),
            other => panic!("neither welcome nor refused: {other:?}"),
        };
        assert_eq!(files.len(), 2, "two pages");
        let observed_file = files.pop().expect("observed");
        let desired_file = files.pop().expect("desired");
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let desired = Map::new(&desired_file, PAGE_BYTES, ProtFlags::PROT_READ).expect("maps");
        let observed = Map::new(&observed_file, PAGE_BYTES, both).expect("maps");
        let process = Self {
            wire,
            instance,
            workload,
            desired_file,
            observed_file,
            desired,
            observed,
            segments,
            register,
            waiting: VecDeque::new(),
            ticket: 1,
        };
        assert_eq!(process.desired().instance.load(SeqCst), instance);
        process.observed().magic.store(OBSERVED_MAGIC, SeqCst);
        let version = u64::from(process.register.version);
        process.observed().version.store(version, SeqCst);
        if process.register.resumes == 0 {
            let epoch = process.command().epoch;
            process.report(epoch, state::RESIDENT);
        }
        Ok(process)
    }

    /// Comes back to the next daemon with everything that it holds.
    pub fn resume(self, run_dir: &Path) -> Self {
        let mut register = self.register.clone();
        register.resumes = self.instance;
        register.segments = u32::try_from(self.segments.len()).expect("few");
        register.grants = vec![self.grant()];
        register.host_grant = self.desired().host_grant.load(SeqCst);
        register.epoch = self.command().epoch;
        register.workload = self.workload.clone();
        let wire = Wire::connect(run_dir);
        let packet = FromProcess::Register(register.clone()).encode();
        wire.send_raw(&packet, &[self.observed_file.as_raw_fd()])
            .expect("sent");
        for segment in &self.segments {
            let adopt = FromProcess::Adopt {
                id: segment.id,
                bytes: segment.bytes,
            };
            wire.send_raw(&adopt.encode(), &[segment.file.as_raw_fd()])
                .expect("sent");
        }
        let process = Self::welcomed(wire, register, self.segments).expect("adopted");
        process.wire.send(&FromProcess::Wake);
        process
    }

    pub fn desired(&self) -> &Desired {
        self.desired.page()
    }

    pub fn observed(&self) -> &Observed {
        self.observed.page()
    }

    pub fn command(&self) -> Command {
        Command::unpack(self.desired().command.load(SeqCst))
    }

    pub fn grant(&self) -> u64 {
        self.desired().devices[0].grant.load(SeqCst)
    }

    fn report(&self, epoch: u64, code: u8) {
        self.observed()
            .state
            .store(State { epoch, code }.pack(), SeqCst);
        self.wire.send(&FromProcess::Wake);
    }

    pub fn next_ticket(&mut self) -> u64 {
        self.ticket += 1;
        self.ticket
    }

    /// The answer for which `wanted` says yes; others are kept.
    pub fn answer<T>(&mut self, wanted: impl Fn(&ToProcess) -> Option<T>) -> (T, Vec<OwnedFd>) {
        let kept = std::mem::take(&mut self.waiting);
        let mut found = None;
        for (message, files) in kept {
            match wanted(&message) {
                Some(value) if found.is_none() => found = Some((value, files)),
                _ => self.waiting.push_back((message, files)),
            }
        }
        if let Some(found) = found {
            return found;
        }
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let (message, files) = self.wire.receive(left).expect("an answer in time");
            if let Some(value) = wanted(&message) {
                return (value, files);
            }
            self.waiting.push_back((message, files));
        }
    }

    pub fn ask_grow(&mut self, bytes: u64, pageable: u64) -> u64 {
        let ticket = self.next_ticket();
        self.wire.send(&FromProcess::Grow {
            ticket,
            device: 0,
            bytes,
            pageable,
            no_wait: 0,
        });
        ticket
    }

    pub fn grown(&mut self, wanted: u64) -> (u32, bool, String) {
        let (reply, _) = self.answer(|message| match message {
            ToProcess::GrowReply {
                ticket,
                outcome,
                backed,
                text,
            } if *ticket == wanted => Some((*outcome, *backed != 0, text.clone())),
            _ => None,
        });
        reply
    }

    /// Reserves as the library does: under the grant if it fits, else after asking.
    pub fn allocate(&mut self, bytes: u64) -> (u32, bool, String) {
        let mut last = (0, true, String::new());
        for _ in 0..10 {
            if self.take(bytes) {
                return last;
            }
            let ticket = self.ask_grow(bytes, bytes);
            last = self.grown(ticket);
            if last.0 != 0 {
                return last;
            }
        }
        panic!("granted ten times and never got it");
    }

    pub fn take(&self, bytes: u64) -> bool {
        let device = &self.observed().devices[0];
        let fits = reserve(&device.used, bytes, || &self.desired().devices[0].grant);
        if fits {
            let resident = self.command().code == command::RUN;
            if resident {
                device.resident.fetch_add(bytes, SeqCst);
            } else {
                self.observed().host_bytes.fetch_add(bytes, SeqCst);
            }
            self.observed().pageable.fetch_add(bytes, SeqCst);
        }
        fits
    }

    pub fn release(&self, bytes: u64) {
        let device = &self.observed().devices[0];
        device.resident.fetch_sub(bytes, SeqCst);
        self.observed().pageable.fetch_sub(bytes, SeqCst);
        device.used.fetch_sub(bytes, SeqCst);
    }

    pub fn active(&self, active: bool) {
        let now = spillway_coordinator::daemon::testing::now();
        self.observed().in_flight.store(u64::from(active), SeqCst);
        if active {
            self.observed().last_active_ns.store(now, SeqCst);
        }
    }

    pub fn want(&self, wants: bool) {
        self.observed().wants.store(u64::from(wants), SeqCst);
        self.wire.send(&FromProcess::Wake);
    }

    /// Waits for the next command and returns it.
    pub fn told(&mut self, code: u8) -> Command {
        let end = Instant::now() + PATIENCE;
        loop {
            let command = self.command();
            if command.code == code {
                return command;
            }
            assert!(Instant::now() < end, "not told {code}, but {command:?}");
            if let Some(message) = self.wire.receive(Duration::from_millis(20)) {
                self.waiting.push_back(message);
            }
        }
    }

    /// Carries an eviction out.
    pub fn leave(&mut self) {
        let command = self.told(command::EVICT);
        self.report(command.epoch, state::EVICTING);
        let observed = self.observed();
        let bytes = observed.devices[0].used.load(SeqCst);
        observed.devices[0].resident.store(0, SeqCst);
        observed.host_bytes.store(bytes, SeqCst);
        observed.bytes_out.fetch_add(bytes, SeqCst);
        observed.swaps_out.fetch_add(1, SeqCst);
        self.report(command.epoch, state::EVICTED);
    }

    /// Carries a restore out.
    pub fn come_back(&mut self) {
        let command = self.told(command::RUN);
        self.report(command.epoch, state::RESTORING);
        let observed = self.observed();
        let bytes = observed.devices[0].used.load(SeqCst);
        observed.devices[0].resident.store(bytes, SeqCst);
        observed.host_bytes.store(0, SeqCst);
        observed.bytes_in.fetch_add(bytes, SeqCst);
        observed.swaps_in.fetch_add(1, SeqCst);
        observed.wants.store(0, SeqCst);
        self.report(command.epoch, state::RESIDENT);
    }

    pub fn reply(&mut self, code: u8, said: u8) {
        let command = self.told(code);
        self.report(command.epoch, said);
    }

    /// A segment, or the text of the refusal.
    pub fn segment(&mut self, bytes: u64) -> Result<(), String> {
        let wanted = self.next_ticket();
        self.wire.send(&FromProcess::Segment {
            ticket: wanted,
            bytes,
        });
        let ((id, bytes, text), mut files) = self.answer(|message| match message {
            ToProcess::SegmentReply {
                ticket,
                id,
                bytes,
                text,
            } if *ticket == wanted => Some((*id, *bytes, text.clone())),
            _ => None,
        });
        match files.pop() {
            Some(file) if bytes > 0 => {
                self.segments.push(Segment { id, bytes, file });
                Ok(())
            }
            _ => Err(text),
        }
    }

    pub fn refresh(&mut self, measure: bool) {
        let wanted = self.next_ticket();
        self.wire.send(&FromProcess::Refresh {
            ticket: wanted,
            measure: u32::from(measure),
        });
        self.answer(|message| match message {
            ToProcess::RefreshReply { ticket } if *ticket == wanted => Some(()),
            _ => None,
        });
    }

    pub fn hold(&self, device: u32, bytes: u64, key: u64) {
        self.wire.send(&FromProcess::Hold { device, bytes, key });
    }

    pub fn unhold(&self, device: u32, bytes: u64, key: u64) {
        self.wire.send(&FromProcess::Unhold { device, bytes, key });
    }

    pub fn claim(&mut self, device: u32, bytes: u64, key: u64) -> bool {
        let ticket = self.next_ticket();
        self.wire.send(&FromProcess::Claim {
            ticket,
            device,
            bytes,
            key,
        });
        let wanted = ticket;
        let (covered, _) = self.answer(|message| match message {
            ToProcess::ClaimReply { ticket, covered } if *ticket == wanted => Some(*covered != 0),
            _ => None,
        });
        covered
    }

    /// The daemon has closed this session.
    pub fn is_closed(&self) -> bool {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if spillway_coordinator::daemon::testing::read(self.wire.socket.as_fd()).is_err() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

/// Where a socket's path is too long for an address, tests fail in ways that say little.
pub fn short(dir: &Path) -> PathBuf {
    assert!(dir.as_os_str().len() < 80, "{} is too long", dir.display());
    dir.to_path_buf()
}
