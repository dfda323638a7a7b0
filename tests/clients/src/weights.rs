//! A model's weights file and how it is divided into tensors.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::pattern::{Checksum, Random, combine, fill};

const SMALLEST: u64 = 16 << 10;
const LARGEST: u64 = 64 << 20;

/// The sizes of a model's tensors: as in real ones from small (norms, biases) to large (embeddings), together
/// `bytes`, which is a multiple of 4. The same for the same number.
#[must_use]
pub fn tensors(bytes: u64) -> Vec<u64> {
    let mut random = Random::new(0x07e4_5035);
    let mut sizes = Vec::new();
    let mut left = bytes;
    while left > 0 {
        // Layers repeat: a few small ones for each large one.
        let size = match random.below(4) {
            0 => SMALLEST << random.below(4),
            1 => (256 << 10) + (random.below(512 << 10) & !3),
            2 => (2 << 20) + (random.below(14 << 20) & !3),
            _ => (LARGEST >> random.below(3)) - (random.below(1 << 20) & !3),
        };
        let size = size.min(left);
        sizes.push(size);
        left -= size;
    }
    sizes
}

/// Reads each tensor of `file` and calls `each` with its number and bytes; gives the checksum of them all.
///
/// # Errors
/// What reading the file or `each` fails with.
pub fn read_tensors<E: From<io::Error>>(
    file: &File,
    sizes: &[u64],
    mut each: impl FnMut(usize, &[u8]) -> Result<(), E>,
) -> Result<u64, E> {
    let mut buffer =
        vec![0; usize::try_from(sizes.iter().copied().max().unwrap_or(0)).unwrap_or(0)];
    let (mut at, mut sums) = (0, Vec::with_capacity(sizes.len()));
    for (number, size) in sizes.iter().enumerate() {
        let bytes = &mut buffer[..usize::try_from(*size).unwrap_or(0)];
        file.read_exact_at(bytes, at)?;
        at += size;
        sums.push(Checksum::of(bytes));
        each(number, bytes)?;
    }
    Ok(combine(&sums))
}

/// Writes a weights file of the bytes of `seed`, by two threads; gives its checksum.
///
/// # Errors
/// What writing fails with.
pub fn write(path: &std::path::Path, bytes: u64, seed: u64) -> io::Result<u64> {
    let file = File::create(path)?;
    file.set_len(bytes)?;
    let sizes = tensors(bytes);
    let mut starts = Vec::with_capacity(sizes.len());
    let mut at = 0_u64;
    for size in &sizes {
        starts.push((at, *size));
        at += size;
    }
    let half = starts.partition_point(|(start, _)| *start < bytes / 2);
    let (first, second) = starts.split_at(half);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| write_part(&file, second, seed));
        let mut sums = write_part(&file, first, seed)?;
        sums.extend(
            other
                .join()
                .map_err(|_| io::Error::other("the writing thread panicked"))??,
        );
        Ok(combine(&sums))
    })
}

fn write_part(file: &File, tensors: &[(u64, u64)], seed: u64) -> io::Result<Vec<u64>> {
    let mut buffer = vec![0; 4 << 20];
    let mut sums = Vec::with_capacity(tensors.len());
    for (start, size) in tensors {
        let (mut done, mut sum) = (0, Checksum::default());
        while done < *size {
            let piece = usize::try_from((size - done).min(buffer.len() as u64)).unwrap_or(0);
            // Each tensor has a series of its own, so that two exchanged tensors are never alike.
            fill(&mut buffer[..piece], seed ^ start.rotate_left(17), done);
            sum.add(&buffer[..piece]);
            file.write_all_at(&buffer[..piece], start + done)?;
            done += piece as u64;
        }
        sums.push(sum.value());
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_add_up_and_vary() {
        let sizes = tensors(1 << 30);
        assert_eq!(sizes.iter().sum::<u64>(), 1 << 30);
        assert!(sizes.len() > 40, "{} tensors", sizes.len());
        assert!(sizes.iter().any(|s| *s <= 128 << 10) && sizes.iter().any(|s| *s > 32 << 20));
        assert!(sizes.iter().all(|s| s % 4 == 0 && *s <= LARGEST));
    }

    #[test]
    fn what_is_written_is_read() {
        let path = std::env::temp_dir().join(format!("weights-test-{}", std::process::id()));
        let bytes = 5_000_004;
        let wrote = write(&path, bytes, 9).expect("write");
        let again = write(&path, bytes, 9).expect("write");
        assert_eq!(wrote, again);
        let file = File::open(&path).expect("open");
        let read = read_tensors::<io::Error>(&file, &tensors(bytes), |_, _| Ok(())).expect("read");
        assert_eq!(read, wrote);
        let other = write(&path, bytes, 10).expect("write");
        assert_ne!(other, wrote);
        let _ = std::fs::remove_file(&path);
    }
}
