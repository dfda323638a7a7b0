//! `spillway evict` and `spillway restore`: ask, wait, say what it took.

use std::time::Duration;

use spillway_protocol::format_bytes;

use super::EXIT_FAILED;
use super::EXIT_USAGE;
use super::args::{Place, SwapArgs};
use super::out::{Failure, clean, print};
use crate::api::ClientError;
use crate::api::http::percent_encode;
use crate::model::Done;

/// Moves one workload; `verb` is the last part of the API's path.
pub fn run(place: &Place, args: &SwapArgs, verb: &str) -> Result<(), Failure> {
    if !(args.timeout > 0.0 && args.timeout <= 3600.0) {
        let text = format!(
            "--timeout {}: write seconds, above 0 and up to 3600",
            args.timeout
        );
        return Err(Failure::new(EXIT_USAGE, text));
    }
    let client = place.client();
    let name = percent_encode(&args.name);
    let target = format!("/v1/workloads/{name}/{verb}?timeout={}", args.timeout);
    // The daemon ends the wait; the margin is for its answer.
    let time = Duration::from_secs_f64(args.timeout) + Duration::from_secs(5);
    let answer = client.ask("POST", &target, time)?;
    if answer.status != 200 {
        return Err(Failure::new(EXIT_FAILED, clean(&answer.error_text())));
    }
    if args.json {
        return print(&String::from_utf8_lossy(&answer.body));
    }
    let done: Done = serde_json::from_slice(&answer.body).map_err(|error| {
        ClientError::Foreign(client.socket().to_owned(), format!("bad answer: {error}"))
    })?;
    print(&line(&done, verb))
}

#[expect(clippy::cast_precision_loss, reason = "a rate with two digits")]
fn line(done: &Done, verb: &str) -> String {
    let name = clean(&done.name);
    let done_word = if verb == "evict" {
        "evicted"
    } else {
        "restored"
    };
    if done.bytes == 0 {
        return format!("{name}: nothing had to be moved\n");
    }
    let rate = match done.seconds {
        s if s > 0.0 => format!(", {:.2} GB/s", done.bytes as f64 / s / 1e9),
        _ => String::new(),
    };
    format!(
        "{name}: {done_word}, {} in {:.3} s{rate}\n",
        format_bytes(done.bytes),
        done.seconds
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_it_took() {
        let done = |bytes, seconds| Done {
            name: "w".into(),
            bytes,
            seconds,
        };
        assert_eq!(
            line(&done(1 << 30, 0.5), "evict"),
            "w: evicted, 1 GiB in 0.500 s, 2.15 GB/s\n"
        );
        assert_eq!(
            line(&done(0, 0.0), "restore"),
            "w: nothing had to be moved\n"
        );
        assert_eq!(
            line(&done(2 << 20, 0.0), "restore"),
            "w: restored, 2 MiB in 0.000 s\n"
        );
    }
}
