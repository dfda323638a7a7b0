//! Entry points of the driver that the hook table does not know, told by name.

use std::sync::atomic::Ordering::SeqCst;

use spillway_protocol::message::{FromProcess, valid_entry_point};
use spillway_protocol::{MAX_ENTRY_POINTS, PROTOCOL_VERSION_CLAIMS};

use super::Session;
use crate::lock;

impl Session {
    /// Names an entry point of the driver that the hook table does not know. The same name, one that
    /// cannot be one, and those after the first [`MAX_ENTRY_POINTS`] are left out.
    pub fn unknown(&self, name: &str) {
        let mut shared = lock(&self.shared);
        let full = shared.unknown.len() >= MAX_ENTRY_POINTS;
        if full || !valid_entry_point(name) || shared.unknown.iter().any(|known| known == name) {
            return;
        }
        shared.unknown.push(name.to_owned());
        drop(shared);
        self.tell_unknown(name);
    }

    /// A new coordinator has taken this process in.
    pub(super) fn tell_all_unknown(&self) {
        let names = lock(&self.shared).unknown.clone();
        for name in names {
            self.tell_unknown(&name);
        }
    }

    fn tell_unknown(&self, name: &str) {
        if self.version.load(SeqCst) >= PROTOCOL_VERSION_CLAIMS {
            let name = name.to_owned();
            self.send(&FromProcess::Unknown { name });
        }
    }
}
