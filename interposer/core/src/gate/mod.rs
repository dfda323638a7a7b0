//! The gate: every call that submits work passes it, the pager closes it, waits until nobody is inside,
//! and opens it again.
//!
//! # Promises
//! * While [`close`] has returned `Ok` and [`open`] has not been called, no thread is between entering
//!   and leaving, except threads that called [`exempt_current_thread`].
//! * Passing costs a few plain instructions on a word of the thread's own; the closing side pays, by
//!   `membarrier`. Where the kernel has none, every call passes a real fence instead (slower, as right).
//! * What a call did before leaving happens before what the closer does after closing.
//! * A nested call (the thread is inside already) never waits.
//! * Nothing here waits for anybody but callers inside the gate, and for those only until a deadline.
//!
//! # How
//! Thread: (1) add to its word, (2) load the gate's state. Closer: (a) set closed, (b) membarrier,
//! (c) load every word. Within (b) each running thread passes a full barrier at some point of its
//! program. Before (2): it sees *closed* and steps out. After (2): then (1) came before the barrier too,
//! and the closer sees the thread inside.
//!
//! A word holds the depth (16 bits), a count of calls (46), bit 62 *late* and bit 63 *slow*: not
//! registered yet, or late (the thread has already ended as far as its thread-locals are concerned).
//! *Slow* is the sign, so that one conditional jump tells.

mod barrier;
mod close;
mod fork;
mod line;
pub(crate) mod lock;
mod registry;
mod slow;
mod start;
mod stats;
#[cfg(not(all(target_arch = "x86_64", not(feature = "portable-gate"))))]
#[path = "word_portable.rs"]
pub mod word;
#[cfg(all(target_arch = "x86_64", not(feature = "portable-gate")))]
#[path = "word_x86_64.rs"]
pub mod word;

pub use close::{CloseError, Stuck, close, is_closed, open};
#[cfg(feature = "testing")]
pub use close::{close_without_barrier, pretend_no_membarrier};
pub use fork::set_on_fork_child;
pub use line::{CLOSED, FENCED, Hot, LINE, Line};
pub use registry::{exempt_current_thread, inside_threads};
pub use slow::{Inside, Pass, enter, leave_settled, set_on_wait, settle, start_and_arrive};
pub use start::start;
pub use stats::{Blocked, blocked, calls};

/// What entering adds to the word: one depth, one call.
pub const ENTER: i64 = 0x1_0001;
/// The bits of the word that hold the depth.
pub const DEPTH: u64 = 0xffff;
/// The lowest bit of the count of calls.
pub(crate) const CALLS_SHIFT: u32 = 16;
/// The count of calls, once shifted.
pub(crate) const CALLS: u64 = (1 << 46) - 1;
/// The thread has left the registry for good.
pub const LATE: u64 = 1 << 62;
/// The thread is not in the registry.
pub const SLOW: u64 = 1 << 63;
