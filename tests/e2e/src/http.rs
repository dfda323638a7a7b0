//! HTTP/1.1 over a unix socket, written apart from the coordinator's own code: as `curl` would.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The head: status line and fields.
    pub head: String,
    /// The body, without transfer coding.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// It is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|why| panic!("{why}: {}", self.body))
    }

    /// The `error` of a JSON error, or the whole body.
    #[must_use]
    pub fn error(&self) -> String {
        let json = serde_json::from_str::<Value>(&self.body).ok();
        let text = json.as_ref().and_then(|json| json["error"].as_str());
        text.unwrap_or(&self.body).to_owned()
    }
}

/// Sends these bytes to a unix socket and reads until it closes, at most for `time` per read.
///
/// # Errors
/// The socket's.
pub fn send_raw(socket: &Path, bytes: &[u8], time: Duration) -> std::io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(time))?;
    stream.set_write_timeout(Some(time))?;
    stream.write_all(bytes)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// One request on a connection of its own.
///
/// # Errors
/// The socket's, or an answer that is no HTTP.
pub fn request(
    socket: &Path,
    method: &str,
    target: &str,
    time: Duration,
) -> std::io::Result<Answer> {
    let length = if method == "POST" {
        "Content-Length: 0\r\n"
    } else {
        ""
    };
    let text =
        format!("{method} {target} HTTP/1.1\r\nHost: test\r\n{length}Connection: close\r\n\r\n");
    parse(&send_raw(socket, text.as_bytes(), time)?)
        .ok_or_else(|| std::io::Error::other("the answer is no HTTP"))
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    let chunked = head
        .to_ascii_lowercase()
        .lines()
        .any(|line| line.starts_with("transfer-encoding:") && line.contains("chunked"));
    let rest = &bytes[end + 4..];
    let body = if chunked {
        unchunk(rest)?
    } else {
        rest.to_vec()
    };
    let body = String::from_utf8_lossy(&body).into_owned();
    Some(Answer { status, head, body })
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n")?;
        let size = std::str::from_utf8(&rest[..end]).ok()?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        rest = rest.get(end + 2..)?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_framings_are_read() {
        let plain = parse(b"HTTP/1.1 404 Not Found\r\nContent-Length: 13\r\n\r\n{\"error\":\"x\"}")
            .expect("reads");
        assert_eq!((plain.status, plain.error().as_str()), (404, "x"));
        let chunked = parse(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=1\r\nde\r\n0\r\n\r\n",
        );
        assert_eq!(chunked.expect("reads").body, "abcde");
        assert!(parse(b"nonsense\r\n\r\n").is_none());
    }
}
