//! The arbiter: who may use how much of each device, and who is on it.
//!
//! # Problem
//! Workloads share devices whose memory does not hold all of them at once. Each has a *request* R,
//! guaranteed, and a *limit* L, never passed. A kernel reaches memory through pointers that nobody
//! can see, so a workload runs only with all of what it uses on the device: the unit of swapping is
//! the workload. Find out whose memory to move and when, such that guarantees hold, nobody starves,
//! the device does not spend its time swapping, and nothing is moved without need.
//!
//! # Approach
//! A pure library: events go in (a process came, asks to grow, reports its state, died; time passed),
//! [`Action`]s come out. There is no clock (time is an argument, nanoseconds of any monotonic clock),
//! no socket and no thread. The shared pages are behind the trait [`Pages`], because lowering a
//! grant is a handshake through them whose result is needed at once. Everything is deterministic.
//! Every event ends with one pass of the plan (`plan.rs`); there is no other place where space is given.
//!
//! # Terms
//! - *room* of a device: what may be given out. *External*: what others than our processes hold.
//! - *grant*: what a process may use without asking. *Used*: what it has taken of it. *Overhead*:
//!   contexts and code, measured, outside the grant. *Pinned*: the part of used that cannot move.
//! - *U* of a workload: used and overhead of all its processes. With U > R it is a *borrower*, as a
//!   whole; else it is within its request.
//! - *charge*: physical bytes set aside for a workload. Resident or on the move: grants and overhead.
//!   Evicted: pinned and overhead. `never`: at least R. The charges never exceed the room by what
//!   the arbiter gives; measured overhead may exceed it, and then nothing is given until it fits.
//! - *waiter*: a growth that is not granted yet, or an evicted workload that wants back.
//! - *active*: work in flight, or submitted within the idle time, or waiting. A *turn*: for how long
//!   an active borrower is safe from its equals.
//!
//! # Algorithm
//! 1. Waiters in order (`order.rs`): within their request first, then who has waited far too long, then by
//!    priority, then first come first served.
//! 2. Each is served from free space, after unused grants were taken back as far as needed. What
//!    earlier waiters are about to get is not free for later ones.
//! 3. If that is not enough, and what is being freed already neither, victims are chosen by
//!    `order.rs`: idle ones; for a waiter within its request active borrowers; for a borrower those
//!    active borrowers whose turn is over; in an oversubscribed device the same among those within
//!    their requests. No more than needed; none at all if all together would not do.
//! 4. If only turns stand in the way, the victims are claimed and the waiter waits for the last turn
//!    to end; later waiters cannot take those victims from it.
//!
//! Growth above the request ends after the growth wait; everything else waits until it is served.

mod admission;
pub mod audit;
mod growth;
mod ledger;
mod order;
mod plan;
mod residency;
mod turns;
mod types;

mod arbiter;

pub use admission::effective_quota;
pub use arbiter::{Arbiter, ProcessView, ShareView, WorkloadView};
pub use ledger::Phase;
pub use types::*;
