//! Occupancy: arithmetic on the device's limits; built-in kernels use no shared memory and 32
//! registers.

use crate::abi::{In, Out, exports};
use crate::attributes::MULTIPROCESSORS;
use crate::launch;
use crate::layout::LaunchConfig;
use spillway_simulator_core::code::{INVALID_VALUE, R};

const THREADS: i32 = 2048;
const BLOCKS: i32 = 32;
const SHARED: usize = 228 << 10;
const RESERVED: usize = 1024;

fn blocks(block: i32, shared: usize) -> R<i32> {
    if !(1..=1024).contains(&block) {
        return Err(INVALID_VALUE);
    }
    let warps = (block + 31) / 32;
    let by_shared = (SHARED / (shared + RESERVED)) as i32;
    Ok((THREADS / 32 / warps).min(BLOCKS).min(by_shared))
}

exports! {
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(out: Out<i32>, function: u64, block: i32, shared: usize) {
        launch::function(function)?;
        out.set(blocks(block, shared)?)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        out: Out<i32>, function: u64, block: i32, shared: usize, flags: u32,
    ) {
        launch::function(function)?;
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        out.set(blocks(block, shared)?)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<i32>, block: Out<i32>, function: u64, shared_of: Option<extern "C" fn(i32) -> usize>, shared: usize, limit: i32,
    ) {
        potential(grid, block, function, shared_of, shared, limit)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: Out<i32>, block: Out<i32>, function: u64, shared_of: Option<extern "C" fn(i32) -> usize>, shared: usize, limit: i32,
        flags: u32,
    ) {
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        potential(grid, block, function, shared_of, shared, limit)
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(out: Out<usize>, function: u64, per_multiprocessor: i32, block: i32) {
        launch::function(function)?;
        if per_multiprocessor < 1 || blocks(block, 0)? < per_multiprocessor {
            return Err(INVALID_VALUE);
        }
        out.set((SHARED / per_multiprocessor as usize - RESERVED).min(227 << 10))
    }

    fn cuOccupancyMaxActiveClusters(out: Out<i32>, function: u64, config: In<LaunchConfig>) {
        launch::function(function)?;
        let config = config.get()?;
        let threads = config.block.iter().product::<u32>() as i32;
        out.set(blocks(threads, config.shared_bytes as usize)? * MULTIPROCESSORS / 8)
    }

    fn cuOccupancyMaxPotentialClusterSize(out: Out<i32>, function: u64, config: In<LaunchConfig>) {
        launch::function(function)?;
        config.get()?;
        out.set(8)
    }
}

fn potential(
    grid: Out<i32>,
    block: Out<i32>,
    function: u64,
    shared_of: Option<extern "C" fn(i32) -> usize>,
    shared: usize,
    limit: i32,
) -> R {
    launch::function(function)?;
    let largest = if limit == 0 {
        1024
    } else {
        limit.clamp(1, 1024)
    };
    let (mut best, mut best_threads) = ((0, 0), 0);
    for size in (1..=largest.div_euclid(32).max(1))
        .rev()
        .map(|warps| (warps * 32).min(largest))
    {
        let shared = shared_of.map_or(shared, |f| f(size));
        let active = blocks(size, shared)?;
        if active * size > best_threads {
            best_threads = active * size;
            best = (active * MULTIPROCESSORS, size);
        }
    }
    grid.set(best.0)?;
    block.set(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_bind_in_turn() {
        assert_eq!(blocks(1024, 0), Ok(2));
        assert_eq!(blocks(32, 0), Ok(32));
        assert_eq!(blocks(256, 100 << 10), Ok(2));
        assert_eq!(blocks(0, 0), Err(INVALID_VALUE));
    }
}
