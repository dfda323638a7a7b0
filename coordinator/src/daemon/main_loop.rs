//! The main loop: waits for news, passes it on, and does what is due. One thread; nothing in it
//! blocks but the wait itself.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::channel;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{SockFlag, accept4};
use nix::time::{ClockId, clock_gettime};
use spillway_arbiter::{Arbiter, Config, MILLISECOND, Nanos, OperationId, ProcessId, SECOND};

use super::audit::Auditor;
use super::claims::Claims;
use super::events::Events;
use super::gpus::{FakeGpus, Gpus};
use super::handle::{Handle, Request, Waker};
use super::identity::Identity;
use super::nvml::Nvml;
use super::options::{OnStuck, Options, default_reserve};
use super::pages::PageTable;
use super::pool::Pool;
use super::publish::Publisher;
use super::rundir::{RunDir, default_dir};
use super::sampler::Sampler;
use super::session::{Session, Stage};
use super::socket::{self, Read};
use super::state::{Daemon, DeviceState, Operation};

/// While somebody waits or moves, pages are looked at this often.
const BUSY_PERIOD: Nanos = 10 * MILLISECOND;
/// Else this often.
const QUIET_PERIOD: Nanos = 250 * MILLISECOND;
/// Packets of one session that are read before others get their turn.
const PACKETS_PER_ROUND: usize = 32;
/// A connection that has not registered for this long is closed.
const REGISTER_WITHIN: Nanos = 10 * SECOND;
/// Connections of all users together.
const MAX_SESSIONS: usize = 8192;

const TOKEN_LISTENER: u64 = 0;
const TOKEN_WAKER: u64 = 1;
const TOKEN_SIGNAL: u64 = 2;
const TOKEN_FIRST_SESSION: u64 = 16;

/// `CLOCK_MONOTONIC`, in nanoseconds: the clock that processes write into their pages, too.
#[must_use]
pub fn now() -> Nanos {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        let (seconds, nanos) = (time.tv_sec(), time.tv_nsec());
        u64::try_from(seconds).unwrap_or(0) * SECOND + u64::try_from(nanos).unwrap_or(0)
    })
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// Text for the operator: what is missing and what to do.
pub fn run(options: Options) -> Result<()> {
    let signals = block_signals()?;
    raise_descriptor_limit();
    let run_dir = RunDir::take(&options.run_dir.clone().unwrap_or_else(default_dir))?;
    let gpus: Box<dyn Gpus> = if options.fake_device.is_empty() {
        Box::new(Nvml::open().map_err(anyhow::Error::msg)?)
    } else {
        Box::new(FakeGpus(options.fake_device.clone()))
    };
    let api = run_dir.api_listener(options.api_group.as_deref())?;
    let (sender, requests) = channel();
    let waker = Waker::new()?;
    // Never dropped, not even by a panic: dropping it would empty the host memory of everybody who is
    // swapped out. The kernel closes our side, and the next coordinator adopts what the owners hold.
    let mut daemon = ManuallyDrop::new(Daemon::new(
        options,
        &run_dir,
        gpus,
        requests,
        waker.clone(),
    )?);
    daemon.watch(&signals)?;
    let mut publisher = Publisher::new(run_dir.path(), daemon.instance)
        .inspect_err(|text| tracing::warn!("{text}"))
        .ok();
    let control = Arc::new(Handle::new(sender, waker));
    std::thread::Builder::new()
        .name("api".to_owned())
        .spawn(move || {
            if let Err(error) = crate::api::serve(api, control) {
                tracing::error!(%error, "api.sock is no longer served");
            }
        })?;
    let result = daemon.serve(&signals, publisher.as_mut());
    run_dir.clear();
    result
}

fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok(SignalFd::with_flags(&set, flags)?)
}

/// Every session takes a handful of descriptors.
fn raise_descriptor_limit() {
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most.min(1 << 20), most);
    }
}

impl Daemon {
    fn new(
        options: Options,
        run_dir: &RunDir,
        gpus: Box<dyn Gpus>,
        requests: std::sync::mpsc::Receiver<Request>,
        waker: Waker,
    ) -> Result<Self> {
        let devices = devices(&options, gpus.as_ref())?;
        let rooms: Vec<u64> = devices
            .iter()
            .map(|device| device.capacity - device.reserve)
            .collect();
        let in_use = (0..devices.len()).any(|index| {
            gpus.measure(index)
                .processes
                .is_none_or(|all| !all.is_empty())
        });
        let nanos = |duration: std::time::Duration| {
            u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
        };
        let config = Config {
            turn: nanos(options.turn),
            idle_after: nanos(options.idle_after),
            growth_wait: nanos(options.growth_wait),
            drain_deadline: nanos(options.drain_deadline),
            oversubscription: options.oversubscription,
            kill_stuck: options.on_stuck == OnStuck::Kill,
            ..Config::default()
        };
        let pool = Pool::new(options.pool);
        let workshop = pool.start(waker.clone())?;
        let sampler = Sampler::start(gpus, waker.clone())?;
        let listener = run_dir.session_listener()?;
        let started = now();
        let window = nanos(options.adoption_window);
        let mut daemon = Self {
            run_dir: run_dir.path().to_path_buf(),
            instance: random()?,
            started,
            devices,
            arbiter: Arbiter::new(config, &rooms),
            pages: PageTable::default(),
            sessions: std::collections::BTreeMap::new(),
            next_session: TOKEN_FIRST_SESSION,
            claims: Claims::default(),
            workloads: std::collections::BTreeMap::new(),
            pool,
            workshop,
            sampler,
            events: Events::default(),
            operations: std::collections::BTreeMap::new(),
            returning: Vec::new(),
            refreshing: Vec::new(),
            sample_again: Nanos::MAX,
            overheads: Default::default(),
            refused: std::collections::BTreeMap::new(),
            auditor: Auditor::start(waker.clone())?,
            adopting_until: (in_use && window > 0).then(|| started + window),
            news: std::collections::BTreeSet::new(),
            counted: started,
            requests,
            waker,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            listener,
            accept_again: 0,
            options,
        };
        if daemon.adopting_until.is_some() {
            daemon.arbiter.set_frozen(started, &mut daemon.pages, true);
        }
        daemon.announce();
        Ok(daemon)
    }

    fn announce(&mut self) {
        let text = format!(
            "spillwayd {} serves {} device(s) at {}",
            env!("CARGO_PKG_VERSION"),
            self.devices.len(),
            self.run_dir.display()
        );
        self.event(
            "coordinator_started",
            None,
            text,
            &[("pid", std::process::id().into())],
        );
        for index in 0..self.devices.len() {
            let device = &self.devices[index];
            tracing::info!(
                uuid = super::gpus::format_uuid(&device.gpu.uuid),
                capacity = spillway_protocol::format_bytes(device.capacity),
                reserve = spillway_protocol::format_bytes(device.reserve),
                "device {index}: {}",
                device.gpu.name
            );
        }
    }

    fn watch(&self, signals: &SignalFd) -> Result<()> {
        let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
        self.epoll.add(&self.listener, readable(TOKEN_LISTENER))?;
        self.epoll.add(&self.waker, readable(TOKEN_WAKER))?;
        self.epoll.add(signals, readable(TOKEN_SIGNAL))?;
        Ok(())
    }

    fn serve(&mut self, signals: &SignalFd, mut publisher: Option<&mut Publisher>) -> Result<()> {
        let mut events = vec![EpollEvent::empty(); 256];
        loop {
            let timeout = self.timeout();
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => bail!("epoll: {error}"),
            };
            self.claims.begin_pass();
            self.claims.backlog = count == events.len();
            for event in &events[..count] {
                match event.data() {
                    TOKEN_LISTENER => self.accept(),
                    TOKEN_WAKER => self.waker.clear(),
                    TOKEN_SIGNAL => {
                        if let Ok(Some(signal)) = signals.read_signal() {
                            tracing::info!(signal = signal.ssi_signo, "ends; processes run on");
                            return Ok(());
                        }
                    }
                    // A session's socket and its pidfd have numbers of their own.
                    token => self.session_event(token, event.events()),
                }
            }
            self.take_requests();
            while let Some(made) = self.workshop.made() {
                self.deliver(made);
            }
            self.auditor.listen();
            while let Some(sample) = self.sampler.sample() {
                self.sampled(&sample);
            }
            self.answer_claims();
            self.round();
            if let Some(publisher) = publisher.as_deref_mut() {
                self.publish(publisher);
            }
        }
    }

    fn publish(&mut self, publisher: &mut Publisher) {
        let time = now();
        if publisher.is_due(time, self.arbiter.is_busy(), &self.events) {
            let status = self.status();
            publisher.publish(time, &status, &self.events);
        }
    }

    /// What is done after every wait.
    fn round(&mut self) {
        let time = now();
        if self.adopting_until.is_some_and(|until| time >= until) {
            self.adopting_until = None;
            self.arbiter.set_frozen(time, &mut self.pages, false);
            self.register_held();
        }
        if time >= self.sample_again {
            self.sample_again = Nanos::MAX;
            self.ask_sample();
        }
        // While nothing is under way only those who sent something have news.
        let look: Vec<ProcessId> = if self.arbiter.is_busy() {
            self.pages.0.keys().copied().collect()
        } else {
            std::mem::take(&mut self.news).into_iter().collect()
        };
        self.news.clear();
        for id in look {
            self.look(id);
        }
        self.count_activity();
        self.arbiter.tick(time, &mut self.pages);
        self.apply();
        self.tidy(time);
    }

    /// Sends what waits, closes what has ended. Closing may free what others wait for.
    fn tidy(&mut self, time: Nanos) {
        loop {
            let mut ended = Vec::new();
            for (id, session) in &mut self.sessions {
                session.flush();
                let late = matches!(session.stage, Stage::New | Stage::Adopting(_))
                    && time.saturating_sub(session.opened) > REGISTER_WITHIN;
                if late {
                    session.refuse("registers too slowly");
                }
                if session.end.is_some() {
                    ended.push(*id);
                    continue;
                }
                let wants = session.has_queue();
                if wants != session.watches_write {
                    session.watches_write = wants;
                    let mut interest = EpollFlags::EPOLLIN;
                    interest.set(EpollFlags::EPOLLOUT, wants);
                    let mut event = EpollEvent::new(interest, id.0);
                    let _ = self.epoll.modify(session.as_fd(), &mut event);
                }
            }
            if ended.is_empty() {
                return;
            }
            for id in ended {
                self.close(id);
            }
            self.apply();
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let time = now();
        if self.claims.in_a_hurry() && self.adopting_until.is_none() {
            return EpollTimeout::ZERO;
        }
        let period = if self.arbiter.is_busy() || !self.returning.is_empty() {
            BUSY_PERIOD
        } else {
            QUIET_PERIOD
        };
        let mut at = (time + period)
            .min(self.arbiter.wake_at())
            .min(self.sample_again);
        if let Some(until) = self.adopting_until {
            at = at.min(until);
        }
        // Rounded up: waking too early would only lead to another wait.
        let millis = at.saturating_sub(time).div_ceil(MILLISECOND);
        EpollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
    }

    fn accept(&mut self) {
        for _ in 0..PACKETS_PER_ROUND {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let raw = match accept4(self.listener.as_raw_fd(), flags) {
                Ok(raw) => raw,
                Err(Errno::EAGAIN) => return,
                Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                    self.accept_later();
                    return;
                }
                // The peer has gone again.
                Err(_) => continue,
            };
            // SAFETY: the kernel has just made this descriptor for us.
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            self.welcome_connection(socket);
        }
    }

    /// No descriptors left: a short rest instead of spinning on the same connection. It is the one
    /// place where the main loop waits for anything but news.
    fn accept_later(&mut self) {
        let time = now();
        if time >= self.accept_again {
            let text =
                "no descriptors left for further sessions: raise spillwayd's limit of open files";
            self.event("busy", None, text.to_owned(), &[]);
        }
        self.accept_again = time + SECOND;
        std::thread::sleep(std::time::Duration::from_millis(10));
    }

    fn welcome_connection(&mut self, socket: OwnedFd) {
        if self.sessions.len() >= MAX_SESSIONS {
            return;
        }
        let identity = match Identity::of_peer(socket.as_fd()) {
            Ok(identity) => identity,
            Err(text) => {
                let message = spillway_protocol::message::ToProcess::Refused { text: text.clone() };
                let _ = socket::write(socket.as_fd(), &message.encode(), &[]);
                self.event("refused", None, text, &[]);
                return;
            }
        };
        // Two tokens: the socket's, and one more for the pidfd.
        let token = self.next_session;
        self.next_session += 2;
        let id = ProcessId(token);
        let readable = |token| EpollEvent::new(EpollFlags::EPOLLIN, token);
        if self.epoll.add(&socket, readable(token)).is_err() {
            return;
        }
        if let Some(pidfd) = &identity.pidfd {
            let _ = self.epoll.add(pidfd, readable(token + 1));
        }
        self.sessions
            .insert(id, Session::new(socket, identity, now()));
    }

    fn session_event(&mut self, token: u64, flags: EpollFlags) {
        let is_pidfd = !(token - TOKEN_FIRST_SESSION).is_multiple_of(2);
        let id = ProcessId(token - u64::from(is_pidfd));
        if is_pidfd {
            // Children that inherited the socket may keep it open for ever; the process has ended.
            if let Some(session) = self.sessions.get_mut(&id) {
                session.end("ended");
            }
            return;
        }
        if flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            self.read_session(id);
        }
    }

    fn read_session(&mut self, id: ProcessId) {
        for _ in 0..PACKETS_PER_ROUND {
            let Some(session) = self.sessions.get_mut(&id).filter(|s| s.end.is_none()) else {
                return;
            };
            let packet = match socket::read(session.as_fd()) {
                Ok(Read::Packet(packet)) => packet,
                Ok(Read::Nothing) => return,
                Ok(Read::Closed) | Err(_) => {
                    session.end("closed its socket");
                    return;
                }
            };
            match &session.stage {
                Stage::New | Stage::Adopting(_) if packet.cut => {
                    self.refuse(id, "malformed", "the message is longer than any can be");
                }
                Stage::New => self.register_packet(id, packet),
                Stage::Adopting(_) => self.adopt_packet(id, packet),
                Stage::Held(_) => self.refuse(id, "malformed", "wait for Welcome first"),
                Stage::Live(_) => self.serve_packet(id, packet),
            }
        }
        self.claims.backlog = true;
    }

    fn take_requests(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            match request {
                Request::Metrics(reply) => {
                    let metrics = self.metrics();
                    let _ = reply.try_send(metrics);
                }
                Request::Subscribe(reply) => {
                    let _ = reply.try_send(self.events.subscribe());
                }
                Request::Operate {
                    operation,
                    name,
                    evict,
                    reply,
                } => self.operate(
                    operation,
                    Operation {
                        name,
                        evict,
                        began: now(),
                        before: 0,
                        reply,
                    },
                ),
                Request::Forget(operation) => {
                    self.operations.remove(&OperationId(operation));
                    self.arbiter.forget(OperationId(operation));
                }
            }
        }
    }
}

fn devices(options: &Options, gpus: &dyn Gpus) -> Result<Vec<DeviceState>> {
    let found = gpus.devices();
    if found.is_empty() {
        bail!("NVML shows no device: is a GPU visible here (nvidia-smi -L)?");
    }
    found
        .into_iter()
        .map(|gpu| {
            let capacity = options
                .capacity
                .map_or(gpu.total, |amount| amount.of(gpu.total));
            if capacity > gpu.total {
                bail!(
                    "--capacity is {}, but {} has only {}",
                    spillway_protocol::format_bytes(capacity),
                    gpu.name,
                    spillway_protocol::format_bytes(gpu.total)
                );
            }
            let reserve = options
                .reserve
                .map_or_else(|| default_reserve(capacity), |size| size.of(capacity));
            if reserve >= capacity {
                bail!(
                    "--reserve leaves nothing of {} on {}",
                    spillway_protocol::format_bytes(capacity),
                    gpu.name
                );
            }
            Ok(DeviceState {
                gpu,
                capacity,
                reserve,
                used: None,
                foreign: [0; 2],
                charged_before: 0,
                active: 0,
            })
        })
        .collect()
}

fn random() -> Result<u64> {
    let mut bytes = [0u8; 8];
    let mut file = std::fs::File::open("/dev/urandom").context("cannot open /dev/urandom")?;
    std::io::Read::read_exact(&mut file, &mut bytes)?;
    // 0 means "resumes nothing".
    Ok(u64::from_le_bytes(bytes).max(1))
}
