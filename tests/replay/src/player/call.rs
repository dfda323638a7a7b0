//! One call: its arguments here, and what it changes.

use anyhow::Result;
use serde_json::{Value, json};

use super::contents::{digest, digest_more, fill};
use super::driver::Driver;
use super::state::{Pending, Region, Space, State};
use crate::roles::{self, Role};
use crate::trace::Call;

/// What kernels the player has: those that the simulator can run.
const IMAGE: &str = concat!(
    include_str!("../../../../simulator/kernels/spillway.ptx"),
    "\0"
);
/// In the place of every kernel of the program.
const KERNEL: &[u8] = b"fill_u32\0";
/// One that there is not.
const NO_KERNEL: &[u8] = b"no_such_kernel\0";
/// How much is copied at once when memory is filled or read.
const PIECE: u64 = 4 << 20;
/// In the place of an address that is nobody's.
const NOWHERE: u64 = 0x00de_ad00_0000;
/// Streams and contexts that are no handles: none, the legacy and the thread's default stream.
const CONSTANTS: u64 = 2;
const PER_THREAD_STREAM: u64 = 2;
/// `CUDA_ERROR_NOT_READY`
const NOT_READY: i32 = 600;

/// See the module.
pub struct Player {
    driver: Driver,
    state: State,
}

/// The arguments of a call, and where its results go. What they point to lives as long as this.
#[derive(Default)]
struct Arguments {
    words: Vec<u64>,
    results: Vec<Box<[u64]>>,
    /// Host memory that is written: address here, bytes.
    read_back: Option<(u64, u64)>,
    /// Recorded addresses of device memory that the call uses.
    uses: Vec<u64>,
    /// Recorded starts of host memory that the call uses.
    hosts: Vec<u64>,
    /// Memory to be registered.
    own: Option<(Vec<u64>, u64)>,
}

extern "C" fn nothing() {}

impl Player {
    pub fn new() -> Result<Self> {
        Ok(Self {
            driver: Driver::open()?,
            state: State::default(),
        })
    }

    /// Something is allocated, and nothing is being captured.
    pub fn can_be_moved(&self) -> bool {
        !self.state.regions.is_empty() && self.state.captures.is_empty()
    }

    /// Plays a call, and says what came of it.
    pub fn play(&mut self, call: &Call) -> Value {
        if call.name == super::END {
            return self.at_the_end();
        }
        self.state.tick += 1;
        let played = match call.name.as_str() {
            "cuPointerGetAttributes" => self.attributes(call),
            "cuLaunchKernelEx" | "cuLaunchKernelEx_ptsz" => match as_launch(call) {
                Some(launch) => self.by_table(&launch),
                None => Err("its configuration was not recorded".into()),
            },
            _ => self.by_table(call),
        };
        let mut line = json!({"line": call.line, "call": call.name});
        match played {
            Ok((status, told)) => {
                line["r"] = json!(status);
                line["recorded"] = json!(quiet(&call.name, call.status));
                line["told"] = json!(told);
            }
            Err(why) => line["left_out"] = json!(why),
        }
        line
    }

    fn by_table(&mut self, call: &Call) -> Result<(i32, Vec<Value>), String> {
        let (name, roles) =
            roles::find(&call.name).ok_or_else(|| "the player does not know it".to_owned())?;
        if roles.len() != call.words.len() {
            return Err(format!(
                "it has {} arguments, not {}",
                call.words.len(),
                roles.len()
            ));
        }
        let stream = self.stream(call, &roles);
        let mut arguments = self.arguments(call, &roles, stream)?;
        let mut told = Vec::new();
        self.before(call, stream, &mut told);
        // SAFETY: each word is what the table says of this function's argument: a number, a handle or an
        // address of this run, or a pointer to memory in `arguments` or to host memory of the trace.
        let status = unsafe { self.driver.call(name, &arguments.words) };
        let status = status.ok_or("the driver does not have it")?;
        if status == 0 {
            self.after(call, &roles, &mut arguments, stream, &mut told);
        }
        Ok((quiet(&call.name, status), told))
    }

    /// The stream here that a call works on; 0 for calls that have none.
    fn stream(&self, call: &Call, roles: &[Role]) -> u64 {
        let at = if call.name.starts_with("cuLaunchKernel") || call.name.starts_with("cuLaunchCoop")
        {
            Some(8)
        } else if call.name.contains("Async") || call.name.starts_with("cuEventRecord") {
            roles.iter().rposition(|(role, _)| *role == "h")
        } else if call.name.starts_with("cuStream") {
            Some(0)
        } else if call.name.starts_with("cuGraphLaunch") || call.name.starts_with("cuGraphUpload") {
            Some(1)
        } else {
            None
        };
        let word = at.and_then(|at| call.words.get(at)).copied().unwrap_or(0);
        let per_thread = call.name.ends_with("_ptsz") || call.name.ends_with("_ptds");
        match self.state.handles.get(&word) {
            Some(here) => *here,
            None if word == 0 && per_thread => PER_THREAD_STREAM,
            None => word.min(CONSTANTS),
        }
    }

    fn arguments(&mut self, call: &Call, roles: &[Role], stream: u64) -> Result<Arguments, String> {
        let mut arguments = Arguments::default();
        for (index, &(role, about)) in roles.iter().enumerate() {
            let word = call.words[index];
            let size = call.words.get(about).copied().unwrap_or(0);
            let here = match role {
                "n" => word,
                "0" => 0,
                "1" => 1,
                "h" => self.handle(call, word)?,
                "d" => {
                    arguments.uses.push(word);
                    self.device(call, word)?
                }
                "p" => match self.state.address(word) {
                    Some(here) => here,
                    None => self.state.host(word, 0).unwrap_or(NOWHERE),
                },
                "H" => self.state.host(word, 0).unwrap_or(NOWHERE),
                "src" | "psrc" | "dst" | "pdst" => match self.state.address(word) {
                    Some(here) => {
                        if word != 0 {
                            arguments.uses.push(word);
                        }
                        here
                    }
                    None if word <= 4096 => NOWHERE,
                    None => {
                        let is_source = role.ends_with("src");
                        let here = self.host(call, word, size, is_source)?;
                        arguments.hosts.push(self.state.host_or_new(word, size));
                        if !is_source {
                            arguments.read_back = Some((here, size));
                        }
                        here
                    }
                },
                "reg" => {
                    let page = 4096;
                    let words = usize::try_from(size / 8 + 2 * page / 8);
                    let mut own = vec![0_u64; words.map_err(|_| "too large".to_owned())?];
                    let start = own.as_mut_ptr() as u64;
                    let here = start.next_multiple_of(page) + word % page;
                    arguments.own = Some((own, here));
                    here
                }
                "blk" if call.block.is_empty() => {
                    return Err("what it points to was not recorded".into());
                }
                "blk" => arguments.result(&call.block),
                "ptx" => IMAGE.as_ptr() as u64,
                "len" => IMAGE.len() as u64,
                "fn" if call.status == 0 => KERNEL.as_ptr() as u64,
                "fn" => NO_KERNEL.as_ptr() as u64,
                "params" => self.parameters(call, stream, &mut arguments),
                "cb" => nothing as *const () as u64,
                "io" => arguments.result(&[call.input.unwrap_or(0)]),
                // A result that was not wanted.
                _ if word == 0 => 0,
                ">b" => {
                    let words = usize::try_from(size.min(4096) / 8 + 1).unwrap_or(1);
                    arguments.result(&vec![0; words])
                }
                _ => arguments.result(&[0, 0, 0]),
            };
            arguments.words.push(here);
        }
        Ok(arguments)
    }

    fn handle(&self, call: &Call, word: u64) -> Result<u64, String> {
        match self.state.handles.get(&word) {
            Some(here) => Ok(*here),
            None if word <= CONSTANTS => Ok(word),
            None if call.status == 0 => {
                Err(format!("handle {word:#x} is of a call that was left out"))
            }
            None => Err(format!("handle {word:#x} is none any more")),
        }
    }

    fn device(&self, call: &Call, word: u64) -> Result<u64, String> {
        match self.state.address(word) {
            Some(here) => Ok(here),
            None if call.status != 0 => Ok(NOWHERE),
            None => Err(format!("address {word:#x} is of a call that was left out")),
        }
    }

    /// Host memory for a copy; filled if it is copied from and nothing may be reading it.
    fn host(&mut self, call: &Call, word: u64, bytes: u64, is_source: bool) -> Result<u64, String> {
        if bytes > 1 << 40 {
            return Err(format!("{bytes} bytes are too many"));
        }
        let start = self.state.host_or_new(word, bytes);
        let Some(host) = self.state.hosts.get_mut(&start) else {
            return Err("no such host memory".into());
        };
        let offset = word - start;
        let range = if host.filled {
            (offset, bytes)
        } else {
            (0, host.bytes)
        };
        if is_source && host.busy.is_empty() {
            host.filled = true;
            let length = usize::try_from(range.1).unwrap_or(0);
            // SAFETY: host memory of this run has so many bytes, and no copy uses it.
            let memory = unsafe {
                std::slice::from_raw_parts_mut((host.here + range.0) as usize as *mut u8, length)
            };
            fill(memory, call.line as u64);
        }
        Ok(host.here + offset)
    }

    /// The parameters of the kernel: where, how many words, which word.
    fn parameters(&mut self, call: &Call, stream: u64, arguments: &mut Arguments) -> u64 {
        let captures = &self.state.captures;
        let target = if captures.is_empty() || captures.contains_key(&stream) {
            self.state.target(stream)
        } else {
            None
        };
        let (at, bytes) = target.unwrap_or((0, 0));
        let at = arguments.result(&[at]);
        let count = arguments.result(&[bytes / 4]);
        let value = arguments.result(&[call.line as u64]);
        arguments.result(&[at, count, value])
    }

    /// What has to be done before a call, so that every answer is known.
    fn before(&mut self, call: &Call, stream: u64, told: &mut Vec<Value>) {
        let first = call.words.first().copied().unwrap_or(0);
        let name = call.name.as_str();
        match name {
            // The program has waited until it was finished.
            "cuStreamQuery" | "cuStreamQuery_ptsz" | "cuEventQuery" if call.status == 0 => {
                self.settle(told)
            }
            "cuEventSynchronize" | "cuStreamDestroy_v2" | "cuCtxDestroy_v2" => self.settle(told),
            _ if name.starts_with("cuDevicePrimaryCtxRe") && name != "cuDevicePrimaryCtxRetain" => {
                self.settle(told);
            }
            "cuMemFreeHost" | "cuMemHostUnregister" => self.settle(told),
            "cuMemFree_v2" | "cuMemFreeAsync" | "cuMemFreeAsync_ptsz" if call.status == 0 => {
                if let Some(region) = self.state.regions.get(&first).copied() {
                    self.wait_and_read(first, region, stream, told);
                }
            }
            "cuMemUnmap" if call.status == 0 => self.unmapping(call, told),
            _ => {}
        }
    }

    /// Digests what is about to be freed.
    fn wait_and_read(&mut self, start: u64, region: Region, stream: u64, told: &mut Vec<Value>) {
        if !region.known || !self.state.captures.is_empty() {
            return;
        }
        if stream == 0 {
            self.settle(told);
        } else {
            self.own("cuStreamSynchronize", &[stream]);
        }
        if let Some(here) = self.state.address(start) {
            told.push(self.read(here, region.bytes));
        }
    }

    /// Digests what is about to be unmapped; what else its region has stays.
    fn unmapping(&mut self, call: &Call, told: &mut Vec<Value>) {
        let (from, bytes) = (call.words[0], call.words[1]);
        let to = from.saturating_add(bytes);
        let touched = self.state.regions.range(..to);
        let touched: Vec<(u64, Region)> = touched
            .filter(|(start, region)| *start + region.bytes > from)
            .map(|(start, region)| (*start, *region))
            .collect();
        for (start, region) in touched {
            let (low, high) = (start.max(from), (start + region.bytes).min(to));
            let part = Region {
                bytes: high - low,
                ..region
            };
            self.wait_and_read(low, part, 0, told);
            self.state.regions.remove(&start);
            if start < low {
                self.state.regions.insert(
                    start,
                    Region {
                        bytes: low - start,
                        ..region
                    },
                );
            }
            if high < start + region.bytes {
                let bytes = start + region.bytes - high;
                self.state.regions.insert(high, Region { bytes, ..region });
            }
        }
    }

    /// What follows from success.
    fn after(
        &mut self,
        call: &Call,
        roles: &[Role],
        arguments: &mut Arguments,
        stream: u64,
        told: &mut Vec<Value>,
    ) {
        for (index, &(role, about)) in roles.iter().enumerate() {
            let pointer = arguments.words[index];
            if !(role.starts_with('>') || role == "io") || pointer == 0 {
                continue;
            }
            // SAFETY: a result of at least 24 bytes, or 8, made for this argument.
            let value = unsafe { *(pointer as usize as *const u64) };
            let recorded = call.outputs.get(&index).copied().unwrap_or(0);
            match role {
                ">h" if recorded != 0 => {
                    self.state.handles.insert(recorded, value);
                }
                ">d" => self.allocated(call, recorded, value, (about, arguments), stream),
                ">H" => self
                    .state
                    .add_host(recorded, call.words[about], value, None),
                ">a" => {
                    let bytes = self
                        .state
                        .hosts
                        .get(&call.words[about])
                        .map_or(1, |host| host.bytes);
                    self.state
                        .spaces
                        .insert(recorded, Space { bytes, here: value });
                }
                ">t" => told.push(json!(value)),
                ">f" => told.push(json!({"free": value})),
                ">b" | ">b16" => {
                    let length = if role == ">b" {
                        call.words[about].min(4096)
                    } else {
                        16
                    };
                    let length = usize::try_from(length).unwrap_or(0);
                    // SAFETY: a result of so many bytes, made for this argument.
                    let bytes = unsafe {
                        std::slice::from_raw_parts(pointer as usize as *const u8, length)
                    };
                    told.push(json!(format!("{:016x}", digest(bytes))));
                }
                ">v" => told.push(self.attribute(call.words[1], value, arguments.words[about])),
                ">r" => told.push(json!(value.wrapping_sub(arguments.words[about]))),
                _ => {}
            }
        }
        self.copied(call, arguments, stream, told);
        self.changed(call, arguments, stream, told);
    }

    /// Copies: who uses what until when.
    fn copied(&mut self, call: &Call, arguments: &Arguments, stream: u64, told: &mut Vec<Value>) {
        for &address in &arguments.uses {
            self.state.uses(address, stream);
        }
        if let [to, from] = arguments.uses[..] {
            let unknown = |state: &State, address| {
                state
                    .region(address)
                    .is_none_or(|start| !state.regions[&start].known)
            };
            if unknown(&self.state, from)
                && let Some(start) = self.state.region(to)
                && let Some(region) = self.state.regions.get_mut(&start)
            {
                region.known = false;
            }
        }
        let context = self.context();
        let is_async = call.name.contains("Async");
        if is_async {
            for start in &arguments.hosts {
                if let Some(host) = self.state.hosts.get_mut(start) {
                    host.busy.insert((context, stream));
                }
            }
        }
        let Some((here, bytes)) = arguments.read_back else {
            return;
        };
        // What was read is known only if what it came from is.
        let from = arguments
            .uses
            .first()
            .and_then(|address| self.state.region(*address));
        if from.is_some_and(|start| !self.state.regions[&start].known) {
            return;
        }
        if is_async {
            self.state.pending.push(Pending {
                stream,
                context,
                here,
                bytes,
            });
        } else {
            told.push(json!(format!("{:016x}", digest(host_bytes(here, bytes)))));
        }
    }

    /// Everything else that a call changes.
    fn changed(
        &mut self,
        call: &Call,
        arguments: &mut Arguments,
        stream: u64,
        told: &mut Vec<Value>,
    ) {
        let first = call.words.first().copied().unwrap_or(0);
        match call.name.as_str() {
            "cuMemFree_v2" | "cuMemFreeAsync" | "cuMemFreeAsync_ptsz" | "cuMemAddressFree" => {
                self.state.forget(first);
            }
            "cuMemSetAccess" => self.access_given(call),
            "cuMemFreeHost" => {
                self.state.hosts.remove(&first);
            }
            "cuMemHostRegister_v2" => {
                if let Some((own, here)) = arguments.own.take() {
                    self.state.add_host(first, call.words[1], here, Some(own));
                }
            }
            "cuStreamBeginCapture_v2" | "cuStreamBeginCapture_v2_ptsz" => {
                self.state.captures.insert(stream, self.state.tick);
            }
            "cuStreamEndCapture" | "cuStreamEndCapture_ptsz" => {
                self.state.captures.remove(&stream);
            }
            "cuStreamSynchronize" | "cuStreamSynchronize_ptsz" => {
                let context = self.context();
                self.finished(told, |at| at == (context, stream));
            }
            "cuCtxSynchronize" => {
                let context = self.context();
                self.finished(told, |(of, _)| of == context);
            }
            "cuCtxDestroy_v2" => self.lost(),
            name if name.starts_with("cuDevicePrimaryCtxRe") && !name.contains("Retain") => {
                self.lost()
            }
            name if name.starts_with("cuLaunchKernel") || name.starts_with("cuLaunchCoop") => {
                if self.state.captures.is_empty() {
                    self.own("cuStreamSynchronize", &[stream]);
                }
            }
            _ => {}
        }
    }

    /// New device memory, or new addresses.
    fn allocated(
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
            let pitch = unsafe { *(arguments.words[1] as usize as *const u64) };
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
    fn access_given(&mut self, call: &Call) {
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
    fn fill(&mut self, here: u64, bytes: u64, call: &Call, stream: u64) -> bool {
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
    fn read(&mut self, here: u64, bytes: u64) -> Value {
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

    /// Waits for everything in the current context, where that is allowed.
    fn settle(&mut self, told: &mut Vec<Value>) {
        if self.state.captures.is_empty() && self.own("cuCtxSynchronize", &[]) == 0 {
            let context = self.context();
            self.finished(told, |(of, _)| of == context);
        }
    }

    /// Copies of these contexts and streams are finished.
    fn finished(&mut self, told: &mut Vec<Value>, is_finished: impl Fn((u64, u64)) -> bool) {
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
    fn lost(&mut self) {
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

    fn context(&mut self) -> u64 {
        let mut context = 0_u64;
        self.own("cuCtxGetCurrent", &[&raw mut context as u64]);
        context
    }

    /// A call of the player's own.
    fn own(&mut self, name: &'static str, words: &[u64]) -> i32 {
        // SAFETY: as the header declares it; pointers are to this function's callers' memory.
        unsafe { self.driver.call(name, words) }.unwrap_or(-1)
    }

    /// An attribute of an address, without what differs from run to run.
    fn attribute(&self, which: u64, value: u64, address: u64) -> Value {
        match which {
            // CONTEXT, MEMPOOL_HANDLE
            1 | 17 => json!(value != 0),
            // DEVICE_POINTER, HOST_POINTER, RANGE_START_ADDR
            3 | 4 | 11 => json!(value.wrapping_sub(address)),
            // P2P_TOKENS, BUFFER_ID
            5 | 7 => Value::Null,
            _ => json!(value),
        }
    }

    fn attributes(&mut self, call: &Call) -> Result<(i32, Vec<Value>), String> {
        let [count, _, _, address] = call.words[..] else {
            return Err("it does not have 4 arguments".into());
        };
        let asked: Vec<u32> = call
            .block
            .iter()
            .flat_map(|word| [*word as u32, (*word >> 32) as u32])
            .collect();
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count > asked.len() || count == 0 {
            return Err("what it points to was not recorded".into());
        }
        let address = self.state.address(address).unwrap_or(NOWHERE);
        let mut values = vec![[0_u64; 2]; count];
        let pointers: Vec<u64> = values
            .iter_mut()
            .map(|value| value.as_mut_ptr() as u64)
            .collect();
        let words = [
            count as u64,
            asked.as_ptr() as u64,
            pointers.as_ptr() as u64,
            address,
        ];
        let status = self.own("cuPointerGetAttributes", &words);
        let told = asked
            .iter()
            .zip(&values)
            .map(|(which, value)| self.attribute(u64::from(*which), value[0], address));
        Ok((status, told.collect()))
    }

    fn at_the_end(&mut self) -> Value {
        let mut told = Vec::new();
        self.settle(&mut told);
        for (start, region) in self.state.regions.clone() {
            if region.known
                && let Some(here) = self.state.address(start)
            {
                told.push(self.read(here, region.bytes));
            }
        }
        json!({"line": 0, "call": super::END, "r": 0, "recorded": 0, "told": told})
    }
}

impl Arguments {
    /// Memory for a result or a structure.
    fn result(&mut self, words: &[u64]) -> u64 {
        let mut place: Box<[u64]> = words.into();
        let pointer = place.as_mut_ptr() as u64;
        self.results.push(place);
        pointer
    }
}

/// A status without what depends on time: an unfinished stream is as good as a finished one.
fn quiet(name: &str, status: i32) -> i32 {
    let timed = name.contains("Query") || name.contains("ElapsedTime");
    if timed && status == NOT_READY {
        0
    } else {
        status
    }
}

/// `cuLaunchKernelEx` as `cuLaunchKernel`, without attributes.
fn as_launch(call: &Call) -> Option<Call> {
    let [first, second, third, shared, stream, ..] = call.block[..] else {
        return None;
    };
    let halves = |word: u64| [word & 0xffff_ffff, word >> 32];
    let function = *call.words.get(1)?;
    let mut words = vec![function];
    words.extend([first, second, third].into_iter().flat_map(halves));
    words.extend([shared & 0xffff_ffff, stream, 1, 0]);
    Some(Call {
        name: call.name.replace("KernelEx", "Kernel"),
        words,
        ..call.clone()
    })
}

fn host_bytes<'a>(here: u64, bytes: u64) -> &'a [u8] {
    let length = usize::try_from(bytes).unwrap_or(0);
    // SAFETY: host memory of this run of so many bytes, to which no copy is going on.
    unsafe { std::slice::from_raw_parts(here as usize as *const u8, length) }
}
