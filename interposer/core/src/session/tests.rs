//! The session against a coordinator that a test plays.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind,
    listen, sendmsg, socket,
};
use spillway_protocol::message::DeviceInfo;
use spillway_protocol::page::{DESIRED_MAGIC, PAGE_BYTES};
use spillway_protocol::{MAX_MESSAGE, PROTOCOL_VERSION, PROTOCOL_VERSION_CLAIMS};

use super::*;

/// Plays the coordinator.
struct Host {
    dir: PathBuf,
    listener: OwnedFd,
}

/// One process at the coordinator's.
struct Peer(OwnedFd);

impl Host {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("spw-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        let listener = Self::listen(&dir);
        Self { dir, listener }
    }

    fn path(&self) -> PathBuf {
        self.dir.join("s")
    }

    fn listen(dir: &std::path::Path) -> OwnedFd {
        let path = dir.join("s");
        let _ = std::fs::remove_file(&path);
        let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
        let listener = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
        let address = UnixAddr::new(&path).expect("short");
        bind(listener.as_raw_fd(), &address).expect("bound");
        listen(&listener, Backlog::new(4).expect("few")).expect("listens");
        listener
    }

    /// Takes the next process in.
    fn welcome(&self, version: u32) -> Peer {
        let raw = accept(self.listener.as_raw_fd()).expect("somebody connects");
        // SAFETY: the kernel has just made this descriptor for us.
        let peer = Peer(unsafe { OwnedFd::from_raw_fd(raw) });
        assert!(matches!(peer.read(), Some(FromProcess::Register(_))));
        let page = |magic: u64| {
            let file = memfd_create("page", MFdFlags::MFD_CLOEXEC).expect("a memfd");
            let mut bytes = vec![0; PAGE_BYTES];
            bytes[..8].copy_from_slice(&magic.to_le_bytes());
            nix::unistd::write(&file, &bytes).expect("written");
            file
        };
        let (desired, observed) = (page(DESIRED_MAGIC), page(0));
        let welcome = ToProcess::Welcome {
            version,
            instance: 1,
            workload: "w".to_owned(),
        };
        peer.send(&welcome, &[desired.as_raw_fd(), observed.as_raw_fd()]);
        peer
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Peer {
    fn send(&self, message: &ToProcess, files: &[i32]) {
        let rights = [ControlMessage::ScmRights(files)];
        let control: &[ControlMessage<'_>] = if files.is_empty() { &[] } else { &rights };
        let packet = message.encode();
        let data = [IoSlice::new(&packet)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.0.as_raw_fd(), &data, control, flags, None).expect("sent");
    }

    /// The next message; `None`: nothing for 200 ms, or the end.
    fn read(&self) -> Option<FromProcess> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, and a buffer of the length that is said.
        let bytes = unsafe {
            if libc::poll(&raw mut poll, 1, 200) <= 0 {
                return None;
            }
            libc::recv(poll.fd, buffer.as_mut_ptr().cast(), buffer.len(), 0)
        };
        let bytes = usize::try_from(bytes).ok().filter(|bytes| *bytes > 0)?;
        Some(FromProcess::decode(&buffer[..bytes]).expect("the session speaks well"))
    }

    /// Everything that comes, wake-ups left out.
    fn read_all(&self) -> Vec<FromProcess> {
        std::iter::from_fn(|| self.read())
            .filter(|message| *message != FromProcess::Wake)
            .collect()
    }
}

fn start(host: &Host, version: u32) -> (&'static Session, Peer) {
    let register = Register {
        version: PROTOCOL_VERSION,
        workload: "w".to_owned(),
        request: None,
        limit: None,
        priority: 0,
        swap: true,
        resumes: 0,
        segments: 0,
        grants: vec![0],
        host_grant: 0,
        epoch: 0,
        devices: vec![DeviceInfo {
            uuid: [1; 16],
            total_bytes: 1 << 30,
        }],
    };
    std::thread::scope(|scope| {
        let welcome = scope.spawn(|| host.welcome(version));
        let session = Session::start_at(host.path(), register, || {}).expect("welcomed");
        let session: &'static Session = Box::leak(Box::new(session));
        let peer = welcome.join().expect("welcomed");
        std::thread::spawn(|| session.listen());
        (session, peer)
    })
}

fn hold(bytes: u64, key: u64) -> FromProcess {
    FromProcess::Hold {
        device: 0,
        bytes,
        key,
    }
}

#[test]
fn a_coordinator_is_told_what_is_held_and_so_is_the_next_one() {
    let mut host = Host::new("holds");
    let (session, peer) = start(&host, PROTOCOL_VERSION);
    session.hold(0, 4096, 7);
    session.hold(0, 8192, 0);
    session.hold(0, 8192, 0);
    session.hold(0, 0, 9);
    session.unhold(0, 8192, 0);
    session.unhold(0, 12288, 0);
    session.unknown("cuNew");
    session.unknown("cuNew");
    session.unknown("not a name");
    let (device, bytes, key) = (0, 8192, 0);
    let unknown = FromProcess::Unknown {
        name: "cuNew".to_owned(),
    };
    assert_eq!(
        peer.read_all(),
        [
            hold(4096, 7),
            hold(8192, 0),
            hold(8192, 0),
            FromProcess::Unhold { device, bytes, key },
            unknown.clone(),
        ]
    );
    // The next coordinator is there before the session notices that this one is gone.
    host.listener = Host::listen(&host.dir);
    drop(peer);
    session.hold(0, 16384, 0);
    let peer = host.welcome(PROTOCOL_VERSION);
    let mut told = peer.read_all();
    assert_eq!(told.pop(), Some(unknown));
    told.sort_by_key(|message| format!("{message:?}"));
    assert_eq!(told, [hold(16384, 0), hold(4096, 7), hold(8192, 0)]);
}

#[test]
fn a_claim_is_answered_or_given_up() {
    let host = Host::new("claims");
    let (session, peer) = start(&host, PROTOCOL_VERSION);
    for covered in [0, 1] {
        let answer = std::thread::spawn(|| session.claim(0, 4096, 7));
        let Some(FromProcess::Claim {
            ticket,
            device: 0,
            bytes: 4096,
            key: 7,
        }) = peer.read()
        else {
            panic!("it asks");
        };
        peer.send(&ToProcess::ClaimReply { ticket, covered }, &[]);
        assert_eq!(answer.join().expect("ends"), covered != 0);
    }
    let begin = Instant::now();
    assert!(!session.claim(0, 4096, 7), "nobody answers");
    assert!((2..10).contains(&begin.elapsed().as_secs()));
    peer.read_all();
    drop(peer);
    let begin = Instant::now();
    assert!(!session.claim(0, 4096, 7), "nobody is there");
    assert!(begin.elapsed() < Duration::from_secs(1));
}

#[test]
fn the_version_before_is_sent_nothing_that_it_does_not_know() {
    let mut host = Host::new("old");
    let (session, peer) = start(&host, PROTOCOL_VERSION_CLAIMS - 1);
    session.hold(0, 4096, 7);
    session.unknown("cuNew");
    assert!(!session.claim(0, 4096, 7));
    assert_eq!(peer.read_all(), []);
    host.listener = Host::listen(&host.dir);
    drop(peer);
    let peer = host.welcome(PROTOCOL_VERSION);
    assert_eq!(peer.read_all().len(), 2, "told as soon as it is understood");
}
