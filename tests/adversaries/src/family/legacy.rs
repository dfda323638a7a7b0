//! The entry points of before CUDA 3.2, in contexts of their own kind and in others; today's in theirs.

use crate::driver::{
    Code, Handle, cuArrayCreate, cuArrayDestroy, cuCtxCreate, cuCtxDestroy_v2, cuCtxPopCurrent_v2,
    cuCtxSetCurrent, cuCtxSynchronize, cuMemAlloc, cuMemAlloc_v2, cuMemAllocAsync, cuMemAllocPitch,
    cuMemAllocPitch_v2, cuMemFree, cuMemFree_v2, cuMemFreeAsync, cuMemGetInfo,
};
use crate::family::arrays::{Arrays, Shape};
use crate::family::physical::Handles;
use crate::stage::{Case, Done, MIB, Stage, info, need};
use crate::types::ArrayOld;
use crate::way::{Way, attempt, greedily};

struct Old;

impl Way for Old {
    type Held = u32;

    fn take(&mut self, bytes: u64) -> Result<u32, Code> {
        let mut at = 0;
        let bytes = u32::try_from(bytes).map_err(|_| Code::OUT_OF_MEMORY)?;
        cuMemAlloc(&mut at, bytes).then(at)
    }

    fn give(&mut self, held: u32) -> Code {
        cuMemFree(held)
    }
}

struct OldPitch;

impl Way for OldPitch {
    type Held = u32;

    fn take(&mut self, bytes: u64) -> Result<u32, Code> {
        const ROW: u32 = 512 << 10;
        let (mut at, mut pitch) = (0, 0);
        let rows = u32::try_from(bytes / u64::from(ROW)).map_err(|_| Code::OUT_OF_MEMORY)?;
        if u64::from(rows) * u64::from(ROW) > u64::from(u32::MAX) {
            return Err(Code::OUT_OF_MEMORY);
        }
        cuMemAllocPitch(&mut at, &mut pitch, ROW, rows, 16).then(at)
    }

    fn give(&mut self, held: u32) -> Code {
        cuMemFree(held)
    }
}

/// Stream-ordered memory, which has no old entry point.
struct Ordered;

impl Way for Ordered {
    type Held = u64;

    fn take(&mut self, bytes: u64) -> Result<u64, Code> {
        let mut at = 0;
        cuMemAllocAsync(&mut at, bytes as usize, 0).then(at)
    }

    fn give(&mut self, held: u64) -> Code {
        cuMemFreeAsync(held, 0)
    }

    fn settle(&mut self) {
        cuCtxSynchronize();
    }
}

/// A way in another context than the stage's own.
pub struct Within<W> {
    way: W,
    context: Handle,
    own: Handle,
}

impl<W: Way> Way for Within<W> {
    type Held = W::Held;

    fn take(&mut self, bytes: u64) -> Result<W::Held, Code> {
        cuCtxSetCurrent(self.context);
        let taken = self.way.take(bytes);
        cuCtxSetCurrent(self.own);
        taken
    }

    fn give(&mut self, held: W::Held) -> Code {
        cuCtxSetCurrent(self.context);
        let code = self.way.give(held);
        cuCtxSetCurrent(self.own);
        code
    }

    fn settle(&mut self) {
        cuCtxSetCurrent(self.context);
        self.way.settle();
        cuCtxSetCurrent(self.own);
    }

    fn step(&self) -> u64 {
        self.way.step()
    }
}

/// Stream-ordered memory in a context of the old kind; `None`: the driver makes none.
pub fn ordered_within(stage: &Stage) -> Option<Within<impl Way>> {
    let (mut context, mut popped) = (0, 0);
    if !cuCtxCreate(&mut context, 0, stage.device).is_ok() {
        return None;
    }
    cuCtxPopCurrent_v2(&mut popped);
    cuCtxSetCurrent(stage.context);
    Some(Within {
        way: Ordered,
        context,
        own: stage.context,
    })
}

/// Many small ones, and some in pieces of no round size.
fn small(case: &mut Case<'_>, context: Handle, own: Handle) -> Done {
    let (free, _) = info();
    let mut held = Vec::new();
    let mut sum = 0;
    cuCtxSetCurrent(context);
    loop {
        let bytes = [3000, 70_000, 900_001, 1 << 20][held.len() % 4];
        let mut at = 0;
        let code = cuMemAlloc(&mut at, bytes);
        if !code.is_ok() {
            case.refusal(code, "cuMemAlloc v1");
            break;
        }
        held.push(at);
        sum += u64::from(bytes);
        case.took(u64::from(bytes));
    }
    cuCtxSetCurrent(own);
    case.top();
    if sum > free {
        case.wrong(format!("{sum} given, {free} were free"));
    }
    cuCtxSetCurrent(context);
    for at in held {
        let code = cuMemFree(at);
        if !code.is_ok() {
            case.wrong(format!("cuMemFree v1: {}", code.0));
        }
    }
    cuCtxSetCurrent(own);
    Ok(())
}

/// Each kind of call in the other's contexts: refused by the driver's own code, and nothing is taken or lost.
fn mixed(case: &mut Case<'_>, context: Handle, own: Handle) -> Done {
    const INVALID_CONTEXT: Code = Code(201);
    let before = info();
    let (mut at, mut wide, mut pitch, mut wide_pitch, mut array) = (0, 0, 0, 0, 0);
    let shape = ArrayOld {
        width: 1024,
        height: 1024,
        format: 0x20,
        channels: 1,
    };
    for _ in 0..20 {
        cuCtxSetCurrent(own);
        let mut answers = vec![
            ("cuMemAlloc v1", cuMemAlloc(&mut at, 8 << 20)),
            (
                "cuMemAllocPitch v1",
                cuMemAllocPitch(&mut at, &mut pitch, 1 << 20, 8, 4),
            ),
            ("cuArrayCreate v1", cuArrayCreate(&mut array, &shape)),
            ("cuMemFree v1", cuMemFree(1 << 20)),
        ];
        cuCtxSetCurrent(context);
        answers.push((
            "cuMemAlloc in an old context",
            cuMemAlloc_v2(&mut wide, 8 << 20),
        ));
        answers.push((
            "cuMemAllocPitch in an old context",
            cuMemAllocPitch_v2(&mut wide, &mut wide_pitch, 1 << 20, 8, 4),
        ));
        for (what, code) in answers {
            if code.is_ok() {
                // A driver may allow it: then it counts.
                case.took(8 * MIB);
            } else if code != INVALID_CONTEXT {
                case.wrong(format!("{what}: {}", code.0));
            }
        }
        if wide != 0 {
            cuMemFree_v2(wide);
            wide = 0;
        }
        if array != 0 {
            cuArrayDestroy(array);
            array = 0;
        }
    }
    cuCtxSetCurrent(own);
    case.top();
    if info() != before {
        case.wrong(format!(
            "{:?} after calls in wrong contexts, {before:?} before",
            info()
        ));
    }
    Ok(())
}

/// What is told in 32 bits is the quota, too; and with its context goes all that was allocated there.
fn told_and_dropped(case: &mut Case<'_>, stage: &Stage) -> Done {
    let own = stage.context;
    for _ in 0..3 {
        let mut context = 0;
        need(cuCtxCreate(&mut context, 0, stage.device), "cuCtxCreate v1")?;
        let (wide_free, wide_total) = {
            cuCtxSetCurrent(own);
            let told = info();
            cuCtxSetCurrent(context);
            told
        };
        let (mut free, mut total) = (0, 0);
        need(cuMemGetInfo(&mut free, &mut total), "cuMemGetInfo v1")?;
        if (u64::from(free), u64::from(total)) != (wide_free, wide_total) {
            case.wrong(format!(
                "cuMemGetInfo v1 says {free} of {total}, today's {wide_free} of {wide_total}"
            ));
        }
        let mut at = 0;
        while cuMemAlloc(&mut at, 24 << 20).is_ok() {
            case.took(24 * MIB);
        }
        cuCtxSetCurrent(own);
        case.top();
        need(cuCtxDestroy_v2(context), "cuCtxDestroy")?;
        case.released("after a context of the old kind");
    }
    Ok(())
}

/// See the module.
pub fn run(stage: &Stage) {
    let own = stage.context;
    let (mut context, mut popped) = (0, 0);
    let code = cuCtxCreate(&mut context, 0, stage.device);
    if !code.is_ok() {
        stage.skip("cuCtxCreate v1", &format!("the driver answers {}", code.0));
        return;
    }
    cuCtxPopCurrent_v2(&mut popped);
    cuCtxSetCurrent(own);
    fn within<W>(way: W, context: Handle, own: Handle) -> Within<W> {
        Within { way, context, own }
    }
    attempt(stage, "cuMemAlloc v1", within(Old, context, own));
    attempt(stage, "cuMemAllocPitch v1", within(OldPitch, context, own));
    let flat = Arrays(Shape::FlatOld);
    attempt(stage, "cuArrayCreate v1", within(flat, context, own));
    let deep = Arrays(Shape::DeepOld);
    attempt(stage, "cuArray3DCreate v1", within(deep, context, own));
    attempt(
        stage,
        "cuMemAllocAsync in an old context",
        within(Ordered, context, own),
    );
    attempt(
        stage,
        "cuMemCreate in an old context",
        within(Handles, context, own),
    );
    stage.case("small ones", |case| small(case, context, own));
    stage.case("calls in wrong contexts", |case| mixed(case, context, own));
    cuCtxDestroy_v2(context);
    // Without a coordinator nobody measures what a context takes, and no case makes one.
    if !stage.alone {
        stage.case("what is told, and contexts that end", |case| {
            told_and_dropped(case, stage)
        });
    }
    stage.case("cuMemAlloc after all that", |case| {
        greedily(case, &mut crate::family::classic::Classic, "cuMemAlloc")
    });
}
