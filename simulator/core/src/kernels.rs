//! The built-in kernels: what `kernels/spillway.ptx` does on a GPU, done here by the CPU.

use crate::code::{ILLEGAL_ADDRESS, MISALIGNED_ADDRESS, NOT_SUPPORTED, R};
use crate::engine;
use crate::exec::Work;
use crate::sync::now_ns;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// A kernel that the simulator can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// Whatever its name, a kernel that only returns.
    Nothing,
    FillU32,
    ChecksumU32,
    AxpyF32,
    SpinNs,
    Rendezvous,
    Persist,
    HeapU32,
    StackU32,
}

impl Builtin {
    /// The kernel of that name, if its parameters are laid out as the built-in's are.
    #[must_use]
    pub fn find(name: &str, params_bytes: usize) -> Option<Self> {
        let (builtin, bytes) = match name {
            "fill_u32" => (Self::FillU32, 20),
            "checksum_u32" => (Self::ChecksumU32, 24),
            "axpy_f32" => (Self::AxpyF32, 32),
            "spin_ns" => (Self::SpinNs, 8),
            "rendezvous" => (Self::Rendezvous, 24),
            "persist" => (Self::Persist, 8),
            "heap_u32" => (Self::HeapU32, 16),
            "stack_u32" => (Self::StackU32, 12),
            _ => return None,
        };
        (params_bytes == bytes).then_some(builtin)
    }
}

/// A launch with its parameters as they were at the call.
#[derive(Clone, Debug)]
pub struct Launch {
    pub builtin: Option<Builtin>,
    pub function: u64,
    pub params: Vec<u8>,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
}

impl Launch {
    fn u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.params[offset..offset + 4]);
        u32::from_le_bytes(bytes)
    }

    fn u64(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.params[offset..offset + 8]);
        u64::from_le_bytes(bytes)
    }
}

/// Multiplier of the position in the checksum.
pub const MIX: u32 = 2_654_435_761;

/// Sum over `words` of (word xor (position * [`MIX`])), the first being at position `first`.
#[must_use]
pub fn checksum(words: &[u32], first: u32) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { checksum_avx2(words, first) };
    }
    checksum_lanes(words, first)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn checksum_avx2(words: &[u32], first: u32) -> u64 {
    checksum_lanes(words, first)
}

#[inline(always)]
fn checksum_lanes(words: &[u32], first: u32) -> u64 {
    const LANES: usize = 16;
    let mut keys = [0_u32; LANES];
    for (lane, key) in keys.iter_mut().enumerate() {
        *key = first.wrapping_add(lane as u32).wrapping_mul(MIX);
    }
    let mut sums = [0_u64; LANES];
    let chunks = words.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] = sums[lane].wrapping_add(u64::from(chunk[lane] ^ keys[lane]));
            keys[lane] = keys[lane].wrapping_add(MIX.wrapping_mul(LANES as u32));
        }
    }
    let mut total = sums.iter().fold(0_u64, |a, b| a.wrapping_add(*b));
    for (word, key) in rest.iter().zip(keys) {
        total = total.wrapping_add(u64::from(word ^ key));
    }
    total
}

fn aligned(address: u64, to: u64) -> R {
    if address.is_multiple_of(to) {
        Ok(())
    } else {
        Err(MISALIGNED_ADDRESS)
    }
}

/// Runs a launch to its end.
///
/// # Errors
/// What the context gets as its lasting error.
pub fn run(launch: &Launch, work: &Work<'_>) -> R {
    let Some(builtin) = launch.builtin else {
        return Err(NOT_SUPPORTED);
    };
    let began = now_ns();
    match builtin {
        Builtin::Nothing => {}
        Builtin::FillU32 => {
            let (at, n, value) = (launch.u64(0), launch.u64(8), launch.u32(16));
            aligned(at, 4)?;
            work.each_run(at, bytes_of(n)?, true, |piece, length| {
                // SAFETY: `each_run` hands out mapped, writable memory of that length, 4-aligned
                // since address and pieces are; device memory is shared, so no reference is kept.
                unsafe {
                    std::slice::from_raw_parts_mut(piece.cast::<u32>(), length as usize / 4)
                        .fill(value)
                };
            })?;
        }
        Builtin::ChecksumU32 => {
            let (at, n, out) = (launch.u64(0), launch.u64(8), launch.u64(16));
            aligned(at, 4)?;
            aligned(out, 8)?;
            let mut sum = 0_u64;
            let mut position = 0_u32;
            work.each_run(at, bytes_of(n)?, false, |piece, length| {
                // SAFETY: as above, readable.
                let words =
                    unsafe { std::slice::from_raw_parts(piece.cast::<u32>(), length as usize / 4) };
                sum = sum.wrapping_add(checksum(words, position));
                position = position.wrapping_add(words.len() as u32);
            })?;
            work.each_run(out, 8, true, |piece, _| {
                // SAFETY: eight mapped, writable, aligned bytes.
                unsafe { AtomicU64::from_ptr(piece.cast()) }.fetch_add(sum, Ordering::AcqRel);
            })?;
        }
        Builtin::AxpyF32 => axpy(launch, work)?,
        Builtin::SpinNs => {
            work.driver.compute(work.context.gpu).spend(
                work.driver,
                work.context.gpu,
                launch.u64(0),
                || work.stopped(),
            );
            return Ok(());
        }
        Builtin::Rendezvous => {
            let (at, expected, timeout_ns) = (launch.u64(0), launch.u32(8), launch.u64(16));
            aligned(at, 4)?;
            // Every thread of the launch arrives, as it does on a GPU.
            let threads = launch.grid.iter().chain(&launch.block).product::<u32>();
            let arrive = |add: u32| -> R<u32> {
                let mut seen = 0;
                work.each_run(at, 4, true, |piece, _| {
                    // SAFETY: four mapped, writable, aligned bytes.
                    seen = unsafe { AtomicU32::from_ptr(piece.cast()) }
                        .fetch_add(add, Ordering::AcqRel)
                        + add;
                })?;
                Ok(seen)
            };
            let mut seen = arrive(threads)?;
            while seen < expected {
                if work.stopped() {
                    return Ok(());
                }
                if now_ns() - began > timeout_ns {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_micros(50));
                seen = arrive(0)?;
            }
        }
        Builtin::HeapU32 => {
            let (bytes, out) = (launch.u64(0), launch.u64(8));
            aligned(out, 4)?;
            let heap = work.context.limits.get(crate::limits::HEAP as i32)?;
            store(work, out, u32::from(bytes > 0 && bytes < heap))?;
        }
        Builtin::StackU32 => {
            aligned(launch.u64(0), 4)?;
            store(work, launch.u64(0), launch.u32(8) % 1024)?;
        }
        Builtin::Persist => {
            let at = launch.u64(0);
            aligned(at, 4)?;
            let mut flag = 0;
            while flag == 0 && !work.stopped() {
                work.each_run(at, 4, false, |piece, _| {
                    // SAFETY: four mapped, readable, aligned bytes.
                    flag = unsafe { AtomicU32::from_ptr(piece.cast()) }.load(Ordering::Acquire);
                })?;
                if flag == 0 {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        }
    }
    if matches!(
        builtin,
        Builtin::FillU32 | Builtin::ChecksumU32 | Builtin::AxpyF32
    ) {
        engine::account(work.driver, work.context.gpu, now_ns() - began);
    }
    Ok(())
}

fn store(work: &Work<'_>, at: u64, value: u32) -> R {
    work.each_run(at, 4, true, |piece, _| {
        // SAFETY: four mapped, writable, aligned bytes.
        unsafe { AtomicU32::from_ptr(piece.cast()) }.store(value, Ordering::Release);
    })
}

fn bytes_of(words: u64) -> R<u64> {
    words.checked_mul(4).ok_or(ILLEGAL_ADDRESS)
}

fn axpy(launch: &Launch, work: &Work<'_>) -> R {
    let (n, x, y) = (launch.u64(0), launch.u64(16), launch.u64(24));
    let factor = f32::from_bits(launch.u32(8));
    aligned(x, 4)?;
    aligned(y, 4)?;
    work.each_pair(x, y, bytes_of(n)?, |from, to, length| {
        for index in 0..length as usize / 4 {
            // SAFETY: both runs are mapped for that length and 4-aligned; they may be the same
            // memory, so they are not made into slices.
            unsafe {
                let (from, to) = (from.cast::<f32>().add(index), to.cast::<f32>().add(index));
                to.write(factor.mul_add(from.read(), to.read()));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_depends_on_position_and_splits_anywhere() {
        let words: Vec<u32> = (0..1000_u32)
            .map(|i| i.wrapping_mul(0x9e37_79b9) ^ 5)
            .collect();
        let slow = words.iter().enumerate().fold(0_u64, |sum, (i, w)| {
            sum.wrapping_add(u64::from(w ^ (i as u32).wrapping_mul(MIX)))
        });
        assert_eq!(checksum(&words, 0), slow);
        assert_eq!(
            checksum(&words[..333], 0).wrapping_add(checksum(&words[333..], 333)),
            slow
        );
        let mut swapped = words.clone();
        swapped.swap(1, 2);
        assert_ne!(checksum(&swapped, 0), slow);
    }

    #[test]
    fn builtins_are_found_by_name_and_layout() {
        assert_eq!(Builtin::find("spin_ns", 8), Some(Builtin::SpinNs));
        assert_eq!(Builtin::find("spin_ns", 12), None);
        assert_eq!(Builtin::find("other", 8), None);
    }
}
