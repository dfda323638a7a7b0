//! Sizes: as typed, and series of them that look like a model's or a program's.

use spillway_protocol::size::{Amount, parse_amount};

use crate::pattern::Random;

/// Reads `64MiB`, `1GiB`; a share of a device means nothing here and is refused.
///
/// # Errors
/// What cannot be read, or is a share, with what to write instead.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    match parse_amount(text).map_err(|e| e.to_string())? {
        Amount::Bytes(bytes) => Ok(bytes),
        Amount::Fraction(_) => Err(format!(
            "{text}: write a size such as 64MiB, not a share of the device"
        )),
    }
}

/// `count` sizes from `smallest` up, spread evenly over their logarithm, that add up to `total`.
///
/// All are multiples of 4, in no order, the same for the same seed. The last takes what rounding left.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sizes are approximate"
)]
pub fn log_uniform(count: usize, smallest: u64, total: u64, seed: u64) -> Vec<u64> {
    if count == 0 || total < smallest * count as u64 {
        return vec![(total / count.max(1) as u64) & !3; count];
    }
    let mut random = Random::new(seed);
    let places: Vec<f64> = (0..count).map(|_| random.unit()).collect();
    let sizes_for = |largest: f64| -> Vec<u64> {
        let ratio = largest / smallest as f64;
        places
            .iter()
            .map(|place| ((smallest as f64 * ratio.powf(*place)) as u64).max(smallest) & !3)
            .collect()
    };
    let (mut low, mut high) = (smallest as f64, total as f64);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if sizes_for(middle).iter().sum::<u64>() <= total {
            low = middle;
        } else {
            high = middle;
        }
    }
    let mut sizes = sizes_for(low);
    let rest = (total - sizes.iter().sum::<u64>().min(total)) & !3;
    if let Some(last) = sizes.last_mut() {
        *last += rest;
    }
    sizes
}

/// Shows bytes as people read them.
#[must_use]
pub fn show(bytes: u64) -> String {
    spillway_protocol::size::format_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_adds_up_and_spreads_out() {
        let sizes = log_uniform(499, 1024, 512 << 20, 7);
        let sum: u64 = sizes.iter().sum();
        assert!((512_u64 << 20) - sum < 4, "{sum}");
        assert!(sizes.iter().all(|s| *s >= 1024 && s % 4 == 0));
        let small = sizes.iter().filter(|s| **s < 64 << 10).count();
        assert!(
            small > 100 && small < 400,
            "{small} of 499 are below 64 KiB"
        );
        assert_eq!(sizes, log_uniform(499, 1024, 512 << 20, 7));
        assert_ne!(sizes, log_uniform(499, 1024, 512 << 20, 8));
    }

    #[test]
    fn shares_are_refused() {
        assert!(parse_bytes("40%").is_err());
        assert_eq!(parse_bytes("64MiB"), Ok(64 << 20));
    }
}
