//! The adversaries: a file per family of ways to get device memory.
//!
//! Adding a family is a file here and a line in [`ALL`].

mod arrays;
mod classic;
mod ordered;
mod physical;

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
        vars: &[],
        run,
    }
}

/// All of them.
pub const ALL: &[Family] = &[
    family(
        "classic",
        "cuMemAlloc of all sizes, with pitch",
        classic::run,
    ),
    family("legacy", "entry points with 32-bit sizes", classic::legacy),
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

/// Is another process of an adversary.
pub fn child(arguments: &[String]) -> i32 {
    eprintln!("adversaries: no such process: {arguments:?}");
    2
}
