//! `GET /v1/events`: JSON lines, each in a chunk of its own, so that a reader has an event as soon as
//! it happens.
//!
//! A reader that stops reading is dropped: either its socket is full for longer than the write
//! limit, or the daemon's bounded queue for it overflows; neither makes anybody else wait.

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::http::{RequestHead, Wire};
use super::reply::{JSON_LINES, Reply};
use super::server::gone;
use crate::model::{Control, Event};

/// How often a silent stream looks whether its client is still there.
const LOOK: Duration = Duration::from_millis(500);

/// What a HEAD request is told.
pub(super) fn head() -> Reply {
    Reply {
        status: 200,
        content_type: JSON_LINES,
        allow: None,
        body: Vec::new(),
    }
}

/// Streams the kept events and, if asked to follow, those to come, until the client closes, does
/// not read, or the daemon ends. `true`: the body was ended as it should be, and the connection can
/// be used again.
pub(super) fn stream(
    wire: &mut Wire,
    control: &dyn Control,
    request: &RequestHead,
    follow: bool,
    write_limit: Duration,
) -> bool {
    let chunked = !request.http10;
    let (kept, live) = control.subscribe();
    let head = if chunked {
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {JSON_LINES}\r\nTransfer-Encoding: chunked\r\n\
             Cache-Control: no-store\r\n\r\n"
        )
    } else {
        format!("HTTP/1.0 200 OK\r\nContent-Type: {JSON_LINES}\r\nConnection: close\r\n\r\n")
    };
    let mut send = |bytes: &[u8]| wire.write_all(bytes, Instant::now() + write_limit).is_ok();
    if !send(head.as_bytes()) {
        return false;
    }
    for event in &kept {
        if !send(&line(event, chunked)) {
            return false;
        }
    }
    if !follow {
        return !chunked || send(b"0\r\n\r\n");
    }
    loop {
        match live.recv_timeout(LOOK) {
            Ok(event) => {
                let deadline = Instant::now() + write_limit;
                if wire.write_all(&line(&event, chunked), deadline).is_err() {
                    return false;
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                if gone(wire.stream()) {
                    return false;
                }
            }
            // Too slow a reader, or the daemon ends. No last chunk: the reader must not take the
            // stream for complete.
            Err(RecvTimeoutError::Disconnected) => return false,
        }
    }
}

fn line(event: &Event, chunked: bool) -> Vec<u8> {
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    if !chunked {
        return line;
    }
    let mut bytes = format!("{:x}\r\n", line.len()).into_bytes();
    bytes.extend_from_slice(&line);
    bytes.extend_from_slice(b"\r\n");
    bytes
}
