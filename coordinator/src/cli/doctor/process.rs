//! `spillway doctor PID`: is Spillway in force in this process? In the order in which things have to
//! come true: loader, settings, driver, socket, registration, quota, swap.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use spillway_protocol::format_bytes;
use spillway_protocol::names::{
    ENV_LIMIT, ENV_REQUEST, ENV_RUN_DIR, RUN_DIR, find_run_dir, session_socket,
};

use super::Report;
use super::proc::Proc;
use crate::cli::args::Place;
use crate::cli::settings::{Options, Settings};
use crate::cli::{library, rundir, session, status};
use crate::model::{Status, Workload};

const START_AGAIN: &str = "start it again with spillway run -- PROGRAM ...";

/// Asks all questions about one process.
pub fn examine(report: &mut Report, place: &Place, pid: i32) {
    let process = match Proc::read(pid) {
        Ok(process) => process,
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::PermissionDenied => "run as root, or as its user",
                _ => "spillway status lists the processes that are known",
            };
            report.fail(
                "process",
                format!("cannot look into process {pid}: {error}"),
                remedy,
            );
            return;
        }
    };
    report.ok("process", format!("process {pid} is {}", process.name()));
    let loaded = library_loaded(report, &process);
    let settings = settings(report, &process);
    let driver = driver_loaded(report, &process);
    let settings = settings.filter(|settings| loaded && !settings.disabled);
    let Some(settings) = settings else {
        report.fail(
            "quota",
            "no quota is in force for this process",
            "remove what the lines above name",
        );
        return;
    };
    if settings.no_coordinator {
        report.warn(
            "coordinator",
            "runs with SPILLWAY_NO_COORDINATOR: its limit holds for this process alone, and it is never swapped",
            "start it without --no-coordinator",
        );
        return;
    }
    socket(report, &process);
    match status::fetch(&place.client()) {
        Err(failure) => report.fail(
            "registered",
            format!(
                "cannot ask the coordinator whether it knows process {pid}: {}",
                failure.text()
            ),
            "run as the user of spillwayd",
        ),
        Ok(status) => registered(report, &status, pid, driver),
    }
}

fn library_loaded(report: &mut Report, process: &Proc) -> bool {
    if let Some(path) = process.mapping("libspillway") {
        if path.ends_with(" (deleted)") {
            report.warn(
                "library",
                format!("runs with {path}: the file was replaced since it started"),
                START_AGAIN,
            );
        } else {
            report.ok("library", format!("{path} is loaded"));
        }
        return true;
    }
    let text = "libspillway.so is not loaded";
    if let Ok(exe) = std::fs::read(process.exe())
        && let Some(elf) = library::read_elf(&exe)
        && !(elf.native() && elf.interpreted)
    {
        report.fail(
            "library",
            format!("{text}: the program is statically linked or for another machine"),
            "use a dynamically linked build of it",
        );
        return false;
    }
    let preload = process.text("LD_PRELOAD").unwrap_or_default();
    let entries = preload.split([':', ' ']);
    let mut ours = entries.filter(|entry| entry.contains("libspillway"));
    let Some(entry) = ours.next() else {
        let what = match preload.as_str() {
            "" => "LD_PRELOAD was not set".to_owned(),
            other => format!("LD_PRELOAD={other} does not name it"),
        };
        report.fail(
            "library",
            format!("{text}: {what} when the program started"),
            format!("{START_AGAIN}, or set LD_PRELOAD"),
        );
        return false;
    };
    if process.secure() == Some(true) {
        report.fail(
            "library",
            format!("{text}: the program has set-uid or file capabilities, and the loader then ignores LD_PRELOAD"),
            "take these rights from it, or name the library in /etc/ld.so.preload",
        );
        return false;
    }
    let seen = process.path(Path::new(entry));
    let (what, remedy) = if seen.exists() {
        match library::check(&seen, "LD_PRELOAD") {
            Err(error) => (error.to_string(), "put a good libspillway.so there"),
            Ok(_) => (
                format!("LD_PRELOAD names {entry}, which is there now and good"),
                "the file came after the program started, or the program's own loader refused it: \
                 start it again and read its first lines on standard error",
            ),
        }
    } else {
        (
            format!(
                "LD_PRELOAD names {entry}, which is not there in the file system of the process; the loader ignores that in silence"
            ),
            "mount the library into the container at that path, or correct the path",
        )
    };
    report.fail("library", format!("{text}: {what}"), remedy);
    false
}

/// The settings, if the library takes them.
fn settings(report: &mut Report, process: &Proc) -> Option<Settings> {
    let environment = |name: &str| process.var(name).map(OsStr::to_owned);
    match Settings::check(&Options::default(), &environment) {
        Ok(settings) => {
            let set = |name| Some(format!("{name}={}", process.text(name)?));
            let set: Vec<_> = [ENV_REQUEST, ENV_LIMIT]
                .into_iter()
                .filter_map(set)
                .collect();
            match set.as_slice() {
                [] => report.ok(
                    "settings",
                    "neither SPILLWAY_REQUEST nor SPILLWAY_LIMIT was set",
                ),
                set => report.ok("settings", set.join(", ")),
            }
            if settings.disabled {
                report.fail(
                    "disabled",
                    "SPILLWAY_DISABLE=1: the library passes everything through",
                    "unset it and start the program again",
                );
            }
            Some(settings)
        }
        Err(problems) => {
            for problem in problems {
                report.fail(
                    "settings",
                    format!("{problem} (cuInit fails)"),
                    "correct the variable and start the program again",
                );
            }
            None
        }
    }
}

fn driver_loaded(report: &mut Report, process: &Proc) -> bool {
    match process.mapping("libcuda.so") {
        Some(path) => report.ok("driver", format!("{path} is loaded")),
        None => report.warn(
            "driver",
            "no libcuda.so is loaded: the program has not used CUDA yet",
            "look again once it has; nothing is registered before",
        ),
    }
    process.mapping("libcuda.so").is_some()
}

/// The session socket, in the file system of the process.
fn socket(report: &mut Report, process: &Proc) {
    let there = |dir: &Path| rundir::is_socket(&process.path(&session_socket(dir)));
    let dir = find_run_dir(
        process.text(ENV_RUN_DIR).as_deref(),
        process.text("XDG_RUNTIME_DIR").as_deref(),
        there,
    );
    let inside = session_socket(&dir);
    let shown = inside.display();
    match session::probe(&process.path(&inside)) {
        Ok(()) => report.ok("socket", format!("a coordinator answers on its {shown}")),
        Err(error) if there(&dir) => report.fail(
            "socket",
            format!("no coordinator answers on its {shown}: {error}"),
            "start spillwayd with that run directory",
        ),
        Err(_) => report.fail(
            "socket",
            format!("there is no socket at {shown} in the file system of the process"),
            format!(
                "start spillwayd; in a container, mount the session directory: \
                 -v {RUN_DIR}/session:{}",
                inside.parent().unwrap_or(Path::new(RUN_DIR)).display()
            ),
        ),
    }
}

fn registered(report: &mut Report, status: &Status, pid: i32, driver: bool) {
    let has = |w: &&Workload| w.processes.iter().any(|p| p.pid == pid);
    let Some(workload) = status.workloads.iter().find(has) else {
        let text = format!("the coordinator does not know process {pid}");
        if driver {
            report.fail(
                "registered",
                text,
                "the program has not called cuInit, or was refused: see its standard error and \
                 spillway events --no-follow",
            );
        } else {
            report.warn("registered", text, "it registers when it first uses CUDA");
        }
        return;
    };
    report.ok(
        "registered",
        format!(
            "registered as workload {}, {}",
            workload.name, workload.state
        ),
    );
    quota(report, status, workload);
    if let Some(why) = &workload.waiting_for {
        report.warn("waiting", format!("waits for {why}"), "see spillway status");
    }
    match &workload.not_swappable {
        None => report.ok("swap", "it can be swapped"),
        Some(why) if workload.swap == "never" => {
            report.ok("swap", format!("it is never swapped, as asked for: {why}"));
        }
        Some(why) => report.warn(
            "swap",
            format!("it cannot be swapped: {why}"),
            swap_remedy(why),
        ),
    }
    if workload.unknown_entry_points > 0 {
        report.warn(
            "entry_points",
            format!(
                "it asked for driver entry points that this library does not know ({}): what they \
                 do is not counted",
                status::unknown(workload)
            ),
            "use a newer libspillway.so",
        );
    }
}

/// The coordinator's reasons end with what to do; the ones that do not get it here.
fn swap_remedy(why: &str) -> &'static str {
    if why.contains("pool") || why.contains("host memory") {
        "give the host pool more space: spillwayd --pool"
    } else if why.contains("capture") {
        "wait until the capture ends"
    } else {
        "its memory stays on the device; the neighbours have to do with the rest"
    }
}

fn quota(report: &mut Report, status: &Status, workload: &Workload) {
    for share in &workload.devices {
        let device = status.devices.iter().find(|d| d.uuid == share.uuid);
        let text = format!(
            "device {}: request {}, limit {}, uses {}",
            share.index,
            format_bytes(share.request_bytes),
            format_bytes(share.limit_bytes),
            format_bytes(share.used_bytes)
        );
        if share.used_bytes > share.limit_bytes {
            report.warn(
                "quota",
                format!("{text}: more than the limit, so it gets no more"),
                "its overhead has grown: raise the limit",
            );
        } else if device.is_some_and(|d| share.limit_bytes >= d.room_bytes) {
            report.warn(
                "quota",
                format!("{text}: it may take all of the device"),
                "set SPILLWAY_LIMIT, or use spillway run --limit, unless that is meant",
            );
        } else {
            report.ok("quota", text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Level;
    use crate::model::{Device, DeviceShare, Process};

    fn node(change: impl FnOnce(&mut Workload)) -> Status {
        let mut workload = Workload {
            name: "w".into(),
            state: "resident".into(),
            swap: "auto".into(),
            devices: vec![DeviceShare {
                uuid: "GPU-1".into(),
                request_bytes: 1,
                limit_bytes: 2,
                ..DeviceShare::default()
            }],
            processes: vec![Process {
                pid: 7,
                ..Process::default()
            }],
            ..Workload::default()
        };
        change(&mut workload);
        Status {
            devices: vec![Device {
                uuid: "GPU-1".into(),
                room_bytes: 4,
                ..Device::default()
            }],
            workloads: vec![workload],
            ..Status::default()
        }
    }

    fn level(status: &Status, pid: i32, driver: bool, check: &str) -> Option<Level> {
        let mut report = Report::default();
        registered(&mut report, status, pid, driver);
        let found = report.0.iter().find(|c| c.check == check)?;
        Some(found.level)
    }

    #[test]
    fn a_known_process_under_quota_is_fine() {
        let status = node(|_| {});
        for check in ["registered", "quota", "swap"] {
            assert_eq!(level(&status, 7, true, check), Some(Level::Ok), "{check}");
        }
    }

    #[test]
    fn what_is_not_in_force_is_said() {
        let status = node(|_| {});
        assert_eq!(level(&status, 8, true, "registered"), Some(Level::Fail));
        assert_eq!(level(&status, 8, false, "registered"), Some(Level::Warn));
        let free = node(|w| w.devices[0].limit_bytes = 4);
        assert_eq!(level(&free, 7, true, "quota"), Some(Level::Warn));
        let over = node(|w| w.devices[0].used_bytes = 3);
        assert_eq!(level(&over, 7, true, "quota"), Some(Level::Warn));
        let stuck = node(|w| w.not_swappable = Some("MPS".into()));
        assert_eq!(level(&stuck, 7, true, "swap"), Some(Level::Warn));
        let never = node(|w| {
            w.not_swappable = Some("SPILLWAY_SWAP=never".into());
            w.swap = "never".into();
        });
        assert_eq!(level(&never, 7, true, "swap"), Some(Level::Ok));
        let unknown = node(|w| w.unknown_entry_points = 1);
        assert_eq!(level(&unknown, 7, true, "entry_points"), Some(Level::Warn));
    }
}
