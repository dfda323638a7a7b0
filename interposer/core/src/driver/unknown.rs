//! Entry points that the driver has and the table does not know: a newer driver's.
//!
//! They pass through, except in strict mode, and are counted, each name once. A name that the driver lacks
//! is no entry point, however often programs probe for it. In strict mode a name may be asked for before the
//! driver is loaded; it is refused then, and counts when the driver turns out to have it.
//!
//! Recording neither allocates nor waits: `dlsym` comes here.

use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

/// How many names are told apart.
const NAMES: usize = 256;
/// Longer names are cut. The longest of today has 53 bytes.
const NAME_MAX: usize = 63;

/// The name is in its place.
const WRITTEN: u8 = 1;
/// The driver has it.
const SEEN: u8 = 2;

struct Entry {
    /// Hash of the name; 0: free. Who puts it here writes the name.
    key: AtomicU64,
    name: UnsafeCell<[u8; NAME_MAX + 1]>,
    state: AtomicU8,
}

// SAFETY: the name is written once, by the thread that has set the key, and read only by who has seen
// WRITTEN after it.
unsafe impl Sync for Entry {}

/// A list of names.
struct Names {
    entries: [Entry; NAMES],
    /// Which entries the driver has (index + 1), in the order in which that became known.
    order: [AtomicUsize; NAMES],
    count: AtomicUsize,
}

static UNKNOWN: Names = Names::new();

impl Names {
    const fn new() -> Self {
        Self {
            entries: [const {
                Entry {
                    key: AtomicU64::new(0),
                    name: UnsafeCell::new([0; NAME_MAX + 1]),
                    state: AtomicU8::new(0),
                }
            }; NAMES],
            order: [const { AtomicUsize::new(0) }; NAMES],
            count: AtomicUsize::new(0),
        }
    }

    /// Notes a name; `seen`: the driver has it. Whether it counts from now on and did not before.
    fn record(&self, name: &[u8], seen: bool) -> bool {
        let name = &name[..name.len().min(NAME_MAX)];
        let key = hash(name);
        for (index, entry) in self.entries.iter().enumerate() {
            match entry
                .key
                .compare_exchange(0, key, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => {
                    // SAFETY: the key was free, so this thread alone writes, and nobody reads yet.
                    unsafe { (&mut *entry.name.get())[..name.len()].copy_from_slice(name) };
                    return self.add(index, WRITTEN | if seen { SEEN } else { 0 });
                }
                Err(other) if other == key => return seen && self.add(index, SEEN),
                Err(_) => {}
            }
        }
        false
    }

    /// Whoever completes an entry counts it, so it counts once.
    fn add(&self, index: usize, bits: u8) -> bool {
        let before = self.entries[index].state.fetch_or(bits, Ordering::AcqRel);
        let all = WRITTEN | SEEN;
        if before == all || before | bits != all {
            return false;
        }
        let place = self.count.fetch_add(1, Ordering::AcqRel);
        self.order[place].store(index + 1, Ordering::Release);
        true
    }

    fn name(&self, index: usize) -> Option<&[u8; NAME_MAX + 1]> {
        let entry = &self.entries[index];
        let written = entry.state.load(Ordering::Acquire) & WRITTEN != 0;
        // SAFETY: it is written and never changes again.
        written.then(|| unsafe { &*entry.name.get() })
    }

    fn settle(&self, has: impl Fn(&CStr) -> bool, mut counts: impl FnMut(&CStr)) {
        for index in 0..NAMES {
            let seen = self.entries[index].state.load(Ordering::Acquire) & SEEN != 0;
            let name = self.name(index).filter(|_| !seen);
            let name = name.and_then(|name| CStr::from_bytes_until_nul(name).ok());
            if let Some(name) = name.filter(|name| has(name))
                && self.add(index, SEEN)
            {
                counts(name);
            }
        }
    }

    fn from(&self, from: usize) -> Vec<String> {
        let listed = self.order.iter().skip(from);
        let indices = listed.map_while(|word| word.load(Ordering::Acquire).checked_sub(1));
        indices
            .filter_map(|index| CStr::from_bytes_until_nul(self.name(index)?).ok())
            .map(|name| name.to_string_lossy().into_owned())
            .collect()
    }
}

/// FNV-1a; never 0.
fn hash(name: &[u8]) -> u64 {
    let hash = name.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    hash.max(1)
}

/// Whether a name may be the driver's: `cu` and a capital letter. `cudnnCreate` and `curl_easy_init` are not.
#[must_use]
pub fn is_drivers(name: &[u8]) -> bool {
    matches!(name, [b'c', b'u', third, ..] if third.is_ascii_uppercase())
}

/// Notes a name that the table does not have; `seen`: the driver has it, otherwise that is not known yet.
/// Whether it is one more unknown entry point.
pub fn record(name: &CStr, seen: bool) -> bool {
    UNKNOWN.record(name.to_bytes(), seen)
}

/// The driver is there now: counts the names that were asked for before and that it has.
pub fn settle(has: impl Fn(&CStr) -> bool) {
    UNKNOWN.settle(has, super::strict::refused);
}

/// Addresses that `cuGetProcAddress` has handed out for names of the table and that no row has.
static ADDRESSES: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];

/// Notes an address; whether it is one more unknown entry point.
pub fn record_address(address: usize) -> bool {
    for word in &ADDRESSES {
        match word.compare_exchange(0, address, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(known) if known == address => return false,
            Err(_) => {}
        }
    }
    false
}

/// How many entry points of the driver programs have asked for that the table does not know: by name, and
/// versions of known names by address. At most 256 of either are told apart.
#[must_use]
pub fn unknown_entry_points() -> usize {
    let addresses = ADDRESSES.iter();
    UNKNOWN.count.load(Ordering::Relaxed)
        + addresses
            .filter(|word| word.load(Ordering::Relaxed) != 0)
            .count()
}

/// The unknown names from number `from` on, in the order in which they were noted: a caller that adds up
/// what it got sees each once.
#[must_use]
pub fn unknown_names(from: usize) -> Vec<String> {
    UNKNOWN.from(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_counts_once_and_only_if_the_driver_has_it() {
        static NAMES: Names = Names::new();
        assert!(NAMES.record(b"cuFutureCall", true));
        assert!(!NAMES.record(b"cuFutureCall", true));
        assert!(!NAMES.record(b"cuMissing", false));
        assert!(!NAMES.record(b"cuEarly", false));
        assert_eq!(NAMES.from(0), ["cuFutureCall"]);
        let mut new = Vec::new();
        NAMES.settle(
            |name| name == c"cuEarly",
            |name| new.push(name.to_bytes().to_vec()),
        );
        assert_eq!(new, [b"cuEarly"]);
        NAMES.settle(|_| true, |name| assert_eq!(name, c"cuMissing"));
        assert_eq!(NAMES.from(1), ["cuEarly", "cuMissing"]);
        assert_eq!(NAMES.from(3), Vec::<String>::new());
        assert_eq!(NAMES.count.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn racing_threads_count_a_name_once() {
        static NAMES: Names = Names::new();
        let counted = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let counted = &counted;
                scope.spawn(move || {
                    for number in 0..200 {
                        let name = format!("cuName{number}");
                        let seen = (thread + number) % 3 != 0;
                        let mut new = NAMES.record(name.as_bytes(), seen);
                        new |= NAMES.record(name.as_bytes(), true);
                        counted.fetch_add(usize::from(new), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(counted.load(Ordering::Relaxed), 200);
        let mut names = NAMES.from(0);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 200);
    }

    #[test]
    fn more_names_than_places_and_long_ones_do_no_harm() {
        static MANY: Names = Names::new();
        for number in 0..2 * NAMES {
            MANY.record(format!("cu{}{number}", "X".repeat(80)).as_bytes(), true);
            MANY.record(format!("cuName{number}").as_bytes(), true);
        }
        let names = MANY.from(0);
        assert_eq!(names.len(), NAMES);
        assert!(names.iter().all(|name| name.len() <= NAME_MAX));
    }

    #[test]
    fn only_the_drivers_form_of_a_name() {
        for name in ["cuFutureCall", "cuA"] {
            assert!(is_drivers(name.as_bytes()), "{name}");
        }
        for name in [
            "cu",
            "c",
            "",
            "cudnnCreate",
            "curl_easy_init",
            "cublasInit",
            "cu_x",
            "nvmlInit",
        ] {
            assert!(!is_drivers(name.as_bytes()), "{name}");
        }
    }
}
