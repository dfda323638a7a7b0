//! From a stream handle to queued or captured work.

use spillway_simulator_core::capture;
use spillway_simulator_core::code::{INVALID_HANDLE, R, STREAM_CAPTURE_IMPLICIT};
use spillway_simulator_core::context::{self, Context};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::exec::Op;
use spillway_simulator_core::stream::{Kind, Stream};
use std::sync::Arc;

/// The driver and the current context.
///
/// # Errors
/// `NOT_INITIALIZED`, `INVALID_CONTEXT`, or the context's lasting error.
pub fn here() -> R<(&'static Driver, Arc<Context>)> {
    let driver = driver::get()?;
    Ok((driver, context::current()?))
}

/// The stream of a handle: 0 and 1, 2 are the default streams of the current context.
///
/// # Errors
/// `INVALID_HANDLE`, and those of [`here`] for default streams.
pub fn stream(handle: u64, per_thread: bool) -> R<Arc<Stream>> {
    let driver = driver::get()?;
    match handle {
        0 if per_thread => context::per_thread_stream(&context::current_entry()?),
        0 | 1 => context::current_entry()?
            .default_stream()
            .ok_or(INVALID_HANDLE),
        2 => context::per_thread_stream(&context::current_entry()?),
        _ => {
            let stream = driver.streams.get(handle).ok_or(INVALID_HANDLE)?;
            stream.check()?;
            Ok(stream)
        }
    }
}

/// Refuses use of the legacy stream while a blocking stream of its context captures.
///
/// # Errors
/// `STREAM_CAPTURE_IMPLICIT`; the capture is spoilt.
pub fn refuse_implicit(stream: &Stream) -> R {
    if stream.kind == Kind::Legacy && capture::any() {
        let blocking: Vec<_> = stream
            .context
            .capturing()
            .into_iter()
            .filter(|s| s.kind == Kind::Blocking && s.green_id() == stream.green_id())
            .collect();
        for capturing in &blocking {
            if let Some(capture) = capture::current(capturing) {
                capture.invalidate();
            }
        }
        if !blocking.is_empty() {
            return Err(STREAM_CAPTURE_IMPLICIT);
        }
    }
    Ok(())
}

/// Queues work, or makes it a node if the stream captures; returns its number if it was queued.
///
/// # Errors
/// Those of captures, and the context's lasting error.
pub fn submit(stream: &Arc<Stream>, kind: u32, op: Op) -> R<Option<u64>> {
    stream.check()?;
    refuse_implicit(stream)?;
    if let Some(capture) = capture::current(stream) {
        capture.record(stream, kind, op)?;
        return Ok(None);
    }
    stream.submit(driver::get()?, op).map(Some)
}

/// Queues work and waits for it.
///
/// # Errors
/// As [`submit`]; what failed in the stream meanwhile.
pub fn submit_and_wait(stream: &Arc<Stream>, kind: u32, op: Op) -> R {
    if let Some(sequence) = submit(stream, kind, op)? {
        stream.wait(sequence);
        stream.context.check()?;
    }
    Ok(())
}
