//! What is known of the application's contexts, streams and captures: what a drain has to wait
//! for, and what a destroyed context takes along.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::glance::Glance;

/// One context that the application made or retained.
#[derive(Debug, Default)]
pub struct ContextInfo {
    /// Device index.
    pub device: usize,
    /// It is the device's primary context.
    pub primary: bool,
    /// Its addresses and sizes have 32 bits (the first `cuCtxCreate`).
    pub old: bool,
    /// Streams created in it, as driver handles.
    pub streams: BTreeSet<usize>,
}

/// A green context: a part of a device, whose memory is the primary context's.
#[derive(Clone, Copy, Debug)]
pub struct Green {
    /// What `cuCtxFromGreenCtx` answers.
    pub context: usize,
    pub primary: usize,
}

/// A green context that is being destroyed, with what goes with it.
#[derive(Debug)]
pub struct TakenGreen {
    known: Green,
    streams: Vec<usize>,
    captures: Vec<((usize, u64), u32)>,
}

/// All contexts, streams and captures.
#[derive(Debug, Default)]
pub struct Contexts {
    known: BTreeMap<usize, ContextInfo>,
    owner_of_stream: HashMap<usize, usize>,
    greens: HashMap<usize, Green>,
    /// Streams of green contexts, which end with those.
    green_of_stream: HashMap<usize, usize>,
    /// Captures begun and not ended: stream handle, and the thread for the per-thread stream.
    captures: HashMap<(usize, u64), u32>,
    /// Contexts that are gone and that the pager has not yet forgotten.
    retired: Vec<usize>,
    /// Contexts and streams that a thread of ours has in a driver call now.
    in_use: HashMap<usize, u32>,
    /// Contexts and streams that the application is destroying now.
    going: BTreeSet<usize>,
    /// Threads of ours that ask a stream how far it is, which would spoil a capture.
    asking: u32,
    /// Threads of the application that are beginning a capture.
    beginning: u32,
    /// What may be read without the lock around this.
    glance: Arc<Glance>,
}

impl Contexts {
    /// What is to be known without the lock around this.
    #[must_use]
    pub fn glance(&self) -> Arc<Glance> {
        Arc::clone(&self.glance)
    }

    /// Notes a context; repeats are harmless.
    pub fn add(&mut self, context: usize, device: usize, primary: bool) {
        let info = self.known.entry(context).or_default();
        if info.device != device {
            self.glance.forget(context);
        }
        info.device = device;
        info.primary |= primary;
    }

    /// A context's device, if it is known.
    #[must_use]
    pub fn device_of(&self, context: usize) -> Option<usize> {
        let device = self.known.get(&context).map(|info| info.device)?;
        self.glance.note(context, device);
        Some(device)
    }

    /// Notes a green context.
    pub fn add_green(&mut self, green: usize, context: usize, primary: usize) {
        self.greens.insert(green, Green { context, primary });
    }

    /// A green context, if it is known.
    #[must_use]
    pub fn green(&self, green: usize) -> Option<Green> {
        self.greens.get(&green).copied()
    }

    /// The green context that a context stands for.
    #[must_use]
    pub fn green_behind(&self, context: usize) -> Option<usize> {
        let mut all = self.greens.iter();
        all.find(|(_, g)| g.context == context)
            .map(|(&green, _)| green)
    }

    /// Notes that a stream is of a green context.
    pub fn add_green_stream(&mut self, green: usize, stream: usize) {
        self.green_of_stream.insert(stream, green);
    }

    /// A green context is about to be destroyed: forgets it and its streams before the driver does so, since another
    /// thread may get the same handles for new ones at once.
    pub fn take_green(&mut self, green: usize) -> Option<TakenGreen> {
        let known = self.greens.remove(&green)?;
        let mut streams: Vec<usize> = self
            .green_of_stream
            .iter()
            .filter(|(_, owner)| **owner == green)
            .map(|(&stream, _)| stream)
            .collect();
        streams.sort_unstable();
        let of = |key: &(usize, u64)| streams.binary_search(&key.0).is_ok();
        let captures = self.captures.iter().filter(|(key, _)| of(key));
        let captures = captures.map(|(&key, &count)| (key, count)).collect();
        for &stream in &streams {
            self.remove_stream(stream);
        }
        Some(TakenGreen {
            known,
            streams,
            captures,
        })
    }

    /// The driver has refused to destroy it.
    pub fn put_green_back(&mut self, green: usize, taken: TakenGreen) {
        self.greens.insert(green, taken.known);
        for stream in taken.streams {
            self.add_stream(taken.known.primary, stream);
            self.add_green_stream(green, stream);
        }
        self.captures.extend(taken.captures);
        self.show_captures();
    }

    /// Notes that a context is of the old interface.
    pub fn set_old(&mut self, context: usize) {
        if let Some(info) = self.known.get_mut(&context) {
            info.old = true;
        }
    }

    /// Whether a context is of the old interface.
    #[must_use]
    pub fn is_old(&self, context: usize) -> bool {
        self.known.get(&context).is_some_and(|info| info.old)
    }

    /// Some context is known on a device.
    #[must_use]
    pub fn any_on(&self, device: usize) -> bool {
        self.known.values().any(|info| info.device == device)
    }

    /// The primary context of a device, if it was retained.
    #[must_use]
    pub fn primary_of(&self, device: usize) -> Option<usize> {
        self.known
            .iter()
            .find(|(_, i)| i.primary && i.device == device)
            .map(|(&c, _)| c)
    }

    /// Forgets a context; its streams and captures go with it. The pager is told.
    pub fn remove(&mut self, context: usize) {
        self.glance.forget(context);
        if let Some(info) = self.known.remove(&context) {
            for stream in info.streams {
                self.owner_of_stream.remove(&stream);
                self.green_of_stream.remove(&stream);
                self.captures.retain(|&(s, _), _| s != stream);
            }
            self.retired.push(context);
        }
        self.show_captures();
    }

    /// A thread of ours is about to use a handle of the application in a driver call; `false`: it is
    /// gone or going. To be ended by [`Contexts::unuse`].
    #[must_use]
    pub fn try_use(&mut self, handle: usize) -> bool {
        let known = self.known.contains_key(&handle) || self.owner_of_stream.contains_key(&handle);
        if !known || self.going.contains(&handle) {
            return false;
        }
        *self.in_use.entry(handle).or_default() += 1;
        true
    }

    /// See [`Contexts::try_use`].
    pub fn unuse(&mut self, handle: usize) {
        if let Some(users) = self.in_use.get_mut(&handle) {
            *users -= 1;
            if *users == 0 {
                self.in_use.remove(&handle);
            }
        }
    }

    /// The application begins to destroy a handle: nobody of ours uses it from now on. Returns
    /// whether somebody still does.
    pub fn going(&mut self, handle: usize) -> bool {
        self.going.insert(handle);
        self.in_use.contains_key(&handle)
    }

    /// It is being destroyed.
    #[must_use]
    pub fn is_going(&self, handle: usize) -> bool {
        self.going.contains(&handle)
    }

    /// The destruction is done, or was refused.
    pub fn gone(&mut self, handle: usize) {
        self.going.remove(&handle);
    }

    /// Contexts that are gone since the last call.
    pub fn take_retired(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.retired)
    }

    /// Every known context.
    #[must_use]
    pub fn all(&self) -> Vec<usize> {
        self.known.keys().copied().collect()
    }

    /// Notes a stream.
    pub fn add_stream(&mut self, context: usize, stream: usize) {
        if let Some(info) = self.known.get_mut(&context) {
            info.streams.insert(stream);
            self.owner_of_stream.insert(stream, context);
        }
    }

    /// Forgets a stream; an open capture on it is abandoned with it.
    pub fn remove_stream(&mut self, stream: usize) {
        if let Some(context) = self.owner_of_stream.remove(&stream)
            && let Some(info) = self.known.get_mut(&context)
        {
            info.streams.remove(&stream);
        }
        self.green_of_stream.remove(&stream);
        self.captures.retain(|&(s, _), _| s != stream);
        self.show_captures();
    }

    /// Streams of a context.
    #[must_use]
    pub fn streams_of(&self, context: usize) -> Vec<usize> {
        self.known
            .get(&context)
            .map(|i| i.streams.iter().copied().collect())
            .unwrap_or_default()
    }

    /// The context of a stream that was created, not of the default ones.
    #[must_use]
    pub fn context_of_stream(&self, stream: usize) -> Option<usize> {
        self.owner_of_stream.get(&stream).copied()
    }

    /// A capture begins.
    pub fn begin_capture(&mut self, stream: usize, thread: u64) {
        *self.captures.entry((stream, thread)).or_default() += 1;
        self.show_captures();
    }

    fn show_captures(&self) {
        self.glance.set_capturing(!self.captures.is_empty());
    }

    /// The application is about to begin a capture: nobody of ours starts to ask streams until
    /// [`Contexts::tried_capture`].
    pub fn tries_capture(&mut self) {
        self.beginning += 1;
    }

    /// The driver has begun the capture, or refused it.
    pub fn tried_capture(&mut self) {
        self.beginning -= 1;
    }

    /// Somebody asks streams.
    #[must_use]
    pub fn asking(&self) -> bool {
        self.asking > 0
    }

    /// A thread of ours is about to ask a stream how far it is; `false`: a capture is open or begins. To
    /// be ended by [`Contexts::asked`].
    #[must_use]
    pub fn try_ask(&mut self) -> bool {
        let may = self.captures.is_empty() && self.beginning == 0;
        self.asking += u32::from(may);
        may
    }

    /// See [`Contexts::try_ask`].
    pub fn asked(&mut self) {
        self.asking -= 1;
    }

    /// A capture ends.
    pub fn end_capture(&mut self, stream: usize, thread: u64) {
        self.captures.remove(&(stream, thread));
        self.show_captures();
    }

    /// Streams that were last seen capturing.
    #[must_use]
    pub fn capturing(&self) -> Vec<(usize, u64)> {
        self.captures.keys().copied().collect()
    }

    /// Some capture is open.
    #[must_use]
    pub fn any_capture(&self) -> bool {
        !self.captures.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_being_destroyed_is_not_used() {
        let mut contexts = Contexts::default();
        contexts.add(10, 0, true);
        assert!(contexts.try_use(10));
        assert!(!contexts.is_going(10));
        assert!(contexts.going(10), "still in use");
        assert!(contexts.is_going(10), "a new one of that name waits");
        assert!(!contexts.try_use(10));
        contexts.unuse(10);
        assert!(!contexts.going(10));
        contexts.gone(10);
        assert!(contexts.try_use(10));
        assert!(!contexts.try_use(11), "unknown");
    }

    #[test]
    fn a_glance_never_tells_of_what_is_gone() {
        let mut contexts = Contexts::default();
        let glance = contexts.glance();
        contexts.add(10, 0, false);
        assert_eq!(glance.device_of(10), None, "nobody has asked yet");
        assert_eq!(contexts.device_of(10), Some(0));
        assert_eq!(glance.device_of(10), Some(0));
        contexts.remove(10);
        assert_eq!(glance.device_of(10), None);
        // The driver may give the same handle to another device's context.
        contexts.add(10, 1, false);
        assert_eq!(contexts.device_of(10), Some(1));
        contexts.add(10, 2, false);
        assert_eq!(glance.device_of(10), None);
        contexts.add_stream(10, 100);
        contexts.begin_capture(100, 0);
        assert!(glance.capturing());
        contexts.end_capture(100, 0);
        assert!(!glance.capturing());
        contexts.begin_capture(100, 0);
        contexts.remove_stream(100);
        assert!(!glance.capturing());
    }

    #[test]
    fn nobody_asks_while_a_capture_is_open() {
        let mut contexts = Contexts::default();
        assert!(contexts.try_ask());
        contexts.tries_capture();
        assert!(contexts.asking() && !contexts.try_ask());
        contexts.asked();
        assert!(!contexts.asking());
        contexts.begin_capture(100, 0);
        contexts.tried_capture();
        assert!(!contexts.try_ask());
        contexts.end_capture(100, 0);
        assert!(contexts.try_ask());
    }

    #[test]
    fn a_green_context_takes_its_streams_and_leaves_the_primary() {
        let mut contexts = Contexts::default();
        contexts.add(10, 0, true);
        contexts.add_green(500, 11, 10);
        for stream in [100, 101] {
            contexts.add_stream(10, stream);
        }
        contexts.add_green_stream(500, 101);
        assert_eq!(contexts.green_behind(11), Some(500));
        assert_eq!(contexts.green_behind(10), None);
        contexts.begin_capture(101, 0);
        let taken = contexts.take_green(500).expect("it is on record");
        assert!(contexts.green(500).is_none() && contexts.take_green(500).is_none());
        assert_eq!(contexts.streams_of(10), vec![100]);
        assert!(!contexts.any_capture());
        // The driver has refused, and nothing has changed.
        contexts.put_green_back(500, taken);
        assert_eq!(contexts.green_behind(11), Some(500));
        assert_eq!(contexts.streams_of(10), vec![100, 101]);
        assert!(contexts.any_capture());
        // It is destroyed, and another thread has the handles for new ones before we go on.
        let taken = contexts.take_green(500);
        contexts.add_green(500, 12, 10);
        contexts.add_stream(10, 101);
        contexts.add_green_stream(500, 101);
        drop(taken);
        assert_eq!(contexts.green_behind(12), Some(500));
        assert_eq!(contexts.streams_of(10), vec![100, 101]);
        contexts.set_old(10);
        assert!(contexts.is_old(10) && !contexts.is_old(11));
    }

    #[test]
    fn a_context_takes_its_streams_and_captures_along() {
        let mut contexts = Contexts::default();
        contexts.add(10, 0, true);
        contexts.add(20, 1, false);
        contexts.add_stream(10, 100);
        contexts.begin_capture(100, 0);
        assert_eq!(
            (contexts.primary_of(0), contexts.primary_of(1)),
            (Some(10), None)
        );
        assert!(contexts.any_capture());
        assert!(contexts.glance().capturing());
        contexts.remove(10);
        assert!(!contexts.any_capture());
        assert!(!contexts.glance().capturing());
        assert_eq!(contexts.context_of_stream(100), None);
        assert_eq!(contexts.take_retired(), vec![10]);
        assert_eq!(contexts.all(), vec![20]);
    }
}
