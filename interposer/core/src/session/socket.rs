//! The session socket's raw side: packets with descriptors, close-on-exec, no signal on a broken
//! pipe.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use spillway_protocol::MAX_MESSAGE;

use crate::descriptor::Descriptor;

/// Connects; the socket is blocking. Connecting and sending take at most `timeout` each.
pub fn open(path: &Path, timeout: Duration) -> io::Result<Descriptor> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let fd = Descriptor::keep(fd)?;
    set_timeouts(&fd, timeout)?;
    // A listener that does not accept keeps even this waiting, once its queue is full.
    connect(fd.get()?.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// Bounds every receive and every send; zero: wait for ever.
pub fn set_timeouts(fd: &Descriptor, timeout: Duration) -> io::Result<()> {
    let micros = i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX);
    let value = TimeVal::new(micros / 1_000_000, micros % 1_000_000);
    let fd = fd.get()?;
    setsockopt(&fd, sockopt::SendTimeout, &value)?;
    Ok(setsockopt(&fd, sockopt::ReceiveTimeout, &value)?)
}

/// How long a packet waits for a coordinator that reads nothing.
const FULL: Duration = Duration::from_secs(2);

/// Sends one packet; waits, bounded, while the coordinator reads nothing.
///
/// # Errors
/// The coordinator is gone, or has read nothing for [`FULL`] (`WouldBlock`).
pub fn send(fd: &Descriptor, packet: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
    let until = Instant::now() + FULL;
    loop {
        match try_send(fd, packet, descriptors) {
            Err(why) if why.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// Sends one packet, at once or not at all.
///
/// # Errors
/// As [`send`].
pub fn try_send(fd: &Descriptor, packet: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
    let data = [IoSlice::new(packet)];
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(
            fd.get()?.as_raw_fd(),
            &data,
            control,
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        ) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(why) => return Err(why.into()),
        }
    }
}

/// Receives one packet with its descriptors. An empty packet is the end.
pub fn receive(fd: &Descriptor) -> io::Result<(Vec<u8>, Vec<Descriptor>)> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    loop {
        let mut data = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = match recvmsg::<()>(fd.get()?.as_raw_fd(), &mut data, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other?,
        };
        let mut descriptors = Vec::new();
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                for fd in fds {
                    // SAFETY: the kernel has just installed this descriptor for us alone.
                    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                    descriptors.push(Descriptor::keep(fd)?);
                }
            }
        }
        let bytes = got.bytes;
        buffer.truncate(bytes);
        return Ok((buffer, descriptors));
    }
}
