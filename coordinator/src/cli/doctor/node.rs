//! `spillway doctor`: is this node ready, and is anything known to be wrong on it?

use std::ffi::CString;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use spillway_protocol::names::{api_socket, session_socket};
use spillway_protocol::{PROTOCOL_VERSION, format_bytes};

use super::Report;
use crate::cli::args::Place;
use crate::cli::out::Failure;
use crate::cli::{library, session, status};
use crate::model::Status;

/// Asks all questions about the node.
pub fn examine(report: &mut Report, place: &Place) {
    let dir = place.dir();
    run_dir(report, &dir, place.why());
    let session_path = session_socket(&dir);
    if socket(report, "session_socket", &session_path, 0o666) {
        match session::probe(&session_path) {
            Ok(()) => report.ok("session", "a coordinator answers on the session socket"),
            Err(error) => report.fail("session", error.to_string(), "start spillwayd again"),
        }
    }
    if socket(report, "api_socket", &api_socket(&dir), 0o600) {
        match settled(place) {
            Ok(status) => daemon(report, &status),
            Err(failure) => report.fail("api", failure.text(), "see the log of spillwayd"),
        }
    }
    match library::find(None, false) {
        Ok(path) => report.ok("library", format!("programs get {}", path.display())),
        Err(error) => report.fail(
            "library",
            error.to_string(),
            "install it beside this command",
        ),
    }
    loads(
        report,
        "nvml",
        "libnvidia-ml.so.1",
        "overhead is not measured, and a restarted coordinator cannot see what is free",
    );
    loads(
        report,
        "driver",
        "libcuda.so.1",
        "programs on this node find no GPU unless they bring their own",
    );
    huge_pages(report);
}

/// The daemon's status; one that has just started gets the moment that it needs to ask NVML.
fn settled(place: &Place) -> Result<Status, Failure> {
    let status = status::fetch(&place.client())?;
    let unasked = status.devices.iter().any(|d| d.nvml_used_bytes.is_none());
    if !unasked || status.uptime_seconds > 3.0 {
        return Ok(status);
    }
    std::thread::sleep(std::time::Duration::from_millis(1500));
    status::fetch(&place.client())
}

fn run_dir(report: &mut Report, dir: &Path, why: &str) {
    let shown = dir.display();
    match std::fs::metadata(dir) {
        Err(error) => report.fail(
            "run_dir",
            format!("run directory {shown} ({why}): {error}"),
            "start spillwayd, or name its directory with --run-dir or SPILLWAY_RUN_DIR",
        ),
        Ok(meta) if !meta.is_dir() => report.fail(
            "run_dir",
            format!("run directory {shown} ({why}) is not a directory"),
            "name another with --run-dir or SPILLWAY_RUN_DIR",
        ),
        Ok(meta) if meta.permissions().mode() & 0o022 != 0 => report.fail(
            "run_dir",
            format!("run directory {shown} can be written by others (mode {:o}): they could put their own sockets there", meta.permissions().mode() & 0o7777),
            format!("chmod go-w {shown}"),
        ),
        Ok(_) => report.ok("run_dir", format!("run directory {shown} ({why})")),
    }
}

/// `true`: it is a socket, and can be asked.
fn socket(report: &mut Report, check: &'static str, path: &Path, mode: u32) -> bool {
    let shown = path.display();
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) => {
            report.fail(check, format!("{shown}: {error}"), "start spillwayd");
            return false;
        }
    };
    if !meta.file_type().is_socket() {
        report.fail(
            check,
            format!("{shown} is not a socket"),
            "remove it and start spillwayd again",
        );
        return false;
    }
    let has = meta.permissions().mode() & 0o777;
    // The API's socket may have been given to a group.
    let excess = has & !mode & !(if mode == 0o600 { 0o060 } else { 0 });
    if excess != 0 || has & mode != mode {
        report.warn(
            check,
            format!(
                "{shown} has mode {has:o}, owner {}; it should be {mode:o}",
                meta.uid()
            ),
            format!("chmod {mode:o} {shown}"),
        );
    } else {
        report.ok(check, format!("{shown}, mode {has:o}"));
    }
    true
}

fn daemon(report: &mut Report, status: &Status) {
    let here = env!("CARGO_PKG_VERSION");
    report.ok(
        "api",
        format!("spillwayd {}, pid {}", status.version, status.pid),
    );
    if status.version != here {
        report.warn(
            "version",
            format!(
                "this command is version {here}, spillwayd is {}",
                status.version
            ),
            "install the same version of both, and start spillwayd again",
        );
    }
    if status.protocol != PROTOCOL_VERSION {
        report.warn(
            "protocol",
            format!(
                "this command speaks protocol {PROTOCOL_VERSION}, spillwayd {}",
                status.protocol
            ),
            "install the same version of both",
        );
    }
    if status.adopting {
        report.warn(
            "adopting",
            "spillwayd has just restarted and waits for running processes; nothing new is granted",
            "ask again in a few seconds",
        );
    }
    if status.devices.is_empty() {
        report.fail(
            "devices",
            "spillwayd serves no device",
            "see its log: it finds devices by NVML",
        );
    }
    for device in &status.devices {
        let text = format!(
            "device {} ({}): {} of {} can be granted",
            device.index,
            device.name,
            format_bytes(device.room_bytes),
            format_bytes(device.capacity_bytes)
        );
        match device.nvml_used_bytes {
            Some(_) => report.ok("devices", text),
            None => report.warn(
                "devices",
                format!("{text}; NVML does not tell how much is in use"),
                "overhead is not measured there: leave a larger reserve",
            ),
        }
    }
    pool(report, status);
    for workload in &status.workloads {
        if let Some(why) = workload
            .not_swappable
            .as_ref()
            .filter(|_| workload.swap != "never")
        {
            let pid = workload.processes.first().map_or(0, |p| p.pid);
            report.warn(
                "workloads",
                format!("workload {} cannot be swapped: {why}", workload.name),
                format!("spillway doctor {pid}"),
            );
        }
        if workload.unknown_entry_points > 0 {
            report.warn(
                "workloads",
                format!(
                    "workload {} asked for unknown driver entry points ({})",
                    workload.name,
                    status::unknown(workload)
                ),
                "use a newer libspillway.so",
            );
        }
    }
}

fn pool(report: &mut Report, status: &Status) {
    let pool = &status.pool;
    let text = format!(
        "host pool: {} of {} reserved",
        format_bytes(pool.reserved_bytes),
        format_bytes(pool.capacity_bytes)
    );
    if pool.capacity_bytes == 0 {
        report.warn(
            "pool",
            "the host pool has no space: nothing can be swapped",
            "free host memory, or spillwayd --pool",
        );
    } else if pool.reserved_bytes >= pool.capacity_bytes / 10 * 9 {
        report.warn(
            "pool",
            format!("{text}: what comes next may not be swappable"),
            "spillwayd --pool",
        );
    } else {
        report.ok("pool", text);
    }
}

/// Asks the loader, since only it knows all its paths.
fn loads(report: &mut Report, check: &'static str, library: &str, without: &str) {
    let Ok(name) = CString::new(library) else {
        return;
    };
    // SAFETY: `name` is a NUL-terminated string that outlives the call; the libraries named here
    // run no code of their own when loaded that could break an invariant of this process, and the
    // handle is closed at most once, right here.
    let loaded = unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL);
        !handle.is_null() && {
            libc::dlclose(handle);
            true
        }
    };
    if loaded {
        report.ok(check, format!("{library} can be loaded"));
    } else {
        report.warn(
            check,
            format!("{library} cannot be loaded: {without}"),
            "install the NVIDIA driver, or set LD_LIBRARY_PATH to where it is",
        );
    }
}

/// Faster to populate than ordinary pages, where the system has some.
fn huge_pages(report: &mut Report) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let meminfo = read("/proc/meminfo");
    let figure = |key: &str| -> u64 {
        let line = meminfo.lines().find(|line| line.starts_with(key));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        word.and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    let free = figure("HugePages_Free:") * figure("Hugepagesize:") * 1024;
    let shmem = read("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let shmem = shmem
        .split(['[', ']'])
        .nth(1)
        .unwrap_or("unknown")
        .to_owned();
    let text = match free {
        0 => "no free huge pages".to_owned(),
        bytes => format!("{} of free huge pages", format_bytes(bytes)),
    };
    report.ok(
        "huge_pages",
        format!("{text}; transparent ones for shared memory: {shmem} (huge pages make new host memory faster to get; swaps do not need them)"),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Level;

    fn level(report: &Report, check: &str) -> Option<Level> {
        report.0.iter().find(|c| c.check == check).map(|c| c.level)
    }

    #[test]
    fn an_empty_directory_is_no_coordinator() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let place = Place {
            run_dir: Some(dir.path().to_owned()),
        };
        let mut report = Report::default();
        examine(&mut report, &place);
        assert_eq!(level(&report, "run_dir"), Some(Level::Ok));
        assert_eq!(level(&report, "session_socket"), Some(Level::Fail));
        assert_eq!(level(&report, "api_socket"), Some(Level::Fail));
        assert_eq!(level(&report, "api"), None);
        assert!(!report.good());
    }

    #[test]
    fn modes_and_kinds_are_checked() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        };
        mode(dir.path(), 0o777);
        let mut report = Report::default();
        run_dir(&mut report, dir.path(), "test");
        assert_eq!(level(&report, "run_dir"), Some(Level::Fail));

        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("writable");
        let mut report = Report::default();
        assert!(!socket(&mut report, "api_socket", &file, 0o600));
        assert_eq!(level(&report, "api_socket"), Some(Level::Fail));

        let path = dir.path().join("api.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).expect("bind");
        for (has, wants, expected) in [
            (0o600, 0o600, Level::Ok),
            (0o660, 0o600, Level::Ok),
            (0o666, 0o600, Level::Warn),
            (0o666, 0o666, Level::Ok),
            (0o600, 0o666, Level::Warn),
        ] {
            mode(&path, has);
            let mut report = Report::default();
            assert!(socket(&mut report, "api_socket", &path, wants));
            assert_eq!(
                level(&report, "api_socket"),
                Some(expected),
                "{has:o} {wants:o}"
            );
        }
    }

    #[test]
    fn a_library_that_is_not_there_is_said() {
        let mut report = Report::default();
        loads(&mut report, "nvml", "libspillway-no-such.so.1", "x");
        loads(&mut report, "driver", "libc.so.6", "x");
        assert_eq!(level(&report, "nvml"), Some(Level::Warn));
        assert_eq!(level(&report, "driver"), Some(Level::Ok));
    }

    #[test]
    fn another_version_and_no_device_are_said() {
        let status = Status {
            version: "9.9.9".into(),
            protocol: 99,
            adopting: true,
            ..Status::default()
        };
        let mut report = Report::default();
        daemon(&mut report, &status);
        for check in ["version", "protocol", "adopting", "pool"] {
            assert_eq!(level(&report, check), Some(Level::Warn), "{check}");
        }
        assert_eq!(level(&report, "devices"), Some(Level::Fail));
    }
}
