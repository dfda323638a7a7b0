//! Which run directory is meant, as the library decides it too.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use spillway_protocol::names::{ENV_RUN_DIR, api_socket, find_run_dir, session_socket};

use super::args::Place;
use crate::api::Client;

/// Whether a socket is at the path.
pub fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
}

impl Place {
    /// The run directory, absolute.
    pub fn dir(&self) -> PathBuf {
        let dir = self.run_dir.clone().unwrap_or_else(|| {
            let var = |name| std::env::var(name).ok();
            find_run_dir(
                var(ENV_RUN_DIR).as_deref(),
                var("XDG_RUNTIME_DIR").as_deref(),
                |dir| is_socket(&session_socket(dir)),
            )
        });
        std::path::absolute(&dir).unwrap_or(dir)
    }

    /// Who decided on the directory, for people.
    pub fn why(&self) -> &'static str {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if self.run_dir.is_some() {
            "by --run-dir"
        } else if set(ENV_RUN_DIR) {
            "by SPILLWAY_RUN_DIR"
        } else if self.dir() == Path::new(spillway_protocol::names::RUN_DIR) {
            "the default"
        } else {
            "by XDG_RUNTIME_DIR"
        }
    }

    /// A client of its `api.sock`.
    pub fn client(&self) -> Client {
        Client::new(api_socket(&self.dir()))
    }
}
