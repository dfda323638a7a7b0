//! `spillway run`: everything that can be wrong is said before the program starts, since afterwards
//! nobody reads it; then this process becomes the program and keeps its pid.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use spillway_protocol::driver_file;
use spillway_protocol::names::{ENV_DRIVER_LIBRARY, ENV_RUN_DIR, session_socket};

use super::args::{Place, RunArgs};
use super::library;
use super::out::{Failure, warn};
use super::settings::Settings;
use super::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_RUN, session};

/// Becomes the program; returns only on failure.
pub fn run(place: &Place, args: &RunArgs) -> Result<(), Failure> {
    let Some((program, arguments)) = args.program.split_first() else {
        return Err(refuse("no program: write spillway run -- PROGRAM ..."));
    };
    let settings = Settings::check(&args.into(), &|name| std::env::var_os(name))
        .map_err(|problems| refuse(problems.join("\nspillway: ")))?;
    let library = library::find(args.library.as_deref(), settings.strict).map_err(refuse)?;
    let driver = if settings.strict && !settings.disabled {
        Some(driver().map_err(refuse)?)
    } else {
        None
    };
    if !settings.no_coordinator {
        let socket = session_socket(&place.dir());
        session::probe(&socket).map_err(|error| {
            refuse(format!(
                "no coordinator: {error}\n\
                 spillway: or use --no-coordinator: the limit then holds for each process alone, \
                 and nothing is swapped"
            ))
        })?;
    }
    if settings.disabled {
        warn("SPILLWAY_DISABLE=1 is set: the library will do nothing; unset it to have the limit");
    }
    if let Some(text) = resolve(program).and_then(|path| unpreloadable(&path)) {
        warn(&text);
    }
    let mut command = std::process::Command::new(program);
    command
        .args(arguments)
        .envs(settings.variables(program))
        .env(
            "LD_PRELOAD",
            preload(&library, std::env::var_os("LD_PRELOAD")),
        );
    if let Some(driver) = driver {
        command.env(ENV_DRIVER_LIBRARY, driver);
    }
    if place.run_dir.is_some() || std::env::var_os(ENV_RUN_DIR).is_some_and(|v| !v.is_empty()) {
        // Absolute: the program may change its directory before it uses CUDA.
        command.env(ENV_RUN_DIR, place.dir());
    }
    Err(not_started(program, &command.exec()))
}

fn refuse(text: impl std::fmt::Display) -> Failure {
    Failure::new(EXIT_RUN, text)
}

fn not_started(program: &OsStr, error: &io::Error) -> Failure {
    let name = program.display();
    match error.kind() {
        io::ErrorKind::NotFound if resolve(program).is_some() => Failure::new(
            EXIT_NOT_FOUND,
            format!("{name}: the interpreter that it names was not found"),
        ),
        io::ErrorKind::NotFound => {
            Failure::new(EXIT_NOT_FOUND, format!("{name}: program not found"))
        }
        _ => Failure::new(
            EXIT_NOT_EXECUTABLE,
            format!("{name}: cannot be executed: {error}"),
        ),
    }
}

/// The driver's file for strict mode: where its name means our library, the driver is opened by its path.
/// The one that the environment names is never replaced by another.
fn driver() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os(ENV_DRIVER_LIBRARY).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return match driver_file::check(&path) {
            Ok(()) => Ok(path),
            Err(why) => Err(format!("{ENV_DRIVER_LIBRARY}={} {why}", path.display())),
        };
    }
    let cache = std::fs::read(driver_file::CACHE).unwrap_or_default();
    let folders = std::env::var_os("LD_LIBRARY_PATH");
    let places = driver_file::candidates(folders.as_deref(), &cache);
    let found = places
        .into_iter()
        .find(|path| driver_file::check(path).is_ok());
    found.ok_or_else(|| {
        format!(
            "--strict: no driver: no {} in LD_LIBRARY_PATH, in {} or in the usual folders; name its \
             file with {ENV_DRIVER_LIBRARY}",
            driver_file::SONAME,
            driver_file::CACHE
        )
    })
}

/// `LD_PRELOAD` with the library in front and no other copy of it, nor the other of our two, behind.
fn preload(library: &Path, before: Option<OsString>) -> OsString {
    let mut list = library.as_os_str().as_bytes().to_vec();
    let before = before.unwrap_or_default();
    for entry in before.as_bytes().split(|b| matches!(b, b':' | b' ')) {
        let name = Path::new(OsStr::from_bytes(entry)).file_name();
        let ours = [library::FILE_NAME, library::STRICT_FILE_NAME];
        if entry.is_empty() || ours.iter().any(|ours| name == Some(OsStr::new(ours))) {
            continue;
        }
        list.push(b':');
        list.extend_from_slice(entry);
    }
    OsString::from_vec(list)
}

/// Where `exec` will find the program.
fn resolve(program: &OsStr) -> Option<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(program)).filter(|path| path.exists());
    }
    let path = std::env::var_os("PATH")?;
    let mut candidates = std::env::split_paths(&path).map(|dir| dir.join(program));
    candidates.find(|candidate| {
        use nix::unistd::{AccessFlags, access};
        candidate.is_file() && access(candidate, AccessFlags::X_OK).is_ok()
    })
}

/// Why the loader would not preload anything into this program, if so.
fn unpreloadable(path: &Path) -> Option<String> {
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    let shown = path.display();
    let mode = path.metadata().ok()?.permissions().mode();
    if mode & 0o6000 != 0 && !nix::unistd::geteuid().is_root() {
        return Some(format!(
            "{shown} is set-uid or set-gid: the loader preloads nothing into it, so no limit holds"
        ));
    }
    let mut start = Vec::new();
    std::fs::File::open(path)
        .ok()?
        .take(64 << 10)
        .read_to_end(&mut start)
        .ok()?;
    let elf = library::read_elf(&start)?;
    if !elf.native() {
        return Some(format!(
            "{shown} is for another machine: the library will not load into it, so no limit holds"
        ));
    }
    (!elf.interpreted).then(|| {
        format!("{shown} is statically linked: nothing can be preloaded into it, so no limit holds")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_goes_first_and_once() {
        let lib = Path::new("/a/libspillway.so");
        assert_eq!(preload(lib, None), "/a/libspillway.so");
        let before = "/x/libfoo.so /old/libspillway.so::/y.so:/a/libspillway_strict.so".into();
        assert_eq!(
            preload(lib, Some(before)),
            "/a/libspillway.so:/x/libfoo.so:/y.so"
        );
    }
}
