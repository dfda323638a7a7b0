//! Where the built programs and libraries are.

use std::path::{Path, PathBuf};

/// What builds everything that the tests need.
const BUILD: &str = "cargo build -p spillway-interposer -p spillway-interposer-strict -p spillway-coordinator -p spillway-clients \
     -p spillway-simulator-cuda -p spillway-simulator-nvml -p spillway-conformance -p spillway-replay -p spillway-tests";

/// The folder with all artifacts: `SPILLWAY_TEST_BIN_DIR`, or the one of the build that the running
/// test belongs to.
#[must_use]
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("SPILLWAY_TEST_BIN_DIR").filter(|dir| !dir.is_empty()) {
        return dir.into();
    }
    let exe = std::env::current_exe().expect("the test's own path");
    let dir = exe.parent().expect("a folder");
    if dir.ends_with("deps") {
        dir.parent().expect("the profile's folder").to_owned()
    } else {
        dir.to_owned()
    }
}

/// A built program or library by its file name.
///
/// # Panics
/// It is not there: with the command that builds it.
#[must_use]
pub fn artifact(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(
        path.exists(),
        "{} is not there. Build it: {BUILD} (or name the folder with SPILLWAY_TEST_BIN_DIR)",
        path.display()
    );
    path
}

/// Links what is built here into a folder, laid out like an archive: the commands, the library, and programs that
/// tests and scripts run.
///
/// # Panics
/// Something is not there.
pub fn lay_out(base: &Path, programs: &[&str]) {
    let link = |folder: &str, name: &str| {
        std::fs::create_dir_all(base.join(folder)).expect("a folder");
        std::os::unix::fs::symlink(artifact(name), base.join(folder).join(name)).expect("a link");
    };
    link("bin", "spillway");
    link("bin", "spillwayd");
    link("lib", "libspillway.so");
    for name in programs {
        link("test-bin", name);
    }
}

/// The repository's root.
#[must_use]
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.join("../..")
        .canonicalize()
        .unwrap_or_else(|_| here.to_owned())
}
