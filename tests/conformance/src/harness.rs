//! What a case is, how it ends, and the words it is written in.
//!
//! A case ends by returning: done, failed with a text, or skipped with a reason. `ok!`, `is!`, `fails!` and
//! `check!` return early; `observe!` prints a fact that is worth knowing and on which drivers may differ.

use crate::api::Code;

/// Why a case stopped before its end.
pub enum Stop {
    Fail(String),
    Skip(String),
}

/// How a case ended.
pub type Outcome = Result<(), Stop>;

/// One rule of the driver.
pub struct Case {
    pub topic: &'static str,
    pub name: &'static str,
    pub run: fn() -> Outcome,
}

impl Case {
    /// `topic.name`, as `run` takes it.
    pub fn full_name(&self) -> String {
        format!("{}.{}", self.topic, self.name)
    }
}

/// The text of a failed call.
pub fn wrong(call: &str, got: Code, wanted: &str, file: &str, line: u32) -> Stop {
    // The call as written may span lines; the report is one line.
    let call = call.split_whitespace().collect::<Vec<_>>().join(" ");
    Stop::Fail(format!(
        "{file}:{line}: {call} returned {got:?}, wanted {wanted}"
    ))
}

/// The call succeeds.
macro_rules! ok {
    ($call:expr) => {
        match $call {
            code if code.is_ok() => {}
            code => {
                return Err($crate::harness::wrong(
                    stringify!($call),
                    code,
                    "success",
                    file!(),
                    line!(),
                ))
            }
        }
    };
}

/// The call returns exactly this code.
macro_rules! is {
    ($call:expr, $code:ident) => {
        match $call {
            code if code == $crate::api::Code::$code => {}
            code => {
                return Err($crate::harness::wrong(
                    stringify!($call),
                    code,
                    stringify!($code),
                    file!(),
                    line!(),
                ))
            }
        }
    };
}

/// The call fails with some code of the driver, which is reported as an observation.
macro_rules! fails {
    ($call:expr) => {
        match $call {
            code if code.is_ok() || code == $crate::api::Code::ABSENT => {
                return Err($crate::harness::wrong(
                    stringify!($call),
                    code,
                    "an error",
                    file!(),
                    line!(),
                ));
            }
            code => {
                let call = stringify!($call)
                    .split('(')
                    .next()
                    .unwrap_or_default()
                    .to_string();
                $crate::harness::observe!("{call} refuses with {code:?}");
            }
        }
    };
}

/// A condition holds.
macro_rules! check {
    ($cond:expr, $($text:tt)+) => {{
        let holds: bool = $cond;
        if !holds {
            return Err($crate::harness::Stop::Fail(format!("{}:{}: {}", file!(), line!(), format!($($text)+))));
        }
    }};
}

/// Drivers may differ here; say what this one does.
macro_rules! observe {
    ($($text:tt)+) => {
        println!("observed: {}", format!($($text)+))
    };
}

/// The rule does not apply on this machine.
macro_rules! skip {
    ($($text:tt)+) => {
        return Err($crate::harness::Stop::Skip(format!($($text)+)))
    };
}

/// The table of one topic's file.
macro_rules! cases {
    ($topic:literal: $($name:ident),* $(,)?) => {
        pub const CASES: &[$crate::harness::Case] = &[
            $($crate::harness::Case { topic: $topic, name: stringify!($name), run: $name }),*
        ];
    };
}

pub(crate) use {cases, check, fails, is, observe, ok, skip};
