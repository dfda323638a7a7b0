//! External memory: an import that lives as long as it or anything that is mapped from it.

use super::{Descriptor, Ended, Handles, Import};

/// One import.
#[derive(Debug)]
pub(super) struct External {
    import: Import,
    context: usize,
    /// The import itself, and the buffers and arrays that are mapped from it.
    users: u32,
    /// Memory of this process that it keeps, if it was imported from a descriptor of such.
    physical: Option<u64>,
}

/// What has ended with an import.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ExternalEnded {
    /// The import, to be uncharged.
    pub import: Option<Import>,
    /// Memory of this process that only the import kept.
    pub ended: Vec<Ended>,
}

impl Handles {
    /// The driver is about to import what is open under a descriptor, and takes the descriptor over: memory of
    /// this process is kept by the import from now on. To be given to [`Handles::external_opened`] or
    /// [`Handles::external_refused`].
    pub fn external_importing(&mut self, descriptor: &Descriptor) -> Option<u64> {
        let (&id, physical) = self
            .physical
            .iter_mut()
            .find(|(_, physical)| physical.descriptors.contains(descriptor))?;
        physical.bindings += 1;
        Some(id)
    }

    /// The driver has refused the import.
    pub fn external_refused(&mut self, physical: Option<u64>) -> Vec<Ended> {
        let mut ended = Vec::new();
        if let Some(id) = physical {
            self.let_go(vec![(0, 0, id)], &mut ended);
        }
        ended
    }

    /// It is imported, with what it is charged.
    pub fn external_opened(
        &mut self,
        memory: u64,
        import: Import,
        context: usize,
        physical: Option<u64>,
    ) {
        self.ids += 1;
        self.external_of.insert(memory, self.ids);
        let external = External {
            import,
            context,
            users: 1,
            physical,
        };
        self.external.insert(self.ids, external);
    }

    /// A buffer or an array was mapped from it.
    pub fn external_mapped(&mut self, memory: u64, made: u64) {
        if let Some(&id) = self.external_of.get(&memory)
            && let Some(external) = self.external.get_mut(&id)
        {
            external.users += 1;
            self.external_of.insert(made, id);
        }
    }

    /// The import, or what is mapped from it, is about to be destroyed: off the record before the driver
    /// does so. To be ended by [`Handles::external_destroyed`].
    pub fn external_destroying(&mut self, key: u64) -> Option<u64> {
        self.external_of.remove(&key)
    }

    /// The driver has done so, or refused to.
    pub fn external_destroyed(&mut self, key: u64, id: u64, done: bool) -> ExternalEnded {
        let mut out = ExternalEnded::default();
        let Some(external) = self.external.get_mut(&id) else {
            return out;
        };
        if !done {
            self.external_of.insert(key, id);
            return out;
        }
        external.users = external.users.saturating_sub(1);
        if external.users == 0
            && let Some(external) = self.external.remove(&id)
        {
            out.import = Some(external.import);
            out.ended = self.external_refused(external.physical);
        }
        out
    }

    /// A context is gone with what was imported in it.
    pub fn external_context_gone(&mut self, context: usize) -> Vec<ExternalEnded> {
        let gone: Vec<(u64, External)> = self
            .external
            .extract_if(|_, external| external.context == context)
            .collect();
        self.external_of
            .retain(|_, id| !gone.iter().any(|(known, _)| known == id));
        gone.into_iter()
            .map(|(_, external)| ExternalEnded {
                import: Some(external.import),
                ended: self.external_refused(external.physical),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DESCRIPTOR: Descriptor = Descriptor {
        number: 3,
        file: (1, 2),
    };

    fn imported() -> (Handles, Option<u64>) {
        let mut handles = Handles::default();
        handles.created(7, (0, 100));
        handles.exported(7, Some(DESCRIPTOR));
        let kept = handles.external_importing(&DESCRIPTOR);
        assert!(kept.is_some());
        // The driver has closed it.
        assert_eq!(handles.descriptors_closed(|_| false), vec![]);
        assert_eq!(handles.released(7), vec![], "the import keeps it");
        (handles, kept)
    }

    fn destroy(handles: &mut Handles, key: u64) -> ExternalEnded {
        let id = handles.external_destroying(key).expect("it is on record");
        handles.external_destroyed(key, id, true)
    }

    #[test]
    fn an_import_and_its_buffers_keep_memory() {
        let (mut handles, kept) = imported();
        handles.external_opened(50, (0, 100, 0), 5, kept);
        handles.external_mapped(50, 0x1000);
        assert_eq!(destroy(&mut handles, 50), ExternalEnded::default());
        let last = destroy(&mut handles, 0x1000);
        assert_eq!(last.import, Some((0, 100, 0)));
        assert_eq!(last.ended[0].charge, (0, 100));
        assert_eq!(handles.external_destroying(0x1000), None);
    }

    #[test]
    fn what_the_driver_refuses_changes_nothing() {
        let (mut handles, kept) = imported();
        assert_eq!(handles.external_refused(kept)[0].charge, (0, 100));

        let (mut handles, kept) = imported();
        handles.external_opened(50, (0, 100, 0), 5, kept);
        let id = handles.external_destroying(50).expect("it is on record");
        let refused = handles.external_destroyed(50, id, false);
        assert_eq!(refused, ExternalEnded::default());
        assert_eq!(destroy(&mut handles, 50).ended.len(), 1);
    }

    #[test]
    fn imports_go_with_their_context() {
        let (mut handles, kept) = imported();
        handles.external_opened(50, (0, 100, 100), 5, kept);
        handles.external_mapped(50, 0x1000);
        assert_eq!(handles.external_context_gone(6), vec![]);
        let gone = handles.external_context_gone(5);
        assert_eq!(gone[0].import, Some((0, 100, 100)));
        assert_eq!(gone[0].ended.len(), 1);
        assert_eq!(handles.external_destroying(0x1000), None);
    }
}
