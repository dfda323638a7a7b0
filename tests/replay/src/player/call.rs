//! One call: its arguments here, and what it changes.

use anyhow::Result;
use serde_json::{Value, json};

use super::contents::fill;
use super::driver::Driver;
use super::memory::pointer;
use super::state::State;
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
/// In the place of an address that is nobody's.
const NOWHERE: u64 = 0x00de_ad00_0000;
/// Streams and contexts that are no handles: none, the legacy and the thread's default stream.
const CONSTANTS: u64 = 2;
const PER_THREAD_STREAM: u64 = 2;
/// `CUDA_ERROR_NOT_READY`
const NOT_READY: i32 = 600;

/// See the module.
pub struct Player {
    pub(super) driver: Driver,
    pub(super) state: State,
}

/// The arguments of a call, and where its results go. What they point to lives as long as this.
#[derive(Default)]
pub(super) struct Arguments {
    pub(super) words: Vec<u64>,
    pub(super) results: Vec<Box<[u64]>>,
    /// Host memory that is written: address here, bytes.
    pub(super) read_back: Option<(u64, u64)>,
    /// Recorded addresses of device memory that the call uses.
    pub(super) uses: Vec<u64>,
    /// Recorded starts of host memory that the call uses.
    pub(super) hosts: Vec<u64>,
    /// Memory to be registered.
    pub(super) own: Option<(Vec<u64>, u64)>,
}

/// More host memory than one copy of a trace may need here.
const HOST_MAX: u64 = 64 << 30;
/// Entries of a recorded list, and words of a recorded structure, at most.
const LIST_MAX: u64 = 8;
const BLOCK: usize = 32;

extern "C" fn nothing() {}

fn small_enough(bytes: u64) -> Result<(), String> {
    if bytes > HOST_MAX {
        return Err(format!("{bytes} bytes of host memory are too many"));
    }
    Ok(())
}

/// Whose structure is a list, of as many entries as the last argument says.
fn is_list(name: &str) -> bool {
    matches!(name, "cuMemSetAccess" | "cuMemPoolSetAccess")
}

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

    pub(super) fn by_table(&mut self, call: &Call) -> Result<(i32, Vec<Value>), String> {
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
    pub(super) fn stream(&self, call: &Call, roles: &[Role]) -> u64 {
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

    pub(super) fn arguments(
        &mut self,
        call: &Call,
        roles: &[Role],
        stream: u64,
    ) -> Result<Arguments, String> {
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
                        small_enough(size)?;
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
                    small_enough(size)?;
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
                "blk" if is_list(&call.name) && call.words.last() > Some(&LIST_MAX) => {
                    return Err("its list is longer than is recorded".into());
                }
                "blk" => {
                    // As long as the longest, whatever the trace says.
                    let mut block = call.block.clone();
                    block.resize(block.len().max(BLOCK), 0);
                    arguments.result(&block)
                }
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

    pub(super) fn handle(&self, call: &Call, word: u64) -> Result<u64, String> {
        match self.state.handles.get(&word) {
            Some(here) => Ok(*here),
            None if word <= CONSTANTS => Ok(word),
            None if call.status == 0 => {
                Err(format!("handle {word:#x} is of a call that was left out"))
            }
            None => Err(format!("handle {word:#x} is none any more")),
        }
    }

    pub(super) fn device(&self, call: &Call, word: u64) -> Result<u64, String> {
        match self.state.address(word) {
            Some(here) => Ok(here),
            None if call.status != 0 => Ok(NOWHERE),
            None => Err(format!("address {word:#x} is of a call that was left out")),
        }
    }

    /// Host memory for a copy; filled if it is copied from and nothing may be reading it.
    pub(super) fn host(
        &mut self,
        call: &Call,
        word: u64,
        bytes: u64,
        is_source: bool,
    ) -> Result<u64, String> {
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
                std::slice::from_raw_parts_mut(pointer::<u8>(host.here + range.0), length)
            };
            fill(memory, call.line as u64);
        }
        Ok(host.here + offset)
    }

    /// The parameters of the kernel: where, how many words, which word.
    pub(super) fn parameters(
        &mut self,
        call: &Call,
        stream: u64,
        arguments: &mut Arguments,
    ) -> u64 {
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

    /// An attribute of an address, without what differs from run to run.
    pub(super) fn attribute(&self, which: u64, value: u64, address: u64) -> Value {
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

    pub(super) fn attributes(&mut self, call: &Call) -> Result<(i32, Vec<Value>), String> {
        let [count, _, _, address] = call.words[..] else {
            return Err("it does not have 4 arguments".into());
        };
        let asked: Vec<u32> = call
            .block
            .iter()
            .flat_map(|word| [*word & 0xffff_ffff, *word >> 32])
            .map(|half| u32::try_from(half).unwrap_or(0))
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

    pub(super) fn at_the_end(&mut self) -> Value {
        let mut told = Vec::new();
        self.read_all(&mut told);
        json!({"line": 0, "call": super::END, "r": 0, "recorded": 0, "told": told})
    }
}

impl Arguments {
    /// Memory for a result or a structure.
    pub(super) fn result(&mut self, words: &[u64]) -> u64 {
        let mut place: Box<[u64]> = words.into();
        let address = place.as_mut_ptr() as u64;
        self.results.push(place);
        address
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
