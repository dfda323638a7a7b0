//! What samples tell: overhead, memory of strangers, and what the dead gave back.

use std::sync::atomic::Ordering::SeqCst;

use spillway_arbiter::audit::overhead;
use spillway_arbiter::{DeviceId, MILLISECOND, Nanos, ProcessId, SECOND};
use spillway_protocol::{format_bytes, granules_up};

use super::main_loop::now;
use super::sampler::{Held, Sample};
use super::state::Daemon;

/// A process that waits for its overhead to be measured is answered after this long at the latest,
/// also if it never held still.
const REFRESH_AT_MOST: Nanos = 50 * MILLISECOND;
/// What the dead held is granted again after this long even if the driver still shows it.
const RETURN_AT_MOST: Nanos = 5 * SECOND;

/// While memory of strangers is in somebody's way, it is measured this often.
const SAMPLE_AGAIN: Nanos = 50 * MILLISECOND;

/// What is known of a process's overhead on a device.
#[derive(Debug)]
pub struct Overhead {
    /// As of when it last asked, or more since.
    sure: u64,
    /// By the last sample.
    last: u64,
    /// The process has asked, and one sample showed less.
    unsure: bool,
}

impl Daemon {
    /// Asks for a sample, and remembers what is charged before it begins.
    pub(super) fn ask_sample(&mut self) {
        for index in 0..self.devices.len() {
            let charged = self.arbiter.charged(index);
            let device = &mut self.devices[index];
            device.charged_before = device.charged_before.max(charged);
        }
        self.sampler.ask();
    }

    /// Something is to be seen that the last sample did not show.
    pub(super) fn sample_soon(&mut self) {
        self.sample_again = self.sample_again.min(now() + SAMPLE_AGAIN);
    }

    /// A sample has arrived.
    pub(super) fn sampled(&mut self, sample: &Sample) {
        for (device, measured) in self.devices.iter_mut().zip(&sample.devices) {
            device.used = measured.used;
        }
        let sessions: Vec<ProcessId> = sample.held.keys().copied().collect();
        for id in sessions {
            self.measure_overhead(id, sample);
        }
        self.find_foreign();
        if self.arbiter.is_busy() && self.devices.iter().any(|d| d.foreign != [0; 2]) {
            // Somebody may be waiting for what was only late to be shown as free.
            self.sample_again = now() + SAMPLE_AGAIN;
        }
        // Before the dead are forgotten: their memory is no stranger's.
        self.audit(sample);
        self.find_returned(sample);
        // Who asked for the measurement goes on by the grants as they are after it.
        self.arbiter.tick(now(), &mut self.pages);
        self.answer_refreshes(sample);
        let workloads: Vec<_> = self.workloads.keys().copied().collect();
        for workload in workloads {
            self.publish_shares(workload);
        }
    }

    fn measure_overhead(&mut self, id: ProcessId, sample: &Sample) {
        let Some(Some(held)) = sample.held.get(&id) else {
            return;
        };
        let Some(pair) = self.pages.0.get(&id) else {
            return;
        };
        let Some(session) = self.sessions.get(&id) else {
            return;
        };
        let pid = session.identity.pid;
        let devices: Vec<(DeviceId, Held)> = pair
            .devices
            .iter()
            .copied()
            .zip(held.iter().copied())
            .collect();
        let asked = self
            .refreshing
            .iter()
            .any(|refreshing| refreshing.session == id && sample.began >= refreshing.since);
        let mut unknown = false;
        for (device, held) in devices {
            let Some(measured) = sample.devices.get(device) else {
                continue;
            };
            let shown = measured.processes.as_ref().and_then(|all| all.get(&pid));
            match shown {
                // It shows at least what the process holds itself; the rest is overhead.
                Some(Some(used)) => {
                    let total = self.devices[device].gpu.total;
                    let most = granules_up(used.saturating_sub(held.resident)).min(total);
                    let maybe = self.maybe(id, device, held);
                    let (_, before) = self.arbiter.account(id, device);
                    let now = self.overhead((id, device), before, (most, maybe), asked);
                    self.arbiter.set_overhead(id, device, now);
                }
                Some(None) => unknown = true,
                // Not in the list: fine as long as it holds nothing there.
                None if held.resident > 0 => unknown = true,
                None => self.arbiter.set_overhead(id, device, 0),
            }
        }
        if unknown {
            self.tell_unknown(id, pid);
        }
    }

    /// A process's overhead by a sample, where it was `before`; `asked`: by the process, which has put its books
    /// in order first.
    ///
    /// A program may have given memory back to the driver before that is in its books: less overhead than when
    /// it last asked counts when two samples in a row show it, and no longer than samples show it. Also when it
    /// asks: other threads of it go on meanwhile. Its answer waits for the second sample.
    fn overhead(
        &mut self,
        whose: (ProcessId, DeviceId),
        before: u64,
        (most, maybe): (u64, u64),
        asked: bool,
    ) -> u64 {
        let known = self.overheads.entry(whose).or_insert(Overhead {
            sure: before,
            last: before,
            unsure: false,
        });
        let now = overhead(known.sure, most, maybe);
        let last = std::mem::replace(&mut known.last, now);
        if now >= known.sure {
            known.sure = now;
            known.unsure = false;
            return now;
        }
        if asked {
            known.unsure = !known.unsure;
            if !known.unsure {
                known.sure = last.max(now);
            }
            return known.sure;
        }
        if last > now {
            self.sample_soon();
        }
        last.max(now)
    }

    /// Bytes beyond what a process says that it holds which the driver may show for it, although they
    /// are not its overhead. It can be what somebody else is charged for; it is not more because a process
    /// says so.
    pub(super) fn maybe(&self, id: ProcessId, device: DeviceId, held: Held) -> u64 {
        let most = self.claims.covered(id, device);
        held.maybe.min(most).min(self.devices[device].gpu.total)
    }

    fn tell_unknown(&mut self, id: ProcessId, pid: i32) {
        let fake = !self.options.fake_device.is_empty();
        let Some(live) = self.sessions.get_mut(&id).and_then(|s| s.live()) else {
            return;
        };
        if std::mem::replace(&mut live.overhead_unknown_said, true) || fake {
            return;
        }
        let name = self.name_of_session(id);
        let text = format!(
            "the driver does not say what pid {pid} holds: its overhead counts as 0; leave more --reserve"
        );
        self.event(
            "overhead_unknown",
            name.as_deref(),
            text,
            &[("pid", pid.into())],
        );
    }

    /// Memory in use beyond everything that we account for belongs to strangers (or to processes from
    /// before a restart that are not back yet) and must not be granted. Only what two samples in a row
    /// show counts: a process may have released memory of which the driver knows a little later.
    fn find_foreign(&mut self) {
        for index in 0..self.devices.len() {
            let charged = self.arbiter.charged(index);
            let device = &mut self.devices[index];
            let most = charged.max(device.charged_before);
            device.charged_before = charged;
            let Some(used) = device.used else {
                continue;
            };
            let outside = device
                .gpu
                .total
                .saturating_sub(device.capacity - device.reserve);
            let excess = used.saturating_sub(most).saturating_sub(outside);
            device.foreign = [excess, device.foreign[0]];
            let foreign = device.foreign[0].min(device.foreign[1]);
            self.arbiter.set_external(index, foreign);
        }
    }

    fn find_returned(&mut self, sample: &Sample) {
        let time = now();
        let mut back = Vec::new();
        let mut late = Vec::new();
        self.returning.retain(|entry| {
            let measured = sample.devices.get(entry.device);
            let list = measured.and_then(|measured| measured.processes.as_ref());
            let gone = list.is_some_and(|all| !all.contains_key(&entry.pid));
            let seen = gone && sample.began > entry.since;
            let overdue = time.saturating_sub(entry.since) >= RETURN_AT_MOST;
            if seen || overdue {
                back.push((entry.device, entry.number));
            }
            if overdue && !seen {
                late.push((entry.device, entry.pid, entry.bytes));
            }
            !(seen || overdue)
        });
        for (device, number) in back {
            self.arbiter.returned(time, &mut self.pages, device, number);
        }
        for (device, pid, bytes) in late {
            let text = format!(
                "pid {pid} has ended, and the driver has not shown its {} on device {device} as free for {} s: granted again",
                format_bytes(bytes),
                RETURN_AT_MOST / SECOND
            );
            self.event(
                "note",
                None,
                text,
                &[("pid", pid.into()), ("bytes", bytes.into())],
            );
        }
    }

    fn answer_refreshes(&mut self, sample: &Sample) {
        let time = now();
        let unsure: Vec<ProcessId> = self
            .overheads
            .iter()
            .filter(|(_, known)| known.unsure)
            .map(|(&(id, _), _)| id)
            .collect();
        let (done, wait): (Vec<_>, Vec<_>) = std::mem::take(&mut self.refreshing)
            .into_iter()
            .partition(|refreshing| {
                let valid = sample.began >= refreshing.since
                    && matches!(sample.held.get(&refreshing.session), Some(Some(_)))
                    && !unsure.contains(&refreshing.session);
                valid || time.saturating_sub(refreshing.since) >= REFRESH_AT_MOST
            });
        self.refreshing = wait;
        for refreshing in done {
            self.refreshed(refreshing.session, refreshing.ticket);
        }
        if !self.refreshing.is_empty() {
            self.ask_sample();
        }
    }

    /// How many bytes the process says that it holds on a device, overhead not included.
    pub(super) fn held(&self, id: ProcessId, device: DeviceId) -> u64 {
        self.pages
            .0
            .get(&id)
            .and_then(|pair| pair.observed(device))
            .map_or(0, |at| at.resident.load(SeqCst))
            .min(self.devices[device].gpu.total)
    }
}
