//! Packets with descriptors on a session socket. Nothing here blocks.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use spillway_protocol::MAX_MESSAGE;

/// The most descriptors that Linux lets one packet carry. We make space for all of them: those that
/// do not fit could not be closed.
const MAX_DESCRIPTORS: usize = 253;
/// Bytes of the control buffer: a header and the descriptors, with room for alignment.
const CONTROL_BYTES: usize = 64 + MAX_DESCRIPTORS * size_of::<RawFd>();

/// A buffer aligned for control messages.
#[repr(C, align(16))]
struct Control([u8; CONTROL_BYTES]);

/// One packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
    /// It was larger than any message may be, or had more descriptors than any message has.
    pub cut: bool,
}

/// What a read found.
#[derive(Debug)]
pub enum Read {
    /// A packet.
    Packet(Packet),
    /// Nothing at the moment.
    Nothing,
    /// The other side is gone.
    Closed,
}

/// Reads one packet.
///
/// # Errors
/// The socket is broken.
pub fn read(socket: BorrowedFd<'_>) -> Result<Read, Errno> {
    // One byte more than a message may have tells a message that is too long.
    let mut buffer = [0u8; MAX_MESSAGE + 1];
    let mut control = Control([0; CONTROL_BYTES]);
    let mut slice = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a structure of integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = CONTROL_BYTES as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header points to buffers that live during the call and have the lengths said.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    // Whatever else is wrong: descriptors that came have to be owned before anything returns.
    let descriptors = if len >= 0 {
        take_descriptors(&header)
    } else {
        Vec::new()
    };
    let len = match Errno::result(len) {
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Read::Nothing),
        Err(Errno::ECONNRESET | Errno::EPIPE) => return Ok(Read::Closed),
        Err(error) => return Err(error),
        Ok(len) => usize::try_from(len).unwrap_or(0),
    };
    // A packet without bytes is the end of the file: nobody may send empty packets.
    if len == 0 && descriptors.is_empty() {
        return Ok(Read::Closed);
    }
    Ok(Read::Packet(Packet {
        cut: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 || len > MAX_MESSAGE,
        bytes: buffer[..len.min(MAX_MESSAGE)].to_vec(),
        descriptors,
    }))
}

fn take_descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has filled the header's control buffer, which is still alive.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return headers inside of the buffer or null.
        let (level, kind, bytes) = unsafe {
            (
                (*message).cmsg_level,
                (*message).cmsg_type,
                (*message).cmsg_len,
            )
        };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: computes a length from a length.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = bytes.saturating_sub(head) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: the kernel wrote `count` descriptors behind this header; each is new to
                // this process and known to nobody else. They need not be aligned.
                let fd = unsafe {
                    let data = libc::CMSG_DATA(message).cast::<RawFd>().add(index);
                    OwnedFd::from_raw_fd(data.read_unaligned())
                };
                descriptors.push(fd);
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    descriptors
}

/// Sends one packet. `Ok(false)`: there is no space in the socket at the moment.
///
/// # Errors
/// The other side is gone, or the socket is broken.
pub fn write(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<bool, Errno> {
    let raw: Vec<RawFd> = descriptors
        .iter()
        .map(|fd| fd.as_fd().as_raw_fd())
        .collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        flags,
        None,
    ) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => Ok(false),
        // Too many descriptors of ours are in flight to processes that do not read.
        Err(Errno::ETOOMANYREFS) => Ok(false),
        Err(error) => Err(error),
    }
}
