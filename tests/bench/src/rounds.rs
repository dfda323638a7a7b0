//! Short rounds of two things in turn, in one thread or in several at once.
//!
//! A round is a few microseconds of the one, then of the other, in an order that swaps from round to round.
//! What the machine does besides meets both; a round that was interrupted is an outlier that the median does
//! not see. What is reported is the median of the differences within rounds.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::figures::Summary;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What the other is compared with.
    Baseline,
    /// What is measured.
    Subject,
}

/// Something that can be done in two ways.
pub trait Case {
    /// Does it `calls` times; 0 or the last code that was not success.
    fn run(&mut self, side: Side, calls: u32) -> i32;
    /// Waits until what was submitted is done; not timed.
    fn settle(&mut self) {}
}

/// How long and how often.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// In all, about.
    pub budget: Duration,
    /// At most so many rounds.
    pub rounds_max: usize,
    /// A side's part of a round lasts about this long.
    pub part: Duration,
    /// At most so many calls in a part, unless they are so cheap that they cannot reach a device.
    pub calls_max: u32,
}

impl Plan {
    /// What suits calls of nanoseconds to milliseconds.
    #[must_use]
    pub fn new(budget: Duration) -> Self {
        Self {
            budget,
            rounds_max: 5000,
            part: Duration::from_micros(20),
            calls_max: 1 << 16,
        }
    }

    /// For calls that a device queues: a full queue would measure the device.
    #[must_use]
    pub fn queued(self) -> Self {
        Self {
            calls_max: 200,
            ..self
        }
    }
}

/// Nanoseconds per call.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of the baseline.
    pub baseline: Summary,
    /// Of the subject.
    pub subject: Summary,
    /// Of the differences within rounds.
    pub added: Summary,
    /// Of the quotients within rounds.
    pub ratio: Summary,
    /// How many rounds; of several threads, those in which they really ran at the same time.
    pub rounds: usize,
    /// Calls in each part of each.
    pub calls: u32,
}

/// One round of one thread, baseline first: nanoseconds per call, and when each part began and ended.
#[derive(Clone, Copy, Debug)]
struct Round {
    each: [f64; 2],
    span: [(Instant, Instant); 2],
}

/// With fewer rounds than this there is no figure.
const ROUNDS_MIN: usize = 20;

/// Cheaper calls do not reach a device.
const FREE: f64 = 20.0;

/// Alternates in one thread.
///
/// # Errors
/// A call failed.
pub fn alternate(plan: Plan, case: &mut dyn Case) -> Result<Outcome> {
    let calls = calibrate(plan, case)?;
    let began = Instant::now();
    let mut samples = Vec::new();
    while samples.len() < plan.rounds_max
        && (samples.len() < ROUNDS_MIN || began.elapsed() < plan.budget)
    {
        samples.push(round(case, calls, samples.len(), &mut || ())?.each);
    }
    Ok(outcome(&samples, calls))
}

/// Alternates in `threads` threads that begin each part together; a round's figure is their mean.
///
/// # Errors
/// A call failed, or a thread could not prepare its case.
pub fn alternate_in_threads<C: Case>(
    plan: Plan,
    threads: usize,
    make: impl Fn() -> Result<C> + Sync,
) -> Result<Outcome> {
    if threads == 1 {
        return alternate(plan, &mut make()?);
    }
    let start = Meeting::new(threads);
    let per_thread: Vec<Result<(Vec<Round>, u32)>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|number| {
                let (start, make) = (&start, &make);
                scope.spawn(move || {
                    stay_on_own_processor(number);
                    let made = make().and_then(|mut case| {
                        let calls = calibrate(plan, &mut case)?;
                        Ok((case, calls))
                    });
                    let calls = made.as_ref().map_or(0, |made| made.1);
                    // All do as many calls, or nobody goes on if one cannot.
                    let calls = start.least(calls);
                    let (mut case, _) = made?;
                    if calls == 0 {
                        return Err(anyhow!("another thread could not begin"));
                    }
                    let mut samples = Vec::new();
                    let began = Instant::now();
                    let mut failed = None;
                    loop {
                        let enough = samples.len() >= plan.rounds_max
                            || (samples.len() >= ROUNDS_MIN && began.elapsed() >= plan.budget);
                        if !start.goes_on(!enough && failed.is_none()) {
                            break;
                        }
                        match round(&mut case, calls, samples.len(), &mut || start.meet()) {
                            Ok(sample) => samples.push(sample),
                            Err(why) => failed = Some(why),
                        }
                    }
                    failed.map_or(Ok((samples, calls)), Err)
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
            })
            .collect()
    });
    let mut all = Vec::new();
    let mut calls = 0;
    for samples in per_thread {
        let (samples, of_thread) = samples?;
        calls = of_thread;
        all.push(samples);
    }
    let rounds = all.iter().map(Vec::len).min().unwrap_or(0);
    let count = f64::from(u32::try_from(threads)?);
    let together: Vec<[f64; 2]> = (0..rounds)
        .map(|index| {
            all.iter()
                .map(|rounds| rounds[index])
                .collect::<Vec<Round>>()
        })
        .filter(|round| [0, 1].into_iter().all(|side| overlap(round, side)))
        .map(|round| [0, 1].map(|side| round.iter().map(|r| r.each[side]).sum::<f64>() / count))
        .collect();
    if together.len() < ROUNDS_MIN {
        return Err(Busy {
            together: together.len(),
            rounds,
            threads,
        }
        .into());
    }
    Ok(outcome(&together, calls))
}

/// Two threads on one processor would never run together. As far as the system allows it.
fn stay_on_own_processor(number: usize) {
    // SAFETY: plain sets of bits that the system reads and fills.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of_val(&allowed), &raw mut allowed) != 0 {
            return;
        }
        let processors: Vec<usize> = (0..libc::CPU_SETSIZE as usize)
            .filter(|&cpu| libc::CPU_ISSET(cpu, &allowed))
            .collect();
        let mut own: libc::cpu_set_t = std::mem::zeroed();
        if let Some(&cpu) = processors.get(number % processors.len().max(1)) {
            libc::CPU_SET(cpu, &mut own);
            libc::sched_setaffinity(0, size_of_val(&own), &raw const own);
        }
    }
}

/// Threads hardly ever ran at the same time: nothing can be said, and nothing is wrong.
#[derive(Debug)]
pub struct Busy {
    together: usize,
    rounds: usize,
    threads: usize,
}

impl std::fmt::Display for Busy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            together,
            rounds,
            threads,
        } = self;
        write!(
            f,
            "the machine is too busy: in {together} of {rounds} rounds {threads} threads ran at the same time"
        )
    }
}

impl std::error::Error for Busy {}

/// Whether all threads' parts of a side were under way together for more than half of the shortest.
fn overlap(round: &[Round], side: usize) -> bool {
    let spans = round.iter().map(|r| r.span[side]);
    let (Some(begin), Some(end), Some(shortest)) = (
        spans.clone().map(|s| s.0).max(),
        spans.clone().map(|s| s.1).min(),
        spans.map(|s| s.1 - s.0).min(),
    ) else {
        return false;
    };
    end.saturating_duration_since(begin) * 2 > shortest
}

/// Runs both sides until they are warm, and finds how many calls a part has.
fn calibrate(plan: Plan, case: &mut dyn Case) -> Result<u32> {
    // The first calls may do what is done once.
    for side in [Side::Baseline, Side::Subject].repeat(3) {
        timed(case, side, 1)?;
        case.settle();
    }
    let mut calls = 1;
    loop {
        let baseline = timed(case, Side::Baseline, calls)?.0;
        case.settle();
        let subject = timed(case, Side::Subject, calls)?.0;
        case.settle();
        let cost = baseline.max(subject);
        let limit = if cost < FREE { 1 << 16 } else { plan.calls_max };
        #[allow(clippy::cast_precision_loss)]
        let part = plan.part.as_nanos() as f64;
        if cost * f64::from(calls) >= part || calls >= limit {
            return Ok(calls.min(limit));
        }
        calls *= 2;
    }
}

/// Nanoseconds per call of one part, and when it began and ended.
fn timed(case: &mut dyn Case, side: Side, calls: u32) -> Result<(f64, (Instant, Instant))> {
    let began = Instant::now();
    let code = black_box(case.run(side, black_box(calls)));
    let ended = Instant::now();
    if code != 0 {
        return Err(anyhow!("a call answers {code} ({side:?})"));
    }
    #[allow(clippy::cast_precision_loss)]
    let nanoseconds = (ended - began).as_nanos() as f64;
    Ok((nanoseconds / f64::from(calls), (began, ended)))
}

fn round(case: &mut dyn Case, calls: u32, number: usize, begin: &mut dyn FnMut()) -> Result<Round> {
    let order = match number % 2 {
        0 => [Side::Baseline, Side::Subject],
        _ => [Side::Subject, Side::Baseline],
    };
    let now = Instant::now();
    let mut round = Round {
        each: [f64::NAN; 2],
        span: [(now, now); 2],
    };
    let mut failed = None;
    for side in order {
        begin();
        // A thread that fails keeps meeting the others until the round is over.
        match timed(case, side, calls) {
            Ok((each, span)) => {
                round.each[side as usize] = each;
                round.span[side as usize] = span;
            }
            Err(why) => failed = Some(why),
        }
        case.settle();
    }
    failed.map_or(Ok(round), Err)
}

fn outcome(samples: &[[f64; 2]], calls: u32) -> Outcome {
    let each = |of: fn(&[f64; 2]) -> f64| Summary::of(samples.iter().map(of).collect());
    Outcome {
        baseline: each(|s| s[0]),
        subject: each(|s| s[1]),
        added: each(|s| s[1] - s[0]),
        ratio: each(|s| s[1] / s[0]),
        rounds: samples.len(),
        calls,
    }
}

/// Where threads wait for each other, spinning: a sleep would be longer than what is measured.
struct Meeting {
    threads: u64,
    arrived: AtomicU64,
    least: AtomicU64,
    stop: AtomicU64,
}

impl Meeting {
    fn new(threads: usize) -> Self {
        Self {
            threads: threads as u64,
            arrived: AtomicU64::new(0),
            least: AtomicU64::new(u64::MAX),
            stop: AtomicU64::new(0),
        }
    }

    fn meet(&self) {
        let mine = self.arrived.fetch_add(1, Ordering::SeqCst);
        let full = (mine / self.threads + 1) * self.threads;
        let mut spins = 0_u32;
        while self.arrived.load(Ordering::SeqCst) < full {
            spins += 1;
            // Who yields is late when the others begin; but the one that is awaited may need this very core.
            if spins.is_multiple_of(50_000) {
                std::thread::yield_now();
            } else {
                spin_loop();
            }
        }
    }

    fn least(&self, value: u32) -> u32 {
        self.least.fetch_min(u64::from(value), Ordering::SeqCst);
        self.meet();
        u32::try_from(self.least.load(Ordering::SeqCst)).unwrap_or(0)
    }

    /// Whether all want to go on.
    fn goes_on(&self, wanted: bool) -> bool {
        if !wanted {
            self.stop.store(1, Ordering::SeqCst);
        }
        self.meet();
        self.stop.load(Ordering::SeqCst) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Spin;
    impl Case for Spin {
        fn run(&mut self, side: Side, calls: u32) -> i32 {
            let each = Duration::from_micros(if side == Side::Baseline { 5 } else { 15 });
            for _ in 0..calls {
                let began = Instant::now();
                while began.elapsed() < each {}
            }
            0
        }
    }

    struct Fails;
    impl Case for Fails {
        fn run(&mut self, side: Side, _calls: u32) -> i32 {
            if side == Side::Subject { 2 } else { 0 }
        }
    }

    #[test]
    fn what_is_added_is_found() {
        let plan = Plan {
            rounds_max: 50,
            ..Plan::new(Duration::from_millis(100))
        };
        for threads in [1, 2] {
            let outcome = match alternate_in_threads(plan, threads, || Ok(Spin)) {
                Err(why) if why.is::<Busy>() => {
                    println!("skipped: {why}");
                    return;
                }
                other => other.expect("no failure"),
            };
            assert!(
                (9_000.0..20_000.0).contains(&outcome.added.median),
                "{outcome:?}"
            );
            assert!((2.5..4.0).contains(&outcome.ratio.median), "{outcome:?}");
        }
    }

    #[test]
    fn a_call_that_fails_is_said_and_nobody_hangs() {
        let plan = Plan::new(Duration::from_millis(10));
        for threads in [1, 2] {
            let why = alternate_in_threads(plan, threads, || Ok(Fails)).expect_err("it fails");
            assert!(
                why.to_string().contains("answers 2") || why.to_string().contains("another thread")
            );
        }
    }
}
