//! The note by which one of our libraries is known, whatever its file is called: in its file and in
//! memory. The strict library lies on a machine under names that the driver has, too.

/// What a library of ours does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `libspillway.so`: stands in front of the driver.
    Plain,
    /// `libspillway_strict.so`: has the driver's name and stands in its place.
    Strict,
}

/// An ELF note with the owner `Spillway`; a library puts one into its section `.note.spillway`.
#[repr(C, align(4))]
pub struct Note {
    owner_bytes: u32,
    content_bytes: u32,
    kind: u32,
    owner: [u8; 12],
    role: u32,
}

/// With its terminating zero, and filled up to a multiple of four.
const OWNER: [u8; 12] = *b"Spillway\0\0\0\0";
const OWNER_BYTES: u32 = 9;
const KIND: u32 = 1;
const PLAIN: u32 = 1;
const STRICT: u32 = 2;

impl Note {
    /// The note of a library.
    #[must_use]
    pub const fn new(role: Role) -> Self {
        Self {
            owner_bytes: OWNER_BYTES,
            content_bytes: 4,
            kind: KIND,
            owner: OWNER,
            role: match role {
                Role::Plain => PLAIN,
                Role::Strict => STRICT,
            },
        }
    }
}

/// Looks for our note among those of a note segment. Neither allocates nor panics, whatever the bytes are.
#[must_use]
pub fn find(mut notes: &[u8]) -> Option<Role> {
    while let Some((head, rest)) = notes.split_at_checked(12) {
        let word = |at: usize| Some(u32::from_ne_bytes(head.get(at..at + 4)?.try_into().ok()?));
        let (owner_bytes, content_bytes, kind) = (word(0)?, word(4)?, word(8)?);
        let padded = |bytes: u32| usize::try_from(bytes).ok()?.checked_next_multiple_of(4);
        let (owner, rest) = rest.split_at_checked(padded(owner_bytes)?)?;
        let (content, rest) = rest.split_at_checked(padded(content_bytes)?)?;
        if owner == OWNER && owner_bytes == OWNER_BYTES && kind == KIND {
            return match u32::from_ne_bytes(content.get(..4)?.try_into().ok()?) {
                PLAIN => Some(Role::Plain),
                STRICT => Some(Role::Strict),
                _ => None,
            };
        }
        notes = rest;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(note: &Note) -> Vec<u8> {
        let words = [note.owner_bytes, note.content_bytes, note.kind];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend_from_slice(&note.owner);
        bytes.extend_from_slice(&note.role.to_ne_bytes());
        bytes
    }

    #[test]
    fn our_note_is_found_behind_others() {
        let mut notes = Vec::new();
        for word in [4u32, 3, 1] {
            notes.extend_from_slice(&word.to_ne_bytes());
        }
        notes.extend_from_slice(b"GNU\0abc\0");
        assert_eq!(find(&notes), None);
        for role in [Role::Plain, Role::Strict] {
            let mut all = notes.clone();
            all.extend(bytes(&Note::new(role)));
            assert_eq!(find(&all), Some(role));
        }
        assert_eq!(size_of::<Note>(), bytes(&Note::new(Role::Plain)).len());
    }

    #[test]
    fn what_is_cut_or_nonsense_is_no_note() {
        let whole = bytes(&Note::new(Role::Strict));
        for end in 0..whole.len() {
            assert_eq!(find(&whole[..end]), None, "{end}");
        }
        assert_eq!(find(&[0xff; 64]), None);
        assert_eq!(find(&[0; 64]), None);
    }
}
