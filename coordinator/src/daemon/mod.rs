//! `spillwayd`: one thread owns all state and never blocks; threads beside it measure, populate host
//! memory, and serve HTTP.
//!
//! | file | idea |
//! | --- | --- |
//! | `options` | the command line |
//! | `rundir` | the run directory: lock, sockets and their modes |
//! | `main_loop` | epoll: who has news, and what is due |
//! | `state` | everything the main loop owns |
//! | `identity` | who is at the other end of a session socket |
//! | `socket` | packets with descriptors, never blocking |
//! | `session` | one connection: its queue, its bounds |
//! | `register` | from the first packet to Welcome, also after a restart |
//! | `serve` | a registered process's messages |
//! | `claims` | memory that several processes map, charged once |
//! | `apply` | carrying out the arbiter's actions |
//! | `shared` | the shared pages: memfds, seals, mappings |
//! | `pages` | the arbiter's view of them |
//! | `adopt` | processes from before a restart |
//! | `pool` | host memory: accounts and segments |
//! | `gpus`, `nvml` | what the driver knows about devices |
//! | `sampler` | the thread that asks it |
//! | `measure` | overhead, foreign memory, what the dead gave back |
//! | `audit` | who uses a device without an account, or beyond it |
//! | `people` | who strangers are, as far as `/proc` tells |
//! | `events` | the event log |
//! | `handle` | [`crate::model::Control`] for other threads |
//! | `view` | status and metrics |
//! | `publish` | the snapshot in shared memory |

mod adopt;
mod apply;
mod audit;
mod claims;
mod events;
mod gpus;
mod handle;
mod identity;
mod main_loop;
mod measure;
mod nvml;
mod options;
mod pages;
mod people;
mod pool;
mod publish;
mod register;
mod rundir;
mod sampler;
mod serve;
mod session;
mod shared;
mod socket;
mod state;
mod view;

pub use main_loop::run;
pub use options::{OnEscape, OnStuck, Options};

/// What tests of the daemon from outside need of it.
#[doc(hidden)]
pub mod testing {
    use std::os::fd::{BorrowedFd, OwnedFd};

    pub use super::main_loop::now;
    use super::socket::{self, Read};

    /// The next packet on a session socket; `None`: nothing at the moment.
    ///
    /// # Errors
    /// The other side has closed it.
    pub fn read(socket: BorrowedFd<'_>) -> nix::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        match socket::read(socket)? {
            Read::Packet(packet) => Ok(Some((packet.bytes, packet.descriptors))),
            Read::Nothing => Ok(None),
            Read::Closed => Err(nix::Error::EPIPE),
        }
    }
}
