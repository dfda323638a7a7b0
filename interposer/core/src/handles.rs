//! Device memory that the application got by other calls than ours to move: VMM handles, arrays,
//! managed memory. Recorded for their charge.
//!
//! A VMM handle's memory is really gone when every reference (create, retain) *and* every mapping
//! is: only then does its charge end.

use std::collections::{BTreeMap, HashMap};

/// Device index and bytes.
pub type Charge = (usize, u64);

#[derive(Debug)]
struct Physical {
    charge: Charge,
    handle: u64,
    references: u32,
    mappings: u32,
}

/// The records.
#[derive(Debug, Default)]
pub struct Handles {
    ids: u64,
    physical: HashMap<u64, Physical>,
    by_handle: HashMap<u64, u64>,
    by_address: BTreeMap<u64, u64>,
    others: HashMap<u64, (Charge, usize)>,
}

impl Handles {
    /// A handle was created.
    pub fn created(&mut self, handle: u64, charge: Charge) {
        self.ids += 1;
        self.by_handle.insert(handle, self.ids);
        let physical = Physical {
            charge,
            handle,
            references: 1,
            mappings: 0,
        };
        self.physical.insert(self.ids, physical);
    }

    /// A handle was mapped.
    pub fn mapped(&mut self, address: u64, handle: u64) {
        if let Some(&id) = self.by_handle.get(&handle)
            && let Some(physical) = self.physical.get_mut(&id)
        {
            physical.mappings += 1;
            self.by_address.insert(address, id);
        }
    }

    /// A reference was taken by address.
    pub fn retained(&mut self, address: u64, handle: u64) {
        if let Some((_, &id)) = self.by_address.range(..=address).next_back()
            && let Some(physical) = self.physical.get_mut(&id)
            && (physical.handle == handle || physical.references == 0)
        {
            physical.references += 1;
            physical.handle = handle;
            self.by_handle.insert(handle, id);
        }
    }

    /// A reference was given back; returns what is not charged any more.
    pub fn released(&mut self, handle: u64) -> Option<Charge> {
        let &id = self.by_handle.get(&handle)?;
        let physical = self.physical.get_mut(&id)?;
        physical.references = physical.references.saturating_sub(1);
        if physical.references == 0 {
            self.by_handle.remove(&handle);
        }
        self.end(id)
    }

    /// All mappings in a range were undone; returns what is not charged any more.
    pub fn unmapped(&mut self, address: u64, bytes: u64) -> Vec<Charge> {
        let end = address.saturating_add(bytes);
        let gone: Vec<(u64, u64)> = self
            .by_address
            .range(address..end)
            .map(|(&a, &id)| (a, id))
            .collect();
        let mut charges = Vec::new();
        for (address, id) in gone {
            self.by_address.remove(&address);
            if let Some(physical) = self.physical.get_mut(&id) {
                physical.mappings = physical.mappings.saturating_sub(1);
            }
            charges.extend(self.end(id));
        }
        charges
    }

    fn end(&mut self, id: u64) -> Option<Charge> {
        let physical = self.physical.get(&id)?;
        if physical.references > 0 || physical.mappings > 0 {
            return None;
        }
        self.physical.remove(&id).map(|p| p.charge)
    }

    /// An array, a mipmapped array or managed memory was made in a context.
    pub fn add_other(&mut self, key: u64, charge: Charge, context: usize) {
        self.others.insert(key, (charge, context));
    }

    /// It is gone.
    pub fn remove_other(&mut self, key: u64) -> Option<Charge> {
        self.others.remove(&key).map(|(charge, _)| charge)
    }

    /// A context is gone with what it owned; VMM handles outlive it.
    pub fn take_context(&mut self, context: usize) -> Vec<Charge> {
        let gone: Vec<u64> = self
            .others
            .iter()
            .filter(|(_, (_, c))| *c == context)
            .map(|(&k, _)| k)
            .collect();
        gone.iter()
            .filter_map(|&key| self.remove_other(key))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create_map_release_stays_charged_until_unmapped() {
        let mut handles = Handles::default();
        handles.created(7, (0, 100));
        handles.mapped(0x1000, 7);
        assert_eq!(handles.released(7), None);
        assert_eq!(handles.unmapped(0x1000, 0x1000), vec![(0, 100)]);
        assert_eq!(handles.unmapped(0x1000, 0x1000), vec![]);
    }

    #[test]
    fn a_retained_reference_keeps_the_charge() {
        let mut handles = Handles::default();
        handles.created(7, (0, 100));
        handles.mapped(0x1000, 7);
        handles.retained(0x1800, 7);
        assert_eq!(handles.released(7), None);
        assert_eq!(handles.unmapped(0, 0x10000), vec![]);
        assert_eq!(handles.released(7), Some((0, 100)));
        assert_eq!(
            handles.released(7),
            None,
            "a release too many is the driver's to refuse"
        );
    }

    #[test]
    fn a_reused_handle_value_is_another_memory() {
        let mut handles = Handles::default();
        handles.created(7, (0, 100));
        handles.mapped(0x1000, 7);
        assert_eq!(handles.released(7), None);
        handles.created(7, (0, 50));
        assert_eq!(handles.released(7), Some((0, 50)));
        assert_eq!(handles.unmapped(0x1000, 1), vec![(0, 100)]);
    }

    #[test]
    fn arrays_go_with_their_context() {
        let mut handles = Handles::default();
        handles.add_other(1, (0, 10), 5);
        handles.add_other(2, (1, 20), 6);
        assert_eq!(handles.take_context(5), vec![(0, 10)]);
        assert_eq!(handles.remove_other(2), Some((1, 20)));
    }
}
