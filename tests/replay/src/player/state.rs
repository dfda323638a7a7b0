//! What the recorded handles and addresses are in this run.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A range of addresses of the trace, and where it begins here.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    pub bytes: u64,
    pub here: u64,
}

/// Device memory whose contents can be read.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub bytes: u64,
    /// Every byte was written by this player, or copied from what was.
    pub known: bool,
    /// The stream here of its last use, and when that was.
    pub used: (u64, u64),
}

/// Host memory of the trace.
#[derive(Debug)]
pub struct Host {
    pub bytes: u64,
    pub here: u64,
    /// Context and stream here of the copies that may still read or write it.
    pub busy: BTreeSet<(u64, u64)>,
    pub filled: bool,
    /// The player's own, so that it stays where it is.
    pub _own: Option<Vec<u64>>,
}

/// A copy to host memory that may not be finished.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    pub stream: u64,
    pub context: u64,
    pub here: u64,
    pub bytes: u64,
}

/// See the module. Keys are the trace's values.
#[derive(Debug, Default)]
pub struct State {
    pub handles: HashMap<u64, u64>,
    pub spaces: BTreeMap<u64, Space>,
    pub regions: BTreeMap<u64, Region>,
    pub hosts: BTreeMap<u64, Host>,
    /// Streams here that capture, and when that began.
    pub captures: HashMap<u64, u64>,
    pub pending: Vec<Pending>,
    /// Counts calls.
    pub tick: u64,
}

/// The range of `map` that has `bytes` bytes from `address` on.
fn within<V>(
    map: &BTreeMap<u64, V>,
    address: u64,
    bytes: u64,
    length: impl Fn(&V) -> u64,
) -> Option<u64> {
    let (start, found) = map.range(..=address).next_back()?;
    let offset = address - start;
    let fits = offset
        .checked_add(bytes)
        .is_some_and(|end| end <= length(found));
    (fits && offset < length(found).max(1)).then_some(*start)
}

impl State {
    /// A device address here.
    #[must_use]
    pub fn address(&self, address: u64) -> Option<u64> {
        if address == 0 {
            return Some(0);
        }
        let start = within(&self.spaces, address, 0, |space| space.bytes)?;
        Some(self.spaces[&start].here + (address - start))
    }

    /// A host address here.
    #[must_use]
    pub fn host(&self, address: u64, bytes: u64) -> Option<u64> {
        let start = within(&self.hosts, address, bytes, |host| host.bytes)?;
        Some(self.hosts[&start].here + (address - start))
    }

    /// The host memory that has these bytes; made if there is none.
    pub fn host_or_new(&mut self, address: u64, bytes: u64) -> u64 {
        if let Some(start) = within(&self.hosts, address, bytes, |host| host.bytes) {
            return start;
        }
        let words = usize::try_from(bytes / 8 + 1).unwrap_or(0);
        let mut own = vec![0_u64; words];
        let host = Host {
            bytes: bytes.max(1),
            here: own.as_mut_ptr() as u64,
            busy: BTreeSet::new(),
            filled: false,
            _own: Some(own),
        };
        if let Some(old) = self.hosts.insert(address, host) {
            // A shorter one of the same address: something may still copy from it.
            Box::leak(Box::new(old));
        }
        address
    }

    /// Host memory that the driver allocated or registered.
    pub fn add_host(&mut self, address: u64, bytes: u64, here: u64, own: Option<Vec<u64>>) {
        let host = Host {
            bytes: bytes.max(1),
            here,
            busy: BTreeSet::new(),
            filled: false,
            _own: own,
        };
        if let Some(old) = self.hosts.insert(address, host) {
            Box::leak(Box::new(old));
        }
    }

    /// The device memory that has this address.
    #[must_use]
    pub fn region(&self, address: u64) -> Option<u64> {
        within(&self.regions, address, 0, |region| region.bytes)
    }

    /// Notes that `stream` uses the device memory of an address.
    pub fn uses(&mut self, address: u64, stream: u64) {
        let used = (stream, self.tick);
        if let Some(start) = self.region(address)
            && let Some(region) = self.regions.get_mut(&start)
        {
            region.used = used;
        }
    }

    /// What a kernel on `stream` may write: the memory that this stream, and none since, has used last; in a
    /// capture only what the capture has used.
    #[must_use]
    pub fn target(&self, stream: u64) -> Option<(u64, u64)> {
        let since = self.captures.get(&stream).copied();
        let all = self.regions.iter().filter(|(_, region)| {
            let (by, when) = region.used;
            region.known
                && region.bytes >= 4
                && by == stream
                && since.is_none_or(|since| when > since)
        });
        let (start, region) = all.max_by_key(|(_, region)| region.used.1)?;
        Some((self.address(*start)?, region.bytes))
    }

    /// Everything of an address is gone.
    pub fn forget(&mut self, address: u64) {
        self.spaces.remove(&address);
        self.regions.remove(&address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let mut state = State::default();
        state.spaces.insert(
            0x1000,
            Space {
                bytes: 0x100,
                here: 0x9000,
            },
        );
        state.regions.insert(
            0x1000,
            Region {
                bytes: 0x100,
                known: true,
                used: (5, 1),
            },
        );
        state.spaces.insert(
            0x2000,
            Space {
                bytes: 0x100,
                here: 0x7000,
            },
        );
        state.regions.insert(
            0x2000,
            Region {
                bytes: 0x100,
                known: true,
                used: (6, 2),
            },
        );
        state
    }

    #[test]
    fn addresses_inside_a_range_are_found() {
        let state = state();
        assert_eq!(state.address(0x1010), Some(0x9010));
        assert_eq!(state.address(0x1100), None);
        assert_eq!(state.address(0xfff), None);
        assert_eq!(state.address(0), Some(0));
    }

    #[test]
    fn a_kernel_writes_what_its_stream_has_used_last() {
        let mut state = state();
        assert_eq!(state.target(5), Some((0x9000, 0x100)));
        assert_eq!(state.target(7), None);
        state.tick = 3;
        state.uses(0x1080, 6);
        assert_eq!(state.target(5), None);
        assert_eq!(state.target(6), Some((0x9000, 0x100)));
        state.captures.insert(6, 3);
        assert_eq!(state.target(6), None, "not used within the capture");
    }

    #[test]
    fn host_memory_is_made_once() {
        let mut state = State::default();
        assert_eq!(state.host_or_new(0x5000, 64), 0x5000);
        assert_eq!(state.host_or_new(0x5010, 16), 0x5000);
        assert_eq!(state.host(0x5010, 48), Some(state.hosts[&0x5000].here + 16));
        assert_eq!(state.host(0x5010, 49), None);
        assert_eq!(state.host_or_new(0x5010, 49), 0x5010);
    }
}
