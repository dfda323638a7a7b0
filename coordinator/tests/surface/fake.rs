//! A coordinator of fixed answers behind the real server, and a session socket that refuses.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, recv,
    send, socket,
};
use spillway_coordinator::api::{Limits, serve_with};
use spillway_coordinator::model::{
    Control, ControlError, Device, DeviceShare, Done, Event, Metrics, Pool, Status, Workload,
    WorkloadMetrics,
};
use spillway_protocol::message::{FromProcess, ToProcess};

/// Answers by name: `busy`, `slow`, `ending`, `panics` do as they are called, `a/b:1` is evicted.
pub struct Fake {
    status: Mutex<Status>,
    kept: Mutex<Vec<Event>>,
    live: Mutex<Vec<SyncSender<Event>>>,
}

pub fn event(n: u64, text: &str) -> Event {
    Event {
        time_unix: 1.5,
        workload: Some("a/b:1".into()),
        kind: "note".into(),
        text: text.into(),
        numbers: BTreeMap::from([("n".to_owned(), n.into())]),
    }
}

pub fn workload(name: &str) -> Workload {
    Workload {
        name: name.into(),
        state: "resident".into(),
        swap: "auto".into(),
        devices: vec![DeviceShare {
            uuid: "GPU-1".into(),
            request_bytes: 1 << 29,
            limit_bytes: 1 << 30,
            ..DeviceShare::default()
        }],
        ..Workload::default()
    }
}

impl Fake {
    pub fn new() -> Arc<Self> {
        let status = Status {
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: spillway_protocol::PROTOCOL_VERSION,
            instance: "ab12".into(),
            pid: std::process::id(),
            run_dir: "/somewhere".into(),
            devices: vec![Device {
                uuid: "GPU-1".into(),
                name: "Test GPU".into(),
                capacity_bytes: 4 << 30,
                room_bytes: 3 << 30,
                nvml_used_bytes: Some(0),
                ..Device::default()
            }],
            pool: Pool {
                capacity_bytes: 1 << 30,
                ..Pool::default()
            },
            workloads: vec![workload("a/b:1"), workload("busy")],
            ..Status::default()
        };
        Arc::new(Self {
            status: Mutex::new(status),
            kept: Mutex::new(vec![event(1, "first"), event(2, "second")]),
            live: Mutex::default(),
        })
    }

    pub fn change(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().expect("not poisoned"));
    }

    /// Sends to all subscribers as the contract says: never waits, drops who does not keep up.
    /// Returns how many are left.
    pub fn publish(&self, event: &Event) -> usize {
        let mut live = self.live.lock().expect("not poisoned");
        live.retain(|sender| match sender.try_send(event.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        });
        live.len()
    }

    pub fn subscribers(&self) -> usize {
        self.live.lock().expect("not poisoned").len()
    }

    fn swap(&self, name: &str, timeout: Duration) -> Result<Done, ControlError> {
        match name {
            "a/b:1" => Ok(Done {
                name: name.into(),
                bytes: 1 << 30,
                seconds: 0.5,
            }),
            "busy" => Err(ControlError::Conflict("busy: a kernel runs".into())),
            "slow" => {
                std::thread::sleep(timeout);
                Err(ControlError::Timeout(format!("not done in {timeout:?}")))
            }
            "ending" => Err(ControlError::Unavailable("spillwayd is ending".into())),
            "panics" => panic!("on purpose"),
            other => Err(ControlError::NotFound(format!("no workload {other}"))),
        }
    }
}

impl Control for Fake {
    fn status(&self) -> Status {
        self.status.lock().expect("not poisoned").clone()
    }

    fn metrics(&self) -> Metrics {
        Metrics {
            status: self.status(),
            workloads: BTreeMap::from([("a/b:1".to_owned(), WorkloadMetrics::default())]),
            ..Metrics::default()
        }
    }

    fn subscribe(&self) -> (Vec<Event>, Receiver<Event>) {
        let (sender, receiver) = sync_channel(64);
        self.live.lock().expect("not poisoned").push(sender);
        (self.kept.lock().expect("not poisoned").clone(), receiver)
    }

    fn evict(&self, name: &str, timeout: Duration) -> Result<Done, ControlError> {
        self.swap(name, timeout)
    }

    fn restore(&self, name: &str, timeout: Duration) -> Result<Done, ControlError> {
        self.swap(name, timeout)
    }
}

/// A run directory in which the fake lives; removed at the end.
pub struct Node {
    dir: tempfile::TempDir,
    pub fake: Arc<Fake>,
}

impl Node {
    pub fn start() -> Self {
        Self::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Self {
        let node = Self {
            dir: tempfile::tempdir().expect("a temporary directory"),
            fake: Fake::new(),
        };
        let listener = UnixListener::bind(node.api()).expect("bind");
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(node.api(), mode).expect("chmod");
        let control: Arc<dyn Control> = node.fake.clone();
        // The thread ends with the test program; the listener has no other end.
        std::thread::spawn(move || serve_with(&listener, &control, limits));
        node
    }

    /// Adds a session socket that refuses whatever does not register, as the coordinator's does.
    pub fn with_session(self) -> Self {
        std::fs::create_dir(self.path().join("session")).expect("mkdir");
        let path = self.path().join("session/session.sock");
        refusing_session(&path);
        let mode = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(path, mode).expect("chmod");
        self
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn api(&self) -> PathBuf {
        self.path().join("api.sock")
    }
}

fn refusing_session(path: &Path) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd =
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("socket");
    bind(fd.as_raw_fd(), &UnixAddr::new(path).expect("short path")).expect("bind");
    listen(&fd, Backlog::new(8).expect("in range")).expect("listen");
    std::thread::spawn(move || {
        while let Ok(client) = accept(fd.as_raw_fd()) {
            // SAFETY: `accept` just returned this descriptor, and nothing else owns it.
            let client: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(client) };
            let mut packet = [0u8; 8192];
            let bytes = recv(client.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap_or(0);
            assert!(FromProcess::decode(&packet[..bytes]).is_ok());
            let refused = ToProcess::Refused {
                text: "register first".into(),
            };
            let _ = send(
                client.as_raw_fd(),
                &refused.encode(),
                MsgFlags::MSG_NOSIGNAL,
            );
        }
    });
}
