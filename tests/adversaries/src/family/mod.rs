//! The adversaries: a file per family of ways to get device memory.
//!
//! Adding a family is a file here and a line in [`ALL`].

mod arrays;
pub mod classic;
mod crowd;
mod devices;
mod external;
mod graphs;
mod handed;
mod legacy;
mod limits;
mod managed;
mod multicast;
mod names;
mod ordered;
mod overhead;
pub mod physical;
mod shared;
mod traps;

use serde_json::json;

use crate::stage::{Stage, Stop};

/// A family of ways.
pub struct Family {
    pub name: &'static str,
    pub what: &'static str,
    /// Devices of the machine that it needs.
    pub gpus: u32,
    /// It says nothing without a coordinator.
    pub coordinator: bool,
    /// It says nothing of a workload that stays on the device.
    pub swaps: bool,
    /// Variables that it is started with.
    pub vars: &'static [(&'static str, &'static str)],
    run: fn(&Stage),
}

const fn family(name: &'static str, what: &'static str, run: fn(&Stage)) -> Family {
    Family {
        name,
        what,
        gpus: 1,
        coordinator: false,
        swaps: false,
        vars: &[],
        run,
    }
}

/// What the driver takes for itself: measured by the coordinator, so said only where there is one.
const fn overhead(name: &'static str, what: &'static str, run: fn(&Stage)) -> Family {
    Family {
        coordinator: true,
        ..family(name, what, run)
    }
}

/// Three devices, in an order of the program's own.
const fn devices(name: &'static str, vars: &'static [(&'static str, &'static str)]) -> Family {
    Family {
        gpus: 3,
        vars,
        ..family(
            name,
            "several devices, and NVML's word for each",
            devices::run,
        )
    }
}

/// All of them.
pub const ALL: &[Family] = &[
    family(
        "classic",
        "cuMemAlloc of all sizes, with pitch",
        classic::run,
    ),
    family(
        "legacy",
        "entry points with 32-bit addresses and sizes",
        legacy::run,
    ),
    family(
        "physical",
        "cuMemCreate and mappings in every order",
        physical::run,
    ),
    family(
        "pools",
        "stream-ordered allocation and memory pools",
        ordered::run,
    ),
    family(
        "arrays",
        "arrays and mipmapped arrays of all shapes and formats",
        arrays::run,
    ),
    family(
        "managed",
        "managed memory: touched, prefetched, advised",
        managed::run,
    ),
    family("graphs", "memory nodes of graphs", graphs::run),
    Family {
        gpus: 2,
        ..family("multicast", "bindings to multicast objects", multicast::run)
    },
    family(
        "external",
        "external memory, pools handed on",
        external::run,
    ),
    family("names", "every way to get at an entry point", names::run),
    overhead(
        "contexts",
        "contexts of the program's own",
        overhead::contexts,
    ),
    overhead("green", "green contexts", overhead::green),
    overhead("modules", "modules and libraries, lazy", overhead::modules),
    Family {
        vars: &[("CUDA_MODULE_LOADING", "EAGER")],
        ..overhead(
            "modules-eager",
            "modules and libraries, eager",
            overhead::modules,
        )
    },
    overhead("limits", "sizes that a context sets aside", limits::run),
    overhead("objects", "streams and events", overhead::objects),
    family(
        "threads",
        "threads of one process at the limit",
        crowd::threads,
    ),
    overhead("siblings", "processes of one workload", crowd::siblings),
    Family {
        swaps: true,
        ..overhead("evicted", "memory taken while swapped out", crowd::evicted)
    },
    family(
        "traps",
        "frees that are wrong, frees and takes at once",
        traps::run,
    ),
    overhead("shared", "memory that two processes map", shared::run),
    overhead("handed", "memory that changes hands", handed::run),
    overhead(
        "bequeathed",
        "memory of workloads that end",
        handed::between,
    ),
    overhead("forks", "processes that fork", handed::forks),
    devices("devices-120", &[("CUDA_VISIBLE_DEVICES", "1,2,0")]),
    devices("devices-201", &[("CUDA_VISIBLE_DEVICES", "2,0,1")]),
    devices("devices-012", &[]),
];

/// The family of a name.
pub fn find(name: &str) -> Option<&'static Family> {
    ALL.iter().find(|family| family.name == name)
}

/// Is the adversary of a name; its exit code.
pub fn run(name: &str, alone: bool) -> i32 {
    let Some(family) = find(name) else {
        eprintln!("adversaries: no family {name}");
        return 2;
    };
    match Stage::new(alone) {
        Ok(stage) => {
            (family.run)(&stage);
            stage.tell(&json!({"do": "end"}));
            0
        }
        Err(Stop::Skip(why) | Stop::Broken(why)) => {
            eprintln!("adversaries: {why}");
            1
        }
    }
}
