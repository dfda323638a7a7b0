//! The other end of `api.sock`: what the `spillway` command asks with.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::http::{BodyReader, Fault, Framing, Wire};

/// How long connecting may take: longer only when a stopped daemon's queue is full.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// The largest answer that is read.
const MAX_ANSWER: usize = 64 << 20;

/// Why the daemon could not be asked. Every text names the socket and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing is at the path.
    #[error(
        "no socket at {0}: start spillwayd, or name its run directory with --run-dir or SPILLWAY_RUN_DIR"
    )]
    Missing(PathBuf),
    /// Something else is at the path.
    #[error(
        "{0} is not a socket: name spillwayd's run directory with --run-dir or SPILLWAY_RUN_DIR"
    )]
    NotASocket(PathBuf),
    /// The socket's mode does not let this user in.
    #[error("may not use {0}: run as the user of spillwayd (root, if it runs as root)")]
    Denied(PathBuf),
    /// A socket without a listener.
    #[error("nobody listens on {0}: spillwayd has ended; start it again")]
    Dead(PathBuf),
    /// Whoever listens is no spillwayd.
    #[error("{0} does not answer as spillwayd does ({1}): is it another program's socket?")]
    Foreign(PathBuf, String),
    /// No answer in time.
    #[error("no answer from {0} in time: is spillwayd stopped?")]
    Timeout(PathBuf),
    /// The daemon closed the connection while it answered.
    #[error(
        "spillwayd closed the connection on {0} before its answer was complete: it has ended, or this reader was too slow"
    )]
    Cut(PathBuf),
    /// Anything else.
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
}

/// Connects a unix socket of either kind, waiting at most [`CONNECT_TIME`].
///
/// # Errors
/// As `connect` says; a path longer than a socket address holds is `ENAMETOOLONG`.
pub fn connect_unix(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    let address = UnixAddr::new(path).map_err(io::Error::from)?;
    let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::seconds(i64::try_from(CONNECT_TIME.as_secs()).unwrap_or(5));
    setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
    connect(fd.as_raw_fd(), &address)?;
    Ok(fd)
}

impl ClientError {
    /// Puts a failed `connect` into words.
    #[must_use]
    pub fn of_connect(path: &Path, error: io::Error) -> Self {
        let path = path.to_owned();
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Self::Missing(path),
            Some(libc::EACCES | libc::EPERM) => Self::Denied(path),
            Some(libc::ECONNREFUSED) => {
                let socket = std::fs::metadata(&path).map(|m| m.file_type().is_socket());
                if socket.unwrap_or(true) {
                    Self::Dead(path)
                } else {
                    Self::NotASocket(path)
                }
            }
            Some(libc::EPROTOTYPE) => {
                Self::Foreign(path, "it is a socket of another type".to_owned())
            }
            Some(libc::EAGAIN | libc::ETIMEDOUT) => Self::Timeout(path),
            _ => Self::Io(path, error),
        }
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The `error` of a JSON error, or else the body's beginning.
    #[must_use]
    pub fn error_text(&self) -> String {
        let json = serde_json::from_slice::<serde_json::Value>(&self.body).ok();
        let text = json.as_ref().and_then(|json| json.get("error")?.as_str());
        text.map_or_else(
            || {
                let text = String::from_utf8_lossy(&self.body);
                let start: String = text.chars().take(200).collect();
                format!("status {}: {}", self.status, start.trim())
            },
            str::to_owned,
        )
    }
}

/// A client of one `api.sock`; each question is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Asks this socket; nothing is opened yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The path that is asked.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn fault(&self, fault: Fault) -> ClientError {
        let path = self.socket.clone();
        match fault {
            Fault::Timeout => ClientError::Timeout(path),
            Fault::Closed(_) => ClientError::Cut(path),
            Fault::Io(error) => ClientError::Io(path, error),
            fault => ClientError::Foreign(path, fault.to_string()),
        }
    }

    fn open(&self, method: &str, target: &str, deadline: Instant) -> Result<Wire, ClientError> {
        let fd = connect_unix(&self.socket, SockType::Stream)
            .map_err(|error| ClientError::of_connect(&self.socket, error))?;
        let mut wire = Wire::new(UnixStream::from(fd));
        let length = if method == "POST" {
            "Content-Length: 0\r\n"
        } else {
            ""
        };
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: spillwayd\r\n{length}Connection: close\r\n\r\n"
        );
        match wire.write_all(request.as_bytes(), deadline) {
            // Whoever hangs up at once may have said why: read it.
            Ok(()) | Err(Fault::Io(_)) => Ok(wire),
            Err(fault) => Err(self.fault(fault)),
        }
    }

    fn framing(&self, head: &super::http::ResponseHead) -> Result<Framing, ClientError> {
        Framing::of(&head.fields, Framing::UntilClose).map_err(|fault| self.fault(fault))
    }

    /// Asks and reads the whole answer, whatever its status.
    ///
    /// # Errors
    /// The socket is not there or not ours, or no complete answer came within `time`.
    pub fn ask(&self, method: &str, target: &str, time: Duration) -> Result<Answer, ClientError> {
        let deadline = Instant::now() + time;
        let mut wire = self.open(method, target, deadline)?;
        let head = wire
            .response_head(deadline)
            .map_err(|fault| self.fault(fault))?;
        let framing = self.framing(&head)?;
        let body = wire
            .body(framing, MAX_ANSWER, deadline)
            .map_err(|fault| self.fault(fault))?;
        Ok(Answer {
            status: head.status,
            body,
        })
    }

    /// Reads a streamed answer line by line until it ends or `each` breaks off. An answer other than
    /// 200 is returned instead.
    ///
    /// # Errors
    /// As [`Client::ask`]; [`ClientError::Cut`] when a stream ends without its proper end.
    pub fn lines(
        &self,
        target: &str,
        each: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Option<Answer>, ClientError> {
        let soon = Instant::now() + Duration::from_secs(10);
        let mut wire = self.open("GET", target, soon)?;
        let head = wire
            .response_head(soon)
            .map_err(|fault| self.fault(fault))?;
        let framing = self.framing(&head)?;
        if head.status != 200 {
            let body = wire
                .body(framing, MAX_ANSWER, soon)
                .map_err(|fault| self.fault(fault))?;
            return Ok(Some(Answer {
                status: head.status,
                body,
            }));
        }
        let mut reader = BodyReader::new(framing);
        let mut open_line: Vec<u8> = Vec::new();
        loop {
            // A stream may be silent for as long as nothing happens.
            let ever = Instant::now() + Duration::from_secs(365 * 24 * 3600);
            let piece = reader.piece(&mut wire, ever).map_err(|f| self.fault(f))?;
            let Some(piece) = piece else { break };
            open_line.extend_from_slice(&piece);
            while let Some(end) = open_line.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = open_line.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line[..end]);
                if each(&line).is_break() {
                    return Ok(None);
                }
            }
            if open_line.len() > MAX_ANSWER {
                return Err(self.fault(Fault::BodyTooLarge));
            }
        }
        Ok(None)
    }
}
