//! The shape of arrays: which descriptions are valid, and what each level takes.

use crate::layout::Array3dDescriptor;
use spillway_simulator_core::code::{INVALID_VALUE, R};

/// `CUDA_ARRAY3D_*`.
pub const LAYERED: u32 = 1;
pub const CUBEMAP: u32 = 4;
pub const SPARSE: u32 = 0x40;
pub const DEFERRED: u32 = 0x80;
/// All that there are, up to `CUDA_ARRAY3D_VIDEO_ENCODE_DECODE`.
const FLAGS: u32 = 0x1ff;

/// A texel, or a block of them where a format compresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element {
    pub bytes: u64,
    /// Texels of a block each way.
    pub edge: u64,
    /// Rows for every two rows of the description: three where a plane of half the size follows.
    pub rows_of_two: u64,
}

/// The element of a format.
///
/// # Errors
/// `INVALID_VALUE` for a format that is not simulated, or another number of channels than it has.
pub fn element(format: u32, channels: u32) -> R<Element> {
    let of = |bytes, edge, rows_of_two| Element {
        bytes,
        edge,
        rows_of_two,
    };
    let plain = |one: u64| {
        let ok = matches!(channels, 1 | 2 | 4);
        ok.then(|| of(one * u64::from(channels), 1, 2))
            .ok_or(INVALID_VALUE)
    };
    let fixed = |wanted: u32, element| {
        let ok = channels == wanted;
        ok.then_some(element).ok_or(INVALID_VALUE)
    };
    match format {
        // Integers of 8, 16 and 32 bits, signed or not, and floats of 16 and 32.
        0x01 | 0x08 => plain(1),
        0x02 | 0x09 | 0x10 => plain(2),
        0x03 | 0x0a | 0x20 => plain(4),
        // BC1 and BC4, then the other compressed ones.
        0x91 | 0x92 => fixed(4, of(8, 4, 2)),
        0x97 | 0x98 => fixed(1, of(8, 4, 2)),
        0x99 | 0x9a => fixed(2, of(16, 4, 2)),
        0x9b | 0x9c => fixed(3, of(16, 4, 2)),
        0x93..=0x96 | 0x9d | 0x9e => fixed(4, of(16, 4, 2)),
        // NV12, P010 and P016: brightness, then colour at half the size.
        0xb0 => fixed(3, of(1, 1, 3)),
        0x9f | 0xa1 => fixed(3, of(2, 1, 3)),
        // Normalised integers of 8 and 16 bits; the number of channels is in the name.
        0xc0 | 0xc6 => fixed(1, of(1, 1, 2)),
        0xc1 | 0xc7 => fixed(2, of(2, 1, 2)),
        0xc2 | 0xc8 => fixed(4, of(4, 1, 2)),
        0xc3 | 0xc9 => fixed(1, of(2, 1, 2)),
        0xc4 | 0xca => fixed(2, of(4, 1, 2)),
        0xc5 | 0xcb => fixed(4, of(8, 1, 2)),
        _ => Err(INVALID_VALUE),
    }
}

/// One level: where it lies in the array's memory, and its pitches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    pub shape: Array3dDescriptor,
    pub offset: u64,
    pub pitch: u64,
    pub slice: u64,
}

impl Level {
    pub fn bytes(&self) -> u64 {
        self.slice * self.shape.depth.max(1) as u64
    }
}

/// Refuses what no array can be.
///
/// # Errors
/// `INVALID_VALUE`.
pub fn check(shape: &Array3dDescriptor) -> R {
    let has = |flag: u32| shape.flags & flag != 0;
    let (w, h, d) = (shape.width, shape.height, shape.depth);
    let within = |limits: [usize; 3]| w <= limits[0] && h <= limits[1] && d <= limits[2];
    let valid = match (has(LAYERED), has(CUBEMAP)) {
        (layered, true) => {
            let faces = d == 6 || layered && d != 0 && d.is_multiple_of(6);
            w == h && faces && within([32_768, 32_768, 2046])
        }
        (true, false) => d != 0 && within([32_768, 32_768, 2048]),
        (false, false) if d != 0 => h != 0 && within([16_384; 3]),
        (false, false) => within([131_072, 65_536, 0]),
    };
    if w == 0 || !valid || shape.flags & !FLAGS != 0 || has(SPARSE) && has(DEFERRED) {
        return Err(INVALID_VALUE);
    }
    element(shape.format, shape.channels).map(|_| ())
}

/// The levels of an array, one after the other; at most as many as it takes to halve it to one texel.
///
/// # Errors
/// `INVALID_VALUE` as [`check`], or if it is too large to count.
pub fn levels(shape: &Array3dDescriptor, wanted: u32) -> R<Vec<Level>> {
    const ALIGNMENT: u64 = 512;
    check(shape)?;
    let element = element(shape.format, shape.channels)?;
    let layers = shape.flags & (LAYERED | CUBEMAP) != 0;
    let halved = if layers { 0 } else { shape.depth };
    let largest = shape.width.max(shape.height).max(halved).max(1);
    let mut all = Vec::new();
    let mut end = 0_u64;
    for level in 0..wanted.clamp(1, largest.ilog2() + 1) {
        let half = |edge: usize| if edge == 0 { 0 } else { (edge >> level).max(1) };
        let mut smaller = *shape;
        smaller.width = half(shape.width);
        smaller.height = half(shape.height);
        smaller.depth = if layers {
            shape.depth
        } else {
            half(shape.depth)
        };
        let pitch = (smaller.width as u64).div_ceil(element.edge) * element.bytes;
        let rows = (smaller.height.max(1) as u64 * element.rows_of_two / 2).div_ceil(element.edge);
        let offset = end.next_multiple_of(ALIGNMENT);
        let level = Level {
            shape: smaller,
            offset,
            pitch,
            slice: pitch * rows,
        };
        end = offset.checked_add(level.bytes()).ok_or(INVALID_VALUE)?;
        all.push(level);
    }
    Ok(all)
}

/// Texels of a 64 KiB tile of a sparse array.
pub fn tile(shape: &Array3dDescriptor) -> R<[u32; 3]> {
    let element = element(shape.format, shape.channels)?;
    let solid = shape.depth != 0 && shape.flags & (LAYERED | CUBEMAP) == 0;
    let edge = element.edge as u32;
    let flat = |w: u32, h: u32| [w * edge, h * edge, 1];
    match (element.bytes, solid) {
        (1, false) => Ok(flat(256, 256)),
        (2, false) => Ok(flat(256, 128)),
        (4, false) => Ok(flat(128, 128)),
        (8, false) => Ok(flat(128, 64)),
        (16, false) => Ok(flat(64, 64)),
        (1, true) => Ok([64, 32, 32]),
        (2, true) => Ok([32, 32, 32]),
        (4, true) => Ok([32, 32, 16]),
        (8, true) => Ok([32, 16, 16]),
        (16, true) => Ok([16, 16, 16]),
        _ => Err(INVALID_VALUE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(width: usize, height: usize, depth: usize, flags: u32) -> Array3dDescriptor {
        Array3dDescriptor {
            width,
            height,
            depth,
            format: 0x20,
            channels: 1,
            flags,
        }
    }

    #[test]
    fn levels_halve_and_layers_stay() {
        let bytes = |s: Array3dDescriptor, n| {
            levels(&s, n).map(|l| l.iter().map(Level::bytes).collect::<Vec<_>>())
        };
        assert_eq!(bytes(shape(8, 4, 0, 0), 99), Ok(vec![128, 32, 8, 4]));
        assert_eq!(bytes(shape(8, 8, 3, LAYERED), 2), Ok(vec![768, 192]));
        assert_eq!(bytes(shape(8, 8, 8, 0), 2), Ok(vec![2048, 256]));
        assert_eq!(levels(&shape(8, 4, 0, 0), 2).map(|l| l[1].offset), Ok(512));
    }

    #[test]
    fn blocks_and_planes_are_counted_whole() {
        let of = |format, channels| {
            let s = Array3dDescriptor {
                format,
                channels,
                ..shape(10, 10, 0, 0)
            };
            levels(&s, 1).map(|l| l[0].bytes())
        };
        assert_eq!(of(0x91, 4), Ok(3 * 3 * 8));
        assert_eq!(of(0x9e, 4), Ok(3 * 3 * 16));
        assert_eq!(of(0xb0, 3), Ok(150));
        assert_eq!(of(0xb0, 1), Err(INVALID_VALUE));
        assert_eq!(of(0xc5, 4), Ok(800));
        assert_eq!(of(0x77, 1), Err(INVALID_VALUE));
    }

    #[test]
    fn what_no_array_can_be() {
        for wrong in [
            shape(0, 1, 0, 0),
            shape(4, 0, 4, 0),
            shape(4, 4, 0, LAYERED),
            shape(4, 8, 6, CUBEMAP),
            shape(4, 4, 7, CUBEMAP | LAYERED),
            shape(4, 4, 12, CUBEMAP),
            shape(4, 4, 0, 1 << 12),
            shape(1 << 20, 0, 0, 0),
        ] {
            assert_eq!(check(&wrong), Err(INVALID_VALUE), "{wrong:?}");
        }
        for right in [
            shape(4, 4, 6, CUBEMAP),
            shape(4, 4, 12, CUBEMAP | LAYERED),
            shape(4, 0, 4, LAYERED),
        ] {
            assert_eq!(check(&right), Ok(()), "{right:?}");
        }
    }
}
