//! Memory that the driver keeps in stores of its own, pools and graph memory: charged as pinned by what
//! the driver says that it has reserved (see [`crate::meter`]).

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use spillway_protocol::granules_up;

use crate::driver::{Status, call};
use crate::gate;
use crate::heap::SMALL;
use crate::lock;
use crate::meter::{Meter, Settled};
use crate::pools::Pool;
use crate::quota::Backing;
use crate::runtime::Runtime;

/// `CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT`
const POOL_RESERVED: u32 = 5;
/// `CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT`
const GRAPH_USED: u32 = 0;
/// `CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT`
const GRAPH_RESERVED: u32 = 2;
/// How often the driver's figure is asked for again because the books have changed meanwhile.
const ASK_AT_MOST: usize = 8;
/// How long the end of a pool waits for threads of ours that ask the driver about it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a metered call has not done what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmade {
    /// It would have passed the limit, and was not made.
    Refused,
    /// The driver's answer.
    Failed(Status),
    /// It was made, and took more than fits under the limit: to be undone if it can be.
    Over,
}

/// A store that a call may make grow.
pub struct Growth<'a> {
    /// Its books.
    pub meter: &'a Mutex<Meter>,
    /// Its device, by index.
    pub device: usize,
    /// By how much at most, in bytes, whole granules.
    pub most: u64,
    /// What it takes of the store's unused bytes, by [`Runtime::claim_room`].
    pub claim: u64,
    /// Asks the driver what the store has, in bytes.
    pub reserved: Box<dyn Fn() -> Option<u64>>,
}

/// What the driver has reserved for a pool, in bytes.
pub fn pool_reserved(pool: u64) -> Option<u64> {
    let mut bytes = 0u64;
    // SAFETY: the driver fills 64 bits for this attribute, and refuses a pool that is gone.
    let got = unsafe {
        call::cuMemPoolGetAttribute(pool as *mut _, POOL_RESERVED, (&raw mut bytes).cast())
    };
    got.is_success().then_some(bytes)
}

fn graph_figure(ordinal: i32, which: u32) -> Option<u64> {
    let mut bytes = 0u64;
    // SAFETY: the driver fills 64 bits for this attribute.
    let got =
        unsafe { call::cuDeviceGetGraphMemAttribute(ordinal, which, (&raw mut bytes).cast()) };
    got.is_success().then_some(bytes)
}

/// What the driver has reserved for graphs on a device, and how much of it is in use, in bytes.
pub fn graph_memory(ordinal: i32) -> Option<(u64, u64)> {
    Some((
        graph_figure(ordinal, GRAPH_RESERVED)?,
        graph_figure(ordinal, GRAPH_USED)?,
    ))
}

impl Runtime {
    /// Runs a driver call, inside the gate, that may make stores grow. Where the driver cannot tell what a
    /// store has, it is taken to have grown by the most that was announced.
    ///
    /// # Errors
    /// See [`Unmade`].
    pub fn metered(&self, growths: &[Growth], make: impl FnOnce() -> Status) -> Result<(), Unmade> {
        // All of it before the gate: reserving may wait for the coordinator.
        for (index, growth) in growths.iter().enumerate() {
            if growth.most > 0 && self.reserve(growth.device, growth.most, false).is_err() {
                for done in growths.iter().take(index).filter(|done| done.most > 0) {
                    self.unreserve(done.device, done.most, Backing::Pinned);
                }
                for growth in growths {
                    lock(growth.meter).unclaim(growth.claim);
                }
                return Err(Unmade::Refused);
            }
        }
        for growth in growths {
            lock(growth.meter).begin(growth.most);
        }
        let inside = gate::enter();
        self.observed.changes_begun.fetch_add(1, SeqCst);
        let status = make();
        let mut settled = Vec::with_capacity(growths.len());
        for growth in growths {
            settled.push(self.ask(growth.meter, &growth.reserved, |meter, known| {
                let charged = meter.charged();
                let has = known.unwrap_or(if status.is_success() {
                    charged
                } else {
                    charged.saturating_sub(growth.most)
                });
                let settled = meter.end(growth.most, has);
                meter.unclaim(growth.claim);
                self.report_held(meter, growth.device, has);
                settled
            }));
        }
        self.observed.changes_ended.fetch_add(1, SeqCst);
        drop(inside);
        let mut over = false;
        for (growth, settled) in growths.iter().zip(settled) {
            over |= self.settle(growth.meter, growth.device, settled).is_err();
        }
        match status.ok() {
            Err(why) => Err(Unmade::Failed(why)),
            Ok(()) if over => Err(Unmade::Over),
            Ok(()) => Ok(()),
        }
    }

    /// How much of `bytes` a call may take out of what a store has unused; see [`Meter::claim`]. `figures`:
    /// what the driver has reserved there, and what of it is used.
    pub fn claim_room(
        &self,
        meter: &Mutex<Meter>,
        bytes: u64,
        partly: bool,
        figures: impl Fn() -> Option<(u64, u64)>,
    ) -> u64 {
        for _ in 0..ASK_AT_MOST {
            let version = lock(meter).version();
            let Some((reserved, used)) = figures() else {
                return 0;
            };
            let mut meter = lock(meter);
            if meter.version() == version {
                return meter.claim(bytes, partly, reserved, used);
            }
        }
        0
    }

    /// Asks the driver what a store has, and enters it into the books if they have not changed meanwhile;
    /// no lock is held while the driver is asked.
    fn ask<T>(
        &self,
        meter: &Mutex<Meter>,
        reserved: &dyn Fn() -> Option<u64>,
        enter: impl FnOnce(&mut Meter, Option<u64>) -> T,
    ) -> T {
        let mut tries = 0;
        loop {
            let version = lock(meter).version();
            let mut known = reserved();
            let mut meter = lock(meter);
            tries += 1;
            if meter.version() == version || tries == ASK_AT_MOST {
                if meter.version() != version {
                    // Too much happens at once: what is charged stays, until a quieter moment.
                    known = known.map(|known| known.max(meter.charged()));
                }
                return enter(&mut meter, known);
            }
        }
    }

    fn report_held(&self, meter: &mut Meter, device: usize, reserved: u64) {
        let (more, less) = meter.report(reserved);
        let resident = &self.observed.devices[device].resident;
        resident.fetch_add(more, SeqCst);
        crate::take_off(resident, less);
    }

    /// Brings the quota in line with a store. Outside the gate.
    fn settle(&self, meter: &Mutex<Meter>, device: usize, settled: Settled) -> Result<(), ()> {
        match settled {
            Settled::Even => Ok(()),
            Settled::Spare(bytes) => {
                self.unreserve(device, bytes, Backing::Pinned);
                Ok(())
            }
            Settled::Short(bytes) => {
                self.reserve(device, bytes, false)?;
                let mut meter = lock(meter);
                meter.topped_up(bytes);
                // Charged from now on, and so no overhead any more.
                let charged = meter.charged();
                self.observed.changes_begun.fetch_add(1, SeqCst);
                self.report_held(&mut meter, device, charged);
                self.observed.changes_ended.fetch_add(1, SeqCst);
                Ok(())
            }
        }
    }

    /// Looks what a store has now; returns the bytes that it has given back since.
    fn look(&self, meter: &Mutex<Meter>, device: usize, reserved: impl Fn() -> Option<u64>) -> u64 {
        self.observed.changes_begun.fetch_add(1, SeqCst);
        let settled = self.ask(meter, &reserved, |meter, known| {
            let Some(has) = known else {
                return Settled::Even;
            };
            let settled = meter.end(0, has);
            self.report_held(meter, device, has);
            settled
        });
        self.observed.changes_ended.fetch_add(1, SeqCst);
        match settled {
            Settled::Spare(bytes) => {
                self.unreserve(device, bytes, Backing::Pinned);
                bytes
            }
            // It took more than was announced: overhead, until somebody allocates there.
            Settled::Even | Settled::Short(_) => 0,
        }
    }

    /// Looks what a driver's pool has now.
    pub fn look_at_pool(&self, pool: u64) -> u64 {
        let used = lock(&self.pools).try_use(pool);
        let Some((device, meter)) = used else {
            return 0;
        };
        let given_back = self.look(&meter, device, || pool_reserved(pool));
        lock(&self.pools).unuse(pool);
        given_back
    }

    /// A pool is about to be destroyed: takes it off the record, and waits until no thread of ours asks the
    /// driver about it. They do so for microseconds; the wait is bounded all the same.
    pub fn take_pool(&self, pool: u64) -> Option<Pool> {
        let taken = lock(&self.pools).take(pool);
        let until = Instant::now() + PATIENCE;
        while lock(&self.pools).is_used(pool) && Instant::now() < until {
            std::thread::sleep(Duration::from_micros(50));
        }
        taken
    }

    /// A driver's pool with this meter was destroyed: what is still allocated from it is charged by itself.
    pub fn pool_destroyed(&self, pool: u64, known: Option<(usize, Arc<Mutex<Meter>>)>) {
        let left = lock(&self.heap).pool_gone(pool);
        let Some((device, meter)) = known else {
            return;
        };
        let mut wanted = 0;
        for alloc in &left {
            wanted += if alloc.bytes >= SMALL {
                granules_up(alloc.bytes)
            } else {
                let mut small = lock(&self.small[device]);
                let needs = small.needs(alloc.bytes);
                small.add(alloc.bytes, needs);
                needs
            };
        }
        self.observed.changes_begun.fetch_add(1, SeqCst);
        let charged = {
            let mut meter = lock(&meter);
            let charged = meter.charged();
            let _ = meter.end(0, 0);
            let resident = &self.observed.devices[device].resident;
            crate::take_off(resident, meter.report(0).1);
            resident.fetch_add(wanted, SeqCst);
            charged
        };
        self.observed.changes_ended.fetch_add(1, SeqCst);
        if wanted < charged {
            self.unreserve(device, charged - wanted, Backing::Pinned);
        } else if wanted > charged {
            // The pool packed closer than we charge: without room for it, it counts as overhead.
            let _ = self.reserve(device, wanted - charged, false);
        }
    }

    /// Looks what the driver has reserved for graphs on a device.
    pub fn look_at_graphs(&self, device: usize) -> u64 {
        if !lock(&self.graphs).any() {
            return 0;
        }
        let ordinal = self.devices[device].ordinal;
        self.look(&self.graph_meters[device], device, || {
            graph_memory(ordinal).map(|(reserved, _)| reserved)
        })
    }

    /// Looks at all stores of a device: they give back at synchronisations, which nobody tells us of.
    pub fn look_at_stores(&self, device: usize) -> u64 {
        if !self.has_stores.load(SeqCst) {
            return 0;
        }
        let pools = lock(&self.pools).drivers(Some(device));
        let pools: u64 = pools.into_iter().map(|pool| self.look_at_pool(pool)).sum();
        pools + self.look_at_graphs(device)
    }

    /// Has the driver give back what its stores on a device keep unused; returns the bytes.
    pub fn trim_stores(&self, device: usize) -> u64 {
        if !self.has_stores.load(SeqCst) {
            return 0;
        }
        let pools = lock(&self.pools).drivers(Some(device));
        let graphs = lock(&self.graphs).any();
        if pools.is_empty() && !graphs {
            return 0;
        }
        self.relaxed(|| {
            for &pool in &pools {
                if lock(&self.pools).try_use(pool).is_none() {
                    continue;
                }
                // SAFETY: it is not destroyed before we have let go of it.
                let _ = unsafe { call::cuMemPoolTrimTo(pool as *mut _, 0) };
                lock(&self.pools).unuse(pool);
            }
            if graphs {
                // SAFETY: no pointers are involved.
                let _ = unsafe { call::cuDeviceGraphMemTrim(self.devices[device].ordinal) };
            }
        });
        self.look_at_stores(device)
    }
}
