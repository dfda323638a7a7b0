//! Joining a coordinator: from the socket to Welcome, for the first time or after a restart.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use spillway_protocol::message::{FromProcess, Register, ToProcess};
use spillway_protocol::page::Desired;

use super::{Descriptor, Segment, page, socket};

/// How long a registration may take before the process goes on without a coordinator.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a session did not begin.
#[derive(Debug)]
pub enum StartError {
    /// Nobody answers there.
    Absent(PathBuf, io::Error),
    /// The coordinator says no; one line.
    Refused(String),
}

/// What a handshake yields.
pub(super) struct Joined {
    pub socket: Arc<Descriptor>,
    pub desired: &'static Desired,
    pub observed: Arc<Descriptor>,
    pub workload: String,
    /// The protocol version that the coordinator speaks.
    pub version: u32,
}

/// Joins a coordinator: the registration, what is brought along, and its answer.
///
/// # Errors
/// Nobody answers there, or the coordinator refuses.
pub(super) fn handshake(
    path: &std::path::Path,
    register: &Register,
    observed: Option<&Descriptor>,
    segments: &[Segment],
) -> Result<Joined, StartError> {
    let absent = |why| StartError::Absent(path.to_owned(), why);
    let fd = socket::open(path, REGISTER_TIMEOUT).map_err(absent)?;
    let mut descriptors = Vec::new();
    if let Some(page) = observed {
        descriptors.push(page.get().map_err(absent)?.as_raw_fd());
    }
    let packet = FromProcess::Register(register.clone()).encode();
    // A coordinator that refuses at once may close before it has read all: read its answer anyway.
    let mut sent = socket::send(&fd, &packet, &descriptors);
    for segment in segments {
        let packet = FromProcess::Adopt {
            id: segment.id,
            bytes: segment.bytes,
        }
        .encode();
        sent = sent.and_then(|()| {
            let file = segment.file.get()?.as_raw_fd();
            socket::send(&fd, &packet, &[file])
        });
    }
    let (packet, mut files) = match (socket::receive(&fd), sent) {
        (Ok(got), _) => got,
        (Err(_), Err(why)) | (Err(why), Ok(())) => return Err(absent(why)),
    };
    if packet.is_empty() {
        return Err(absent(io::Error::other("it closed the connection")));
    }
    match ToProcess::decode(&packet) {
        Ok(ToProcess::Welcome {
            version, workload, ..
        }) if files.len() == 2 => {
            let own = files.remove(1);
            let desired = page::desired(&files[0]).map_err(absent)?;
            socket::set_timeouts(&fd, Duration::ZERO).map_err(absent)?;
            Ok(Joined {
                socket: Arc::new(fd),
                desired,
                observed: Arc::new(own),
                workload,
                version,
            })
        }
        Ok(ToProcess::Refused { text }) => Err(StartError::Refused(text)),
        Ok(_) => Err(absent(io::Error::other(
            "it does not speak Spillway's session protocol",
        ))),
        Err(why) => Err(absent(io::Error::other(format!("it sent nonsense: {why}")))),
    }
}
