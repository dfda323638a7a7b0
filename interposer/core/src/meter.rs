//! What the driver keeps of its own accord, in pools and for graphs: charged by what the driver says
//! that it has reserved, not by what the program asked for. Pure bookkeeping of one such store.
//!
//! A call that may make the store grow is announced with the most that it may take, which the caller has
//! reserved in the quota before. Afterwards the driver's figure decides. While several threads are in
//! such calls, the figure cannot be told apart by thread, so nothing is given back before the last of them
//! has ended: the books may be too high for that long, never too low.

use spillway_protocol::granules_up;

/// One store.
#[derive(Debug, Default)]
pub struct Meter {
    /// Quota bytes that stand for what the driver has reserved.
    charged: u64,
    /// Quota bytes reserved for calls under way.
    pending: u64,
    /// Bytes of it that the process reports as held on the device.
    reported: u64,
    /// Unused bytes of the store that calls under way count on.
    claimed: u64,
    /// Counts changes of the books.
    version: u64,
}

/// What is to be done to the quota after a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Nothing.
    Even,
    /// This many bytes are to be given back.
    Spare(u64),
    /// The driver took this many bytes more than was reserved. Once they are reserved, see
    /// [`Meter::topped_up`].
    Short(u64),
}

impl Meter {
    /// Quota bytes that the store stands for now.
    #[must_use]
    pub fn charged(&self) -> u64 {
        self.charged + self.pending
    }

    /// Changes whenever the books do. A figure of the driver's that was asked for before a change is too
    /// old to be used after it: another thread may have made the store grow.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Calls are under way that have reserved what they may take.
    #[must_use]
    pub fn in_flight(&self) -> bool {
        self.pending > 0
    }

    /// A call is about to take `bytes` that the driver may have unused in the store: of `reserved` bytes
    /// `used` are handed out. Returns how many of them it may count on: all, none, or if `partly` what there
    /// is. To be ended by [`Meter::unclaim`] after [`Meter::end`].
    #[must_use]
    pub fn claim(&mut self, bytes: u64, partly: bool, reserved: u64, used: u64) -> u64 {
        let room = reserved.saturating_sub(used).saturating_sub(self.claimed);
        let claim = match room.min(bytes) {
            part if part == bytes || partly => part,
            _ => 0,
        };
        self.claimed += claim;
        self.version += 1;
        claim
    }

    /// See [`Meter::claim`].
    pub fn unclaim(&mut self, bytes: u64) {
        self.claimed = self.claimed.saturating_sub(bytes);
        self.version += 1;
    }

    /// A call begins that may take `bytes`, which are reserved.
    pub fn begin(&mut self, bytes: u64) {
        self.version += 1;
        self.pending += bytes;
    }

    /// The call has ended; the driver has `reserved` bytes now.
    #[must_use]
    pub fn end(&mut self, bytes: u64, reserved: u64) -> Settled {
        self.version += 1;
        self.pending = self.pending.saturating_sub(bytes);
        let had = self.charged + bytes;
        let has = granules_up(reserved);
        if self.pending > 0 {
            self.charged = had;
            return match has.saturating_sub(had + self.pending) {
                0 => Settled::Even,
                short => Settled::Short(short),
            };
        }
        self.charged = has.min(had);
        match (had.saturating_sub(has), has.saturating_sub(had)) {
            (0, 0) => Settled::Even,
            (0, short) => Settled::Short(short),
            (spare, _) => Settled::Spare(spare),
        }
    }

    /// How the figure of bytes held on the device has to change, as (more, less), now that the driver has
    /// `reserved` bytes. What is not charged is not reported as held: it then counts as overhead.
    #[must_use]
    pub fn report(&mut self, reserved: u64) -> (u64, u64) {
        let held = granules_up(reserved).min(self.charged);
        let before = std::mem::replace(&mut self.reported, held);
        (held.saturating_sub(before), before.saturating_sub(held))
    }

    /// The bytes of [`Settled::Short`] have been reserved.
    pub fn topped_up(&mut self, bytes: u64) {
        self.charged += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const MIB: u64 = 1 << 20;

    #[test]
    fn the_drivers_figure_decides() {
        let mut meter = Meter::default();
        meter.begin(4 * MIB);
        assert_eq!(meter.charged(), 4 * MIB);
        assert_eq!(meter.end(4 * MIB, 3 * MIB), Settled::Even);
        assert_eq!(meter.end(0, 2 * MIB), Settled::Spare(2 * MIB));
        assert_eq!(meter.end(0, 34 * MIB), Settled::Short(32 * MIB));
        assert_eq!(meter.charged(), 2 * MIB);
        assert_eq!(meter.report(34 * MIB), (2 * MIB, 0));
        meter.topped_up(32 * MIB);
        assert_eq!(meter.charged(), 34 * MIB);
        assert_eq!(meter.report(34 * MIB), (32 * MIB, 0));
        assert_eq!(meter.report(MIB), (0, 32 * MIB));
        assert_eq!(meter.end(0, 0), Settled::Spare(34 * MIB));
    }

    #[test]
    fn a_call_that_took_nothing_gives_back_what_was_reserved() {
        let mut meter = Meter::default();
        meter.begin(8 * MIB);
        assert_eq!(meter.end(8 * MIB, 0), Settled::Spare(8 * MIB));
    }

    #[test]
    fn nothing_is_given_back_while_another_call_is_under_way() {
        let mut meter = Meter::default();
        meter.begin(2 * MIB);
        meter.begin(4 * MIB);
        // Only the first has taken its memory.
        assert_eq!(meter.end(2 * MIB, 2 * MIB), Settled::Even);
        assert_eq!(meter.charged(), 6 * MIB);
        // Both have; the store shrank meanwhile.
        meter.begin(2 * MIB);
        assert_eq!(meter.end(4 * MIB, MIB), Settled::Even);
        assert_eq!(meter.end(2 * MIB, MIB), Settled::Spare(6 * MIB));
        assert_eq!(meter.charged(), 2 * MIB);
    }

    #[test]
    fn what_is_unused_is_counted_on_once() {
        let mut meter = Meter::default();
        assert_eq!(meter.claim(2 * MIB, false, 10 * MIB, 7 * MIB), 2 * MIB);
        let version = meter.version();
        assert_eq!(meter.claim(2 * MIB, false, 10 * MIB, 7 * MIB), 0);
        assert_eq!(meter.claim(2 * MIB, true, 10 * MIB, 7 * MIB), MIB);
        meter.unclaim(2 * MIB);
        assert_ne!(
            meter.version(),
            version,
            "figures from before are too old now"
        );
        assert_eq!(meter.claim(2 * MIB, false, 10 * MIB, 7 * MIB), 2 * MIB);
    }

    #[test]
    fn more_than_all_calls_together_announced_is_short() {
        let mut meter = Meter::default();
        meter.begin(2 * MIB);
        meter.begin(2 * MIB);
        assert_eq!(meter.end(2 * MIB, 32 * MIB), Settled::Short(28 * MIB));
        meter.topped_up(28 * MIB);
        assert_eq!(meter.end(2 * MIB, 32 * MIB), Settled::Even);
    }
}
