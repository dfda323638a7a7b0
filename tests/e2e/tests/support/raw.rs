//! A process that speaks the session protocol by hand: honest where a test needs a tenant, hostile
//! where it needs an adversary.

#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{IoSlice, IoSliceMut};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use spillway_protocol::message::{DeviceInfo, FromProcess, Register, ToProcess};
use spillway_protocol::page::{Desired, Observed, PAGE_BYTES};
use spillway_protocol::{Amount, MAX_MESSAGE, PROTOCOL_VERSION};
use spillway_tests::Daemon;

/// The devices that a coordinator serves, as a process would register them.
pub fn devices(daemon: &Daemon<'_>) -> Vec<DeviceInfo> {
    let status = daemon.status();
    let devices = status["devices"].as_array().expect("devices").clone();
    let one = |device: &serde_json::Value| {
        let text = device["uuid"].as_str().expect("a uuid");
        let hex: String = text.chars().skip(4).filter(|c| *c != '-').collect();
        let mut uuid = [0; 16];
        for (at, byte) in uuid.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).expect("hex");
        }
        DeviceInfo {
            uuid,
            total_bytes: device["capacity_bytes"].as_u64().expect("a size"),
        }
    };
    devices.iter().map(one).collect()
}

/// A first registration.
pub fn register(devices: Vec<DeviceInfo>, workload: &str, limit: Option<u64>) -> Register {
    Register {
        version: PROTOCOL_VERSION,
        workload: workload.to_owned(),
        request: None,
        limit: limit.map(Amount::Bytes),
        priority: 0,
        swap: true,
        resumes: 0,
        segments: 0,
        grants: vec![0; devices.len()],
        host_grant: 0,
        epoch: 0,
        devices,
    }
}

/// A connection.
pub struct Raw(pub OwnedFd);

impl Raw {
    /// Connects; every receive ends after 10 s.
    pub fn connect(run_dir: &Path) -> Self {
        let path = spillway_protocol::names::session_socket(run_dir);
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .expect("a socket");
        connect(fd.as_raw_fd(), &UnixAddr::new(&path).expect("a short path")).expect("connects");
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(10, 0)).expect("a timeout");
        Self(fd)
    }

    /// Sends bytes with descriptors; `false`: the other side has closed.
    pub fn send_bytes(&self, bytes: &[u8], descriptors: &[RawFd]) -> bool {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
        let data = [IoSlice::new(bytes)];
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &data,
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .is_ok()
    }

    /// Sends a message.
    pub fn send(&self, message: &FromProcess) -> bool {
        self.send_bytes(&message.encode(), &[])
    }

    /// The next message with its descriptors; `None`: the other side has closed.
    pub fn receive(&self) -> Option<(ToProcess, Vec<OwnedFd>)> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut data = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = match recvmsg::<()>(self.0.as_raw_fd(), &mut data, Some(&mut space), flags) {
            Ok(got) => got,
            Err(nix::Error::ECONNRESET | nix::Error::EPIPE) => return None,
            Err(why) => panic!("no answer: {why}"),
        };
        let mut files = Vec::new();
        for message in got.cmsgs().expect("control messages") {
            if let ControlMessageOwned::ScmRights(fds) = message {
                // SAFETY: the kernel has just installed these descriptors for us.
                files.extend(
                    fds.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let bytes = got.bytes;
        if bytes == 0 {
            return None;
        }
        buffer.truncate(bytes);
        Some((ToProcess::decode(&buffer).expect("a message"), files))
    }

    /// The next message that is not a wake-up.
    pub fn answer(&self) -> Option<(ToProcess, Vec<OwnedFd>)> {
        loop {
            match self.receive()? {
                (ToProcess::Wake, _) => {}
                other => return Some(other),
            }
        }
    }

    /// Sends a registration and expects a refusal; returns its text.
    pub fn refused(&self, register: Register) -> String {
        assert!(self.send(&FromProcess::Register(register)));
        match self.answer() {
            Some((ToProcess::Refused { text }, _)) => text,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }
}

/// A registered process.
pub struct Tenant {
    pub raw: Raw,
    pub desired: Mapping,
    pub observed: Mapping,
    pub desired_file: OwnedFd,
    pub observed_file: OwnedFd,
    pub workload: String,
    pub instance: u64,
    ticket: u64,
}

impl Tenant {
    /// Registers.
    pub fn join(run_dir: &Path, register: Register) -> Self {
        Self::join_with(run_dir, register, &[])
    }

    /// Registers with descriptors.
    pub fn join_with(run_dir: &Path, register: Register, descriptors: &[RawFd]) -> Self {
        Self::try_join(run_dir, register, descriptors).unwrap_or_else(|text| panic!("{text}"))
    }

    /// Registers; the error is the refusal.
    pub fn try_join(
        run_dir: &Path,
        register: Register,
        descriptors: &[RawFd],
    ) -> Result<Self, String> {
        let raw = Raw::connect(run_dir);
        assert!(raw.send_bytes(&FromProcess::Register(register).encode(), descriptors));
        let (instance, workload, mut files) = match raw.answer() {
            Some((
                ToProcess::Welcome {
                    instance, workload, ..
                },
                files,
            )) => (instance, workload, files),
            Some((ToProcess::Refused { text }, _)) => return Err(text),
            other => panic!("expected a welcome, got {other:?}"),
        };
        assert_eq!(files.len(), 2);
        let observed_file = files.pop().expect("two");
        let desired_file = files.pop().expect("two");
        let read = ProtFlags::PROT_READ;
        let desired = Mapping::new(&desired_file, PAGE_BYTES, read).expect("maps");
        let observed =
            Mapping::new(&observed_file, PAGE_BYTES, read | ProtFlags::PROT_WRITE).expect("maps");
        Ok(Self {
            raw,
            desired,
            observed,
            desired_file,
            observed_file,
            workload,
            instance,
            ticket: 0,
        })
    }

    /// The coordinator's page.
    pub fn desired(&self) -> &Desired {
        // SAFETY: a page-aligned mapping of at least that size, made of atomics, that lives as long
        // as `self`.
        unsafe { self.desired.0.cast::<Desired>().as_ref() }
    }

    /// The process's page.
    pub fn observed(&self) -> &Observed {
        // SAFETY: as above.
        unsafe { self.observed.0.cast::<Observed>().as_ref() }
    }

    /// Asks for growth; the outcome.
    pub fn grow(&mut self, bytes: u64, pageable: u64) -> u32 {
        self.ticket += 1;
        let ticket = self.ticket;
        assert!(self.raw.send(&FromProcess::Grow {
            ticket,
            device: 0,
            bytes,
            pageable,
            no_wait: 1,
        }));
        match self.raw.answer() {
            Some((
                ToProcess::GrowReply {
                    ticket: echoed,
                    outcome,
                    ..
                },
                _,
            )) => {
                assert_eq!(echoed, ticket);
                outcome
            }
            other => panic!("expected an answer to Grow, got {other:?}"),
        }
    }

    /// Orders a host segment.
    pub fn segment(&mut self, bytes: u64) -> (u64, OwnedFd) {
        self.ticket += 1;
        let ticket = self.ticket;
        assert!(self.raw.send(&FromProcess::Segment { ticket, bytes }));
        match self.raw.answer() {
            Some((
                ToProcess::SegmentReply {
                    id,
                    bytes: got,
                    text,
                    ..
                },
                mut files,
            )) => {
                assert_eq!(got, bytes, "{text}");
                (id, files.pop().expect("a segment"))
            }
            other => panic!("expected a segment, got {other:?}"),
        }
    }
}

/// A shared mapping.
pub struct Mapping(pub NonNull<std::ffi::c_void>, usize);

impl Mapping {
    /// Maps the beginning of a file.
    pub fn new(file: impl AsFd, bytes: usize, protection: ProtFlags) -> nix::Result<Self> {
        let len = NonZeroUsize::new(bytes).expect("not empty");
        let file: BorrowedFd<'_> = file.as_fd();
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let at = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Self(at, bytes))
    }

    /// Reads it all.
    pub fn read(&self) -> Vec<u8> {
        let mut copy = vec![0; self.1];
        // SAFETY: both are that long; what others write meanwhile is bytes, whatever they are.
        unsafe {
            std::ptr::copy_nonoverlapping(self.0.as_ptr().cast(), copy.as_mut_ptr(), self.1);
        }
        copy
    }

    /// Writes every byte.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the tests map writable what they fill.
        unsafe { std::ptr::write_bytes(self.0.as_ptr().cast::<u8>(), byte, self.1) };
    }

    /// Every byte is this one.
    pub fn is_all(&self, byte: u8) -> bool {
        self.read().iter().all(|b| *b == byte)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, with this length.
        let _ = unsafe { munmap(self.0, self.1) };
    }
}
