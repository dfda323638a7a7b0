//! Waiting until the GPU has finished, with a bound.
//!
//! The driver's own waits have none: a kernel that never ends would hold an allocation for ever that the driver
//! itself answers at once. So streams are asked instead. What is not done after [`AT_MOST`] counts as endless:
//! the caller then does without what the wait would have brought.
//!
//! The per-thread default streams of other threads cannot be asked: what runs there alone looks idle.

use std::time::{Duration, Instant};

use crate::deferred::record;
use crate::driver::{Status, call};
use crate::lock;
use crate::runtime::Runtime;
use crate::vmm;

/// How long a call that the driver would not hold up waits for the GPU: as long as the coordinator lets growth
/// wait for other workloads, unless it was told otherwise.
pub const AT_MOST: Duration = Duration::from_secs(10);
/// Pauses between two looks grow from one to the other.
const PAUSE: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(1));

/// Looks again and again, with growing pauses, whether something is so; `false`: not until then.
pub fn comes(until: Instant, mut so: impl FnMut() -> bool) -> bool {
    let mut pause = PAUSE.0;
    loop {
        if so() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Whether any of the current context's streams is busy, of its own ones the first `most`; also if a capture is
/// open, since asking would spoil that.
pub fn any_busy(runtime: &Runtime, streams: &[usize], most: usize) -> bool {
    // A capture that has begun meanwhile is work, too.
    let legacy = runtime.asking(|| {
        // SAFETY: stream 0 is the current context's legacy stream.
        unsafe { call::cuStreamQuery(std::ptr::null_mut()) }
    });
    legacy.is_none_or(|status| status == Status::NOT_READY)
        || streams
            .iter()
            .take(most)
            .any(|&stream| stream_busy(runtime, stream))
}

/// Whether one of the current context's own streams is busy; also if a capture is open.
fn stream_busy(runtime: &Runtime, stream: usize) -> bool {
    let asked = runtime.using(stream, || {
        runtime.asking(|| {
            // SAFETY: a stream of the application that is not being destroyed.
            unsafe { call::cuStreamQuery(stream as *mut _) }
        })
    });
    asked == Some(None) || asked == Some(Some(Status::NOT_READY))
}

impl Runtime {
    /// Waits until a context's streams have finished, outside the gate; `false`: some have not after `at_most`, or
    /// a stream captures.
    pub fn idle_within(&self, context: usize, at_most: Duration) -> bool {
        comes(Instant::now() + at_most, || {
            let streams = lock(&self.contexts).streams_of(context);
            let busy = self.using(context, || {
                vmm::in_context(context, || Ok(any_busy(self, &streams, usize::MAX)))
            });
            // A context that is going runs nothing that anybody waits for.
            busy != Some(Ok(true))
        })
    }

    /// Waits for the current context as `cuCtxSynchronize` does, [`AT_MOST`] so long; `None`: what it had been given
    /// before is still not done. Work that comes meanwhile is not waited for: a context that serves may never be idle.
    pub fn synchronized(&self) -> Option<Result<(), Status>> {
        let (context, _) = match self.current() {
            Ok(current) => current,
            Err(why) => return Some(Err(why)),
        };
        if self.idle_within(context, Duration::ZERO) {
            // SAFETY: no pointers are involved.
            return Some(unsafe { call::cuCtxSynchronize() }.ok());
        }
        let until = Instant::now() + AT_MOST;
        let waited = self.using(context, || {
            vmm::in_context(context, || Ok(self.relaxed(|| self.so_far(context, until))))
        });
        match waited {
            // It is going: nothing is given back there any more.
            None => Some(Ok(())),
            Some(Err(why)) => Some(Err(why)),
            Some(Ok(done)) => done.then_some(Ok(())),
        }
    }

    /// Waits for what streams of a context, which is current, have been given until now. The legacy stream gets no
    /// mark, since all other streams would wait for that: it is waited for until it is idle once.
    fn so_far(&self, context: usize, until: Instant) -> bool {
        let legacy = || any_busy(self, &[], 0);
        let mut marks = None;
        let mut rest = true;
        let done = comes(until, || {
            if marks.is_none() {
                let streams = lock(&self.contexts).streams_of(context);
                marks = self.mark(&streams);
            }
            rest = rest && legacy();
            let open = |mark: &Mark| mark.is_open(self);
            marks.as_ref().is_some_and(|marks| !marks.iter().any(open)) && !rest
        });
        for mark in marks.into_iter().flatten() {
            mark.end(done);
        }
        done
    }

    /// Marks how far streams are; `None`: a stream captures.
    fn mark(&self, streams: &[usize]) -> Option<Vec<Mark>> {
        let mut marks = Vec::with_capacity(streams.len());
        for &stream in streams {
            match self.using(stream, || self.asking(|| record(stream))) {
                // Gone.
                None => {}
                Some(Some(event)) => marks.push(Mark {
                    stream,
                    event: event.ok(),
                }),
                Some(None) => {
                    for mark in marks {
                        mark.end(false);
                    }
                    return None;
                }
            }
        }
        Some(marks)
    }
}

/// How far a stream was.
struct Mark {
    stream: usize,
    /// Ours; without one, the stream is asked whether it is idle.
    event: Option<usize>,
}

impl Mark {
    fn is_open(&self, runtime: &Runtime) -> bool {
        let status = match self.event {
            // SAFETY: an event of ours, and its context stays meanwhile.
            Some(event) => unsafe { call::cuEventQuery(event as *mut _) },
            None => return stream_busy(runtime, self.stream),
        };
        status == Status::NOT_READY
    }

    /// `done`: the driver's pools give back what is free when something is waited for.
    fn end(self, done: bool) {
        let Some(event) = self.event else { return };
        // SAFETY: as above; one that is done is not waited for.
        unsafe {
            if done {
                let _ = call::cuEventSynchronize(event as *mut _);
            }
            let _ = call::cuEventDestroy_v2(event as *mut _);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_comes_is_waited_for_no_longer() {
        let start = Instant::now();
        let until = start + Duration::from_millis(20);
        assert!(!comes(until, || false));
        assert!(start.elapsed() >= Duration::from_millis(20));
        let mut looks = 0;
        assert!(comes(until, || {
            looks += 1;
            true
        }));
        assert_eq!(looks, 1, "looked at once, also when it is late");
    }
}
