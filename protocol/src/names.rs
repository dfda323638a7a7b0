//! Names that people type, and the files that both sides look for.

use std::path::{Path, PathBuf};

/// Guaranteed share: `24GiB`, `40%`, ...
pub const ENV_REQUEST: &str = "SPILLWAY_REQUEST";
/// Burst ceiling.
pub const ENV_LIMIT: &str = "SPILLWAY_LIMIT";
/// Name of the workload; unique on the node.
pub const ENV_WORKLOAD: &str = "SPILLWAY_WORKLOAD";
/// Integer; higher wins; default 0.
pub const ENV_PRIORITY: &str = "SPILLWAY_PRIORITY";
/// `auto` or `never`.
pub const ENV_SWAP: &str = "SPILLWAY_SWAP";
/// `1` turns the library into a pure pass-through.
pub const ENV_DISABLE: &str = "SPILLWAY_DISABLE";
/// `1`: driver entry points that the library does not know are refused. See also `spillway run --strict`.
pub const ENV_STRICT: &str = "SPILLWAY_STRICT";
/// For the strict library: the driver's file, an absolute path. Set by `spillway run --strict`.
pub const ENV_DRIVER_LIBRARY: &str = "SPILLWAY_DRIVER_LIBRARY";
/// Log level of the library, on stderr: `off`, `error`, `warn` (default), `info`, `debug`.
pub const ENV_LOG: &str = "SPILLWAY_LOG";
/// Records the process's driver calls into this file; `%p` stands for the process id. See `docs/trace.md`.
pub const ENV_TRACE: &str = "SPILLWAY_TRACE";
/// Overrides the run directory.
pub const ENV_RUN_DIR: &str = "SPILLWAY_RUN_DIR";
/// Set by `spillway run --no-coordinator`: do not look for a coordinator and do not warn.
pub const ENV_NO_COORDINATOR: &str = "SPILLWAY_NO_COORDINATOR";

/// The default run directory of a root daemon.
pub const RUN_DIR: &str = "/run/spillway";

/// The session socket below a run directory. Its directory is what gets mounted into a container.
#[must_use]
pub fn session_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("session").join("session.sock")
}

/// The API socket below a run directory.
#[must_use]
pub fn api_socket(run_dir: &Path) -> PathBuf {
    run_dir.join("api.sock")
}

/// Where a process looks for a run directory: the override alone if there is one, else
/// `$XDG_RUNTIME_DIR/spillway` if `probe` says that a socket is there, else [`RUN_DIR`].
pub fn find_run_dir(
    override_dir: Option<&str>,
    xdg_runtime_dir: Option<&str>,
    probe: impl Fn(&Path) -> bool,
) -> PathBuf {
    if let Some(dir) = override_dir.filter(|d| !d.is_empty()) {
        return PathBuf::from(dir);
    }
    if let Some(dir) = xdg_runtime_dir.filter(|d| !d.is_empty()) {
        let dir = Path::new(dir).join("spillway");
        if probe(&dir) {
            return dir;
        }
    }
    PathBuf::from(RUN_DIR)
}

/// A workload name is 1 to [`crate::MAX_NAME`] bytes of `[A-Za-z0-9._-]`, `/` and `:`, not starting
/// with a punctuation mark, so that it can stand in a URL path (percent-encoded), a metric label and
/// a table without surprises.
#[must_use]
pub fn valid_workload_name(name: &str) -> bool {
    let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/' | b':');
    !name.is_empty()
        && name.len() <= crate::MAX_NAME
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_dir_order() {
        let yes = |_: &Path| true;
        let no = |_: &Path| false;
        assert_eq!(find_run_dir(Some("/x"), Some("/y"), yes), Path::new("/x"));
        assert_eq!(
            find_run_dir(None, Some("/y"), yes),
            Path::new("/y/spillway")
        );
        assert_eq!(find_run_dir(None, Some("/y"), no), Path::new(RUN_DIR));
        assert_eq!(find_run_dir(Some(""), None, yes), Path::new(RUN_DIR));
    }

    #[test]
    fn workload_names() {
        assert!(valid_workload_name("mistral-7b"));
        assert!(valid_workload_name("pod/abc:1"));
        assert!(!valid_workload_name(""));
        assert!(!valid_workload_name("-x"));
        assert!(!valid_workload_name("a b"));
        assert!(!valid_workload_name(&"a".repeat(129)));
    }
}
