//! The calls whose added cost matters most, each as a loop that is the same for both sides.

use std::ffi::c_void;
use std::ptr::null_mut;

use anyhow::Result;

use crate::driver::{Driver, Handle, check};
use crate::rounds::{Case, Side};
use crate::setup::Device;

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `cuLaunchKernel` of an empty kernel, 11 arguments.
    Launch,
    /// `cuMemcpyHtoDAsync`, 4 arguments, 4 KiB from page-locked memory.
    CopyIn,
    /// `cuMemcpyDtoHAsync`, the same.
    CopyOut,
    /// `cuEventRecord`
    EventRecord,
    /// `cuMemGetInfo`
    MemGetInfo,
    /// `cuPointerGetAttribute`, the context of a pointer from `cuMemAlloc`.
    PointerAttribute,
    /// A launch on both sides by the driver's own address: what this bench finds where nothing is added.
    Control,
    /// The same, with a locked instruction on one side: what a locked gate would add.
    Locked,
}

/// All calls with the names of their cases.
pub const CALLS: [(Call, &str); 8] = [
    (Call::Launch, "launch"),
    (Call::CopyIn, "copy"),
    (Call::CopyOut, "copy_out"),
    (Call::EventRecord, "event_record"),
    (Call::MemGetInfo, "mem_get_info"),
    (Call::PointerAttribute, "pointer_attribute"),
    (Call::Control, "control"),
    (Call::Locked, "locked"),
];

impl Call {
    /// A device queues it.
    #[must_use]
    pub fn is_queued(self) -> bool {
        !matches!(self, Self::MemGetInfo | Self::PointerAttribute)
    }
}

/// Bytes of a copy.
const COPY: usize = 4096;

/// A line of memory that is written past the caches, as a driver writes a doorbell.
#[repr(align(64))]
struct Doorbell([u64; 8]);

/// One thread's stream, event and memory, and what it calls.
pub struct Hooks<'a> {
    device: &'a Device,
    call: Call,
    kernel: Handle,
    stream: Handle,
    event: Handle,
    host: *mut c_void,
    /// From the program's `cuMemAlloc`, and from the driver's own: each side asks about its own pointer.
    memory: (u64, u64),
    doorbell: Option<Box<Doorbell>>,
}

impl<'a> Hooks<'a> {
    /// Prepares the calling thread. `combined`: each call follows stores past the caches.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn new(device: &'a Device, kernel: Handle, call: Call, combined: bool) -> Result<Self> {
        /// `CU_STREAM_NON_BLOCKING`
        const NON_BLOCKING: u32 = 1;
        /// `CU_EVENT_DISABLE_TIMING`
        const NO_TIMING: u32 = 2;
        device.enter()?;
        let driver = &device.both.hooked;
        let (mut stream, mut event, mut host) = (null_mut(), null_mut(), null_mut());
        let mut memory = (0, 0);
        // SAFETY: the driver fills one object each time.
        unsafe {
            check(
                "cuStreamCreate",
                (driver.cuStreamCreate)(&raw mut stream, NON_BLOCKING),
            )?;
            check(
                "cuEventCreate",
                (driver.cuEventCreate)(&raw mut event, NO_TIMING),
            )?;
            check(
                "cuMemAllocHost",
                (driver.cuMemAllocHost_v2)(&raw mut host, COPY),
            )?;
            check(
                "cuMemAlloc",
                (driver.cuMemAlloc_v2)(&raw mut memory.0, COPY),
            )?;
            check(
                "cuMemAlloc",
                (device.both.direct.cuMemAlloc_v2)(&raw mut memory.1, COPY),
            )?;
        }
        let doorbell = combined.then(|| Box::new(Doorbell([0; 8])));
        Ok(Self {
            device,
            call,
            kernel,
            stream,
            event,
            host,
            memory,
            doorbell,
        })
    }

    fn driver(&self, side: Side) -> &'a Driver {
        match (side, self.call) {
            (Side::Baseline, _) | (_, Call::Control | Call::Locked) => &self.device.both.direct,
            (Side::Subject, _) => &self.device.both.hooked,
        }
    }

    /// The loop, with `before` in front of each call. Not inlined: the same code serves both sides.
    #[inline(never)]
    fn repeat(&self, side: Side, calls: u32, before: impl Fn()) -> i32 {
        let driver = self.driver(side);
        let (kernel, stream, event, host) = (self.kernel, self.stream, self.event, self.host);
        // Both sides copy to and from the program's allocation.
        let memory = self.memory.0;
        let mut bad = 0;
        // SAFETY: handles and memory of this thread, which live as long as the process; places for answers.
        unsafe {
            match self.call {
                Call::Launch | Call::Control => {
                    let launch = driver.cuLaunchKernel;
                    for _ in 0..calls {
                        before();
                        bad |= launch(kernel, 1, 1, 1, 1, 1, 1, 0, stream, null_mut(), null_mut());
                    }
                }
                Call::Locked => {
                    let launch = driver.cuLaunchKernel;
                    let word = std::sync::atomic::AtomicU64::new(0);
                    let word = std::hint::black_box(&word);
                    for _ in 0..calls {
                        before();
                        if side == Side::Subject {
                            word.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        }
                        bad |= launch(kernel, 1, 1, 1, 1, 1, 1, 0, stream, null_mut(), null_mut());
                    }
                }
                Call::CopyIn => {
                    let copy = driver.cuMemcpyHtoDAsync_v2;
                    for _ in 0..calls {
                        before();
                        bad |= copy(memory, host, COPY, stream);
                    }
                }
                Call::CopyOut => {
                    let copy = driver.cuMemcpyDtoHAsync_v2;
                    for _ in 0..calls {
                        before();
                        bad |= copy(host, memory, COPY, stream);
                    }
                }
                Call::EventRecord => {
                    let record = driver.cuEventRecord;
                    for _ in 0..calls {
                        before();
                        bad |= record(event, stream);
                    }
                }
                Call::MemGetInfo => {
                    let ask = driver.cuMemGetInfo_v2;
                    let (mut free, mut total) = (0, 0);
                    for _ in 0..calls {
                        before();
                        bad |= ask(&raw mut free, &raw mut total);
                    }
                }
                Call::PointerAttribute => {
                    /// `CU_POINTER_ATTRIBUTE_CONTEXT`
                    const CONTEXT: u32 = 1;
                    let ask = driver.cuPointerGetAttribute;
                    let memory = match side {
                        Side::Baseline => self.memory.1,
                        Side::Subject => self.memory.0,
                    };
                    let mut context: Handle = null_mut();
                    for _ in 0..calls {
                        before();
                        bad |= ask((&raw mut context).cast(), CONTEXT, memory);
                    }
                }
            }
        }
        bad
    }
}

impl Case for Hooks<'_> {
    fn run(&mut self, side: Side, calls: u32) -> i32 {
        match &self.doorbell {
            None => self.repeat(side, calls, || ()),
            Some(doorbell) => self.repeat(side, calls, || ring(doorbell)),
        }
    }

    fn settle(&mut self) {
        if self.call.is_queued() {
            // SAFETY: no pointers.
            unsafe { (self.device.both.direct.cuCtxSynchronize)() };
        }
    }
}

/// Stores past the caches.
#[inline(always)]
fn ring(doorbell: &Doorbell) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: this thread's own line; nobody reads it.
    unsafe {
        std::arch::asm!(
            "movnti [{line}], {value}",
            "movnti [{line} + 8], {value}",
            line = in(reg) doorbell.0.as_ptr(),
            value = in(reg) 1_u64,
            options(nostack, preserves_flags),
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::hint::black_box(doorbell);
}
