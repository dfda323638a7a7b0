//! Memory that two processes map: by descriptor and by IPC handle, within a workload and between two. It is
//! charged once.

use std::os::fd::AsRawFd;

use crate::child::{Child, inherit};
use crate::driver::{cuIpcGetMemHandle, cuMemAlloc_v2, cuMemFree_v2, cuMemRelease};
use crate::family::physical::{create, export};
use crate::stage::{Case, Done, MIB, Stage, Stop, info, need};
use crate::types::IpcHandle;

const BYTES: u64 = 96 * MIB;

/// The other process has opened the memory, and takes all that it may besides.
fn both(case: &mut Case<'_>, child: &mut Child, other: bool) -> Done {
    child.tell("opened");
    let opened = child.hear()?;
    if opened != "open" {
        case.refused(format!("memory of another process: {opened}"));
    }
    // This process as well: its own memory and what is free.
    let free = info().0 / (2 * MIB) * (2 * MIB);
    let mut own = 0;
    if free > 0 {
        let code = cuMemAlloc_v2(&mut own, free as usize);
        case.fits(code, free, "cuMemAlloc beside shared memory");
    }
    if other {
        child.tell("all");
        let answer = child.hear()?;
        if answer != "0 2" {
            case.wrong(format!(
                "the other workload: all that is free and 2 MiB more: {answer} instead of 0 2"
            ));
        }
    } else {
        child.tell("take");
        let answer = child.hear()?;
        if answer != "refused 2" {
            case.wrong(format!("the other process: {answer} instead of refused 2"));
        }
    }
    case.top();
    cuMemFree_v2(own);
    Ok(())
}

fn by_descriptor(case: &mut Case<'_>, vars: &[(&str, &str)]) -> Done {
    let other = !vars.is_empty();
    if other {
        case.workloads(2);
    }
    let handle = create(BYTES, 1).map_err(|code| match need(code, "cuMemCreate") {
        Err(stop) => stop,
        Ok(()) => Stop::Broken("no error".to_owned()),
    })?;
    let descriptor = export(handle).map_err(|code| Stop::Broken(format!("export: {}", code.0)))?;
    inherit(&descriptor, true);
    let (number, bytes) = (descriptor.as_raw_fd().to_string(), BYTES.to_string());
    let child = Child::start(&["open", "fd", &number, &bytes], vars);
    inherit(&descriptor, false);
    let mut child = child?;
    drop(descriptor);
    both(case, &mut child, other)?;
    drop(child);
    cuMemRelease(handle);
    Ok(())
}

fn by_ipc(case: &mut Case<'_>, vars: &[(&str, &str)]) -> Done {
    let other = !vars.is_empty();
    if other {
        case.workloads(2);
    }
    let mut at = 0;
    need(cuMemAlloc_v2(&mut at, BYTES as usize), "cuMemAlloc")?;
    let mut handle = IpcHandle([0; 64]);
    let code = cuIpcGetMemHandle(&mut handle, at);
    if !code.is_ok() {
        cuMemFree_v2(at);
        // Memory that can be swapped is not shared in this way.
        return Err(Stop::Skip(format!("cuIpcGetMemHandle: {}", code.0)));
    }
    let hex: String = handle.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut child = Child::start(&["open", "ipc", &hex], vars)?;
    both(case, &mut child, other)?;
    drop(child);
    cuMemFree_v2(at);
    Ok(())
}

/// See the module.
pub fn run(stage: &Stage) {
    let another = [
        ("SPILLWAY_WORKLOAD", "shared-other"),
        ("SPILLWAY_REQUEST", "64MiB"),
    ];
    stage.case("by descriptor, two workloads", |case| {
        by_descriptor(case, &another)
    });
    stage.case("by descriptor, one workload", |case| {
        by_descriptor(case, &[])
    });
    stage.case("by IPC, two workloads", |case| by_ipc(case, &another));
    stage.case("by IPC, one workload", |case| by_ipc(case, &[]));
}
