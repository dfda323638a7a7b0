//! Streams: creation, order, queries, host functions, capture.

use crate::abi::{Out, exports};
use crate::graph::{self as graphs};
use crate::submit::{stream, submit};
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{
    CAPTURED_EVENT, INVALID_HANDLE, INVALID_VALUE, NOT_READY, R, STREAM_CAPTURE_INVALIDATED,
    STREAM_CAPTURE_UNSUPPORTED,
};
use spillway_simulator_core::context::{self, Current};
use spillway_simulator_core::driver;
use spillway_simulator_core::event::State;
use spillway_simulator_core::exec::{Callback, Op};
use spillway_simulator_core::graph;
use spillway_simulator_core::space::fresh_id;
use spillway_simulator_core::stream::{Kind, Stream};
use std::ffi::c_void;
use std::sync::Arc;

const NON_BLOCKING: u32 = 1;

fn create(out: Out<u64>, flags: u32, priority: i32) -> R {
    out.needed()?;
    make(out, &context::current_entry()?, flags, priority)
}

/// A stream in a context or green context.
///
/// # Errors
/// `INVALID_VALUE`.
pub fn make(out: Out<u64>, of: &Current, flags: u32, priority: i32) -> R {
    let driver = driver::get()?;
    if flags & !NON_BLOCKING != 0 {
        return Err(INVALID_VALUE);
    }
    let kind = if flags & NON_BLOCKING != 0 {
        Kind::NonBlocking
    } else {
        Kind::Blocking
    };
    let made = Stream::new(
        fresh_id(),
        kind,
        false,
        flags,
        priority.clamp(-5, 0),
        Arc::clone(&of.context),
        of.green.clone(),
    );
    of.context.add_stream(&made);
    driver.streams.insert(made.id, Arc::clone(&made));
    out.set(made.id)
}

fn destroy(handle: u64) -> R {
    let driver = driver::get()?;
    if handle <= 2 {
        return Err(INVALID_HANDLE);
    }
    let known = driver.streams.get(handle).ok_or(INVALID_HANDLE)?;
    if let Some(green) = &known.green {
        green.check()?;
    }
    let gone = driver.streams.remove(handle).ok_or(INVALID_HANDLE)?;
    capture::abandon(&gone);
    gone.context.close_stream(handle);
    Ok(())
}

/// Refuses a wait for a stream that captures; the capture is spoilt.
fn refuse_capturing(stream: &Stream) -> R {
    crate::submit::refuse_implicit(stream)?;
    match capture::current(stream) {
        None => Ok(()),
        Some(capture) if capture.invalid() => Err(STREAM_CAPTURE_INVALIDATED),
        Some(capture) => {
            capture.invalidate();
            Err(STREAM_CAPTURE_UNSUPPORTED)
        }
    }
}

/// The `CUcontext` of a stream.
fn context_id(stream: &Stream) -> u64 {
    stream
        .green
        .as_ref()
        .map_or(stream.context.id, |green| green.context_id)
}

exports! {
    fn cuStreamCreate(out: Out<u64>, flags: u32) {
        create(out, flags, 0)
    }

    fn cuStreamCreateWithPriority(out: Out<u64>, flags: u32, priority: i32) {
        create(out, flags, priority)
    }

    fn cuStreamDestroy(handle: u64) {
        destroy(handle)
    }

    fn cuStreamDestroy_v2(handle: u64) {
        destroy(handle)
    }

    fn cuStreamGetPriority / cuStreamGetPriority_ptsz [per_thread] (handle: u64, out: Out<i32>) {
        out.set(stream(handle, per_thread)?.priority)
    }

    fn cuStreamGetFlags / cuStreamGetFlags_ptsz [per_thread] (handle: u64, out: Out<u32>) {
        out.set(stream(handle, per_thread)?.flags)
    }

    fn cuStreamGetId / cuStreamGetId_ptsz [per_thread] (handle: u64, out: Out<u64>) {
        let stream = stream(handle, per_thread)?;
        out.set(if stream.kind == Kind::Legacy { context_id(&stream) + 1 } else { stream.id })
    }

    fn cuStreamGetCtx / cuStreamGetCtx_ptsz [per_thread] (handle: u64, out: Out<u64>) {
        out.set(context_id(&*stream(handle, per_thread)?))
    }

    fn cuStreamGetCtx_v2 / cuStreamGetCtx_v2_ptsz [per_thread] (handle: u64, out: Out<u64>, green: Out<u64>) {
        let stream = stream(handle, per_thread)?;
        // The thread's own default stream has no green context, the driver says.
        if stream.per_thread && stream.green.is_some() {
            return Err(INVALID_HANDLE);
        }
        out.offer(stream.context.id);
        green.offer(stream.green_id());
        Ok(())
    }

    fn cuStreamGetDevice / cuStreamGetDevice_ptsz [per_thread] (handle: u64, out: Out<i32>) {
        out.set(stream(handle, per_thread)?.context.gpu as i32)
    }

    fn cuStreamSynchronize / cuStreamSynchronize_ptsz [per_thread] (handle: u64) {
        let stream = stream(handle, per_thread)?;
        refuse_capturing(&stream)?;
        stream.wait(stream.submitted());
        if stream.kind == Kind::Legacy {
            // Work in blocking streams is ordered with it: what came before counts as its own.
            for blocking in &stream.blocking_beside() {
                blocking.wait(blocking.submitted());
            }
        }
        stream.check()?;
        driver::get()?.trim_pools(stream.context.gpu, false);
        Ok(())
    }

    fn cuStreamQuery / cuStreamQuery_ptsz [per_thread] (handle: u64) {
        let stream = stream(handle, per_thread)?;
        refuse_capturing(&stream)?;
        let blocking = || {
            stream.kind == Kind::Legacy && stream.blocking_beside().iter().any(|s| s.busy())
        };
        if stream.busy() || blocking() { Err(NOT_READY) } else { stream.context.check() }
    }

    fn cuStreamWaitEvent / cuStreamWaitEvent_ptsz [per_thread] (handle: u64, event: u64, flags: u32) {
        // CU_EVENT_WAIT_EXTERNAL makes a node of its own in a capture.
        if flags & !1 != 0 {
            return Err(INVALID_VALUE);
        }
        let driver = driver::get()?;
        let stream = stream(handle, per_thread)?;
        let event = driver.events.get(event).ok_or(INVALID_HANDLE)?;
        if flags == 1 && capture::current(&stream).is_some() {
            return match event.state() {
                State::Recorded(marker) => submit(&stream, graph::WAIT_EVENT, Op::Wait(marker)).map(|_| ()),
                State::Never => Ok(()),
                State::Captured(..) => Err(CAPTURED_EVENT),
            };
        }
        if capture::wait_event(driver, &stream, &event)? {
            return Ok(());
        }
        match event.state() {
            State::Recorded(marker) if !marker.is_set() => submit(&stream, graph::WAIT_EVENT, Op::Wait(marker)).map(|_| ()),
            _ => crate::submit::refuse_implicit(&stream),
        }
    }

    fn cuLaunchHostFunc / cuLaunchHostFunc_ptsz [per_thread] (
        handle: u64, function: Option<extern "C" fn(*mut c_void)>, data: usize,
    ) {
        let function = function.ok_or(INVALID_VALUE)?;
        let stream = stream(handle, per_thread)?;
        submit(&stream, graph::HOST, Op::Callback(Callback::Host(function, data))).map(|_| ())
    }

    fn cuStreamAddCallback / cuStreamAddCallback_ptsz [per_thread] (
        handle: u64, function: Option<extern "C" fn(u64, u32, *mut c_void)>, data: usize, flags: u32,
    ) {
        let function = function.filter(|_| flags == 0).ok_or(INVALID_VALUE)?;
        let stream = stream(handle, per_thread)?;
        if let Some(capture) = capture::current(&stream) {
            capture.invalidate();
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        submit(&stream, graph::HOST, Op::Callback(Callback::Stream(function, data))).map(|_| ())
    }

    fn cuStreamCopyAttributes / cuStreamCopyAttributes_ptsz [per_thread] (to: u64, from: u64) {
        stream(to, per_thread)?;
        stream(from, per_thread).map(|_| ())
    }

    fn cuStreamIsCapturing / cuStreamIsCapturing_ptsz [per_thread] (handle: u64, out: Out<u32>) {
        let stream = stream(handle, per_thread)?;
        crate::submit::refuse_implicit(&stream)?;
        out.set(graphs::status(&stream))
    }

    fn cuStreamBeginCapture / cuStreamBeginCapture_ptsz [per_thread] (handle: u64) {
        capture::begin(driver::get()?, &stream(handle, per_thread)?, capture::GLOBAL, None, Vec::new())
    }

    fn cuStreamBeginCapture_v2 / cuStreamBeginCapture_v2_ptsz [per_thread] (handle: u64, mode: u32) {
        capture::begin(driver::get()?, &stream(handle, per_thread)?, mode, None, Vec::new())
    }

    fn cuStreamEndCapture / cuStreamEndCapture_ptsz [per_thread] (handle: u64, out: Out<u64>) {
        out.needed()?;
        out.set(0)?;
        out.set(capture::end(driver::get()?, &stream(handle, per_thread)?)?.id)
    }

    fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) {
        driver::get()?;
        graphs::exchange(mode)
    }
}
