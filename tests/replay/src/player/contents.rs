//! Bytes that are known: what the player writes, and what it makes of what it reads.

/// Fills with bytes that depend on the seed and the place.
pub fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = mix(seed);
    for piece in bytes.chunks_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        piece.copy_from_slice(&mix(state).to_le_bytes()[..piece.len()]);
    }
}

/// A number that two different contents hardly share.
#[must_use]
pub fn digest(bytes: &[u8]) -> u64 {
    digest_more(bytes.len() as u64, bytes)
}

/// As [`digest`], for one more piece; pieces are of a multiple of 8 bytes but for the last.
#[must_use]
pub fn digest_more(before: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(before, |sum, piece| {
        let mut word = [0; 8];
        word[..piece.len()].copy_from_slice(piece);
        mix(sum.rotate_left(5) ^ u64::from_le_bytes(word))
    })
}

fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_told_apart() {
        let (mut one, mut two) = ([0; 100], [0; 100]);
        fill(&mut one, 1);
        fill(&mut two, 2);
        assert_ne!(digest(&one), digest(&two));
        fill(&mut two, 1);
        assert_eq!(digest(&one), digest(&two));
        two.swap(3, 90);
        assert_ne!(digest(&one), digest(&two));
        assert_eq!(digest_more(100, &one), digest(&one));
        let (head, tail) = one.split_at(48);
        assert_eq!(digest_more(digest_more(100, head), tail), digest(&one));
    }
}
