//! The modelled time of a GPU's engines, shared by all processes.
//!
//! Each engine is one word: when it is free again. Who wants it adds its own time behind that and
//! waits until then: first come, first served, nothing to hold, nothing to lose by dying.

use crate::driver::Driver;
use crate::sync::{lock, now_ns, sleep_until};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Direction of a transfer over the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    HostToDevice = 0,
    DeviceToHost = 1,
}

/// Takes `ns` of the engine's time, from `earliest_ns` on; returns when they begin and end. An
/// earliest start in the past makes up for a late wake-up.
fn reserve(clock: &AtomicU64, ns: u64, earliest_ns: u64) -> (u64, u64) {
    let mut busy_until = clock.load(Ordering::Acquire);
    loop {
        let start = busy_until.max(earliest_ns);
        match clock.compare_exchange_weak(
            busy_until,
            start + ns,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) => return (start, start + ns),
            Err(changed) => busy_until = changed,
        }
    }
}

const SLACK_NS: u64 = 300_000;

/// Runs `copy`, which moves `bytes` over the link, and lasts as long as the link takes.
pub fn transfer<T>(
    driver: &Driver,
    gpu: u32,
    direction: Direction,
    bytes: u64,
    copy: impl FnOnce() -> T,
) -> T {
    let link = driver.shared.config().link;
    let own = link[direction as usize];
    if own == 0 {
        return copy();
    }
    let engines = driver.shared.engines(gpu);
    let time = |rate: u64| (u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1))) as u64;
    let earliest = now_ns().saturating_sub(SLACK_NS);
    let (_, mut end) = reserve(&engines.link[direction as usize], time(own), earliest);
    if link[2] != 0 {
        end = end.max(reserve(&engines.link[2], time(link[2]), earliest).1);
    }
    let result = copy();
    sleep_until(end);
    result
}

/// One process's share of one GPU's compute engine: kernels of one process run side by side,
/// those of different processes take turns.
#[derive(Default)]
pub struct Compute {
    /// The slice of engine time that the process holds.
    slice: Mutex<(u64, u64)>,
}

const SLICE_NS: u64 = 2_000_000;

impl Compute {
    /// Uses up `ns` of compute time, or less if `stop` says so.
    pub fn spend(&self, driver: &Driver, gpu: u32, ns: u64, stop: impl Fn() -> bool) {
        let mut left = ns;
        // The first share of a slice counts from when the kernel came.
        let mut since = now_ns();
        while left > 0 && !stop() {
            let (start, end) = {
                let mut slice = lock(&self.slice);
                if since >= slice.1 {
                    let engines = driver.shared.engines(gpu);
                    let want = left.min(SLICE_NS);
                    *slice = reserve(&engines.compute, want, since);
                    driver.shared.count_busy(gpu, want);
                }
                *slice
            };
            let begin = start.max(since);
            let until = end.min(begin + left);
            sleep_until(until);
            left -= until - begin;
            since = until;
        }
    }
}

/// Notes compute time that was really spent.
pub fn account(driver: &Driver, gpu: u32, ns: u64) {
    driver.shared.count_busy(gpu, ns);
}

/// A VMM call: lasts its modelled time, after those of all other processes.
pub fn vmm_call(driver: &Driver, fixed_ns: u64, ns_per_gib: u64, bytes: u64) {
    let cost = fixed_ns + ((u128::from(ns_per_gib) * u128::from(bytes)) >> 30) as u64;
    let cost = cost * driver.shared.config().vmm_cost_milli / 1000;
    if cost > 0 {
        let (_, end) = reserve(driver.shared.vmm_clock(), cost, now_ns());
        sleep_until(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_first_come_first_served() {
        let clock = AtomicU64::new(0);
        let (start, end) = reserve(&clock, 1_000_000_000, now_ns());
        assert_eq!(end - start, 1_000_000_000);
        let (second, _) = reserve(&clock, 5, now_ns());
        assert_eq!(second, end);
    }

    #[test]
    fn an_idle_engine_starts_now() {
        let clock = AtomicU64::new(1);
        let before = now_ns();
        let (start, _) = reserve(&clock, 10, now_ns());
        assert!(start >= before);
    }
}
