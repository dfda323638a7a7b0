//! Device memory that the application got by other calls than ours to move: VMM handles, arrays,
//! managed memory, imports. Recorded for their charge. Pure bookkeeping.
//!
//! A VMM handle's memory is really gone when every reference (create, retain, import), every mapping *and*
//! every binding to a multicast object is, and every descriptor of it that is open in this process is closed:
//! only then does its charge end. Memory whose descriptor was handed out may live on even then, in another
//! process; see [`Ended::exported`].

use std::collections::{BTreeMap, HashMap};

use external::External;
pub use external::ExternalEnded;

/// Device index and bytes.
pub type Charge = (usize, u64);

/// How memory is on the books.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Charged, and among what this process says that it holds.
    Held,
    /// Managed memory: charged; the driver may or may not have memory for it at any moment, and shows none of it as
    /// the process's.
    Managed,
    /// An import that somebody else is charged for: the driver may or may not show it as the process's.
    Covered,
}

/// An array, a managed allocation, or a pointer from another process's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Other {
    /// Where it lies, and how much it is.
    pub charge: Charge,
    /// Whose charge that is.
    pub kind: Kind,
}

/// An import: device index, bytes, and how many of them are charged here.
pub type Import = (usize, u64, u64);

/// A descriptor of memory: its number, and what file the kernel says is open there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The number in this process.
    pub number: i32,
    /// Device and inode of the file.
    pub file: (u64, u64),
}

/// Memory that nothing of this process refers to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What it is charged.
    pub charge: Charge,
    /// A descriptor of it was handed out, which may keep it.
    pub exported: bool,
    /// Bytes that somebody else is charged for.
    pub covered: u64,
}

/// A reference that the driver is asked to release.
#[derive(Debug)]
pub struct Releasing {
    id: u64,
    handle: u64,
}

/// An opening that the driver is asked to close.
#[derive(Debug)]
pub struct Closing {
    /// What it is, if it is open no further time.
    pub last: Option<Import>,
    context: usize,
}

#[derive(Debug)]
struct Physical {
    charge: Charge,
    handle: u64,
    references: u32,
    mappings: u32,
    /// Multicast objects that it is bound to.
    bindings: u32,
    exported: bool,
    /// Descriptors of it that were last seen open here.
    descriptors: Vec<Descriptor>,
    covered: u64,
    /// Imported, and not mapped yet: its size is not known.
    unsized_import: bool,
    /// It goes by more than one handle.
    aliases: bool,
    /// A multicast object: what is bound to it, as (offset, bytes, id).
    members: Vec<(u64, u64, u64)>,
}

/// An import by an IPC handle: the driver counts how often it is open.
#[derive(Debug)]
struct Open {
    import: Import,
    count: u32,
    context: usize,
}

/// The records.
#[derive(Debug, Default)]
pub struct Handles {
    ids: u64,
    physical: HashMap<u64, Physical>,
    by_handle: HashMap<u64, u64>,
    by_address: BTreeMap<u64, u64>,
    others: HashMap<u64, (Other, usize)>,
    opened: HashMap<u64, Open>,
    external: HashMap<u64, External>,
    /// External memory, and what is mapped from it.
    external_of: HashMap<u64, u64>,
}

impl Handles {
    fn add(&mut self, handle: u64, charge: Charge, unsized_import: bool) {
        self.ids += 1;
        self.by_handle.insert(handle, self.ids);
        let physical = Physical {
            charge,
            handle,
            references: 1,
            mappings: 0,
            bindings: 0,
            exported: false,
            descriptors: Vec::new(),
            covered: 0,
            unsized_import,
            aliases: false,
            members: Vec::new(),
        };
        self.physical.insert(self.ids, physical);
    }

    fn of(&mut self, handle: u64) -> Option<&mut Physical> {
        self.physical.get_mut(self.by_handle.get(&handle)?)
    }

    /// A handle was created.
    pub fn created(&mut self, handle: u64, charge: Charge) {
        self.add(handle, charge, false);
    }

    /// A handle was imported, from a descriptor if it was one; its size shows when it is mapped. An import
    /// of what this process has already is one reference more.
    pub fn imported(&mut self, handle: u64, device: usize, from: Option<Descriptor>) {
        let same = |p: &Physical| from.is_some_and(|from| p.descriptors.contains(&from));
        let known = self.physical.iter().find(|(_, p)| same(p));
        let known = known.map(|(&id, _)| id);
        let known = known.or_else(|| self.by_handle.get(&handle).copied());
        match known.and_then(|id| Some((id, self.physical.get_mut(&id)?))) {
            Some((id, physical)) => {
                physical.references += 1;
                physical.aliases |= physical.handle != handle;
                self.by_handle.insert(handle, id);
            }
            None => self.add(handle, (device, 0), true),
        }
    }

    /// The device of an import whose size is not known yet.
    pub fn unsized_import(&mut self, handle: u64) -> Option<usize> {
        let known = self.of(handle)?;
        known.unsized_import.then_some(known.charge.0)
    }

    /// The size of an import is known now: what of it is charged here, and what somebody else is charged
    /// for. What is charged here counts as handed out: others may have it, too. `false`: another thread was
    /// faster, or it is gone.
    pub fn sized(&mut self, handle: u64, charged: u64, covered: u64) -> bool {
        let Some(known) = self.of(handle).filter(|known| known.unsized_import) else {
            return false;
        };
        known.charge.1 = charged;
        known.covered = covered;
        known.exported = true;
        known.unsized_import = false;
        true
    }

    /// The driver has refused to map it with that size after all. `false`: it is mapped elsewhere meanwhile,
    /// or gone.
    pub fn not_sized(&mut self, handle: u64) -> bool {
        let Some(known) = self.of(handle).filter(|known| known.mappings == 0) else {
            return false;
        };
        known.charge.1 = 0;
        known.covered = 0;
        known.unsized_import = true;
        true
    }

    /// It was handed out, as a descriptor or by another name; returns what it is charged, the first time.
    pub fn exported(&mut self, handle: u64, as_descriptor: Option<Descriptor>) -> Option<Charge> {
        let known = self.of(handle)?;
        known.descriptors.extend(as_descriptor);
        let before = std::mem::replace(&mut known.exported, true);
        (!before && known.charge.1 > 0).then_some(known.charge)
    }

    /// A descriptor was made under a number: whatever had it before is closed. That cannot be told by looking,
    /// since the driver's descriptors may all be of one file. Returns what has ended with it.
    pub fn number_reused(&mut self, number: i32) -> Vec<Ended> {
        self.descriptors_closed(|known| known.number != number)
    }

    /// Looks which descriptors are still open here; returns what has ended with the others.
    pub fn descriptors_closed(&mut self, is_open: impl Fn(&Descriptor) -> bool) -> Vec<Ended> {
        let mut changed = Vec::new();
        for (&id, physical) in &mut self.physical {
            let before = physical.descriptors.len();
            physical.descriptors.retain(&is_open);
            if physical.descriptors.len() < before {
                changed.push(id);
            }
        }
        let mut ended = Vec::new();
        for id in changed {
            self.end(id, &mut ended);
        }
        ended
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

    fn at(&self, address: u64) -> Option<u64> {
        let (_, &id) = self.by_address.range(..=address).next_back()?;
        Some(id)
    }

    /// A reference was taken by address.
    pub fn retained(&mut self, address: u64, handle: u64) {
        if let Some(id) = self.at(address)
            && let Some(physical) = self.physical.get_mut(&id)
            && (physical.handle == handle || physical.references == 0)
        {
            // It has no name left if there was no reference.
            physical.aliases |= physical.references > 0 && physical.handle != handle;
            physical.references += 1;
            physical.handle = handle;
            self.by_handle.insert(handle, id);
        }
    }

    /// A reference is about to be given back. Its handle is forgotten before the driver releases it: another
    /// thread may get the same one for new memory at once. To be ended by [`Handles::release_ended`], and
    /// held until then.
    pub fn releasing(&mut self, handle: u64) -> Option<Releasing> {
        let id = *self.by_handle.get(&handle)?;
        let physical = self.physical.get_mut(&id)?;
        physical.references = physical.references.saturating_sub(1);
        physical.bindings += 1;
        if physical.references == 0 {
            if std::mem::take(&mut physical.aliases) {
                self.by_handle.retain(|_, known| *known != id);
            } else {
                self.by_handle.remove(&handle);
            }
        }
        Some(Releasing { id, handle })
    }

    /// The driver has released it, or refused to; returns what has ended.
    pub fn release_ended(&mut self, releasing: &Releasing, done: bool) -> Vec<Ended> {
        let mut ended = Vec::new();
        if let Some(physical) = self.physical.get_mut(&releasing.id) {
            physical.bindings = physical.bindings.saturating_sub(1);
            if !done {
                physical.references += 1;
                self.by_handle.insert(releasing.handle, releasing.id);
            }
        }
        self.end(releasing.id, &mut ended);
        ended
    }

    /// A reference was given back; returns what has ended.
    pub fn released(&mut self, handle: u64) -> Vec<Ended> {
        match self.releasing(handle) {
            Some(releasing) => self.release_ended(&releasing, true),
            None => Vec::new(),
        }
    }

    /// All mappings in a range were undone; returns what has ended.
    pub fn unmapped(&mut self, address: u64, bytes: u64) -> Vec<Ended> {
        let end = address.saturating_add(bytes);
        let gone: Vec<(u64, u64)> = self
            .by_address
            .range(address..end)
            .map(|(&a, &id)| (a, id))
            .collect();
        let mut ended = Vec::new();
        for (address, id) in gone {
            self.by_address.remove(&address);
            if let Some(physical) = self.physical.get_mut(&id) {
                physical.mappings = physical.mappings.saturating_sub(1);
            }
            self.end(id, &mut ended);
        }
        ended
    }

    /// Memory was bound to a multicast object, which keeps it: by its handle, or else by an address that it
    /// is mapped at.
    pub fn bound(
        &mut self,
        object: u64,
        offset: u64,
        bytes: u64,
        handle: Option<u64>,
        address: u64,
    ) {
        let member = match handle {
            Some(handle) => self.by_handle.get(&handle).copied(),
            None => self.at(address),
        };
        let Some(member) = member.filter(|id| self.physical.contains_key(id)) else {
            return;
        };
        if self.of(object).is_none() {
            // Made before the records began, or by a call that is not recorded.
            return;
        }
        if let Some(physical) = self.physical.get_mut(&member) {
            physical.bindings += 1;
        }
        if let Some(object) = self.of(object) {
            object.members.push((offset, bytes, member));
        }
    }

    /// A range of a multicast object was unbound; returns what has ended.
    pub fn unbound(&mut self, object: u64, offset: u64, bytes: u64) -> Vec<Ended> {
        let end = offset.saturating_add(bytes);
        let mut ended = Vec::new();
        if let Some(object) = self.of(object) {
            let gone: Vec<_> = object
                .members
                .extract_if(.., |(at, _, _)| (offset..end).contains(at))
                .collect();
            self.let_go(gone, &mut ended);
        }
        ended
    }

    fn let_go(&mut self, members: Vec<(u64, u64, u64)>, ended: &mut Vec<Ended>) {
        for (_, _, id) in members {
            if let Some(physical) = self.physical.get_mut(&id) {
                physical.bindings = physical.bindings.saturating_sub(1);
            }
            self.end(id, ended);
        }
    }

    fn end(&mut self, id: u64, ended: &mut Vec<Ended>) {
        let in_use = |p: &Physical| {
            p.references > 0 || p.mappings > 0 || p.bindings > 0 || !p.descriptors.is_empty()
        };
        if self.physical.get(&id).is_none_or(in_use) {
            return;
        }
        if let Some(physical) = self.physical.remove(&id) {
            if physical.charge.1 > 0 || physical.covered > 0 {
                ended.push(Ended {
                    charge: physical.charge,
                    exported: physical.exported,
                    covered: physical.covered,
                });
            }
            self.let_go(physical.members, ended);
        }
    }

    /// Memory was opened by an IPC handle at `address`; `Some`: it had been open before, so it is charged
    /// already, as this says.
    pub fn open_again(&mut self, address: u64) -> Option<Import> {
        let open = self.opened.get_mut(&address)?;
        open.count += 1;
        Some(open.import)
    }

    /// The first time it is opened here, with its charge. `false`: another thread has opened it meanwhile, and
    /// what it was charged now is to be undone.
    #[must_use]
    pub fn opened(&mut self, address: u64, import: Import, context: usize) -> bool {
        if self.open_again(address).is_some() {
            return false;
        }
        let open = Open {
            import,
            count: 1,
            context,
        };
        self.opened.insert(address, open);
        true
    }

    /// It is about to be closed once: off the record before the driver closes it, since another thread may
    /// open something else at the same address at once. `None`: it is not on record.
    pub fn closing(&mut self, address: u64) -> Option<Closing> {
        let open = self.opened.get_mut(&address)?;
        open.count = open.count.saturating_sub(1);
        let context = open.context;
        let last = if open.count == 0 {
            self.opened.remove(&address).map(|open| open.import)
        } else {
            None
        };
        Some(Closing { last, context })
    }

    /// The driver has refused to close it.
    pub fn not_closed(&mut self, address: u64, closing: &Closing) {
        match closing.last {
            Some(import) => {
                let _ = self.opened(address, import, closing.context);
            }
            None => {
                self.open_again(address);
            }
        }
    }

    /// An array, a mipmapped array or managed memory was made in a context.
    pub fn add_other(&mut self, key: u64, other: Other, context: usize) {
        self.others.insert(key, (other, context));
    }

    /// It is about to be destroyed: off the record before the driver does so, since another thread may get
    /// the same name for something new at once. With its context, to add it again if the driver refuses.
    pub fn take_other(&mut self, key: u64) -> Option<(Other, usize)> {
        self.others.remove(&key)
    }

    /// The same, for the address of memory: arrays have other names.
    pub fn take_address(&mut self, ptr: u64) -> Option<(Other, usize)> {
        let (known, _) = self.others.get(&ptr)?;
        if known.kind == Kind::Held {
            None
        } else {
            self.take_other(ptr)
        }
    }

    /// A context is gone with what it owned; VMM handles outlive it.
    pub fn take_context(&mut self, context: usize) -> (Vec<Other>, Vec<(u64, Import)>) {
        let imports = self
            .opened
            .extract_if(|_, open| open.context == context)
            .map(|(address, open)| (address, open.import))
            .collect();
        let others = self
            .others
            .extract_if(|_, &mut (_, c)| c == context)
            .map(|(_, (other, _))| other)
            .collect();
        (others, imports)
    }
}

mod external;

#[cfg(test)]
mod tests;
