//! The routes: what each path answers to each method. No IO here; [`crate::model::Control`] does
//! the work.

use std::time::Duration;

use super::http::percent_decode;
use super::metrics;
use super::reply::Reply;
use crate::model::{Control, ControlError, Done, Workload, Workloads};

/// How long `POST .../evict` and `.../restore` wait unless `?timeout=` says otherwise.
pub const SWAP_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest `?timeout=` that is taken.
pub const SWAP_TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// Every path, for those who ask for another.
const PATHS: &str = "/v1/status, /v1/workloads, /v1/workloads/{name}, \
    /v1/workloads/{name}/evict, /v1/workloads/{name}/restore, /v1/events, /metrics";

/// What a request is answered with.
pub enum Answer {
    /// A body that is complete.
    Reply(Reply),
    /// The stream of events; `follow`: also those to come.
    Events {
        /// Go on after the kept ones.
        follow: bool,
    },
}

/// The parameters after `?`, decoded.
#[derive(Clone, Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Splits a request's target into its path, still encoded, and its query.
    ///
    /// # Errors
    /// A target that is no path, or a broken escape in the query.
    pub fn of(target: &str) -> Result<(String, Self), String> {
        // A client that takes us for a proxy sends the whole address.
        let target = match target.split_once("://") {
            Some(("http" | "https", rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
            _ => target,
        };
        if !target.starts_with('/') {
            return Err(format!("{target:?} is no path: it must start with '/'"));
        }
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let decode = |pair: &str| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((percent_decode(key)?, percent_decode(value)?))
        };
        let pairs = pairs.map(decode).collect::<Result<_, String>>()?;
        Ok((path.to_owned(), Self(pairs)))
    }

    /// Refuses parameters that the route does not know: a typing error must not pass in silence.
    fn only(&self, known: &[&str]) -> Result<(), String> {
        match self.0.iter().find(|pair| !known.contains(&&*pair.0)) {
            None => Ok(()),
            Some((key, _)) if known.is_empty() => {
                Err(format!("unknown parameter {key:?}: this path takes none"))
            }
            Some((key, _)) => Err(format!(
                "unknown parameter {key:?}: this path takes {}",
                known.join(", ")
            )),
        }
    }

    fn get(&self, key: &str) -> Option<&str> {
        let last = self.0.iter().rev().find(|pair| pair.0 == key)?;
        Some(&last.1)
    }

    fn timeout(&self) -> Result<Duration, String> {
        self.only(&["timeout"])?;
        let Some(text) = self.get("timeout") else {
            return Ok(SWAP_TIMEOUT);
        };
        let seconds = text.parse::<f64>().ok().filter(|s| *s > 0.0);
        seconds
            .and_then(|s| Duration::try_from_secs_f64(s).ok())
            .filter(|timeout| *timeout <= SWAP_TIMEOUT_MAX)
            .ok_or_else(|| {
                format!("timeout={text:?} is no number of seconds above 0 and up to 3600")
            })
    }

    fn follow(&self) -> Result<bool, String> {
        self.only(&["follow"])?;
        match self.get("follow") {
            None | Some("1" | "true") => Ok(true),
            Some("0" | "false") => Ok(false),
            Some(other) => Err(format!("follow={other:?}: write 0 or 1")),
        }
    }
}

/// Answers one request; blocks for as long as an evict or restore takes.
pub fn answer(control: &dyn Control, method: &str, path: &str, query: &Query) -> Answer {
    let segments: Result<Vec<String>, String> = path
        .trim_start_matches('/')
        .split('/')
        .map(percent_decode)
        .collect();
    let segments = match segments {
        Ok(segments) => segments,
        Err(text) => return Answer::Reply(Reply::error(400, &text)),
    };
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    let get = matches!(method, "GET" | "HEAD");
    let read_only = || Answer::Reply(Reply::not_allowed(method, path, "GET, HEAD"));
    let plain = |reply: &dyn Fn() -> Reply| match query.only(&[]) {
        _ if !get => read_only(),
        Ok(()) => Answer::Reply(reply()),
        Err(text) => Answer::Reply(Reply::error(400, &text)),
    };
    match segments.as_slice() {
        ["v1", "status"] => plain(&|| Reply::json(200, &control.status())),
        ["v1", "workloads"] => plain(&|| {
            let workloads = control.status().workloads;
            Reply::json(200, &Workloads { workloads })
        }),
        ["v1", "workloads", name] if !name.is_empty() => plain(&|| {
            let found = find(control, name);
            found.map_or_else(|reply| reply, |workload| Reply::json(200, &workload))
        }),
        ["v1", "workloads", name, verb @ ("evict" | "restore")] if !name.is_empty() => {
            if method != "POST" {
                return Answer::Reply(Reply::not_allowed(method, path, "POST"));
            }
            let timeout = match query.timeout() {
                Ok(timeout) => timeout,
                Err(text) => return Answer::Reply(Reply::error(400, &text)),
            };
            Answer::Reply(swapped(if *verb == "evict" {
                control.evict(name, timeout)
            } else {
                control.restore(name, timeout)
            }))
        }
        ["v1", "events"] => match query.follow() {
            _ if !get => read_only(),
            Ok(follow) => Answer::Events { follow },
            Err(text) => Answer::Reply(Reply::error(400, &text)),
        },
        ["metrics"] => plain(&|| metrics::reply(&control.metrics())),
        _ => Answer::Reply(Reply::error(404, &not_found(path))),
    }
}

fn find(control: &dyn Control, name: &str) -> Result<Workload, Reply> {
    let found = control.status().workloads.into_iter();
    let mut found = found.filter(|workload| workload.name == name);
    found.next().ok_or_else(|| {
        let text = format!("no workload is named {name:?}; GET /v1/workloads lists them");
        Reply::error(404, &text)
    })
}

fn swapped(result: Result<Done, ControlError>) -> Reply {
    match result {
        Ok(done) => Reply::json(200, &done),
        Err(error) => {
            let status = match error {
                ControlError::NotFound(_) => 404,
                ControlError::Conflict(_) => 409,
                ControlError::Timeout(_) => 504,
                ControlError::Unavailable(_) => 503,
            };
            Reply::error(status, &error.to_string())
        }
    }
}

fn not_found(path: &str) -> String {
    let mut text = format!("{path:?} is nothing here; there are {PATHS}");
    if path.starts_with("/v1/workloads/") {
        text.push_str(" (a '/' in a workload's name is written %2F)");
    }
    text
}
