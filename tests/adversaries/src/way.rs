//! A way to get device memory, and what is tried with every way.

use crate::driver::Code;
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
        holes(case, &mut way, name)
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
                case.too_much(Code::SUCCESS, far - free, name);
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
                    case.too_much(Code::SUCCESS, step, name);
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
    let mut held = Vec::new();
    let mut sum = 0;
    for piece in [64 * MIB, 20 * MIB, 6 * MIB, 2 * MIB] {
        let piece = piece.next_multiple_of(step);
        // Far above the limit there is nothing more to show.
        while sum < 2 * total {
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
    let take = |case: &mut Case<'_>, way: &mut W, held: &mut Vec<W::Held>| {
        while held.len() < 64 {
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
