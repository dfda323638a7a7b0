//! A way to get device memory, and what is tried with every way.

use crate::driver::Code;
use crate::family::classic::Classic;
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info};

/// One way to get device memory.
pub trait Way {
    /// What is held.
    type Held;

    /// Gets exactly so many bytes of device memory.
    ///
    /// # Errors
    /// The driver's refusal.
    fn take(&mut self, bytes: u64) -> Result<Self::Held, Code>;

    /// Gives it back.
    fn give(&mut self, held: Self::Held) -> Code;

    /// Waits until what was given back is really gone.
    fn settle(&mut self) {}

    /// What does not fit under the limit is given all the same, elsewhere than on the device: it is enough
    /// that the device never holds more.
    fn elsewhere(&self) -> bool {
        false
    }

    /// The least that can be got; sizes are multiples of it.
    fn step(&self) -> u64 {
        GRANULE
    }
}

/// All that is tried with a way, as one case.
pub fn attempt<W: Way>(stage: &Stage, name: &str, mut way: W) {
    stage.case(name, |case| {
        exactly(case, &mut way, name)?;
        greedily(case, &mut way, name)?;
        holes(case, &mut way, name)?;
        beside(case, &mut way, name)
    });
}

fn give<W: Way>(case: &mut Case<'_>, way: &mut W, held: W::Held, name: &str) {
    let code = way.give(held);
    if !code.is_ok() {
        case.wrong(format!("{name}: giving back: {}", code.0));
    }
}

/// What is free can be had in one piece, one granule more cannot, and all of it comes back.
pub fn exactly<W: Way>(case: &mut Case<'_>, way: &mut W, name: &str) -> Done {
    let step = way.step();
    // A way that the driver does not have shows at once.
    match way.take(step) {
        Ok(held) => give(case, way, held, name),
        Err(code) if code.is_missing() => {
            return Err(Stop::Skip(format!("{name}: the driver answers {}", code.0)));
        }
        Err(code) => {
            case.fits(code, step, name);
        }
    }
    way.settle();
    case.released("after one piece");
    let free = info().0 / step * step;
    for far in [free + step, case.before().1 + step, 1 << 40] {
        match way.take(far) {
            Ok(held) => {
                case.took(far);
                case.top();
                if !way.elsewhere() {
                    case.too_much(Code::SUCCESS, far - free, name);
                }
                case.gave(far);
                give(case, way, held, name);
            }
            Err(code) => case.refusal(code, name),
        }
    }
    match way.take(free) {
        Ok(held) => {
            case.took(free);
            let (left, _) = case.top();
            if left >= step {
                case.leak(format!("{left} free while all that was free is held"));
            }
            match way.take(step) {
                Ok(more) => {
                    case.took(step);
                    case.top();
                    if !way.elsewhere() {
                        case.too_much(Code::SUCCESS, step, name);
                    }
                    give(case, way, more, name);
                }
                Err(code) => case.refusal(code, name),
            }
            give(case, way, held, name);
        }
        Err(code) => {
            case.fits(code, free, name);
        }
    }
    way.settle();
    case.released("after all that was free was held");
    Ok(())
}

/// Large pieces, then smaller ones, until nothing more is given: all that was free must be had.
pub fn greedily<W: Way>(case: &mut Case<'_>, way: &mut W, name: &str) -> Done {
    let step = way.step();
    let (free, total) = info();
    let far = if way.elsewhere() {
        total + 64 * MIB
    } else {
        2 * total
    };
    let mut held = Vec::new();
    let mut sum = 0;
    for piece in [64 * MIB, 20 * MIB, 6 * MIB, 2 * MIB] {
        let piece = piece.next_multiple_of(step);
        // Far above the limit there is nothing more to show.
        while sum < far {
            match way.take(piece) {
                Ok(one) => {
                    held.push(one);
                    sum += piece;
                    case.took(piece);
                }
                Err(code) => {
                    case.refusal(code, name);
                    break;
                }
            }
        }
    }
    case.top();
    if sum + step <= free {
        case.refused(format!("{name}: {sum} bytes in pieces, {free} were free"));
    }
    // Every second one first, then the others from behind.
    let mut rest = Vec::new();
    for (number, one) in held.into_iter().enumerate() {
        if number % 2 == 0 {
            give(case, way, one, name);
        } else {
            rest.push(one);
        }
    }
    for one in rest.into_iter().rev() {
        give(case, way, one, name);
    }
    way.settle();
    case.released("after pieces were held");
    Ok(())
}

/// What is freed in the middle can be had again, and no more.
pub fn holes<W: Way>(case: &mut Case<'_>, way: &mut W, name: &str) -> Done {
    let step = way.step();
    let free = info().0;
    let piece = (free / 6 / step * step).max(step);
    let mut held = Vec::new();
    // What is given elsewhere has no end of its own.
    let most = if way.elsewhere() { 7 } else { 64 };
    let take = |case: &mut Case<'_>, way: &mut W, held: &mut Vec<W::Held>| {
        while held.len() < most {
            match way.take(piece) {
                Ok(one) => {
                    held.push(one);
                    case.took(piece);
                }
                Err(code) => {
                    case.refusal(code, name);
                    break;
                }
            }
        }
        held.len()
    };
    let first = take(case, way, &mut held);
    for _ in 0..2 {
        for number in (0..held.len()).step_by(2).rev() {
            let one = held.swap_remove(number);
            case.gave(piece);
            give(case, way, one, name);
        }
        way.settle();
        let again = take(case, way, &mut held);
        if again != first {
            case.refused(format!(
                "{name}: {first} pieces of {piece} at first, {again} after freeing some"
            ));
        }
    }
    case.top();
    for one in held {
        give(case, way, one, name);
    }
    way.settle();
    Ok(())
}

/// Half by this way and the rest by `cuMemAlloc`, in both orders: together they are what was free.
pub fn beside<W: Way>(case: &mut Case<'_>, way: &mut W, name: &str) -> Done {
    case.released("before half was held");
    let step = way.step();
    let half = info().0 / 2 / step * step;
    if half == 0 {
        return Ok(());
    }
    for classic_first in [false, true] {
        let first = if classic_first {
            Classic.take(half).ok()
        } else {
            None
        };
        let held = match way.take(half) {
            Ok(held) => Some(held),
            Err(code) => {
                case.fits(code, half, &format!("{name} beside cuMemAlloc"));
                None
            }
        };
        let rest = info().0 / GRANULE * GRANULE;
        let mut second = None;
        if rest > 0 {
            match Classic.take(rest) {
                Ok(at) => second = Some(at),
                Err(code) => {
                    case.fits(code, rest, &format!("cuMemAlloc beside {name}"));
                }
            }
        }
        if let Ok(more) = Classic.take(GRANULE) {
            case.too_much(Code::SUCCESS, GRANULE, &format!("cuMemAlloc beside {name}"));
            Classic.give(more);
        }
        case.top();
        for at in [first, second].into_iter().flatten() {
            Classic.give(at);
        }
        if let Some(held) = held {
            give(case, way, held, name);
        }
        way.settle();
        case.released("after half was held");
    }
    Ok(())
}

/// A part before an eviction, a part after it, the rest after another: no more than the limit, and all of it.
pub fn swapped<W: Way>(stage: &Stage, name: &str, mut way: W) {
    stage.case(name, |case| {
        let way = &mut way;
        let step = way.step();
        let part = info().0 / 3 / step * step;
        let base = match Classic.take(part) {
            Ok(at) => at,
            Err(code) => {
                case.fits(code, part, "cuMemAlloc");
                return Ok(());
            }
        };
        let mut held = Vec::new();
        for bytes in [Some(part), None] {
            case.evict()?;
            let bytes = bytes.unwrap_or_else(|| info().0 / step * step);
            match way.take(bytes) {
                Ok(one) => {
                    case.took(bytes);
                    held.push(one);
                }
                Err(code) if code.is_missing() => {
                    Classic.give(base);
                    return Err(Stop::Skip(format!("{name}: the driver answers {}", code.0)));
                }
                Err(code) => {
                    case.fits(code, bytes, &format!("{name} while swapped out"));
                }
            }
        }
        case.top();
        case.evict()?;
        match way.take(step) {
            Ok(more) => {
                case.top();
                if !way.elsewhere() {
                    case.too_much(Code::SUCCESS, step, &format!("{name} while swapped out"));
                }
                give(case, way, more, name);
            }
            Err(code) => case.refusal(code, name),
        }
        // All of it is wanted on the device at once.
        case.top();
        crate::driver::cuMemsetD8_v2(base, 1, part as usize);
        crate::driver::cuCtxSynchronize();
        case.top();
        case.evict()?;
        for one in held {
            give(case, way, one, name);
        }
        let freed = Classic.give(base);
        if !freed.is_ok() {
            case.wrong(format!("cuMemFree while swapped out: {}", freed.0));
        }
        way.settle();
        Ok(())
    });
}
