//! What a context will take for a program's functions once they run, and nobody could refuse then: stacks that
//! grow with a kernel's local memory, and the heap of `malloc`.
//!
//! A function is found before it is launched. What its launch would take has to fit at that moment, or finding it
//! is out of memory; before an allocation comes near the limit, it is taken, measured, and so in the account.
//! The heap is taken at once: its module makes the driver take it for good.

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use spillway_protocol::GRANULE;

use crate::driver::{Status, call};
use crate::gate;
use crate::lock;
use crate::overhead::signed;
use crate::runtime::Runtime;
use crate::vmm;

/// `CU_LIMIT_STACK_SIZE`, `CU_LIMIT_PRINTF_FIFO_SIZE`, `CU_LIMIT_MALLOC_HEAP_SIZE`,
/// `CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT`.
const STACK: u32 = 0;
const PRINTF: u32 = 1;
const HEAP: u32 = 2;
const PENDING: u32 = 4;
/// `CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES`.
const LOCAL_BYTES: u32 = 3;
/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`, `CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR`.
const MULTIPROCESSORS: u32 = 16;
const THREADS_EACH: u32 = 39;
/// What the driver takes for one more pending launch is not published; more than this is not expected.
const LAUNCH_BYTES: u64 = 8 << 10;

/// Closer to the limit than this, functions are loaded to learn what stack they want, in bytes.
pub const FAR: u64 = 2 << 30;

/// Whether the driver has loaded a function's code.
pub fn is_loaded(function: usize) -> bool {
    let mut loaded = 0;
    // SAFETY: a function that the driver has named; it fills one integer.
    let asked = unsafe { call::cuFuncIsLoaded(&raw mut loaded, function as *mut _) };
    !asked.is_success() || loaded == 1
}

/// See the module.
#[derive(Debug, Default)]
pub struct Standing {
    /// The local memory of a thread, in bytes, that functions of a context have more than its stack.
    stacks: Mutex<HashMap<usize, u64>>,
    any_stack: AtomicBool,
    /// Code that may call `malloc` has been loaded.
    heap_used: AtomicBool,
    /// Contexts whose heap is taken.
    heaps: Mutex<BTreeSet<usize>>,
}

/// A limit of the current context.
fn limit(which: u32) -> u64 {
    let mut value = 0;
    // SAFETY: the driver fills one integer.
    let known = unsafe { call::cuCtxGetLimit(&raw mut value, which) }.is_success();
    if known { value as u64 } else { 0 }
}

fn set_limit(which: u32, value: u64) -> Status {
    let Ok(value) = usize::try_from(value) else {
        return Status::OUT_OF_MEMORY;
    };
    // SAFETY: no pointers are involved.
    unsafe { call::cuCtxSetLimit(which, value) }
}

/// Whether PTX text calls the heap's functions; machine code does not say. Names are whole words: PTX has letters,
/// digits, `_`, `$` and `%` in them.
pub fn text_uses_heap(text: &[u8]) -> bool {
    const MALLOC: &[u8] = b"malloc";
    let in_name = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%');
    text.windows(MALLOC.len())
        .enumerate()
        .filter(|(_, word)| *word == MALLOC)
        .any(|(at, _)| {
            let before = at.checked_sub(1).and_then(|at| text.get(at));
            let after = text.get(at + MALLOC.len());
            !before.is_some_and(in_name) && !after.is_some_and(in_name)
        })
}

impl Runtime {
    /// Bytes that stacks take which are so much larger: one for each thread that the device holds.
    fn stacks(&self, device: usize, larger: u64) -> u64 {
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: the driver fills one integer.
            let asked = unsafe {
                call::cuDeviceGetAttribute(&raw mut value, which, self.devices[device].ordinal)
            };
            let value = if asked.is_success() { value } else { 0 };
            u64::try_from(value).unwrap_or(0)
        };
        (attribute(MULTIPROCESSORS) * attribute(THREADS_EACH)).saturating_mul(larger)
    }

    /// Bytes that a limit of a context will take beyond what it takes now.
    pub fn limit_growth(&self, device: usize, which: u32, before: u64, value: u64) -> u64 {
        let more = value.saturating_sub(before);
        match which {
            STACK => self.stacks(device, more),
            // The heap is taken later; one that has no room cannot be used.
            PRINTF | HEAP => more,
            PENDING => more.saturating_mul(LAUNCH_BYTES),
            _ => 0,
        }
    }

    /// Code is loaded. `image`: the text, if it is PTX and not machine code.
    ///
    /// Machine code may use the heap. Only where the program has asked for another size than the driver's own
    /// is it taken to do so: that size may be anything.
    pub fn code_loaded(&self, image: Option<&[u8]>) {
        /// The size that a context has by itself.
        const BY_ITSELF: u64 = 8 << 20;
        let uses = match image {
            Some(text) => text_uses_heap(text),
            None => limit(HEAP) > BY_ITSELF,
        };
        if uses {
            self.standing.heap_used.store(true, SeqCst);
        }
    }

    /// Bytes that the heap of a context, which is current, will take with the next function, if that uses it.
    pub fn heap_to_come(&self, context: usize) -> u64 {
        if !self.standing.heap_used.load(SeqCst) || lock(&self.standing.heaps).contains(&context) {
            return 0;
        }
        let size = limit(HEAP);
        // What is taken cannot be set any more, also to what it is.
        if set_limit(HEAP, size) == Status::INVALID_VALUE {
            lock(&self.standing.heaps).insert(context);
            return 0;
        }
        size
    }

    /// The program has found a function in the current context.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` if what its launch would take does not fit.
    pub fn stands(&self, function: usize) -> Result<(), Status> {
        if self.session.is_none() {
            return Ok(());
        }
        let Ok((context, device)) = self.current() else {
            return Ok(());
        };
        let heap = self.heap_to_come(context);
        if heap > 0 {
            let load = || {
                // SAFETY: a function that the driver has just named.
                unsafe { call::cuFuncLoad(function as *mut _) }
            };
            // What has been taken stays; the check before it is what counts.
            self.taking_overhead(device, heap.saturating_add(GRANULE), load, || {})
                .ok()?;
            self.measure_now();
            self.heap_to_come(context);
        }
        if self.headroom(device) >= signed(FAR) && !is_loaded(function) {
            // To ask for its local memory would load it. That is done when memory comes nearer to the limit.
            return Ok(());
        }
        let Some((local, more)) = self.larger_stack(device, function) else {
            return Ok(());
        };
        if !self.fits_overhead(device, more) {
            return Err(Status::OUT_OF_MEMORY);
        }
        self.note_stack(context, local);
        Ok(())
    }

    /// What a function of the current context wants for a thread's stack, and what all stacks will take more for
    /// that; `None`: what there is suffices. Loads the function.
    fn larger_stack(&self, device: usize, function: usize) -> Option<(u64, u64)> {
        let mut local = 0;
        // SAFETY: a function that the driver has named; it fills one integer.
        let asked =
            unsafe { call::cuFuncGetAttribute(&raw mut local, LOCAL_BYTES, function as *mut _) };
        let local = u64::try_from(local).unwrap_or(0);
        let stack = limit(STACK);
        let larger = asked.is_success() && local > stack;
        larger.then(|| (local, self.stacks(device, local - stack)))
    }

    fn note_stack(&self, context: usize, local: u64) {
        let mut stacks = lock(&self.standing.stacks);
        let known = stacks.entry(context).or_default();
        *known = local.max(*known);
        self.standing.any_stack.store(true, SeqCst);
    }

    /// A function that the program asked for earlier has been loaded, in its context, which is current: its stack
    /// is still to come.
    pub fn loaded_late(&self, context: usize, device: usize, function: usize) {
        if let Some((local, _)) = self.larger_stack(device, function) {
            self.note_stack(context, local);
        }
    }

    /// Bytes that stacks on a device will still grow by, with the contexts concerned.
    pub fn stacks_to_come(&self, device: usize) -> u64 {
        if !self.standing.any_stack.load(SeqCst) {
            return 0;
        }
        let known: Vec<(usize, u64)> = lock(&self.standing.stacks)
            .iter()
            .map(|(&context, &local)| (context, local))
            .collect();
        let here = |context| lock(&self.contexts).device_of(context) == Some(device);
        let mut sum = 0;
        for (context, local) in known.into_iter().filter(|&(context, _)| here(context)) {
            // One that ends needs none.
            let asked = self.using(context, || vmm::in_context(context, || Ok(limit(STACK))));
            let has = asked.and_then(Result::ok).unwrap_or(u64::MAX);
            if has < local {
                sum += self.stacks(device, local - has);
            } else {
                self.stack_has_grown(context, local);
            }
        }
        sum
    }

    fn stack_has_grown(&self, context: usize, local: u64) {
        let mut stacks = lock(&self.standing.stacks);
        if stacks.get(&context) == Some(&local) {
            stacks.remove(&context);
        }
        self.standing.any_stack.store(!stacks.is_empty(), SeqCst);
    }

    /// Lets stacks on a device grow now to what functions have asked for; `false`: none has. The driver waits for
    /// the context in that, without a bound. So it is waited for before, outside the gate, and for `at_most`: one
    /// that is busy for longer keeps its stack.
    pub fn grow_stacks(&self, device: usize, at_most: Duration) -> bool {
        let mut any = false;
        let known: Vec<(usize, u64)> = lock(&self.standing.stacks)
            .iter()
            .map(|(&context, &local)| (context, local))
            .collect();
        for (context, local) in known {
            if lock(&self.contexts).device_of(context) != Some(device) {
                continue;
            }
            if !self.idle_within(context, at_most) {
                continue;
            }
            let inside = gate::enter();
            let grown = self.using(context, || {
                vmm::in_context(context, || {
                    if limit(STACK) >= local {
                        Ok(())
                    } else {
                        set_limit(STACK, local).ok()
                    }
                })
            });
            drop(inside);
            if let Some(Ok(())) = grown {
                self.stack_has_grown(context, local);
                any = true;
            }
        }
        any
    }

    /// A context has ended.
    pub fn standing_gone(&self, context: usize) {
        lock(&self.standing.heaps).remove(&context);
        lock(&self.standing.stacks).remove(&context);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_says_whether_it_calls_the_heap() {
        assert!(text_uses_heap(b"call.uni (r), malloc, (n);"));
        assert!(!text_uses_heap(b".entry fill() { ret; }"));
        assert!(!text_uses_heap(b""));
        assert!(text_uses_heap(b"malloc"));
        assert!(!text_uses_heap(b".func my_malloc_stats ( )"));
        assert!(!text_uses_heap(
            b"call.uni malloc2, (n); call.uni $malloc, (n); mov %malloc, 0;"
        ));
        assert!(text_uses_heap(b".func my_malloc; call (r), malloc, (n);"));
    }
}
