//! The thread that asks the driver: once a second, and whenever something waits for a measurement.
//!
//! A process's overhead is what the driver shows for it minus what it says that it holds itself. The
//! two are read at different moments, so a sample counts only if the process did not change its
//! physical memory in between: its two counters of begun and ended changes are equal and unchanged.
//! Some memory the driver may or may not show as the process's (imports): how much that can be is read at the
//! same moments. Managed memory it never shows as any process's, so it is in neither figure.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use spillway_arbiter::{DeviceId, Nanos, ProcessId};
use spillway_protocol::page::{Observed, ObservedDevice};

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
    /// What a process held by itself on each of its devices, where it held still during the sample;
    /// `None`: it did not.
    pub held: BTreeMap<ProcessId, Option<Vec<Held>>>,
}

/// What a process says that it holds on a device, overhead not included. Untrusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes that are there.
    pub resident: u64,
    /// Bytes beyond them that the driver may or may not show as its own.
    pub maybe: u64,
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
    let before: Vec<(Option<u64>, Vec<Held>)> = targets
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

fn held(target: &Target) -> Vec<Held> {
    let read = |device: &ObservedDevice| Held {
        resident: device.resident.load(SeqCst),
        maybe: device.maybe.load(SeqCst),
    };
    (0..target.devices.len())
        .map(|index| target.page.devices.get(index).map_or(Held::default(), read))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::mem::offset_of;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::super::gpus::Gpu;
    use super::*;

    const ID: ProcessId = ProcessId(1);
    const BEGUN: usize = offset_of!(Observed, changes_begun);
    const ENDED: usize = offset_of!(Observed, changes_ended);
    const RESIDENT: usize = offset_of!(Observed, devices) + offset_of!(ObservedDevice, resident);
    const MAYBE: usize = offset_of!(Observed, devices) + offset_of!(ObservedDevice, maybe);

    /// While the driver is asked, the process writes these words of its page.
    struct Meanwhile(File, Vec<(usize, u64)>);

    fn write(page: &File, words: &[(usize, u64)]) {
        for (offset, value) in words {
            let offset = *offset as u64;
            page.write_all_at(&value.to_ne_bytes(), offset)
                .expect("the process may write its page");
        }
    }

    impl Gpus for Meanwhile {
        fn devices(&self) -> Vec<Gpu> {
            Vec::new()
        }

        fn measure(&self, _device: usize) -> Measured {
            write(&self.0, &self.1);
            Measured::default()
        }
    }

    fn held_if(meanwhile: &[(usize, u64)]) -> Option<Vec<Held>> {
        let page = Shared::observed().expect("a page");
        let file = page.as_fd().try_clone_to_owned().expect("a descriptor");
        let file = File::from(file);
        write(&file, &[(RESIDENT, 10), (MAYBE, 5), (BEGUN, 3), (ENDED, 3)]);
        let target = Target {
            page: Arc::new(page),
            devices: vec![0],
        };
        let targets = Targets::new(Mutex::new(BTreeMap::from([(ID, target)])));
        let mut sample = take(&Meanwhile(file, meanwhile.to_vec()), 1, &targets);
        sample.held.remove(&ID).expect("it was looked at")
    }

    #[test]
    fn only_who_holds_still_counts() {
        let held = Held {
            resident: 10,
            maybe: 5,
        };
        assert_eq!(held_if(&[]), Some(vec![held]));
        assert_eq!(held_if(&[(RESIDENT, 11)]), None);
        assert_eq!(held_if(&[(MAYBE, 6)]), None);
        assert_eq!(held_if(&[(BEGUN, 4)]), None, "a change has begun");
        assert_eq!(held_if(&[(BEGUN, 4), (ENDED, 4)]), None, "and ended");
        let calls = offset_of!(Observed, calls);
        assert_eq!(held_if(&[(calls, 9)]), Some(vec![held]));
    }
}
