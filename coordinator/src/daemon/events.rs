//! The event log: the last few for who comes later, and live ones for who listens.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::model::Event;

/// How many are kept.
const KEPT: usize = 256;
/// How many may wait for one listener; one that falls back further is cut off.
const QUEUED: usize = 1024;
/// Listeners at the same time.
const LISTENERS: usize = 256;

/// See the module.
#[derive(Debug, Default)]
pub struct Events {
    kept: VecDeque<Event>,
    listeners: Vec<SyncSender<Event>>,
    /// Grows with every event.
    pub count: u64,
}

impl Events {
    /// Adds an event. Never blocks.
    pub fn add(
        &mut self,
        kind: &str,
        workload: Option<&str>,
        text: String,
        numbers: &[(&str, Value)],
    ) {
        let time_unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0.0, |time| time.as_secs_f64());
        let event = Event {
            time_unix,
            workload: workload.map(str::to_owned),
            kind: kind.to_owned(),
            text,
            numbers: numbers
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.clone()))
                .collect::<BTreeMap<_, _>>(),
        };
        tracing::info!(kind, workload = workload.unwrap_or("-"), "{}", event.text);
        self.listeners
            .retain(|listener| listener.try_send(event.clone()).is_ok());
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(event);
        self.count += 1;
    }

    /// The kept events, oldest first.
    pub fn kept(&self) -> impl DoubleEndedIterator<Item = &Event> {
        self.kept.iter()
    }

    /// The kept events and those to come. With too many listeners the channel is closed from the
    /// start.
    pub fn subscribe(&mut self) -> (Vec<Event>, Receiver<Event>) {
        let (sender, receiver) = sync_channel(QUEUED);
        if self.listeners.len() < LISTENERS {
            self.listeners.push(sender);
        }
        (self.kept.iter().cloned().collect(), receiver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_does_not_read_is_cut_off_and_holds_nobody() {
        let mut events = Events::default();
        events.add("note", None, "before".to_owned(), &[]);
        let (kept, slow) = events.subscribe();
        assert_eq!(kept.len(), 1);
        for index in 0..QUEUED + 10 {
            events.add("note", Some("w"), format!("{index}"), &[]);
        }
        assert_eq!(events.listeners.len(), 0);
        assert_eq!(slow.iter().count(), QUEUED);
        assert_eq!(events.kept().count(), KEPT);
    }
}
