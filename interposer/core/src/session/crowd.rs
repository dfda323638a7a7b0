//! Many threads that ask at once. The coordinator ends the session of a process that has more questions open than it
//! keeps, so threads wait for each other here; a measurement is shared by all that had asked before it began.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::lock;

/// Questions of one kind that may be open at once. The coordinator takes 256 of a kind and keeps about as many answers
/// of all kinds for who does not read.
const AT_ONCE: usize = 64;

/// Questions of one kind.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    open: Mutex<usize>,
    left: Condvar,
}

/// A place among the open questions.
#[must_use]
pub(super) struct Place<'a>(&'a Crowd);

impl Crowd {
    /// Waits for a place; `None`: there is none until then.
    pub fn enter(&self, until: Instant) -> Option<Place<'_>> {
        let mut open = lock(&self.open);
        while *open >= AT_ONCE {
            let left = until.checked_duration_since(Instant::now())?;
            open = self
                .left
                .wait_timeout(open, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *open += 1;
        Some(Place(self))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *lock(&self.0.open) -= 1;
        self.0.left.notify_one();
    }
}

#[derive(Debug, Default)]
struct Rounds {
    begun: u64,
    ended: u64,
}

/// Something that all can do together: whoever comes while it is done waits for the next time, since this one has begun
/// before.
#[derive(Debug, Default)]
pub(super) struct Shared {
    rounds: Mutex<Rounds>,
    changed: Condvar,
}

impl Shared {
    /// Returns once `run` has been run, here or by another thread, from a moment after the call on.
    pub fn run(&self, run: impl FnOnce()) {
        let mut rounds = lock(&self.rounds);
        let mine = rounds.begun + 1;
        while rounds.begun != rounds.ended {
            if rounds.ended >= mine {
                return;
            }
            rounds = self
                .changed
                .wait(rounds)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if rounds.ended >= mine {
            return;
        }
        rounds.begun += 1;
        drop(rounds);
        let _end = End(self);
        run();
    }
}

/// Ends a round, also if it panics: the others must not wait for ever.
struct End<'a>(&'a Shared);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let mut rounds = lock(&self.0.rounds);
        rounds.ended = rounds.begun;
        drop(rounds);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::time::Duration;

    #[test]
    fn no_more_than_so_many_are_inside() {
        let (crowd, inside, most) = (Crowd::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE * 4 {
                scope.spawn(|| {
                    let until = Instant::now() + Duration::from_secs(20);
                    let place = crowd.enter(until).expect("in time");
                    most.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
                    std::thread::sleep(Duration::from_millis(5));
                    inside.fetch_sub(1, SeqCst);
                    drop(place);
                });
            }
        });
        assert!((2..=AT_ONCE).contains(&most.load(SeqCst)), "{most:?}");
        let all: Vec<_> = (0..AT_ONCE).map(|_| crowd.enter(Instant::now())).collect();
        assert!(all.iter().all(Option::is_some));
        assert!(
            crowd
                .enter(Instant::now() + Duration::from_millis(5))
                .is_none()
        );
    }

    #[test]
    fn who_came_before_it_began_shares_it() {
        let (shared, runs) = (Shared::default(), AtomicUsize::new(0));
        let (begun, go) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                shared.run(|| {
                    runs.fetch_add(1, SeqCst);
                    begun.wait();
                    go.wait();
                });
            });
            begun.wait();
            for _ in 0..50 {
                // They came too late for the first.
                scope.spawn(|| {
                    shared.run(|| {
                        runs.fetch_add(1, SeqCst);
                    });
                    assert!(runs.load(SeqCst) >= 2);
                });
            }
            std::thread::sleep(Duration::from_millis(200));
            assert_eq!(runs.load(SeqCst), 1);
            go.wait();
        });
        assert!((2..10).contains(&runs.load(SeqCst)), "{runs:?}");
    }
}
