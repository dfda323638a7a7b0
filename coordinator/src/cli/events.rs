//! `spillway events`: one line per event, as they happen.

use std::ops::ControlFlow;

use super::EXIT_FAILED;
use super::args::{EventsArgs, Place};
use super::out::{Failure, clean, print};
use crate::api::ClientError;
use crate::model::Event;

/// Prints the kept events, and those to come unless told otherwise.
pub fn run(place: &Place, args: &EventsArgs) -> Result<(), Failure> {
    let client = place.client();
    let target = if args.no_follow {
        "/v1/events?follow=0"
    } else {
        "/v1/events"
    };
    let mut failure = None;
    let other = client.lines(target, &mut |json| {
        let shown = if args.json {
            format!("{json}\n")
        } else {
            match serde_json::from_str::<Event>(json) {
                Ok(event) => line(&event),
                Err(error) => {
                    let path = client.socket().to_owned();
                    let what = format!("an event cannot be read: {error}");
                    failure = Some(ClientError::Foreign(path, what).into());
                    return ControlFlow::Break(());
                }
            }
        };
        match print(&shown) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    match (failure, other) {
        (Some(failure), _) => Err(failure),
        (None, Some(answer)) => Err(Failure::new(EXIT_FAILED, answer.error_text())),
        (None, None) => Ok(()),
    }
}

fn line(event: &Event) -> String {
    let who = event.workload.as_deref().unwrap_or("-");
    format!(
        "{}  {:<14}  {:<20}  {}\n",
        utc(event.time_unix),
        clean(&event.kind),
        clean(who),
        clean(&event.text)
    )
}

/// Seconds since 1970 as `2026-11-23T03:04:05.678Z`.
#[expect(
    clippy::cast_possible_truncation,
    reason = "milliseconds are shown; an absurd figure saturates"
)]
fn utc(time: f64) -> String {
    let ms = (time * 1000.0).round().clamp(0.0, 253_402_300_799_999.0) as i64;
    let (days, ms) = (ms / 86_400_000, ms % 86_400_000);
    // Years that start in March put the leap day last; 400 of them have 146,097 days.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 {
        (era * 400 + year, month + 3)
    } else {
        (era * 400 + year + 1, month - 9)
    };
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        ms / 3_600_000,
        ms / 60_000 % 60,
        ms / 1000 % 60,
        ms % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checked against `date -u -d @SECONDS`.
    #[test]
    fn times() {
        for (seconds, text) in [
            (0.0, "1970-01-01T00:00:00.000Z"),
            (951_782_400.0, "2000-02-29T00:00:00.000Z"),
            (951_868_799.999, "2000-02-29T23:59:59.999Z"),
            (1_795_404_245.5, "2026-11-23T03:24:05.500Z"),
            (4_107_542_400.0, "2100-03-01T00:00:00.000Z"),
            (f64::NAN, "1970-01-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }

    #[test]
    fn a_line_cannot_hold_a_second_one() {
        let event = Event {
            kind: "note".into(),
            text: "a\nforged".into(),
            ..Event::default()
        };
        let line = line(&event);
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
    }
}
