//! The little of HTTP/1.1 that both ends of `api.sock` need: reading a message's head and body
//! from a unix socket under a deadline and under size bounds, chunked bodies, and percent-encoding.
//!
//! Every read has a deadline for the message as a whole, not for one read: a peer that sends a byte
//! now and then gains nothing. What the peer sent beyond one message is kept for the next
//! (pipelining).

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The largest head (request or status line and headers) that is read, in bytes.
pub const MAX_HEAD: usize = 16 * 1024;
/// The largest request body that is read, in bytes.
pub const MAX_BODY: usize = 64 * 1024;
/// Header fields in one head.
pub const MAX_HEADERS: usize = 64;
/// The longest line that frames a chunk (size and extensions, or a trailer), in bytes.
const MAX_CHUNK_LINE: usize = 1024;

/// Why a message could not be read or written.
#[derive(Debug)]
pub enum Fault {
    /// The peer closed the connection. `true`: in the middle of a message.
    Closed(bool),
    /// The deadline passed.
    Timeout,
    /// The head is larger than [`MAX_HEAD`] or has more than [`MAX_HEADERS`] fields.
    HeadTooLarge,
    /// The body is larger than the reader's bound.
    BodyTooLarge,
    /// It is not HTTP; the text says what is wrong.
    Malformed(String),
    /// A framing that this end does not know.
    Unsupported(String),
    /// The socket failed.
    Io(io::Error),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Closed(true) => f.write_str("the connection was closed in the middle"),
            Fault::Closed(false) => f.write_str("the connection was closed"),
            Fault::Timeout => f.write_str("no answer in time"),
            Fault::HeadTooLarge => write!(
                f,
                "the head is larger than {MAX_HEAD} bytes or has more than {MAX_HEADERS} fields"
            ),
            Fault::BodyTooLarge => f.write_str("the body is too large"),
            Fault::Malformed(what) | Fault::Unsupported(what) => f.write_str(what),
            Fault::Io(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for Fault {}

fn malformed(what: impl Into<String>) -> Fault {
    Fault::Malformed(what.into())
}

/// Header fields in the order they came; names compare without case.
#[derive(Clone, Debug, Default)]
pub struct Fields(Vec<(String, String)>);

impl Fields {
    /// The first field of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// Every field of that name.
    pub fn all<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = &'a str> + use<'a, 'n> {
        let same = move |field: &&'a (String, String)| field.0.eq_ignore_ascii_case(name);
        self.0.iter().filter(same).map(|field| field.1.as_str())
    }

    /// Whether a comma-separated field holds a token, without case.
    #[must_use]
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.all(name)
            .flat_map(|value| value.split(','))
            .any(|value| value.trim().eq_ignore_ascii_case(token))
    }

    fn from_parsed(parsed: &[httparse::Header<'_>]) -> Self {
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        Self(
            parsed
                .iter()
                .map(|h| (h.name.to_owned(), text(h.value)))
                .collect(),
        )
    }
}

/// A request's head.
#[derive(Clone, Debug)]
pub struct RequestHead {
    /// As sent.
    pub method: String,
    /// As sent: path and query, still percent-encoded.
    pub target: String,
    /// HTTP/1.0: no chunked bodies, and the connection ends unless asked otherwise.
    pub http10: bool,
    /// The header fields.
    pub fields: Fields,
}

/// A response's head.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// The status code.
    pub status: u16,
    /// The header fields.
    pub fields: Fields,
}

/// How a body's end is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// This many bytes.
    Length(u64),
    /// Chunks, the last of them empty.
    Chunked,
    /// Everything until the peer closes (responses only).
    UntilClose,
}

impl Framing {
    /// Reads the framing from a head.
    ///
    /// # Errors
    /// A length that is no number, lengths that differ, a length beside a transfer encoding, or an
    /// encoding other than chunked.
    pub fn of(fields: &Fields, without: Framing) -> Result<Self, Fault> {
        let mut length: Option<u64> = None;
        for value in fields.all("content-length") {
            let value = value.trim();
            if value.is_empty() || !value.bytes().all(|b| b.is_ascii_digit()) {
                return Err(malformed(format!("Content-Length {value:?} is no number")));
            }
            let number = value
                .parse()
                .map_err(|_| malformed(format!("Content-Length {value} is too large")))?;
            if length.is_some_and(|before| before != number) {
                return Err(malformed("two Content-Length fields that differ"));
            }
            length = Some(number);
        }
        let mut encodings = fields.all("transfer-encoding").peekable();
        if encodings.peek().is_none() {
            return Ok(length.map_or(without, Framing::Length));
        }
        if length.is_some() {
            return Err(malformed("both Content-Length and Transfer-Encoding"));
        }
        let list: Vec<_> = encodings.flat_map(|e| e.split(',')).collect();
        match list.as_slice() {
            [one] if one.trim().eq_ignore_ascii_case("chunked") => Ok(Framing::Chunked),
            _ => Err(Fault::Unsupported(format!(
                "Transfer-Encoding {:?}: only \"chunked\" is understood",
                list.join(",")
            ))),
        }
    }
}

/// A connection and what was read from it but not yet used.
pub struct Wire {
    stream: UnixStream,
    ahead: Vec<u8>,
}

impl Wire {
    /// Takes over a connected stream.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            ahead: Vec::new(),
        }
    }

    /// The socket below.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether bytes of a next message are already here.
    #[must_use]
    pub fn has_more(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Waits until the peer sends something; `false`: it closed, or nothing came in time.
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait(&mut self, deadline: Instant) -> Result<bool, Fault> {
        if self.has_more() {
            return Ok(true);
        }
        match self.fill(deadline) {
            Ok(bytes) => Ok(bytes > 0),
            Err(Fault::Timeout) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Reads once; 0: the peer closed.
    fn fill(&mut self, deadline: Instant) -> Result<usize, Fault> {
        let mut block = [0u8; 4096];
        loop {
            self.stream
                .set_read_timeout(Some(left(deadline)?))
                .map_err(Fault::Io)?;
            match self.stream.read(&mut block) {
                Ok(bytes) => {
                    self.ahead.extend_from_slice(&block[..bytes]);
                    return Ok(bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Err(Fault::Timeout),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                Err(error) => return Err(Fault::Io(error)),
            }
        }
    }

    fn fill_some(&mut self, deadline: Instant) -> Result<(), Fault> {
        match self.fill(deadline)? {
            0 => Err(Fault::Closed(true)),
            _ => Ok(()),
        }
    }

    /// Drops the empty lines that a client may send before a request.
    fn skip_blank_lines(&mut self) {
        let blank = |b: &&u8| matches!(**b, b'\r' | b'\n');
        let count = self.ahead.iter().take_while(blank).count();
        self.ahead.drain(..count);
    }

    /// Reads a request's head.
    ///
    /// # Errors
    /// [`Fault`]; `Closed(false)` when the peer closed before the first byte.
    pub fn request_head(&mut self, deadline: Instant) -> Result<RequestHead, Fault> {
        let mut first = true;
        loop {
            self.skip_blank_lines();
            if !self.ahead.is_empty() && (first || self.new_line()) {
                let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
                let mut parsed = httparse::Request::new(&mut fields);
                match parsed.parse(&self.ahead) {
                    Ok(httparse::Status::Complete(bytes)) if bytes <= MAX_HEAD => {
                        let head = RequestHead {
                            method: parsed.method.unwrap_or_default().to_owned(),
                            target: parsed.path.unwrap_or_default().to_owned(),
                            http10: parsed.version == Some(0),
                            fields: Fields::from_parsed(parsed.headers),
                        };
                        self.ahead.drain(..bytes);
                        return Ok(head);
                    }
                    Ok(httparse::Status::Complete(_)) => return Err(Fault::HeadTooLarge),
                    Ok(httparse::Status::Partial) => first = false,
                    Err(httparse::Error::TooManyHeaders) => return Err(Fault::HeadTooLarge),
                    Err(error) => return Err(malformed(format!("not HTTP/1.1: {error}"))),
                }
            }
            if self.ahead.len() > MAX_HEAD {
                return Err(Fault::HeadTooLarge);
            }
            let before = self.ahead.len();
            match self.fill(deadline) {
                Ok(0) => return Err(Fault::Closed(before > 0)),
                Ok(_) => {}
                // Silence before the first byte is an idle connection, not a slow request.
                Err(Fault::Timeout) if before == 0 => return Err(Fault::Closed(false)),
                Err(fault) => return Err(fault),
            }
        }
    }

    /// Whether the last block read can have completed a head; saves parsing it byte by byte.
    fn new_line(&self) -> bool {
        self.ahead.len() > MAX_HEAD || self.ahead.contains(&b'\n')
    }

    /// Reads a response's head, skipping interim (1xx) ones.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn response_head(&mut self, deadline: Instant) -> Result<ResponseHead, Fault> {
        loop {
            let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
            let mut parsed = httparse::Response::new(&mut fields);
            match parsed.parse(&self.ahead) {
                Ok(httparse::Status::Complete(bytes)) => {
                    let head = ResponseHead {
                        status: parsed.code.unwrap_or_default(),
                        fields: Fields::from_parsed(parsed.headers),
                    };
                    self.ahead.drain(..bytes);
                    if (100..200).contains(&head.status) {
                        continue;
                    }
                    return Ok(head);
                }
                Ok(httparse::Status::Partial) => {}
                Err(httparse::Error::TooManyHeaders) => return Err(Fault::HeadTooLarge),
                Err(error) => return Err(malformed(format!("no HTTP answer: {error}"))),
            }
            if self.ahead.len() > MAX_HEAD {
                return Err(Fault::HeadTooLarge);
            }
            self.fill_some(deadline)?;
        }
    }

    /// Reads a whole body of at most `max` bytes.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn body(
        &mut self,
        framing: Framing,
        max: usize,
        deadline: Instant,
    ) -> Result<Vec<u8>, Fault> {
        let mut body = Vec::new();
        let mut reader = BodyReader::new(framing);
        while let Some(piece) = reader.piece(self, deadline)? {
            if body.len() + piece.len() > max {
                return Err(Fault::BodyTooLarge);
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    fn line(&mut self, deadline: Instant) -> Result<Vec<u8>, Fault> {
        loop {
            if let Some(end) = self.ahead.iter().position(|b| *b == b'\n') {
                let mut line: Vec<u8> = self.ahead.drain(..=end).collect();
                line.pop();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                return Ok(line);
            }
            if self.ahead.len() > MAX_CHUNK_LINE {
                return Err(malformed("a chunk's size line is too long"));
            }
            self.fill_some(deadline)?;
        }
    }

    /// Writes everything before the deadline.
    ///
    /// # Errors
    /// The peer does not read, or is gone.
    pub fn write_all(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<(), Fault> {
        while !bytes.is_empty() {
            self.stream
                .set_write_timeout(Some(left(deadline)?))
                .map_err(Fault::Io)?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(Fault::Closed(true)),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if would_block(&error) => return Err(Fault::Timeout),
                Err(error) => return Err(Fault::Io(error)),
            }
        }
        Ok(())
    }
}

/// A body being read piece by piece.
pub struct BodyReader {
    framing: Framing,
    /// Bytes left of the length, or of the chunk.
    left: u64,
    /// A chunk was read whole: its line end comes next.
    chunk_end: bool,
    done: bool,
}

impl BodyReader {
    /// Starts at the first byte after the head.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        let left = match framing {
            Framing::Length(bytes) => bytes,
            Framing::Chunked | Framing::UntilClose => 0,
        };
        Self {
            framing,
            left,
            chunk_end: false,
            done: false,
        }
    }

    /// The next bytes, never empty; `None` at the end.
    ///
    /// # Errors
    /// [`Fault`]; `Closed(true)` when the body ends before its framing says so.
    pub fn piece(&mut self, wire: &mut Wire, deadline: Instant) -> Result<Option<Vec<u8>>, Fault> {
        if self.done {
            return Ok(None);
        }
        match self.framing {
            Framing::Length(_) if self.left == 0 => return Ok(self.end()),
            Framing::Chunked if self.left == 0 => {
                self.left = self.chunk(wire, deadline)?;
                if self.left == 0 {
                    for _ in 0..=MAX_HEADERS {
                        if wire.line(deadline)?.is_empty() {
                            return Ok(self.end());
                        }
                    }
                    return Err(malformed("too many trailer fields"));
                }
            }
            Framing::UntilClose => self.left = u64::MAX,
            Framing::Length(_) | Framing::Chunked => {}
        }
        if wire.ahead.is_empty() {
            match wire.fill(deadline)? {
                0 if self.framing == Framing::UntilClose => return Ok(self.end()),
                0 => return Err(Fault::Closed(true)),
                _ => {}
            }
        }
        let take = usize::try_from(self.left).unwrap_or(usize::MAX);
        let piece: Vec<u8> = wire.ahead.drain(..take.min(wire.ahead.len())).collect();
        self.left -= piece.len() as u64;
        self.chunk_end = self.left == 0;
        Ok(Some(piece))
    }

    fn end(&mut self) -> Option<Vec<u8>> {
        self.done = true;
        None
    }

    fn chunk(&mut self, wire: &mut Wire, deadline: Instant) -> Result<u64, Fault> {
        if std::mem::take(&mut self.chunk_end) && !wire.line(deadline)?.is_empty() {
            return Err(malformed("a chunk is longer than its size"));
        }
        let line = wire.line(deadline)?;
        let line = String::from_utf8_lossy(&line);
        let digits = line.split(';').next().unwrap_or_default().trim();
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(malformed(format!("chunk size {digits:?} is no number")));
        }
        u64::from_str_radix(digits, 16)
            .map_err(|_| malformed(format!("chunk size {digits} is too large")))
    }
}

fn left(deadline: Instant) -> Result<Duration, Fault> {
    let left = deadline.saturating_duration_since(Instant::now());
    // A timeout of zero would mean "for ever" to the kernel.
    if left < Duration::from_micros(1) {
        return Err(Fault::Timeout);
    }
    Ok(left)
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// Decodes `%41` escapes.
///
/// # Errors
/// An escape that is cut short or no number, or bytes that are not UTF-8; the text says which.
pub fn percent_decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
        match (digit(rest.next()), digit(rest.next())) {
            (Some(high), Some(low)) => bytes.extend(u8::try_from(high * 16 + low).ok()),
            _ => return Err(format!("{text:?} has a broken % escape")),
        }
    }
    String::from_utf8(bytes).map_err(|_| format!("{text:?} does not decode to UTF-8"))
}

/// Encodes what cannot stand in a path segment.
#[must_use]
pub fn percent_encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}
