//! Printing and failing. A reader that closes standard output early (`| head -1`) ends the command
//! without a word; any other failed write is an error.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use super::EXIT_FAILED;
use crate::api::ClientError;

/// Why the command ends, and with which exit code.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    code: u8,
    text: Option<String>,
}

impl Failure {
    /// Ends with this code and one line on standard error.
    pub fn new(code: u8, text: impl Display) -> Self {
        Self {
            code,
            text: Some(text.to_string()),
        }
    }

    /// Ends with this code; everything has been said.
    pub fn silent(code: u8) -> Self {
        Self { code, text: None }
    }

    /// The reason, without who says it.
    pub fn text(&self) -> &str {
        self.text.as_deref().unwrap_or_default()
    }

    /// Says why, and gives the exit code.
    pub fn report(self) -> ExitCode {
        if let Some(text) = self.text {
            warn(&text);
        }
        ExitCode::from(self.code)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(EXIT_FAILED, error)
    }
}

/// One line on standard error; nobody there to read it is no reason to fail.
pub fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "spillway: {text}");
}

/// Writes to standard output, at once.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::silent(0)),
        Err(error) => Err(Failure::new(
            EXIT_FAILED,
            format!("cannot write to standard output: {error}"),
        )),
    }
}

/// A text from elsewhere, fit for a terminal: control characters cannot move the cursor or recolour
/// what follows.
pub fn clean(text: &str) -> String {
    let shown = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_not_passed_on() {
        assert_eq!(clean("a\x1b[31m\u{9b}b\n"), "a?[31m?b?");
    }
}
