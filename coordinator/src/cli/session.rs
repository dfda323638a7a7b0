//! Whether a coordinator answers on a session socket: connecting alone would also succeed with a
//! stopped daemon or another program's socket.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, SockType, recv, send, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use spillway_protocol::MAX_MESSAGE;
use spillway_protocol::message::{FromProcess, ToProcess};

use crate::api::ClientError;
use crate::api::client::connect_unix;

/// How long the coordinator may take.
const TIME: Duration = Duration::from_secs(5);

/// Asks the coordinator for a sign of life: a session that does not start by registering is refused
/// with a message of the protocol, and nobody else would know it.
///
/// # Errors
/// What is wrong with the socket, with a remedy.
pub fn probe(path: &Path) -> Result<(), ClientError> {
    let fd = connect_unix(path, SockType::SeqPacket)
        .map_err(|error| ClientError::of_connect(path, error))?;
    let failed = |errno: nix::Error| match errno {
        nix::Error::EAGAIN => ClientError::Timeout(path.to_owned()),
        nix::Error::EPIPE | nix::Error::ECONNRESET => foreign(path, "it hung up"),
        errno => ClientError::Io(path.to_owned(), io::Error::from(errno)),
    };
    let limit = TimeVal::seconds(i64::try_from(TIME.as_secs()).unwrap_or(5));
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit).map_err(failed)?;
    let hello = FromProcess::Wake.encode();
    send(fd.as_raw_fd(), &hello, MsgFlags::MSG_NOSIGNAL).map_err(failed)?;
    let mut packet = [0u8; MAX_MESSAGE];
    let bytes = recv(fd.as_raw_fd(), &mut packet, MsgFlags::empty()).map_err(failed)?;
    match ToProcess::decode(&packet[..bytes]) {
        Ok(ToProcess::Refused { .. }) => Ok(()),
        Ok(_) => Err(foreign(path, "it sent an unexpected message")),
        Err(_) if bytes == 0 => Err(foreign(path, "it hung up")),
        Err(error) => Err(foreign(path, &error.to_string())),
    }
}

fn foreign(path: &Path, what: &str) -> ClientError {
    ClientError::Foreign(path.to_owned(), what.to_owned())
}
