//! The two shared pages of a session.
//!
//! *Desired* is written by the coordinator alone (the process maps it read-only and the file is
//! sealed against writing); *observed* is written by the process alone. Every word has one writer
//! and is level-triggered: losing or repeating a wake-up harms nothing.
//!
//! # Reserving quota (process)
//! Compare-exchange `observed.devices[d].used` from `u` to `u + n` only if `u + n <= grant`; load the
//! grant again; if `used` is now above it, subtract `n` and ask the coordinator (`Grow`). Subtract
//! only after the driver has released the memory.
//!
//! # Lowering a grant (coordinator)
//! Store the lower grant, then load `used`; if `used` is above it, store the grant back up to `used`.
//! What neither needs is free. All accesses are sequentially consistent, so at least one side sees
//! the other.

use std::sync::atomic::AtomicU64;

use crate::limits::MAX_DEVICES;

/// First word of [`Desired`].
pub const DESIRED_MAGIC: u64 = u64::from_le_bytes(*b"SPWYdes1");
/// First word of [`Observed`].
pub const OBSERVED_MAGIC: u64 = u64::from_le_bytes(*b"SPWYobs1");

/// Bytes of the file behind each page; both structures fit.
pub const PAGE_BYTES: usize = 4096;

/// What the coordinator wants of one device's share.
#[derive(Default)]
#[repr(C)]
pub struct DesiredDevice {
    /// `used` may reach this many bytes (pageable and pinned; overhead is outside).
    pub grant: AtomicU64,
    /// The workload's limit here, in bytes: what the program is told as the device's total.
    pub limit: AtomicU64,
    /// The workload's request here, in bytes.
    pub request: AtomicU64,
    /// Measured overhead of this process here (context, modules, code), in bytes.
    pub overhead: AtomicU64,
    /// What the workload's other processes use here, with their overhead, in bytes.
    pub others: AtomicU64,
    /// What a context has cost others of these here, at most, in bytes; 0: not known.
    pub context: AtomicU64,
    /// Reserved for later versions; zero.
    pub reserved: [AtomicU64; 2],
}

/// The coordinator's page.
#[derive(Default)]
#[repr(C)]
pub struct Desired {
    /// [`DESIRED_MAGIC`].
    pub magic: AtomicU64,
    /// [`crate::PROTOCOL_VERSION`] of the writer.
    pub version: AtomicU64,
    /// Random id of the coordinator's run: differs after every restart.
    pub instance: AtomicU64,
    /// See [`Command`].
    pub command: AtomicU64,
    /// How long a drain may take before the process reopens and reports busy, in milliseconds.
    pub drain_deadline_ms: AtomicU64,
    /// Pageable bytes (over all devices) for which the host pool has reserved space.
    pub host_grant: AtomicU64,
    /// Bit 0: the workload has other processes, so `others` moves and must be refreshed before it is
    /// shown to the program.
    pub flags: AtomicU64,
    /// Reserved for later versions; zero.
    pub reserved: [AtomicU64; 9],
    /// By registration order.
    pub devices: [DesiredDevice; MAX_DEVICES],
}

/// [`Desired::flags`]: the workload has other processes.
pub const FLAG_SIBLINGS: u64 = 1;

/// What the process reports of one device.
#[derive(Default)]
#[repr(C)]
pub struct ObservedDevice {
    /// Bytes reserved or held: pageable and pinned, in granules, resident or not.
    pub used: AtomicU64,
    /// Physical bytes that this process holds on the device now, without overhead.
    pub resident: AtomicU64,
    /// The part of `used` that cannot be moved.
    pub pinned: AtomicU64,
    /// Bytes that blocked allocating calls are waiting for.
    pub demand: AtomicU64,
    /// Bytes that somebody else is charged for and that the driver may or may not show as held by this process
    /// (imports): beyond `resident`, its figure may be higher by as much.
    pub maybe: AtomicU64,
    /// What the process's first context here has cost, as measured, in bytes; 0: not known.
    pub context: AtomicU64,
    /// Reserved for later versions; zero.
    pub reserved: [AtomicU64; 2],
}

/// The process's page. Hostile to the coordinator: each word is read once, checked and clamped.
#[derive(Default)]
#[repr(C)]
pub struct Observed {
    /// [`OBSERVED_MAGIC`].
    pub magic: AtomicU64,
    /// [`crate::PROTOCOL_VERSION`] of the writer.
    pub version: AtomicU64,
    /// See [`State`].
    pub state: AtomicU64,
    /// Not 0: a call waits at the closed gate (or for growth) and wants the process resident.
    pub wants: AtomicU64,
    /// Calls that have passed the gate so far: moves while the program submits.
    pub calls: AtomicU64,
    /// Not 0: work was in flight on a device when the process last looked.
    pub in_flight: AtomicU64,
    /// When the process was last seen active, `CLOCK_MONOTONIC` in nanoseconds.
    pub last_active_ns: AtomicU64,
    /// Bytes of the process's memory whose only copy is on the host.
    pub host_bytes: AtomicU64,
    /// Pageable bytes over all devices: the part of `used` that the pool must back.
    pub pageable: AtomicU64,
    /// See [`unswappable`]: 0 while the process can be swapped.
    pub unswappable: AtomicU64,
    /// Calls that change physical memory, begun so far. A measurement is valid only if this equals
    /// `changes_ended` before and after it.
    pub changes_begun: AtomicU64,
    /// The same, ended.
    pub changes_ended: AtomicU64,
    /// Bytes copied to the host by evictions so far.
    pub bytes_out: AtomicU64,
    /// Bytes copied to the device by restores so far.
    pub bytes_in: AtomicU64,
    /// Completed evictions.
    pub swaps_out: AtomicU64,
    /// Completed restores.
    pub swaps_in: AtomicU64,
    /// Nanoseconds that calls have spent waiting at the gate so far, over all threads.
    pub blocked_ns: AtomicU64,
    /// Calls that have waited at the gate so far.
    pub blocked_calls: AtomicU64,
    /// Allocating calls refused with out of memory so far.
    pub refused: AtomicU64,
    /// Entry points of the driver seen that the hook table does not know.
    pub unknown_entries: AtomicU64,
    /// Duration of the last completed eviction, gate to last release, in nanoseconds.
    pub last_out_ns: AtomicU64,
    /// Duration of the last completed restore, in nanoseconds.
    pub last_in_ns: AtomicU64,
    /// Reserved for later versions; zero.
    pub reserved: [AtomicU64; 10],
    /// By registration order.
    pub devices: [ObservedDevice; MAX_DEVICES],
}

const _: () = assert!(size_of::<Desired>() <= PAGE_BYTES && size_of::<Observed>() <= PAGE_BYTES);

/// The word in [`Desired::command`]: an epoch, which grows with every change, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Grows by one with every command; starts at 1.
    pub epoch: u64,
    /// One of the constants of [`command`]; anything else is to be ignored.
    pub code: u8,
}

/// Codes of [`Command`].
pub mod command {
    /// Be resident and run: restore what is on the host, open the gate.
    pub const RUN: u8 = 1;
    /// Close the gate and wait until the devices are idle; unmap nothing yet. For workloads of
    /// several processes, which drain together.
    pub const DRAIN: u8 = 2;
    /// Drain if that is not done yet, then move all pageable memory to the host.
    pub const EVICT: u8 = 3;
}

/// The word in [`Observed::state`]: the epoch of the command being carried out, and how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Epoch of the command that this state answers.
    pub epoch: u64,
    /// One of the constants of [`state`]; a reader treats anything else as [`state::RESIDENT`].
    pub code: u8,
}

/// Codes of [`State`].
pub mod state {
    /// Resident, gate open.
    pub const RESIDENT: u8 = 1;
    /// Gate closing, waiting for calls and devices to finish.
    pub const DRAINING: u8 = 2;
    /// Gate closed, devices idle, everything still resident.
    pub const DRAINED: u8 = 3;
    /// Moving memory to the host.
    pub const EVICTING: u8 = 4;
    /// Pageable memory is on the host; pinned memory and overhead remain.
    pub const EVICTED: u8 = 5;
    /// Moving memory back.
    pub const RESTORING: u8 = 6;
    /// The drain passed its deadline: gate reopened, nothing moved. Ends this epoch's command.
    pub const BUSY: u8 = 7;
    /// The eviction could not be done (no host memory, a driver error): undone, gate reopened.
    pub const FAILED: u8 = 8;
}

macro_rules! packed {
    ($name:ident) => {
        impl $name {
            /// Packs into one word.
            #[must_use]
            pub const fn pack(self) -> u64 {
                self.epoch << 8 | self.code as u64
            }

            /// Unpacks one word.
            #[must_use]
            #[expect(clippy::cast_possible_truncation, reason = "the low byte is the code")]
            pub const fn unpack(word: u64) -> Self {
                Self {
                    epoch: word >> 8,
                    code: word as u8,
                }
            }
        }
    };
}
packed!(Command);
packed!(State);

/// Bits of [`Observed::unswappable`]: why a process cannot be moved.
pub mod unswappable {
    /// `SPILLWAY_SWAP=never`.
    pub const NEVER: u64 = 1;
    /// A private driver table beyond the runtime's was handed out.
    pub const EXPORT_TABLE: u64 = 1 << 1;
    /// A stream capture is open.
    pub const CAPTURE: u64 = 1 << 2;
    /// A multi-process service runs the contexts.
    pub const MPS: u64 = 1 << 3;
    /// The driver lacks the calls that paging needs.
    pub const NO_VMM: u64 = 1 << 4;
    /// The library detached after an internal error.
    pub const DETACHED: u64 = 1 << 5;
    /// The host could not back part of the memory.
    pub const NO_HOST_MEMORY: u64 = 1 << 6;

    /// Texts for people, lowest bit first, each with what to do.
    pub const TEXTS: [(u64, &str); 7] = [
        (NEVER, "SPILLWAY_SWAP=never"),
        (
            EXPORT_TABLE,
            "uses a private driver table; work could be submitted unseen",
        ),
        (CAPTURE, "a stream capture is open; wait for it to end"),
        (MPS, "runs under MPS, where one client's fault hits all"),
        (
            NO_VMM,
            "the driver lacks virtual memory management; update it",
        ),
        (
            DETACHED,
            "the library detached after an internal error; restart the process",
        ),
        (
            NO_HOST_MEMORY,
            "part of its memory is not backed by host memory; raise spillwayd --pool",
        ),
    ];
}

/// Lowers a grant towards `target`, never below what the process has used; returns the grant that
/// stands afterwards. The coordinator's half of the protocol above.
pub fn lower_grant(grant: &AtomicU64, used: &AtomicU64, target: u64) -> u64 {
    use std::sync::atomic::Ordering::SeqCst;
    let before = grant.load(SeqCst);
    if target >= before {
        return before;
    }
    grant.store(target, SeqCst);
    let used = used.load(SeqCst);
    if used > target {
        // A hostile process may claim any figure: never give back more than it had.
        let back = used.min(before);
        grant.store(back, SeqCst);
        return back;
    }
    target
}

/// Reserves `bytes` of `used` under `grant`; `false` leaves nothing reserved. The process's half.
pub fn reserve<'a>(used: &AtomicU64, bytes: u64, grant: impl Fn() -> &'a AtomicU64) -> bool {
    use std::sync::atomic::Ordering::SeqCst;
    let mut now = used.load(SeqCst);
    loop {
        let Some(next) = now.checked_add(bytes) else {
            return false;
        };
        if next > grant().load(SeqCst) {
            return false;
        }
        match used.compare_exchange_weak(now, next, SeqCst, SeqCst) {
            Ok(_) => break,
            Err(seen) => now = seen,
        }
    }
    // The grant may have been lowered before our reservation became visible. Other threads' doomed
    // reservations may be in `used` too; then both back out and ask, which is never wrong.
    if used.load(SeqCst) > grant().load(SeqCst) {
        used.fetch_sub(bytes, SeqCst);
        return false;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::SeqCst;

    #[test]
    fn words_survive_packing() {
        let command = Command {
            epoch: 77,
            code: command::EVICT,
        };
        assert_eq!(Command::unpack(command.pack()), command);
        let state = State {
            epoch: u64::MAX >> 8,
            code: 255,
        };
        assert_eq!(State::unpack(state.pack()), state);
    }

    #[test]
    fn reserve_stops_at_the_grant() {
        let (used, grant) = (AtomicU64::new(0), AtomicU64::new(10));
        assert!(reserve(&used, 10, || &grant));
        assert!(!reserve(&used, 1, || &grant));
        assert!(!reserve(&used, u64::MAX, || &grant));
        assert_eq!(used.load(SeqCst), 10);
    }

    #[test]
    fn lowering_stops_at_what_is_used() {
        let (used, grant) = (AtomicU64::new(6), AtomicU64::new(10));
        assert_eq!(lower_grant(&grant, &used, 2), 6);
        assert_eq!(lower_grant(&grant, &used, 8), 6);
        used.store(u64::MAX, SeqCst);
        assert_eq!(lower_grant(&grant, &used, 0), 6);
    }

    /// Threads reserve and free while a coordinator lowers and raises: what it counts as free is
    /// never also in use.
    #[test]
    fn racing_never_overcommits() {
        let (used, grant) = (AtomicU64::new(0), AtomicU64::new(8));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..100_000 {
                        if reserve(&used, 3, || &grant) {
                            used.fetch_sub(3, SeqCst);
                        }
                    }
                });
            }
            for i in 0..100_000u64 {
                let stands = lower_grant(&grant, &used, i % 8);
                // A doomed reservation may still show, but only until its owner looks again; what
                // matters is that the grant itself never exceeds what was given.
                assert!(stands <= 8);
                grant.store(8, SeqCst);
            }
        });
        assert_eq!(used.load(SeqCst), 0);
    }
}
