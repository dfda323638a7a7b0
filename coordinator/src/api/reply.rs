//! An answer of the API with its body known: status, type, length.

use std::fmt::Write as _;

use serde::Serialize;

/// An answer whose body is complete.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: &'static str,
    /// The `Allow` field of a 405.
    pub allow: Option<&'static str>,
    /// The body.
    pub body: Vec<u8>,
}

/// `Content-Type` of every JSON answer.
pub const JSON: &str = "application/json";
/// `Content-Type` of the event stream: one JSON object per line.
pub const JSON_LINES: &str = "application/x-ndjson";

impl Reply {
    /// An answer with a JSON body, ended by a line feed for those who read it in a terminal.
    #[must_use]
    pub fn json(status: u16, value: &impl Serialize) -> Self {
        let mut body = serde_json::to_vec(value).unwrap_or_else(|error| {
            tracing::error!("an answer cannot be written as JSON: {error}");
            br#"{"error":"internal error of spillwayd: its log says more"}"#.to_vec()
        });
        body.push(b'\n');
        Self {
            status,
            content_type: JSON,
            allow: None,
            body,
        }
    }

    /// `{"error": text}`.
    #[must_use]
    pub fn error(status: u16, text: &str) -> Self {
        Self::json(status, &serde_json::json!({ "error": text }))
    }

    /// 405, naming what the path does answer.
    #[must_use]
    pub fn not_allowed(method: &str, path: &str, allow: &'static str) -> Self {
        let text = format!("{method} is not possible on {path}; it answers {allow}");
        Self {
            allow: Some(allow),
            ..Self::error(405, &text)
        }
    }

    /// The bytes that go over the wire.
    #[must_use]
    pub fn bytes(&self, close: bool, head_only: bool) -> Vec<u8> {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n",
            self.status,
            reason(self.status),
            self.content_type,
            self.body.len()
        );
        if let Some(allow) = self.allow {
            let _ = write!(head, "Allow: {allow}\r\n");
        }
        head.push_str(if close {
            "Connection: close\r\n\r\n"
        } else {
            "Connection: keep-alive\r\n\r\n"
        });
        let mut bytes = head.into_bytes();
        if !head_only {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

/// The phrase that goes with a status code.
#[must_use]
pub fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Unknown",
    }
}
