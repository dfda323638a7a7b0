//! `cuMemAlloc` and its kin: sizes from a byte up, with pitch.

use crate::driver::{Address, Code, cuMemAlloc_v2, cuMemAllocPitch_v2, cuMemFree_v2};
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info};
use crate::way::{Way, attempt};

/// `cuMemAlloc_v2`.
pub struct Classic;

impl Way for Classic {
    type Held = Address;

    fn take(&mut self, bytes: u64) -> Result<Address, Code> {
        let mut at = 0;
        cuMemAlloc_v2(&mut at, bytes as usize).then(at)
    }

    fn give(&mut self, held: Address) -> Code {
        cuMemFree_v2(held)
    }
}

/// `cuMemAllocPitch_v2`: rows of half a MiB, which is a multiple of every pitch.
pub struct Pitch;

impl Way for Pitch {
    type Held = Address;

    fn take(&mut self, bytes: u64) -> Result<Address, Code> {
        const ROW: usize = 512 << 10;
        let (mut at, mut pitch) = (0, 0);
        cuMemAllocPitch_v2(&mut at, &mut pitch, ROW, bytes as usize / ROW, 16).then(at)
    }

    fn give(&mut self, held: Address) -> Code {
        cuMemFree_v2(held)
    }
}

/// Allocations of one size until none is given: their sum, by what the driver gives for one, stays
/// within what was free, and the last bytes can still be had.
fn of_one_size(case: &mut Case<'_>, bytes: u64) -> Done {
    let (free, _) = info();
    let most = 4 * free / bytes.max(512);
    let mut held = Vec::new();
    loop {
        match Classic.take(bytes) {
            Ok(at) => held.push(at),
            Err(code) => {
                case.refusal(code, "cuMemAlloc");
                break;
            }
        }
        case.took(bytes);
        if held.len() as u64 > most {
            return Err(Stop::Broken(format!(
                "{} allocations of {bytes}: no end",
                held.len()
            )));
        }
    }
    let (left, _) = case.top();
    let sum = held.len() as u64 * bytes;
    // From half a page up the driver may give whole pages.
    if bytes < GRANULE / 2 && sum + sum / 4 + 4 * MIB < free {
        case.refused(format!(
            "cuMemAlloc of {bytes}: {} of them, {free} were free",
            held.len()
        ));
    }
    if left >= GRANULE && bytes <= left {
        case.refused(format!("cuMemAlloc of {bytes}: refused with {left} free"));
    }
    for at in held {
        let code = cuMemFree_v2(at);
        if !code.is_ok() {
            case.wrong(format!("cuMemFree: {}", code.0));
        }
    }
    Ok(())
}

/// Sizes that are no multiples of anything.
fn odd_pitch(case: &mut Case<'_>) -> Done {
    let mut held = Vec::new();
    let mut step = 0;
    loop {
        step += 1;
        let (mut at, mut pitch) = (0, 0);
        let width = 1000 * (step % 13) + 1;
        let height = 1000 + 100 * (step % 7);
        let code = cuMemAllocPitch_v2(&mut at, &mut pitch, width, height, [4, 8, 16][step % 3]);
        if !code.is_ok() {
            case.refusal(code, "cuMemAllocPitch");
            break;
        }
        if pitch < width {
            case.wrong(format!("a pitch of {pitch} for {width}"));
        }
        held.push(at);
        case.took((pitch * height) as u64);
        if step > 2000 {
            case.wrong("no end");
            break;
        }
    }
    case.top();
    for at in held {
        cuMemFree_v2(at);
    }
    Ok(())
}

/// See the module.
pub fn run(stage: &Stage) {
    attempt(stage, "cuMemAlloc", Classic);
    attempt(stage, "cuMemAllocPitch", Pitch);
    stage.case("odd pitches", odd_pitch);
    for bytes in [
        1,
        511,
        4096,
        100_000,
        MIB - 1,
        MIB,
        MIB + 1,
        GRANULE,
        GRANULE + 1,
        20 * MIB + 3,
    ] {
        // Many small ones take long and show nothing that a few thousand do not.
        if bytes >= 4096 {
            stage.case(&format!("cuMemAlloc of {bytes}"), |case| {
                of_one_size(case, bytes)
            });
        }
    }
}
