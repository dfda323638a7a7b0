//! The thread that asks the driver: once a second, and whenever something waits for a measurement.
//!
//! A process's overhead is what the driver shows for it minus what it says that it holds itself. The
//! two are read at different moments, so a sample counts only if the process did not change its
//! physical memory in between: its two counters of begun and ended changes are equal and unchanged.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_arbiter::{DeviceId, Nanos, ProcessId};
use spillway_protocol::page::Observed;

use super::gpus::{Gpus, Measured};
use super::handle::Waker;
use super::main_loop::now;
use super::people::born;
use super::shared::Shared;

/// Without anybody asking, a sample is taken this often.
const PERIOD: Duration = Duration::from_secs(1);

/// Whose memory is to be told apart.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its page.
    pub page: Arc<Shared<Observed>>,
    /// Its devices, in its order.
    pub devices: Vec<DeviceId>,
}

/// By session.
pub type Targets = Arc<Mutex<BTreeMap<ProcessId, Target>>>;

/// One round over all devices.
#[derive(Debug)]
pub struct Sample {
    /// When it began.
    pub began: Nanos,
    /// By device.
    pub devices: Vec<Measured>,
    /// When those that compute were started; those that are not to be seen are left out.
    pub born: BTreeMap<i32, u64>,
    /// Bytes that a process held by itself on each of its devices, where it held still during the
    /// sample; `None`: it did not.
    pub held: BTreeMap<ProcessId, Option<Vec<u64>>>,
}

/// The thread.
#[derive(Debug)]
pub struct Sampler {
    /// Whom to look at; shared with the thread.
    pub targets: Targets,
    requests: Sender<()>,
    samples: Receiver<Sample>,
}

impl Sampler {
    /// Starts it.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn start(gpus: Box<dyn Gpus>, waker: Waker) -> io::Result<Self> {
        let targets = Targets::default();
        let (requests, wanted) = channel();
        let (sender, samples) = channel();
        let seen = Arc::clone(&targets);
        thread::Builder::new()
            .name("sampler".to_owned())
            .spawn(move || {
                let devices = gpus.devices().len();
                loop {
                    match wanted.recv_timeout(PERIOD) {
                        Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                    // Whatever was asked until now is answered by the one that begins now.
                    while wanted.try_recv().is_ok() {}
                    let sample = take(gpus.as_ref(), devices, &seen);
                    if sender.send(sample).is_err() {
                        return;
                    }
                    waker.wake();
                }
            })?;
        Ok(Self {
            targets,
            requests,
            samples,
        })
    }

    /// Asks for a sample that begins after this call.
    pub fn ask(&self) {
        let _ = self.requests.send(());
    }

    /// The next one that is finished.
    pub fn sample(&self) -> Option<Sample> {
        self.samples.try_recv().ok()
    }
}

/// Both counters, if no change is under way.
fn still(page: &Observed) -> Option<u64> {
    let ended = page.changes_ended.load(SeqCst);
    let begun = page.changes_begun.load(SeqCst);
    (begun == ended).then_some(begun)
}

fn take(gpus: &dyn Gpus, devices: usize, targets: &Targets) -> Sample {
    let targets = targets.lock().clone();
    let began = now();
    let before: Vec<(Option<u64>, Vec<u64>)> = targets
        .values()
        .map(|target| (still(&target.page), held(target)))
        .collect();
    let devices: Vec<Measured> = (0..devices).map(|device| gpus.measure(device)).collect();
    let held = targets
        .iter()
        .zip(before)
        .map(|((id, target), (changes, bytes))| {
            let same = changes.is_some() && still(&target.page) == changes;
            (*id, (same && held(target) == bytes).then_some(bytes))
        })
        .collect();
    Sample {
        began,
        born: births(&devices),
        devices,
        held,
    }
}

fn births(devices: &[Measured]) -> BTreeMap<i32, u64> {
    let pids = devices.iter().flat_map(|device| &device.compute);
    pids.filter_map(|pid| Some((*pid, born(*pid)?))).collect()
}

fn held(target: &Target) -> Vec<u64> {
    (0..target.devices.len())
        .map(|index| {
            target
                .page
                .devices
                .get(index)
                .map_or(0, |device| device.resident.load(SeqCst))
        })
        .collect()
}
