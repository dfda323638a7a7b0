//! Waiting until the GPU has finished, with a bound.
//!
//! The driver's own waits have none: a kernel that never ends would hold an allocation for ever that the driver
//! itself answers at once. So streams are asked instead. What is still busy after [`AT_MOST`] counts as endless:
//! the caller then does without what the wait would have brought.
//!
//! The per-thread default streams of other threads cannot be asked: what runs there alone looks idle.

use std::time::{Duration, Instant};

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
        || streams.iter().take(most).any(|&stream| {
            let asked = runtime.using(stream, || {
                runtime.asking(|| {
                    // SAFETY: a stream of the application that is not being destroyed.
                    unsafe { call::cuStreamQuery(stream as *mut _) }
                })
            });
            asked == Some(None) || asked == Some(Some(Status::NOT_READY))
        })
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

    /// Waits for the current context as `cuCtxSynchronize` does, [`AT_MOST`] so long; `None`: it is still busy.
    pub fn synchronized(&self) -> Option<Result<(), Status>> {
        let (context, _) = match self.current() {
            Ok(current) => current,
            Err(why) => return Some(Err(why)),
        };
        // SAFETY: no pointers are involved.
        self.idle_within(context, AT_MOST)
            .then(|| unsafe { call::cuCtxSynchronize() }.ok())
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
