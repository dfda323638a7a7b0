//! Bytes that can be made again from a seed, anywhere in a series, by several threads; and their checksum.

/// The word at a place of the series of a seed (a counter through a mixer: any part can be made alone).
#[must_use]
fn word(seed: u64, place: u64) -> u64 {
    let mut z = seed.wrapping_add((place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `out` with the bytes of `seed` from byte `start` on; `start` is a multiple of 8.
pub fn fill(out: &mut [u8], seed: u64, start: u64) {
    for (i, chunk) in out.chunks_mut(8).enumerate() {
        let bytes = word(seed, start / 8 + i as u64).to_le_bytes();
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}

/// Numbers that look random and are the same for the same seed.
pub struct Random {
    seed: u64,
    place: u64,
}

impl Random {
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random { seed, place: 0 }
    }

    pub fn next_word(&mut self) -> u64 {
        self.place += 1;
        word(self.seed, self.place)
    }

    /// A number from 0 up to 1.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    pub fn unit(&mut self) -> f64 {
        (self.next_word() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next_word() % limit
    }
}

/// What the kernel `checksum_u32` adds up: each 32-bit word, mixed with its place, modulo 2^64.
///
/// Fed in pieces; every piece but the last is a multiple of 4 bytes long.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksum {
    sum: u64,
    words: u64,
}

impl Checksum {
    pub fn add(&mut self, bytes: &[u8]) {
        let mut sum = self.sum;
        // The place is mixed modulo 2^32, as the kernel does it.
        let mut mixed = u32::try_from(self.words & 0xffff_ffff)
            .unwrap_or(0)
            .wrapping_mul(0x9E37_79B1);
        for word in bytes.as_chunks::<4>().0 {
            sum = sum.wrapping_add(u64::from(u32::from_le_bytes(*word) ^ mixed));
            mixed = mixed.wrapping_add(0x9E37_79B1);
        }
        self.sum = sum;
        self.words += (bytes.len() / 4) as u64;
    }

    #[must_use]
    pub fn value(&self) -> u64 {
        self.sum
    }

    /// Of a whole piece at once.
    #[must_use]
    pub fn of(bytes: &[u8]) -> u64 {
        let mut checksum = Checksum::default();
        checksum.add(bytes);
        checksum.value()
    }
}

/// The checksum of `words` words that are all `value`.
#[must_use]
pub fn checksum_of_filled(value: u32, words: u64) -> u64 {
    let (mut sum, mut mixed) = (0_u64, 0_u32);
    for _ in 0..words {
        sum = sum.wrapping_add(u64::from(value ^ mixed));
        mixed = mixed.wrapping_add(0x9E37_79B1);
    }
    sum
}

/// Puts the checksums of parts together, in order: two parts exchanged give another result.
#[must_use]
pub fn combine(sums: &[u64]) -> u64 {
    sums.iter().fold(0, |total: u64, sum| {
        total.rotate_left(9) ^ sum.wrapping_mul(0xff51_afd7_ed55_8ccd)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_the_parts_of_the_whole() {
        let mut whole = vec![0; 10_000];
        fill(&mut whole, 3, 0);
        let mut part = vec![0; 1000];
        fill(&mut part, 3, 4096);
        assert_eq!(part, whole[4096..5096]);
        let mut other = vec![0; 1000];
        fill(&mut other, 4, 4096);
        assert_ne!(part, other);
    }

    #[test]
    fn checksums_of_pieces_add_up() {
        let mut bytes = vec![0; 40_000];
        fill(&mut bytes, 5, 0);
        let mut pieces = Checksum::default();
        for piece in bytes.chunks(1004) {
            pieces.add(piece);
        }
        assert_eq!(pieces.value(), Checksum::of(&bytes));
        let mut shifted = bytes.clone();
        shifted.swap(0, 4);
        assert_ne!(Checksum::of(&shifted), Checksum::of(&bytes));
    }

    #[test]
    fn filled_words_need_no_bytes() {
        let bytes: Vec<u8> = std::iter::repeat_n(0x0102_0304_u32.to_le_bytes(), 5000)
            .flatten()
            .collect();
        assert_eq!(checksum_of_filled(0x0102_0304, 5000), Checksum::of(&bytes));
    }

    #[test]
    fn order_counts() {
        assert_ne!(combine(&[1, 2]), combine(&[2, 1]));
    }
}
