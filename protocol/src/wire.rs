//! Little-endian fields in a byte buffer: all that a session message is made of.

use std::fmt;

/// Why a message cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WireError {
    /// The message ends before the named field.
    Truncated(&'static str),
    /// Bytes remain after the last field.
    Trailing(usize),
    /// The named field holds a value outside its range.
    Invalid(&'static str),
    /// No message has this kind.
    UnknownKind(u32),
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WireError::Truncated(field) => write!(f, "message ends before {field}"),
            WireError::Trailing(bytes) => write!(f, "{bytes} bytes after the message's last field"),
            WireError::Invalid(field) => write!(f, "{field} is outside its range"),
            WireError::UnknownKind(kind) => write!(f, "unknown message kind {kind}"),
        }
    }
}

impl std::error::Error for WireError {}

/// Reads fields from the front of a message.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize, field: &'static str) -> Result<&'a [u8], WireError> {
        if self.0.len() < bytes {
            return Err(WireError::Truncated(field));
        }
        let (head, tail) = self.0.split_at(bytes);
        self.0 = tail;
        Ok(head)
    }

    /// Reads `N` raw bytes.
    ///
    /// # Errors
    /// The message ends before them.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let bytes = self.take(N, field)?;
        bytes.try_into().map_err(|_| WireError::Truncated(field))
    }

    /// Reads an unsigned 32-bit field.
    ///
    /// # Errors
    /// The message ends before it.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    /// Reads a signed 32-bit field.
    ///
    /// # Errors
    /// The message ends before it.
    pub fn i32(&mut self, field: &'static str) -> Result<i32, WireError> {
        Ok(i32::from_le_bytes(self.array(field)?))
    }

    /// Reads an unsigned 64-bit field.
    ///
    /// # Errors
    /// The message ends before it.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// Reads a text of at most `max` bytes.
    ///
    /// # Errors
    /// The message ends before it, it is longer, or it is not UTF-8.
    pub fn text(&mut self, max: usize, field: &'static str) -> Result<String, WireError> {
        let len = self.u32(field)? as usize;
        if len > max {
            return Err(WireError::Invalid(field));
        }
        let bytes = self.take(len, field)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| WireError::Invalid(field))
    }

    /// Ends the message.
    ///
    /// # Errors
    /// Bytes remain.
    pub fn end(self) -> Result<(), WireError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(WireError::Trailing(self.0.len()))
        }
    }
}

/// Appends fields to a message.
#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// Appends raw bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends an unsigned 32-bit field.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a signed 32-bit field.
    pub fn i32(&mut self, value: i32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends an unsigned 64-bit field.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Appends a text, cut to at most `max` bytes at a character's border.
    pub fn text(&mut self, text: &str, max: usize) -> &mut Self {
        let mut end = text.len().min(max);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.u32(u32::try_from(end).unwrap_or(0))
            .bytes(&text.as_bytes()[..end])
    }
}
