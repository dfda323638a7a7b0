//! Sizes as people type them: `24GiB`, `512MiB`, `24g`, `24GB`, `40%`, `0.4`.

use std::fmt;

/// A size of device memory, absolute or as a share of the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// This many bytes.
    Bytes(u64),
    /// This share of the device: greater than 0, at most 1.
    Fraction(f64),
}

impl Amount {
    /// Bytes on a device of `total` bytes; a share is rounded down.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of a device's bytes is meant to be rounded down"
    )]
    pub fn of(self, total: u64) -> u64 {
        match self {
            Amount::Bytes(bytes) => bytes,
            Amount::Fraction(share) => (total as f64 * share) as u64,
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Amount::Bytes(bytes) => f.write_str(&format_bytes(*bytes)),
            Amount::Fraction(share) => write!(f, "{}%", share * 100.0),
        }
    }
}

/// Why a size cannot be read. The text says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SizeError(String);

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for SizeError {}

/// Reads a size. `GiB`, `MiB`, `KiB`, `TiB` and the single letters `k`, `m`, `g`, `t` (either case)
/// are powers of 1024; `GB`, `MB`, `KB`, `TB` are powers of 1000; `B` is bytes; `40%` and `0.4` are
/// shares of the device, greater than 0 and at most 1 (100 %).
///
/// # Errors
/// A bare integer (is it GiB or per cent?), a share outside the range, an unknown unit, zero, or
/// anything else that is not a size.
pub fn parse_amount(text: &str) -> Result<Amount, SizeError> {
    let text = text.trim();
    let split = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = (&text[..split], text[split..].trim());
    let bad = || {
        SizeError(format!(
            "cannot read {text:?} as a size: write 24GiB, 512MiB or 40%"
        ))
    };
    if number.is_empty() || number.matches('.').count() > 1 || number == "." {
        return Err(bad());
    }
    let value: f64 = number.parse().map_err(|_| bad())?;
    let share = |share: f64| {
        if share > 0.0 && share <= 1.0 {
            Ok(Amount::Fraction(share))
        } else {
            Err(SizeError(format!(
                "{text:?} is no share of a device: it must be more than 0 and at most 1 (100%)"
            )))
        }
    };
    let scale: u64 = match unit.to_ascii_lowercase().as_str() {
        "" if number.contains('.') => return share(value),
        "" => {
            return Err(SizeError(format!(
                "{text:?} has no unit: {text}GiB or {text}%?"
            )));
        }
        "%" => return share(value / 100.0),
        "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(bad()),
    };
    let bytes = if number.contains('.') {
        scaled(value, scale)
    } else {
        number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(scale))
    };
    match bytes {
        Some(0) => Err(SizeError(format!(
            "{text:?} is zero bytes: write a size, or leave it out"
        ))),
        Some(bytes) => Ok(Amount::Bytes(bytes)),
        None => Err(SizeError(format!(
            "{text:?} is more bytes than 64 bits hold"
        ))),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "the range is checked; a fraction of a byte is dropped"
)]
fn scaled(value: f64, scale: u64) -> Option<u64> {
    let bytes = value * scale as f64;
    (bytes < u64::MAX as f64).then_some(bytes as u64)
}

/// `1536` MiB as `1.5 GiB`, for people; at most two decimals, no trailing zeros.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [
        ("TiB", 1 << 40),
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
    ];
    for (unit, scale) in UNITS {
        if bytes >= scale {
            let number = format!("{:.2}", bytes as f64 / scale as f64);
            return format!(
                "{} {unit}",
                number.trim_end_matches('0').trim_end_matches('.')
            );
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_documented_form() {
        let gib = 1u64 << 30;
        for (text, bytes) in [
            ("24GiB", 24 * gib),
            ("512MiB", 512 << 20),
            ("24g", 24 * gib),
            ("24G", 24 * gib),
            ("24GB", 24_000_000_000),
            ("1.5GiB", 3 * gib / 2),
            (" 100 MB ", 100_000_000),
            ("4096B", 4096),
            ("3k", 3072),
        ] {
            assert_eq!(parse_amount(text), Ok(Amount::Bytes(bytes)), "{text}");
        }
        assert_eq!(parse_amount("40%"), Ok(Amount::Fraction(0.4)));
        assert_eq!(parse_amount("0.4"), Ok(Amount::Fraction(0.4)));
        assert_eq!(parse_amount("1.0"), Ok(Amount::Fraction(1.0)));
        assert_eq!(parse_amount("100%"), Ok(Amount::Fraction(1.0)));
    }

    #[test]
    fn refuses_what_could_be_misread() {
        for text in [
            "",
            "24",
            "1",
            "0%",
            "0.0",
            "1.5",
            "101%",
            "-1GiB",
            "GiB",
            "24GX",
            "1.2.3g",
            ".",
            "0GiB",
            "99999999999TiB",
            "1e9",
            "24 %%",
            "nan",
            "inf",
        ] {
            assert!(parse_amount(text).is_err(), "{text}");
        }
        assert!(
            parse_amount("24")
                .unwrap_err()
                .to_string()
                .contains("24GiB or 24%?")
        );
    }

    #[test]
    fn formats_for_people() {
        assert_eq!(format_bytes(3 << 29), "1.5 GiB");
        assert_eq!(format_bytes(2 << 20), "2 MiB");
        assert_eq!(format_bytes(100), "100 B");
    }
}
