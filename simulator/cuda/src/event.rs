//! Events.

use crate::abi::{Out, exports};
use crate::context::entry_of;
use crate::submit::{here, stream, submit};
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{
    CAPTURED_EVENT, INVALID_HANDLE, INVALID_VALUE, NOT_READY, R, STREAM_CAPTURE_UNSUPPORTED,
};
use spillway_simulator_core::context::Current;
use spillway_simulator_core::driver;
use spillway_simulator_core::event::{Event, State};
use spillway_simulator_core::exec::Op;
use spillway_simulator_core::graph::{RECORD_EVENT, WAIT_EVENT};
use spillway_simulator_core::space::fresh_id;
use std::sync::Arc;

/// The event of a handle, usable.
///
/// # Errors
/// `INVALID_HANDLE`, the lasting error of its context.
pub fn event(handle: u64) -> R<Arc<Event>> {
    let driver = driver::get()?;
    let event = driver.events.get(handle).ok_or(INVALID_HANDLE)?;
    driver
        .contexts
        .get(event.context)
        .ok_or(INVALID_HANDLE)?
        .check()?;
    Ok(event)
}

fn record(handle: u64, on: u64, per_thread: bool, flags: u32) -> R {
    let event = event(handle)?;
    let stream = stream(on, per_thread)?;
    if event.context != stream.context.id {
        return Err(INVALID_HANDLE);
    }
    let marker = Arc::default();
    if let Some(capture) = capture::current(&stream) {
        if capture.invalid() {
            return Err(spillway_simulator_core::code::STREAM_CAPTURE_INVALIDATED);
        }
        // CU_EVENT_RECORD_EXTERNAL makes a node of its own.
        if flags == 1 {
            submit(&stream, RECORD_EVENT, Op::Record(Arc::clone(&marker)))?;
            event.set_state(State::Recorded(marker));
        } else {
            capture::record_event(&capture, &stream, &event);
        }
        return Ok(());
    }
    crate::submit::refuse_implicit(&stream)?;
    event.set_state(State::Recorded(Arc::clone(&marker)));
    submit(&stream, RECORD_EVENT, Op::Record(marker)).map(|_| ())
}

fn destroy(handle: u64) -> R {
    driver::get()?
        .events
        .remove(handle)
        .map(|_| ())
        .ok_or(INVALID_HANDLE)
}

fn elapsed(out: Out<f32>, start: u64, end: u64) -> R {
    out.needed()?;
    let (start, end) = (event(start)?, event(end)?);
    if start.context != end.context {
        return Err(INVALID_HANDLE);
    }
    out.set(start.elapsed_ms(&end)?)
}

/// Records an event behind all that was submitted to a context or green context.
///
/// # Errors
/// `INVALID_HANDLE` for an event of another context, `STREAM_CAPTURE_UNSUPPORTED` if a stream captures.
pub fn record_all(of: &Current, handle: u64) -> R {
    of.check()?;
    let event = event(handle)?;
    if event.context != of.context.id {
        return Err(INVALID_HANDLE);
    }
    let streams = of.streams();
    capture::refuse_among(&streams)?;
    let last = of.default_stream().ok_or(INVALID_HANDLE)?;
    for stream in streams.iter().filter(|s| s.busy() && s.id != last.id) {
        let marker = Arc::default();
        submit(stream, RECORD_EVENT, Op::Record(Arc::clone(&marker)))?;
        submit(&last, WAIT_EVENT, Op::Wait(marker))?;
    }
    let marker = Arc::default();
    event.set_state(State::Recorded(Arc::clone(&marker)));
    submit(&last, RECORD_EVENT, Op::Record(marker)).map(|_| ())
}

/// All streams of a context or green context, as they are now, wait for an event.
///
/// # Errors
/// `STREAM_CAPTURE_UNSUPPORTED` if a stream captures, or if the event stands for captured work.
pub fn wait_all(of: &Current, handle: u64) -> R {
    of.check()?;
    let event = event(handle)?;
    let streams = of.streams();
    capture::refuse_among(&streams)?;
    match event.state() {
        State::Captured(..) => Err(STREAM_CAPTURE_UNSUPPORTED),
        State::Recorded(marker) if !marker.is_set() => {
            for stream in &streams {
                submit(stream, WAIT_EVENT, Op::Wait(Arc::clone(&marker)))?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

exports! {
    fn cuEventCreate(out: Out<u64>, flags: u32) {
        out.needed()?;
        let (driver, context) = here()?;
        // BLOCKING_SYNC, DISABLE_TIMING, INTERPROCESS (which needs the second).
        if flags & !7 != 0 || flags & 4 != 0 && flags & 2 == 0 {
            return Err(INVALID_VALUE);
        }
        let event = Arc::new(Event::new(fresh_id(), context.id, flags));
        driver.events.insert(event.id, Arc::clone(&event));
        out.set(event.id)
    }

    fn cuEventDestroy(handle: u64) {
        destroy(handle)
    }

    fn cuEventDestroy_v2(handle: u64) {
        destroy(handle)
    }

    fn cuEventRecord / cuEventRecord_ptsz [per_thread] (handle: u64, on: u64) {
        record(handle, on, per_thread, 0)
    }

    fn cuEventRecordWithFlags / cuEventRecordWithFlags_ptsz [per_thread] (handle: u64, on: u64, flags: u32) {
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        record(handle, on, per_thread, flags)
    }

    fn cuEventQuery(handle: u64) {
        let event = event(handle)?;
        match event.state() {
            State::Never => Ok(()),
            State::Captured(..) => Err(CAPTURED_EVENT),
            State::Recorded(marker) if marker.is_set() => Ok(()),
            State::Recorded(_) => Err(NOT_READY),
        }
    }

    fn cuEventSynchronize(handle: u64) {
        let event = event(handle)?;
        match event.state() {
            State::Never => Ok(()),
            State::Captured(..) => Err(CAPTURED_EVENT),
            State::Recorded(marker) => {
                marker.wait();
                let driver = driver::get()?;
                if let Some(context) = driver.contexts.get(event.context) {
                    context.check()?;
                    driver.trim_pools(context.gpu, false);
                }
                Ok(())
            }
        }
    }

    fn cuEventElapsedTime(out: Out<f32>, start: u64, end: u64) {
        elapsed(out, start, end)
    }

    fn cuEventElapsedTime_v2(out: Out<f32>, start: u64, end: u64) {
        elapsed(out, start, end)
    }

    fn cuCtxRecordEvent(handle: u64, event_handle: u64) {
        record_all(&entry_of(driver::get()?, handle)?, event_handle)
    }

    fn cuCtxWaitEvent(handle: u64, event_handle: u64) {
        wait_all(&entry_of(driver::get()?, handle)?, event_handle)
    }
}
