//! Reading a trace. It comes from anywhere: every error names the line and what is wrong there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// The version of the format that is read.
pub const VERSION: u64 = 1;
/// No recorded line is longer; a file that is no trace may be.
const LINE_MAX: u64 = 64 << 10;
/// More calls than anybody would replay.
const CALLS_MAX: usize = 10_000_000;
/// The most arguments that an entry point has.
const WORDS_MAX: usize = 17;
/// The most devices of a simulated machine.
const DEVICES_MAX: usize = 16;

/// A trace.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// As `cuDriverGetVersion` says; 0: the trace ended before.
    pub driver: u32,
    /// Bytes of each device's memory.
    pub devices: Vec<u64>,
    /// In an order in which they can be played.
    pub calls: Vec<Call>,
    /// The last line is not whole.
    pub cut_off: bool,
}

/// A recorded call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Where it stands in the file.
    pub line: usize,
    /// Nanoseconds since the trace began.
    pub at: u64,
    /// Nanoseconds that it took.
    pub took: u64,
    /// The calling thread.
    pub thread: i64,
    /// The entry point.
    pub name: String,
    /// What it answered.
    pub status: i32,
    /// Its arguments.
    pub words: Vec<u64>,
    /// What arguments pointed to afterwards.
    pub outputs: BTreeMap<usize, u64>,
    /// What an argument that is read and written pointed to before.
    pub input: Option<u64>,
    /// A structure that an argument points to.
    pub block: Vec<u64>,
    /// A name that an argument points to.
    pub text: Option<String>,
}

impl Call {
    /// The place among the calls: what takes something away counts from its beginning, since others may be
    /// given the same while it runs; the rest from its end.
    fn place(&self) -> u64 {
        let takes = [
            "Free",
            "Destroy",
            "Release",
            "Unload",
            "Unmap",
            "Unregister",
            "Reset",
        ];
        if takes.iter().any(|word| self.name.contains(word)) {
            self.at
        } else {
            self.at.saturating_add(self.took)
        }
    }
}

/// Reads a trace.
///
/// # Errors
/// The file cannot be read, or a line is not as the format says.
pub fn read(path: &Path) -> Result<Trace> {
    let file = File::open(path).with_context(|| format!("{}", path.display()))?;
    parse(BufReader::new(file)).with_context(|| format!("{}", path.display()))
}

/// As [`read`], from anywhere.
///
/// # Errors
/// As there.
pub fn parse(mut from: impl BufRead) -> Result<Trace> {
    let mut trace = Trace::default();
    let mut number = 0;
    let mut line = Vec::new();
    loop {
        line.clear();
        let bytes = from
            .by_ref()
            .take(LINE_MAX + 1)
            .read_until(b'\n', &mut line);
        if bytes.context("cannot be read")? == 0 {
            break;
        }
        number += 1;
        ensure!(
            line.len() as u64 <= LINE_MAX,
            "line {number}: longer than {LINE_MAX} bytes: this is no trace"
        );
        if line.last() != Some(&b'\n') {
            trace.cut_off = true;
            ensure!(
                number > 1,
                "line 1: cut off: there is nothing in this trace"
            );
            break;
        }
        let value: Value = serde_json::from_slice(&line)
            .map_err(|why| anyhow::anyhow!("line {number}: not a JSON object: {why}"))?;
        let Value::Object(object) = value else {
            bail!("line {number}: not a JSON object");
        };
        one(&mut trace, number, &object).with_context(|| format!("line {number}"))?;
        ensure!(
            trace.calls.len() <= CALLS_MAX,
            "line {number}: more than {CALLS_MAX} calls"
        );
    }
    ensure!(number > 0, "the file is empty");
    trace.calls.sort_by_key(Call::place);
    Ok(trace)
}

fn one(trace: &mut Trace, number: usize, object: &Map<String, Value>) -> Result<()> {
    if number == 1 {
        let version = object.get("spillway_trace").and_then(Value::as_u64);
        return match version {
            Some(VERSION) => Ok(()),
            Some(other) => {
                bail!("a trace of version {other}; this program reads version {VERSION}")
            }
            None => bail!("no trace: the first line has no \"spillway_trace\""),
        };
    }
    if let Some(devices) = object.get("devices") {
        let devices = numbers(devices, "devices", DEVICES_MAX)?;
        ensure!(!devices.is_empty(), "\"devices\" is empty");
        trace.devices = devices;
        trace.driver = u32::try_from(number_of(object, "driver")?).context("\"driver\"")?;
        return Ok(());
    }
    let name = object
        .get("call")
        .and_then(Value::as_str)
        .unwrap_or_default();
    ensure!(
        name.starts_with("cu") && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
        "\"call\" is not the name of a driver call"
    );
    let words = object.get("a").context("no arguments (\"a\")")?;
    let words = numbers(words, "a", WORDS_MAX)?;
    let group = |key: &str| -> Result<Option<(usize, &Value)>> {
        Ok(group(object, key, words.len())?.into_iter().next())
    };
    let outputs = self::group(object, "o", words.len())?.into_iter();
    let outputs = outputs.map(|(index, value)| {
        let value = value.as_u64().context("\"o\" is not of numbers")?;
        Ok((index, value))
    });
    let block = match group("b")? {
        Some((_, value)) => numbers(value, "b", 64)?,
        None => Vec::new(),
    };
    let text = match group("s")? {
        Some((_, value)) => Some(value.as_str().context("\"s\" is not of texts")?.to_owned()),
        None => None,
    };
    let input = match group("i")? {
        Some((_, value)) => Some(value.as_u64().context("\"i\" is not of numbers")?),
        None => None,
    };
    let status = object.get("r").and_then(Value::as_i64);
    trace.calls.push(Call {
        line: number,
        at: number_of(object, "t")?,
        took: number_of(object, "d")?,
        thread: object
            .get("th")
            .and_then(Value::as_i64)
            .context("no thread (\"th\")")?,
        name: name.to_owned(),
        status: status
            .and_then(|status| i32::try_from(status).ok())
            .context("no status (\"r\")")?,
        outputs: outputs.collect::<Result<_>>()?,
        words,
        input,
        block,
        text,
    });
    Ok(())
}

fn number_of(object: &Map<String, Value>, key: &str) -> Result<u64> {
    let value = object.get(key).and_then(Value::as_u64);
    value.with_context(|| format!("\"{key}\" is not a number of 0 or more"))
}

fn numbers(value: &Value, key: &str, most: usize) -> Result<Vec<u64>> {
    let list = value
        .as_array()
        .with_context(|| format!("\"{key}\" is not a list"))?;
    ensure!(list.len() <= most, "\"{key}\" has more than {most} entries");
    list.iter()
        .map(|value| {
            let number = value.as_u64();
            number.with_context(|| format!("\"{key}\" is not a list of numbers of 0 or more"))
        })
        .collect()
}

/// A group of what arguments point to, by the argument's index.
fn group<'a>(
    object: &'a Map<String, Value>,
    key: &str,
    arguments: usize,
) -> Result<Vec<(usize, &'a Value)>> {
    let Some(value) = object.get(key) else {
        return Ok(Vec::new());
    };
    let group = value
        .as_object()
        .with_context(|| format!("\"{key}\" is not an object"))?;
    group
        .iter()
        .map(|(index, value)| match index.parse::<usize>() {
            Ok(index) if index < arguments => Ok((index, value)),
            _ => bail!("\"{key}\": there is no argument {index}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "{\"spillway_trace\":1,\"library\":\"0.1.0\",\"process\":7}\n";

    fn error(text: &str) -> String {
        format!("{:#}", parse(text.as_bytes()).expect_err(text))
    }

    #[test]
    fn reads_what_the_library_writes() {
        let text = format!(
            "{HEAD}{{\"driver\":12080,\"devices\":[1024,2048]}}\n\
             {{\"t\":5,\"d\":2,\"th\":9,\"call\":\"cuMemAlloc_v2\",\"r\":0,\"a\":[77,4096],\"o\":{{\"0\":99}}}}\n\
             {{\"t\":8,\"d\":2,\"th\":9,\"call\":\"cuModuleGetFunction\",\"r\":500,\"a\":[1,2,3],\"s\":{{\"2\":\"x\"}}}}\n"
        );
        let trace = parse(text.as_bytes()).expect("a trace");
        assert_eq!(
            (trace.driver, &trace.devices[..], trace.cut_off),
            (12080, &[1024, 2048][..], false)
        );
        assert_eq!(trace.calls.len(), 2);
        assert_eq!(trace.calls[0].words, [77, 4096]);
        assert_eq!(trace.calls[0].outputs[&0], 99);
        assert_eq!(
            (trace.calls[1].status, trace.calls[1].text.as_deref()),
            (500, Some("x"))
        );
    }

    #[test]
    fn errors_name_the_line_and_what_is_wrong() {
        assert!(error("").contains("empty"));
        assert!(error("{}\n").contains("line 1: no trace"));
        assert!(error("{\"spillway_trace\":2}\n").contains("version 2"));
        assert!(error("{\"spillway_trace\":1}").contains("cut off"));
        for (line, what) in [
            ("[]", "not a JSON object"),
            ("nonsense", "not a JSON object"),
            ("{\"call\":\"rm -rf\"}", "\"call\""),
            ("{\"call\":\"cuInit\"}", "no arguments"),
            ("{\"call\":\"cuInit\",\"a\":[-1]}", "\"a\""),
            (
                "{\"call\":\"cuInit\",\"a\":[0],\"t\":1,\"d\":1,\"th\":1}",
                "no status",
            ),
            (
                "{\"call\":\"cuInit\",\"a\":[0],\"t\":1,\"d\":1,\"th\":1,\"r\":0,\"o\":{\"1\":0}}",
                "no argument 1",
            ),
            ("{\"driver\":1,\"devices\":[]}", "empty"),
        ] {
            let error = error(&format!("{HEAD}{line}\n"));
            assert!(
                error.contains("line 2: ") && error.contains(what),
                "{line}: {error}"
            );
        }
        let long = format!("{HEAD}{}\n", "x".repeat(100_000));
        assert!(error(&long).contains("line 2: longer"));
    }

    #[test]
    fn a_line_that_is_cut_off_ends_the_trace() {
        let trace = parse(format!("{HEAD}{{\"t\":5,").as_bytes()).expect("a trace");
        assert!(trace.cut_off && trace.calls.is_empty());
    }

    #[test]
    fn what_takes_away_comes_before_what_is_given_meanwhile() {
        let line = |at, took, call: &str| {
            format!("{{\"t\":{at},\"d\":{took},\"th\":1,\"call\":\"{call}\",\"r\":0,\"a\":[]}}\n")
        };
        let text = format!(
            "{HEAD}{}{}",
            line(12, 1, "cuMemAlloc_v2"),
            line(10, 5, "cuMemFree_v2")
        );
        let trace = parse(text.as_bytes()).expect("a trace");
        assert_eq!(trace.calls[0].name, "cuMemFree_v2");
    }
}
