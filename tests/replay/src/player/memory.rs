//! Memory: filled when it is new, read when it is finished.

use serde_json::{Value, json};

use super::call::{Arguments, Player};
use super::contents::{digest, digest_more, fill};
use super::state::{Region, Space};
use crate::trace::Call;

/// How much is copied at once when memory is filled or read.
const PIECE: u64 = 4 << 20;

impl Player {
    /// New device memory, or new addresses.
    pub(super) fn allocated(
        &mut self,
        call: &Call,
        recorded: u64,
        here: u64,
        (about, arguments): (usize, &Arguments),
        stream: u64,
    ) {
        let mut bytes = call.words[about];
        if call.name == "cuMemAllocPitch_v2" {
            // SAFETY: the pitch, a result of its own.
            let pitch = unsafe { *(pointer::<u64>(arguments.words[1])) };
            bytes = pitch.saturating_mul(call.words[3]);
        }
        self.state.spaces.insert(recorded, Space { bytes, here });
        if call.name == "cuMemAddressReserve" {
            return;
        }
        let known = self.fill(here, bytes, call, stream);
        let used = (stream, self.state.tick);
        self.state
            .regions
            .insert(recorded, Region { bytes, known, used });
    }

    /// Memory that can be used from now on.
    pub(super) fn access_given(&mut self, call: &Call) {
        /// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`, behind a type and a number of four bytes each.
        const READ_WRITE: u64 = 3;
        let (start, bytes) = (call.words[0], call.words[1]);
        let allowed = call
            .block
            .get(1)
            .is_some_and(|word| word & 0xffff_ffff == READ_WRITE);
        if !allowed || self.state.region(start).is_some() {
            return;
        }
        if let Some(here) = self.state.address(start) {
            let known = self.fill(here, bytes, call, 0);
            let used = (0, self.state.tick);
            self.state
                .regions
                .insert(start, Region { bytes, known, used });
        }
    }

    /// Fills device memory; whether all of it is known then.
    pub(super) fn fill(&mut self, here: u64, bytes: u64, call: &Call, stream: u64) -> bool {
        let seed = call.line as u64;
        if call.name.contains("Async") {
            let filled = self.own("cuMemsetD8Async", &[here, seed & 0xff, bytes, stream]);
            return filled == 0 && !self.state.captures.contains_key(&stream);
        }
        if !self.state.captures.is_empty() {
            return false;
        }
        let mut done = 0;
        while done < bytes {
            let length = (bytes - done).min(PIECE);
            let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
            fill(&mut piece, seed.wrapping_add(done));
            if self.own(
                "cuMemcpyHtoD_v2",
                &[here + done, piece.as_ptr() as u64, length],
            ) != 0
            {
                return false;
            }
            done += length;
        }
        // No stream waits for a copy from pageable memory that has not arrived.
        self.own("cuCtxSynchronize", &[]) == 0
    }

    /// A digest of device memory, or why there is none.
    pub(super) fn read(&mut self, here: u64, bytes: u64) -> Value {
        let (mut done, mut sum) = (0, bytes);
        while done < bytes {
            let length = (bytes - done).min(PIECE);
            let mut piece = vec![0_u8; usize::try_from(length).unwrap_or(0)];
            let status = self.own(
                "cuMemcpyDtoH_v2",
                &[piece.as_mut_ptr() as u64, here + done, length],
            );
            if status != 0 {
                return json!(format!("cannot be read: {status}"));
            }
            sum = digest_more(sum, &piece);
            done += length;
        }
        json!(format!("{sum:016x}"))
    }

    /// Digests all device memory, where that is allowed.
    pub(super) fn read_all(&mut self, told: &mut Vec<Value>) {
        self.settle(told);
        if !self.state.captures.is_empty() {
            return;
        }
        for (start, region) in self.state.regions.clone() {
            if region.known
                && let Some(here) = self.state.address(start)
            {
                told.push(self.read(here, region.bytes));
            }
        }
    }

    /// Waits for everything in the current context, where that is allowed.
    pub(super) fn settle(&mut self, told: &mut Vec<Value>) {
        if self.state.captures.is_empty() && self.own("cuCtxSynchronize", &[]) == 0 {
            let context = self.context();
            self.finished(told, |(of, _)| of == context);
        }
    }

    /// Copies of these contexts and streams are finished.
    pub(super) fn finished(
        &mut self,
        told: &mut Vec<Value>,
        is_finished: impl Fn((u64, u64)) -> bool,
    ) {
        for host in self.state.hosts.values_mut() {
            host.busy.retain(|at| !is_finished(*at));
        }
        let pending = std::mem::take(&mut self.state.pending);
        for copy in pending {
            if is_finished((copy.context, copy.stream)) {
                told.push(json!(format!(
                    "{:016x}",
                    digest(host_bytes(copy.here, copy.bytes))
                )));
            } else {
                self.state.pending.push(copy);
            }
        }
    }

    /// A context is gone, and memory with it: what is left is what can still be asked for.
    pub(super) fn lost(&mut self) {
        let mut gone = Vec::new();
        for (&start, region) in &self.state.regions.clone() {
            let Some(here) = self.state.address(start) else {
                continue;
            };
            let mut base = 0_u64;
            let asked = [&raw mut base as u64, 0, here];
            if region.bytes > 0 && self.own("cuMemGetAddressRange_v2", &asked) != 0 {
                gone.push(start);
            }
        }
        for start in gone {
            self.state.forget(start);
        }
    }

    pub(super) fn context(&mut self) -> u64 {
        let mut context = 0_u64;
        self.own("cuCtxGetCurrent", &[&raw mut context as u64]);
        context
    }

    /// A call of the player's own.
    pub(super) fn own(&mut self, name: &'static str, words: &[u64]) -> i32 {
        // SAFETY: as the header declares it; pointers are to this function's callers' memory.
        unsafe { self.driver.call(name, words) }.unwrap_or(-1)
    }
}

/// An address of this process as a pointer.
pub fn pointer<T>(address: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
}

/// Host memory of this run, to which no copy is going on.
pub fn host_bytes<'a>(here: u64, bytes: u64) -> &'a [u8] {
    let length = usize::try_from(bytes).unwrap_or(0);
    // SAFETY: host memory of this run of so many bytes, to which no copy is going on.
    unsafe { std::slice::from_raw_parts(pointer(here), length) }
}
