//! Host memory for what is swapped out: segments of the coordinator's pool, mapped and registered
//! in the background, never on the swap path if that can be helped.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use spillway_protocol::{GRANULE, format_bytes, granules_up};

use crate::driver::{Status, call};
use crate::heap::HostPiece;
use crate::lock;
use crate::runtime::Runtime;
use crate::session::{self, Segment, Session};
use crate::vmm;

/// The size of a segment that is asked for, where that much is needed.
const SEGMENT: u64 = 256 << 20;
/// The least that is asked for: many small segments cost more than some spare space.
const LEAST: u64 = 8 * GRANULE;
/// Surplus kept before a segment is given back.
const SURPLUS: u64 = 512 << 20;
/// How long populating a segment may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// `CU_MEMHOSTREGISTER_PORTABLE`
const PORTABLE: u32 = 1;
/// `CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED`
const ALREADY_REGISTERED: i32 = 712;
/// `CU_STREAM_NON_BLOCKING`
const NON_BLOCKING: u32 = 1;

/// What became of the segment that was ordered.
enum Arrival {
    /// None was.
    Nothing,
    /// It is not there yet.
    Awaited,
    /// It is there.
    Came,
    /// There will be none.
    Failed,
}

/// A segment in this process.
struct Mapped {
    segment: Segment,
    address: *mut u8,
    /// The context in which it was registered; its end ends the registration.
    registered_in: Option<usize>,
}

// SAFETY: the address is a shared mapping of this process, valid in every thread; the pager alone
// uses it.
unsafe impl Send for Mapped {}

/// The segments, and a copy stream per context.
#[derive(Default)]
pub struct HostMemory {
    segments: Vec<Mapped>,
    streams: HashMap<usize, usize>,
    /// Where the next piece goes: segment and offset.
    cursor: (usize, u64),
    /// Asked for and not there yet: its ticket, and since when. Populating takes long, and the pager
    /// has more to do: commands to obey, activity to see.
    ordered: Option<(u64, Instant)>,
    /// Do not ask again before this.
    pause: Option<Instant>,
    surplus_since: Option<Instant>,
    /// Registration failed here for good: copies are staged by the driver.
    unregistrable: bool,
}

impl HostMemory {
    fn bytes(&self) -> u64 {
        self.segments.iter().map(|m| m.segment.bytes).sum()
    }

    /// Background work while resident: at most one segment asked for, one registered, one given
    /// back per call.
    pub fn prepare(&mut self, runtime: &Runtime, idle_for: Duration) {
        if !runtime.paging {
            return;
        }
        self.forget_retired(runtime);
        let want = lock(&runtime.heap).pageable_bytes();
        match self.arrived(runtime) {
            // What came before it can be registered meanwhile; the rest can wait.
            Arrival::Awaited => {
                if self.register_one(runtime) {
                    runtime.pager.poke();
                }
                return;
            }
            Arrival::Failed => self.pause = Some(Instant::now() + Duration::from_secs(1)),
            Arrival::Came => runtime.pager.poke(),
            Arrival::Nothing => {}
        }
        let have = self.bytes();
        if have < want && self.pause.is_none_or(|until| Instant::now() >= until) {
            self.pause = None;
            if !self.order(runtime, want - have) {
                self.pause = Some(Instant::now() + Duration::from_secs(1));
            }
            return;
        }
        if self.register_one(runtime) {
            runtime.pager.poke();
            return;
        }
        self.shrink(runtime, have.saturating_sub(want), idle_for);
    }

    fn order(&mut self, runtime: &Runtime, missing: u64) -> bool {
        let size = granules_up(missing).clamp(LEAST, SEGMENT);
        let ticket = runtime
            .session
            .as_ref()
            .and_then(|session| session.order_segment(size));
        self.ordered = ticket.map(|ticket| (ticket, Instant::now()));
        ticket.is_some()
    }

    fn arrived(&mut self, runtime: &Runtime) -> Arrival {
        let (Some((ticket, since)), Some(session)) = (self.ordered, &runtime.session) else {
            return Arrival::Nothing;
        };
        let answer = match session.take_segment(ticket) {
            None if since.elapsed() < PATIENCE => return Arrival::Awaited,
            None => session.await_segment(ticket, Duration::ZERO),
            Some(answer) => answer,
        };
        self.ordered = None;
        match answer.and_then(|segment| self.map(session, segment)) {
            Ok(()) => Arrival::Came,
            Err(_) => Arrival::Failed,
        }
    }

    /// Asks for more and waits for it.
    fn grow(&mut self, runtime: &Runtime, missing: u64) -> Result<(), String> {
        let session = runtime.session.as_ref().ok_or("there is no coordinator")?;
        if self.ordered.is_none() && !self.order(runtime, missing) {
            return Err("no coordinator answered".to_owned());
        }
        let (ticket, _) = self.ordered.take().ok_or("nothing is ordered")?;
        let segment = session.await_segment(ticket, PATIENCE)?;
        self.map(session, segment)
    }

    fn map(&mut self, session: &Session, segment: Segment) -> Result<(), String> {
        let bytes = usize::try_from(segment.bytes).map_err(|_| "segment too large")?;
        match session::map(&segment.file, bytes, true) {
            Ok(address) => {
                self.segments.push(Mapped {
                    segment,
                    address: address.cast(),
                    registered_in: None,
                });
                Ok(())
            }
            Err(why) => {
                session.release_segment(segment.id);
                Err(format!("a host segment could not be mapped: {why}"))
            }
        }
    }

    /// Registers the next segment that is not; `false`: there is none, or it cannot be.
    fn register_one(&mut self, runtime: &Runtime) -> bool {
        let (context, capture) = {
            let contexts = lock(&runtime.contexts);
            (contexts.all().first().copied(), contexts.any_capture())
        };
        let Some(context) = context.filter(|_| !capture && !self.unregistrable) else {
            return false;
        };
        let Some(mapped) = self.segments.iter_mut().find(|m| m.registered_in.is_none()) else {
            return false;
        };
        let bytes = usize::try_from(mapped.segment.bytes).unwrap_or(0);
        let status = runtime.using(context, || {
            vmm::in_context(context, || {
                // SAFETY: a mapping of ours of that size, unmapped only after it is unregistered.
                unsafe { call::cuMemHostRegister_v2(mapped.address.cast(), bytes, PORTABLE) }.ok()
            })
        });
        let Some(status) = status else { return false };
        match status {
            Ok(()) | Err(Status(ALREADY_REGISTERED)) => mapped.registered_in = Some(context),
            Err(why) => {
                self.unregistrable = true;
                crate::say::warning!(
                    "host memory cannot be registered (driver error {}): swaps will be slower",
                    why.0
                );
            }
        }
        true
    }

    fn shrink(&mut self, runtime: &Runtime, surplus: u64, idle_for: Duration) {
        let last = self.segments.last().map_or(0, |m| m.segment.bytes);
        if last == 0 || surplus < last + SURPLUS || idle_for < Duration::from_millis(100) {
            self.surplus_since = None;
            return;
        }
        let since = *self.surplus_since.get_or_insert_with(Instant::now);
        if since.elapsed() < Duration::from_secs(10) {
            return;
        }
        self.surplus_since = None;
        if let Some(mapped) = self.segments.pop() {
            discard(runtime, mapped);
        }
    }

    /// Contexts that are gone took their registrations and our copy streams along.
    fn forget_retired(&mut self, runtime: &Runtime) {
        for context in lock(&runtime.contexts).take_retired() {
            self.streams.remove(&context);
            for mapped in &mut self.segments {
                if mapped.registered_in == Some(context) {
                    mapped.registered_in = None;
                }
            }
        }
    }

    /// Makes sure that there is space for `bytes`, and starts filling from the beginning. Only while
    /// nothing is stored.
    pub fn begin(&mut self, runtime: &Runtime, bytes: u64) -> Result<(), String> {
        self.forget_retired(runtime);
        while self.bytes() < bytes {
            let missing = bytes - self.bytes();
            self.grow(runtime, missing).map_err(|why| {
                format!("no host memory for {} more: {why}", format_bytes(missing))
            })?;
        }
        self.cursor = (0, 0);
        Ok(())
    }

    /// Takes space for one chunk; a piece never crosses a segment's border, as a copy must not.
    pub fn take(&mut self, mut bytes: u64) -> Vec<HostPiece> {
        let mut pieces = Vec::new();
        while bytes > 0 {
            let (segment, offset) = self.cursor;
            let Some(mapped) = self.segments.get(segment) else {
                break;
            };
            let part = bytes.min(mapped.segment.bytes - offset);
            if part == 0 {
                self.cursor = (segment + 1, 0);
                continue;
            }
            pieces.push(HostPiece {
                segment,
                offset,
                bytes: part,
            });
            self.cursor.1 += part;
            bytes -= part;
        }
        pieces
    }

    /// The session's id of a piece's segment.
    pub fn id_of(&self, piece: &HostPiece) -> u64 {
        self.segments[piece.segment].segment.id
    }

    /// The host address of a piece.
    pub fn address(&self, piece: &HostPiece) -> *mut libc::c_void {
        let mapped = &self.segments[piece.segment];
        debug_assert!(piece.offset + piece.bytes <= mapped.segment.bytes);
        mapped
            .address
            .wrapping_add(usize::try_from(piece.offset).unwrap_or(0))
            .cast()
    }

    /// The copy stream of a context, which must be current.
    pub fn stream(&mut self, context: usize) -> Result<usize, Status> {
        if let Some(&stream) = self.streams.get(&context) {
            return Ok(stream);
        }
        let mut stream = std::ptr::null_mut();
        // SAFETY: the driver fills one handle.
        unsafe { call::cuStreamCreate(&raw mut stream, NON_BLOCKING) }.ok()?;
        self.streams.insert(context, stream as usize);
        Ok(stream as usize)
    }
}

fn discard(runtime: &Runtime, mapped: Mapped) {
    let unregistered = mapped.registered_in.is_none_or(|context| {
        let asked = runtime.using(context, || {
            vmm::in_context(context, || {
                // SAFETY: registered by us at this address; nothing is being copied.
                unsafe { call::cuMemHostUnregister(mapped.address.cast()) }.ok()
            })
        });
        asked == Some(Ok(()))
    });
    // What the driver still has registered keeps its addresses: a later segment there would be copied
    // to and from the pages of this one.
    if unregistered {
        // SAFETY: a mapping of ours of that size; no piece refers to it while resident.
        unsafe {
            libc::munmap(
                mapped.address.cast(),
                usize::try_from(mapped.segment.bytes).unwrap_or(0),
            );
        }
    }
    if let Some(session) = &runtime.session {
        session.release_segment(mapped.segment.id);
    }
}
