//! One line of a trace, on the stack. Its longest is a call of 17 arguments with a structure of 25 words.

use core::fmt::{self, Write as _};

const BYTES: usize = 2048;

pub(super) struct Line {
    buffer: [u8; BYTES],
    len: usize,
}

impl fmt::Write for Line {
    /// What does not fit is left out whole, so that a line never ends within a number.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.len + text.len();
        let room = self.buffer.get_mut(self.len..end).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

macro_rules! put {
    ($line:expr, $($text:tt)*) => {{
        let _ = write!($line, $($text)*);
    }};
}

impl Line {
    pub(super) const fn new() -> Self {
        Self {
            buffer: [0; BYTES],
            len: 0,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    /// The first line of a trace.
    pub(super) fn head(&mut self, version: u32, process: i32) {
        put!(
            self,
            "{{\"spillway_trace\":{version},\"library\":\"{}\",\"process\":{process}}}\n",
            env!("CARGO_PKG_VERSION")
        );
    }

    /// The beginning of the line on the machine.
    pub(super) fn machine(&mut self, driver: i32) {
        put!(self, "{{\"driver\":{driver},\"devices\":[");
    }

    /// A device of the list.
    pub(super) fn device(&mut self, further: bool, bytes: u64) {
        let comma = if further { "," } else { "" };
        put!(self, "{comma}{bytes}");
    }

    pub(super) fn end_list(&mut self) {
        put!(self, "]}}\n");
    }

    /// The beginning of a call.
    pub(super) fn call(&mut self, name: &str, at: u64, took: u64, thread: i64, status: i32) {
        put!(
            self,
            "{{\"t\":{at},\"d\":{took},\"th\":{thread},\"call\":\"{name}\",\"r\":{status}"
        );
    }

    /// The arguments as they came.
    pub(super) fn words(&mut self, words: &[u64]) {
        put!(self, ",\"a\":");
        self.list(words);
    }

    fn list(&mut self, words: &[u64]) {
        put!(self, "[");
        for (index, word) in words.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            put!(self, "{comma}{word}");
        }
        put!(self, "]");
    }

    /// A group of what arguments point to: `"o":{"0":1`. The first has no comma before it.
    pub(super) fn output(&mut self, first: bool, index: usize, value: u64) {
        let open = if first { ",\"o\":{" } else { "," };
        put!(self, "{open}\"{index}\":{value}");
    }

    /// What an argument that is read and written held before the call.
    pub(super) fn input(&mut self, index: usize, value: u32) {
        put!(self, ",\"i\":{{\"{index}\":{value}}}");
    }

    pub(super) fn end_group(&mut self) {
        put!(self, "}}");
    }

    /// A structure or list of numbers that an argument points to.
    pub(super) fn block(&mut self, index: usize, words: &[u64]) {
        put!(self, ",\"b\":{{\"{index}\":");
        self.list(words);
        put!(self, "}}");
    }

    /// A name that an argument points to.
    pub(super) fn text(&mut self, index: usize, text: &[u8]) {
        put!(self, ",\"s\":{{\"{index}\":\"");
        for &byte in text.iter().take(256) {
            match byte {
                b'"' | b'\\' => put!(self, "\\{}", char::from(byte)),
                b' '..=b'~' => put!(self, "{}", char::from(byte)),
                _ => put!(self, "?"),
            }
        }
        put!(self, "\"}}");
    }

    /// The end of a call. A line that did not fit would not end here; see the test.
    pub(super) fn end(&mut self) {
        put!(self, "}}\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_line_fits() {
        let mut line = Line::new();
        line.call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
            u64::MAX,
            u64::MAX,
            i64::MIN,
            i32::MIN,
        );
        line.words(&[u64::MAX; 17]);
        for index in 0..4 {
            line.output(index == 0, index, u64::MAX);
        }
        line.end_group();
        line.input(16, u32::MAX);
        line.block(16, &[u64::MAX; 32]);
        line.text(16, &[b'"'; 300]);
        line.end();
        assert!(line.bytes().ends_with(b"\"}}\n"), "{}", line.len);
    }

    #[test]
    fn names_are_escaped() {
        let mut line = Line::new();
        line.text(2, b"a\"b\\c\n\xff");
        assert_eq!(line.bytes(), b",\"s\":{\"2\":\"a\\\"b\\\\c??\"}");
    }
}
