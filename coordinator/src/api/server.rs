//! Connections of `api.sock`: a thread each, a bounded number of them, deadlines on everything.
//!
//! - At most [`Limits::connections`] are served; one more is told so (503) and closed.
//! - A request has [`Limits::request`] from its first byte to its last, and its answer
//!   [`Limits::write`] to be taken, so that a client which stalls costs one thread for that long.
//! - Requests on one connection are answered in their order (keep-alive, pipelining).
//! - Nothing here holds a lock of the coordinator's while it reads from or writes to a client.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::http::{Fault, Framing, MAX_BODY, RequestHead, Wire};
use super::reply::Reply;
use super::routes::{self, Answer};
use super::{events, routes::Query};
use crate::model::Control;

/// How much one server gives to its clients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections served at once.
    pub connections: usize,
    /// How long a connection may be silent between requests.
    pub idle: Duration,
    /// From a request's first byte to its last.
    pub request: Duration,
    /// For an answer, or for one event, to be taken by the client.
    pub write: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            idle: Duration::from_secs(60),
            request: Duration::from_secs(10),
            write: Duration::from_secs(10),
        }
    }
}

/// Serves the API on a listening socket; does not return while the socket works.
///
/// # Errors
/// The listening socket itself failed. A client's mistakes never end the server.
pub fn serve(listener: UnixListener, control: Arc<dyn Control>) -> io::Result<()> {
    serve_with(&listener, &control, Limits::default())
}

/// The same with other limits.
///
/// # Errors
/// As [`serve`].
pub fn serve_with(
    listener: &UnixListener,
    control: &Arc<dyn Control>,
    limits: Limits,
) -> io::Result<()> {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if passing(&error) => {
                // Out of descriptors or memory: the connections that end give some back.
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            Err(error) => return Err(error),
        };
        let slot = Slot::take(&open);
        if slot.before >= limits.connections {
            turn_away(stream);
            continue;
        }
        let control = Arc::clone(control);
        let spawned = std::thread::Builder::new()
            .name("api".into())
            .stack_size(512 * 1024)
            .spawn(move || {
                connection(stream, control.as_ref(), limits);
                drop(slot);
            });
        if let Err(error) = spawned {
            tracing::warn!("no thread for an API connection: {error}");
        }
    }
}

/// One place among the connections; given back when dropped, also by a panic.
struct Slot {
    open: Arc<AtomicUsize>,
    before: usize,
}

impl Slot {
    fn take(open: &Arc<AtomicUsize>) -> Self {
        Self {
            before: open.fetch_add(1, Ordering::Relaxed),
            open: Arc::clone(open),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

fn passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EMFILE
                | libc::ENFILE
                | libc::ENOBUFS
                | libc::ENOMEM
                | libc::ECONNABORTED
                | libc::EINTR
                | libc::EAGAIN
                | libc::EPERM
        )
    )
}

/// Says 503 without ever waiting for the client.
fn turn_away(stream: UnixStream) {
    let reply = Reply::error(
        503,
        "too many connections to the API: close one (spillway events holds one) and try again",
    );
    let mut wire = Wire::new(stream);
    // A few hundred bytes fit into any socket buffer: this does not block.
    let _ = wire.write_all(
        &reply.bytes(true, false),
        Instant::now() + Duration::from_millis(10),
    );
}

/// Serves one client until it closes, stalls, asks for the end, or breaks the protocol.
fn connection(stream: UnixStream, control: &dyn Control, limits: Limits) {
    let mut wire = Wire::new(stream);
    loop {
        match wire.wait(Instant::now() + limits.idle) {
            Ok(true) => {}
            Ok(false) | Err(_) => return,
        }
        let (reply, keep, head_only) = match request(&mut wire, limits) {
            Ok(head) => {
                let keep = keep_alive(&head);
                let head_only = head.method == "HEAD";
                match answer(control, &head) {
                    Answer::Reply(reply) => (reply, keep, head_only),
                    Answer::Events { .. } if head_only => (events::head(), keep, true),
                    Answer::Events { follow } => {
                        let whole = events::stream(&mut wire, control, &head, follow, limits.write);
                        if whole && keep && !head.http10 {
                            continue;
                        }
                        return;
                    }
                }
            }
            Err(fault) => match refusal(&fault) {
                Some(reply) => (reply, false, false),
                None => return,
            },
        };
        let bytes = reply.bytes(!keep, head_only);
        if wire
            .write_all(&bytes, Instant::now() + limits.write)
            .is_err()
        {
            return;
        }
        if !keep {
            linger(wire.stream());
            return;
        }
    }
}

/// Reads one request whole; its body is not used by any route, but is read so that the next
/// request starts where it should.
fn request(wire: &mut Wire, limits: Limits) -> Result<RequestHead, Fault> {
    let deadline = Instant::now() + limits.request;
    let head = wire.request_head(deadline)?;
    let framing = Framing::of(&head.fields, Framing::Length(0))?;
    if matches!(framing, Framing::Length(bytes) if bytes > MAX_BODY as u64) {
        return Err(Fault::BodyTooLarge);
    }
    if framing != Framing::Length(0) && head.fields.has_token("expect", "100-continue") {
        wire.write_all(b"HTTP/1.1 100 Continue\r\n\r\n", deadline)?;
    }
    wire.body(framing, MAX_BODY, deadline)?;
    Ok(head)
}

fn keep_alive(head: &RequestHead) -> bool {
    if head.http10 {
        head.fields.has_token("connection", "keep-alive")
    } else {
        !head.fields.has_token("connection", "close")
    }
}

fn answer(control: &dyn Control, head: &RequestHead) -> Answer {
    let routed = std::panic::AssertUnwindSafe(|| match Query::of(&head.target) {
        Ok((path, query)) => routes::answer(control, &head.method, &path, &query),
        Err(text) => Answer::Reply(Reply::error(400, &text)),
    });
    std::panic::catch_unwind(routed).unwrap_or_else(|_| {
        tracing::error!("internal error on {} {}", head.method, head.target);
        Answer::Reply(Reply::error(
            500,
            "internal error of spillwayd: its log says more; please report it",
        ))
    })
}

/// What a request that could not be read is told; `None`: nobody listens.
fn refusal(fault: &Fault) -> Option<Reply> {
    let (status, text) = match fault {
        Fault::Closed(true) => (400, "the request was cut off before its end".to_owned()),
        Fault::Closed(false) | Fault::Io(_) => return None,
        Fault::Timeout => (408, "the request did not arrive in time".to_owned()),
        Fault::HeadTooLarge => (431, fault.to_string()),
        Fault::BodyTooLarge => (
            413,
            format!("the body is larger than {MAX_BODY} bytes; no route needs one"),
        ),
        Fault::Malformed(what) => (400, what.clone()),
        Fault::Unsupported(what) => (501, what.clone()),
    };
    Some(Reply::error(status, &text))
}

/// Ends a connection whose peer may still be sending: says that no more comes, then reads what is
/// under way for a moment, since closing over unread bytes would reset the peer before it has read
/// the answer.
fn linger(stream: &UnixStream) {
    use std::io::Read;
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let deadline = Instant::now() + Duration::from_millis(200);
    let mut sink = [0u8; 16 * 1024];
    let mut stream = stream;
    for _ in 0..64 {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            return;
        }
        match stream.read(&mut sink) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// Whether the peer has closed its socket altogether (it may have ended only its sending half).
#[must_use]
pub(super) fn gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    match nix::poll::poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => fds[0].revents().is_some_and(|r| {
            r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL)
        }),
        Err(_) => false,
    }
}
