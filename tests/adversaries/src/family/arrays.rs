//! Arrays: one, two and three dimensions, layers, cubes, mipmaps, and formats of any width.

use crate::driver::{
    Code, Handle, cuArray3DCreate, cuArray3DCreate_v2, cuArrayCreate, cuArrayCreate_v2,
    cuArrayDestroy, cuMipmappedArrayCreate, cuMipmappedArrayDestroy,
};
use crate::stage::{Case, Done, MIB, Stage, Stop, info};
use crate::types::{Array2, Array3, Array3Old, ArrayOld, CUBEMAP, LAYERED};
use crate::way::{Way, attempt};

/// `CU_AD_FORMAT_UNSIGNED_INT8`, `_FLOAT`.
const BYTES: u32 = 1;
const FLOAT: u32 = 0x20;

/// Formats beyond the simple ones: bits of one element with its channels.
const ODD: [(&str, u32, u32, u64); 10] = [
    ("half", 0x10, 4, 64),
    ("unorm 8x1", 0xc0, 1, 8),
    ("unorm 8x4", 0xc2, 4, 32),
    ("unorm 16x4", 0xc5, 4, 64),
    ("snorm 8x2", 0xc7, 2, 16),
    ("BC1", 0x91, 4, 4),
    ("BC3", 0x95, 4, 8),
    ("BC7", 0x9d, 4, 8),
    ("unorm 10-10-10-2", 0x50, 4, 32),
    ("NV12", 0xb0, 3, 12),
];

/// The shapes; all of them take exactly the bytes that they are asked for.
#[derive(Clone, Copy)]
pub enum Shape {
    Flat,
    FlatOld,
    Deep,
    DeepOld,
    Layers,
    Cube,
}

pub struct Arrays(pub Shape);

impl Way for Arrays {
    type Held = Handle;

    fn take(&mut self, bytes: u64) -> Result<Handle, Code> {
        // Rows of 64 KiB: 16384 floats, the least that every device takes.
        const WIDTH: usize = 16384;
        let rows = (bytes / 65536) as usize;
        let mut array = 0;
        let code = match self.0 {
            Shape::Flat => cuArrayCreate_v2(
                &mut array,
                &Array2 {
                    width: WIDTH,
                    height: rows,
                    format: FLOAT,
                    channels: 1,
                },
            ),
            Shape::FlatOld => {
                let Ok(height) = u32::try_from(rows) else {
                    return Err(Code::OUT_OF_MEMORY);
                };
                let shape = ArrayOld {
                    width: 16384,
                    height,
                    format: FLOAT,
                    channels: 1,
                };
                cuArrayCreate(&mut array, &shape)
            }
            Shape::DeepOld => {
                let Ok(depth) = u32::try_from(rows / 16) else {
                    return Err(Code::OUT_OF_MEMORY);
                };
                let shape = Array3Old {
                    width: 16384,
                    height: 16,
                    depth,
                    format: FLOAT,
                    channels: 1,
                    flags: 0,
                };
                cuArray3DCreate(&mut array, &shape)
            }
            Shape::Deep | Shape::Layers => {
                let flags = if matches!(self.0, Shape::Layers) {
                    LAYERED
                } else {
                    0
                };
                let shape = Array3 {
                    width: WIDTH,
                    height: 16,
                    depth: rows / 16,
                    format: FLOAT,
                    channels: 1,
                    flags,
                };
                cuArray3DCreate_v2(&mut array, &shape)
            }
            Shape::Cube => {
                // Six faces of 1024 x 1024 bytes: steps of 6 MiB.
                let cubes = (bytes / (6 * MIB)) as usize;
                let shape = Array3 {
                    width: 1024,
                    height: 1024,
                    depth: 6 * cubes,
                    format: BYTES,
                    channels: 1,
                    flags: CUBEMAP | LAYERED,
                };
                cuArray3DCreate_v2(&mut array, &shape)
            }
        };
        code.then(array)
    }

    fn give(&mut self, held: Handle) -> Code {
        cuArrayDestroy(held)
    }

    fn step(&self) -> u64 {
        match self.0 {
            Shape::Cube => 6 * MIB,
            _ => 2 * MIB,
        }
    }
}

/// Many of one shape until none is given; what they take is for the witness to say.
fn many(
    case: &mut Case<'_>,
    what: &str,
    bytes: u64,
    make: impl Fn(&mut Handle) -> Code,
    free: impl Fn(Handle) -> Code,
) -> Done {
    let (all, _) = info();
    let most = 8 * all / bytes.max(1);
    let mut held = Vec::new();
    loop {
        let mut array = 0;
        let code = make(&mut array);
        if held.is_empty() && (code.is_missing() || code.0 == 1) {
            return Err(Stop::Skip(format!("{what}: the driver answers {}", code.0)));
        }
        if !code.is_ok() {
            case.refusal(code, what);
            break;
        }
        held.push(array);
        case.took(bytes);
        if held.len() as u64 > most {
            case.wrong(format!("{what}: no end after {} of them", held.len()));
            break;
        }
    }
    case.top();
    // Whatever the driver needs for one of them, half of what is free holds some.
    let sum = held.len() as u64 * bytes;
    if sum * 2 < all {
        case.refused(format!("{what}: {sum} bytes in all, {all} were free"));
    }
    for array in held {
        let code = free(array);
        if !code.is_ok() {
            case.wrong(format!("{what}: destroying: {}", code.0));
        }
    }
    Ok(())
}

fn mipmaps(case: &mut Case<'_>, levels: u32, layers: usize) -> Done {
    let flags = if layers > 0 { LAYERED } else { 0 };
    let shape = Array3 {
        width: 2048,
        height: 1024,
        depth: layers,
        format: FLOAT,
        channels: 1,
        flags,
    };
    // Each level is a quarter of the one above.
    let mut bytes = 0;
    for level in 0..levels {
        bytes += (8 * MIB * layers.max(1) as u64) >> (2 * level).min(40);
    }
    many(
        case,
        &format!("cuMipmappedArrayCreate with {levels} levels"),
        bytes,
        |array| cuMipmappedArrayCreate(array, &shape, levels),
        cuMipmappedArrayDestroy,
    )
}

/// See the module.
pub fn run(stage: &Stage) {
    attempt(stage, "two dimensions", Arrays(Shape::Flat));
    attempt(stage, "three dimensions", Arrays(Shape::Deep));
    attempt(stage, "layers", Arrays(Shape::Layers));
    attempt(stage, "layered cubes", Arrays(Shape::Cube));
    for levels in [1, 2, 5, 12] {
        stage.case(&format!("mipmaps of {levels}"), |case| {
            mipmaps(case, levels, 0)
        });
    }
    stage.case("layered mipmaps", |case| mipmaps(case, 4, 3));
    for (name, format, channels, bits) in ODD {
        stage.case(&format!("format {name}"), |case| {
            let shape = Array2 {
                width: 1024,
                height: 1024,
                format,
                channels,
            };
            many(
                case,
                "cuArrayCreate",
                1024 * 1024 * bits / 8,
                |array| cuArrayCreate_v2(array, &shape),
                cuArrayDestroy,
            )
        });
    }
    // As wide as devices take them.
    stage.case("one dimension", |case| {
        let shape = Array2 {
            width: 131_072,
            height: 0,
            format: FLOAT,
            channels: 4,
        };
        many(
            case,
            "cuArrayCreate of 131072",
            131_072 * 16,
            |array| cuArrayCreate_v2(array, &shape),
            cuArrayDestroy,
        )
    });
    // Rows that no pitch divides: the driver may round them up.
    stage.case("narrow rows", |case| {
        let shape = Array2 {
            width: 33,
            height: 16384,
            format: BYTES,
            channels: 1,
        };
        many(
            case,
            "cuArrayCreate of 33 x 16384",
            33 * 16384,
            |array| cuArrayCreate_v2(array, &shape),
            cuArrayDestroy,
        )
    });
}
