//! `spillway run`: everything that can be wrong is said before the program starts, since afterwards
//! nobody reads it; then this process becomes the program and keeps its pid.

use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use spillway_protocol::names::{
    ENV_DISABLE, ENV_LIMIT, ENV_NO_COORDINATOR, ENV_PRIORITY, ENV_REQUEST, ENV_RUN_DIR, ENV_SWAP,
    ENV_WORKLOAD, session_socket, valid_workload_name,
};
use spillway_protocol::{Amount, MAX_NAME, parse_amount};

use super::args::{Place, RunArgs, Swap};
use super::library;
use super::out::{Failure, warn};
use super::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_RUN, session};

/// Becomes the program; returns only on failure.
pub fn run(place: &Place, args: &RunArgs) -> Result<(), Failure> {
    let Some((program, arguments)) = args.program.split_first() else {
        return Err(refuse("no program: write spillway run -- PROGRAM ..."));
    };
    let settings = Settings::check(args, program, |name| std::env::var_os(name))?;
    let library = library::find(args.library.as_deref()).map_err(refuse)?;
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
    if std::env::var_os(ENV_DISABLE).is_some_and(|value| value == "1") {
        warn("SPILLWAY_DISABLE=1 is set: the library will do nothing; unset it to have the limit");
    }
    if let Some(text) = resolve(program).and_then(|path| unpreloadable(&path)) {
        warn(&text);
    }
    let mut command = std::process::Command::new(program);
    command.args(arguments).envs(settings.variables).env(
        "LD_PRELOAD",
        preload(&library, std::env::var_os("LD_PRELOAD")),
    );
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

/// What the library will read, checked as it will check it.
#[derive(Debug, PartialEq, Eq)]
struct Settings {
    /// To be set for the program, beyond what it inherits.
    variables: Vec<(&'static str, OsString)>,
    no_coordinator: bool,
}

impl Settings {
    fn check(
        args: &RunArgs,
        program: &OsStr,
        inherited: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Failure> {
        let value = |option: Option<&str>, flag, variable: &'static str| {
            Value::of(option, flag, variable, inherited(variable))
        };
        let request = value(args.request.as_deref(), "--request", ENV_REQUEST)?;
        let limit = value(args.limit.as_deref(), "--limit", ENV_LIMIT)?;
        let swap = args.swap.map(|swap| match swap {
            Swap::Auto => "auto",
            Swap::Never => "never",
        });
        let swap = value(swap, "--swap", ENV_SWAP)?;
        let priority = value(args.priority.as_deref(), "--priority", ENV_PRIORITY)?;
        let mut workload = value(args.workload.as_deref(), "--workload", ENV_WORKLOAD)?;

        let amounts = (amount(request.as_ref())?, amount(limit.as_ref())?);
        let over = match amounts {
            (Some(Amount::Bytes(request)), Some(Amount::Bytes(limit))) => request > limit,
            (Some(Amount::Fraction(request)), Some(Amount::Fraction(limit))) => request > limit,
            // A share against bytes: only the device can tell.
            _ => false,
        };
        if let (true, (Some(request), Some(limit))) = (over, (&request, &limit)) {
            return Err(refuse(format!(
                "{request} is above {limit}: lower the request or raise the limit"
            )));
        }
        if let Some(priority) = &priority
            && priority.text.trim().parse::<i32>().is_err()
        {
            return Err(refuse(format!("{priority} is no integer")));
        }
        if let Some(swap) = &swap
            && !matches!(swap.text.as_str(), "auto" | "never")
        {
            return Err(refuse(format!("{swap}: write auto or never")));
        }
        match &mut workload {
            Some(workload) if !valid_workload_name(&workload.text) => {
                return Err(refuse(format!(
                    "{workload} is no workload name: 1 to {MAX_NAME} letters, digits, or any of \
                     . _ - / : after the first"
                )));
            }
            Some(_) => {}
            none => {
                *none = Some(Value {
                    text: default_name(program, unique()),
                    variable: ENV_WORKLOAD,
                    from: ENV_WORKLOAD,
                });
            }
        }
        let no_coordinator =
            args.no_coordinator || inherited(ENV_NO_COORDINATOR).is_some_and(|v| v == "1");
        let mut variables: Vec<_> = [request, limit, workload, priority, swap]
            .into_iter()
            .flatten()
            .map(|value| (value.variable, OsString::from(value.text)))
            .collect();
        if no_coordinator {
            variables.push((ENV_NO_COORDINATOR, "1".into()));
        }
        Ok(Self {
            variables,
            no_coordinator,
        })
    }
}

/// A setting, and who made it.
#[derive(Debug)]
struct Value {
    text: String,
    variable: &'static str,
    from: &'static str,
}

impl Value {
    fn of(
        option: Option<&str>,
        flag: &'static str,
        variable: &'static str,
        inherited: Option<OsString>,
    ) -> Result<Option<Self>, Failure> {
        if let Some(text) = option {
            let text = text.to_owned();
            return Ok(Some(Self {
                text,
                variable,
                from: flag,
            }));
        }
        let Some(value) = inherited.filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        let text = value.into_string();
        let text = text.map_err(|raw| refuse(format!("{variable}={raw:?} is not UTF-8")))?;
        Ok(Some(Self {
            text,
            variable,
            from: variable,
        }))
    }
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let between = if self.from.starts_with('-') { ' ' } else { '=' };
        write!(f, "{}{between}{}", self.from, self.text)
    }
}

fn amount(value: Option<&Value>) -> Result<Option<Amount>, Failure> {
    let Some(value) = value else { return Ok(None) };
    match parse_amount(&value.text) {
        Ok(amount) => Ok(Some(amount)),
        Err(error) => Err(refuse(format!("{}: {error}", value.from))),
    }
}

/// The program's name, made fit for a workload's, and an id.
fn default_name(program: &OsStr, id: u32) -> String {
    let base = Path::new(program).file_name().unwrap_or(program);
    let base = base.to_string_lossy();
    let fit = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '-'
        }
    };
    let name: String = base.chars().map(fit).take(MAX_NAME - 9).collect();
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    let name = if name.is_empty() { "program" } else { name };
    format!("{name}-{id:08x}")
}

#[expect(clippy::cast_possible_truncation, reason = "any 32 of the bits do")]
fn unique() -> u32 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish() as u32
}

/// `LD_PRELOAD` with the library in front and no other copy of it behind.
fn preload(library: &Path, before: Option<OsString>) -> OsString {
    let mut list = library.as_os_str().as_bytes().to_vec();
    let before = before.unwrap_or_default();
    for entry in before.as_bytes().split(|b| matches!(b, b':' | b' ')) {
        let name = Path::new(OsStr::from_bytes(entry)).file_name();
        if entry.is_empty() || name == Some(OsStr::new(library::FILE_NAME)) {
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

    fn args() -> RunArgs {
        RunArgs {
            request: None,
            limit: None,
            workload: None,
            priority: None,
            swap: None,
            no_coordinator: false,
            library: None,
            program: vec!["prog".into()],
        }
    }

    fn check(args: &RunArgs, env: &[(&str, &str)]) -> Result<Settings, Failure> {
        Settings::check(args, OsStr::new("/usr/bin/my prog"), |name| {
            let found = env.iter().find(|pair| pair.0 == name)?;
            Some(found.1.into())
        })
    }

    fn get(settings: &Settings, name: &str) -> Option<String> {
        let found = settings.variables.iter().find(|pair| pair.0 == name)?;
        found.1.clone().into_string().ok()
    }

    #[test]
    fn options_win_over_the_environment() {
        let mut args = args();
        args.request = Some("1GiB".into());
        args.swap = Some(Swap::Never);
        let env = [(ENV_REQUEST, "9GiB"), (ENV_LIMIT, "2GiB")];
        let settings = check(&args, &env).expect("good values");
        assert_eq!(get(&settings, ENV_REQUEST).as_deref(), Some("1GiB"));
        assert_eq!(get(&settings, ENV_LIMIT).as_deref(), Some("2GiB"));
        assert_eq!(get(&settings, ENV_SWAP).as_deref(), Some("never"));
        assert!(!settings.no_coordinator);
        assert_eq!(get(&settings, ENV_NO_COORDINATOR), None);
    }

    #[test]
    fn bad_values_name_who_set_them_and_what_they_are() {
        for (env, says) in [
            (
                [(ENV_LIMIT, "24"), ("", "")],
                "SPILLWAY_LIMIT: \"24\" has no unit",
            ),
            (
                [(ENV_REQUEST, "2GiB"), (ENV_LIMIT, "1GiB")],
                "SPILLWAY_REQUEST=2GiB is above SPILLWAY_LIMIT=1GiB",
            ),
            ([(ENV_REQUEST, "50%"), (ENV_LIMIT, "0.4")], "is above"),
            (
                [(ENV_PRIORITY, "high"), ("", "")],
                "SPILLWAY_PRIORITY=high is no integer",
            ),
            (
                [(ENV_SWAP, "no"), ("", "")],
                "SPILLWAY_SWAP=no: write auto or never",
            ),
            (
                [(ENV_WORKLOAD, "a b"), ("", "")],
                "SPILLWAY_WORKLOAD=a b is no workload name",
            ),
        ] {
            let failure = check(&args(), &env).expect_err(says);
            let text = format!("{failure:?}");
            assert!(text.replace("\\\"", "\"").contains(says), "{says}: {text}");
            assert!(text.contains("code: 125"), "{text}");
        }
        let mut args = args();
        args.limit = Some("1.5".into());
        let text = format!("{:?}", check(&args, &[]).expect_err("a bad share"));
        assert!(text.contains("--limit"), "{text}");
    }

    #[test]
    fn a_name_is_always_set_and_valid() {
        for program in ["/usr/bin/python3", "a b", "...", "ü", "/", &"x".repeat(500)] {
            let name = default_name(OsStr::new(program), 0x1f);
            assert!(valid_workload_name(&name), "{program}: {name}");
            assert!(name.ends_with("-0000001f"), "{name}");
        }
        assert_eq!(
            default_name(OsStr::new("./serve.py"), 1),
            "serve.py-00000001"
        );
        let name = get(&check(&args(), &[]).expect("good"), ENV_WORKLOAD);
        assert!(name.is_some_and(|name| name.starts_with("my-prog-")));
    }

    #[test]
    fn the_library_goes_first_and_once() {
        let lib = Path::new("/a/libspillway.so");
        assert_eq!(preload(lib, None), "/a/libspillway.so");
        let before = "/x/libfoo.so /old/libspillway.so::/y.so".into();
        assert_eq!(
            preload(lib, Some(before)),
            "/a/libspillway.so:/x/libfoo.so:/y.so"
        );
    }
}
