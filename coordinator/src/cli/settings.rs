//! The settings of a program, read as the library will read them when it first uses CUDA: there a
//! bad value makes `cuInit` fail, so both `spillway run` and `spillway doctor` name it.

use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use spillway_protocol::MAX_NAME;
use spillway_protocol::names::{
    ENV_LIMIT, ENV_NO_COORDINATOR, ENV_PRIORITY, ENV_REQUEST, ENV_STRICT, ENV_SWAP, ENV_WORKLOAD,
};
use spillway_protocol::settings::Problem;

use super::args::{RunArgs, Swap};

/// How an environment is looked up.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// What the command line sets; it goes before the environment.
#[derive(Debug, Default)]
pub struct Options<'a> {
    pub request: Option<&'a str>,
    pub limit: Option<&'a str>,
    pub workload: Option<&'a str>,
    pub priority: Option<&'a str>,
    pub swap: Option<&'a str>,
    pub no_coordinator: bool,
    pub strict: bool,
}

impl<'a> From<&'a RunArgs> for Options<'a> {
    fn from(args: &'a RunArgs) -> Self {
        Self {
            request: args.request.as_deref(),
            limit: args.limit.as_deref(),
            workload: args.workload.as_deref(),
            priority: args.priority.as_deref(),
            swap: args.swap.map(|swap| match swap {
                Swap::Auto => "auto",
                Swap::Never => "never",
            }),
            no_coordinator: args.no_coordinator,
            strict: args.strict,
        }
    }
}

/// Settings that the library will take.
#[derive(Debug)]
pub struct Settings {
    /// What is set, by options or by the environment, as text.
    values: Vec<(&'static str, String)>,
    /// `SPILLWAY_DISABLE=1`: the library does nothing.
    pub disabled: bool,
    /// The library looks for no coordinator.
    pub no_coordinator: bool,
    /// The library stands in the driver's place.
    pub strict: bool,
}

impl Options<'_> {
    /// Each option with the variable that it stands for.
    fn all(&self) -> [(&'static str, &'static str, Option<&str>); 5] {
        [
            ("--request", ENV_REQUEST, self.request),
            ("--limit", ENV_LIMIT, self.limit),
            ("--workload", ENV_WORKLOAD, self.workload),
            ("--priority", ENV_PRIORITY, self.priority),
            ("--swap", ENV_SWAP, self.swap),
        ]
    }
}

impl Settings {
    /// Checks everything by the library's own rules, with the options before the environment.
    ///
    /// # Errors
    /// A line for each value that the library would refuse, naming who set it and what to write.
    pub fn check(options: &Options<'_>, environment: Lookup<'_>) -> Result<Self, Vec<String>> {
        let all = options.all();
        let get = |name: &str| {
            let option = all.iter().find(|(_, variable, _)| *variable == name);
            match option.and_then(|(_, _, value)| *value) {
                Some(text) => Some(text.to_owned()),
                // What is not UTF-8 counts as not set for the library, too.
                None => environment(name).and_then(|text| text.into_string().ok()),
            }
        };
        let read = spillway_protocol::Settings::read(&get);
        let mut problems: Vec<String> = match &read {
            Ok(_) => Vec::new(),
            Err(problems) => problems
                .iter()
                .map(|problem| options.named(problem))
                .collect(),
        };
        // An empty variable is as good as none; an empty option is a slip.
        if options.workload == Some("") {
            problems.push("--workload is empty: write a name, or leave it out".to_owned());
        }
        let (Ok(read), true) = (read, problems.is_empty()) else {
            return Err(problems);
        };
        Ok(Self {
            values: all
                .iter()
                .filter_map(|(_, variable, _)| Some((*variable, get(variable)?)))
                .filter(|(variable, text)| !(text.is_empty() && *variable == ENV_WORKLOAD))
                .collect(),
            disabled: read.disabled,
            no_coordinator: options.no_coordinator || read.no_coordinator,
            strict: options.strict || read.strict,
        })
    }

    /// What to set for a program: all of these, and a workload's name in any case.
    pub fn variables(&self, program: &OsStr) -> Vec<(&'static str, OsString)> {
        let values = self.values.iter();
        let mut variables: Vec<_> = values
            .map(|(variable, text)| (*variable, OsString::from(text)))
            .collect();
        if !variables.iter().any(|pair| pair.0 == ENV_WORKLOAD) {
            variables.push((ENV_WORKLOAD, default_name(program, unique()).into()));
        }
        if self.no_coordinator {
            variables.push((ENV_NO_COORDINATOR, "1".into()));
        }
        if self.strict {
            variables.push((ENV_STRICT, "1".into()));
        }
        variables
    }
}

impl Options<'_> {
    /// A problem, with the option in place of the variable where an option set it.
    fn named(&self, problem: &Problem) -> String {
        let mut text = problem.to_string();
        for (option, variable, value) in self.all() {
            if value.is_some() {
                text = text
                    .replace(&format!("{variable}="), &format!("{option} "))
                    .replace(&format!("{variable}:"), &format!("{option}:"));
            }
        }
        text
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

#[cfg(test)]
mod tests {
    use super::*;
    use spillway_protocol::names::{ENV_DISABLE, valid_workload_name};

    fn check(options: &Options<'_>, env: &[(&str, &str)]) -> Result<Settings, Vec<String>> {
        Settings::check(options, &|name| {
            let found = env.iter().find(|pair| pair.0 == name)?;
            Some(found.1.into())
        })
    }

    fn get(settings: &Settings, name: &str) -> Option<String> {
        let variables = settings.variables(OsStr::new("/usr/bin/my prog"));
        let found = variables.into_iter().find(|pair| pair.0 == name)?;
        found.1.into_string().ok()
    }

    #[test]
    fn options_win_over_the_environment() {
        let options = Options {
            request: Some("1GiB"),
            swap: Some("never"),
            ..Options::default()
        };
        let env = [(ENV_REQUEST, "9GiB"), (ENV_LIMIT, "2GiB")];
        let settings = check(&options, &env).expect("good values");
        assert_eq!(get(&settings, ENV_REQUEST).as_deref(), Some("1GiB"));
        assert_eq!(get(&settings, ENV_LIMIT).as_deref(), Some("2GiB"));
        assert_eq!(get(&settings, ENV_SWAP).as_deref(), Some("never"));
        assert!(!settings.no_coordinator && !settings.disabled);
        assert_eq!(get(&settings, ENV_NO_COORDINATOR), None);
    }

    #[test]
    fn bad_values_name_who_set_them_and_what_they_are() {
        for (env, says) in [
            (
                &[(ENV_LIMIT, "24")][..],
                "SPILLWAY_LIMIT: \"24\" has no unit",
            ),
            (&[(ENV_LIMIT, "")], "SPILLWAY_LIMIT: cannot read"),
            (
                &[(ENV_REQUEST, "2GiB"), (ENV_LIMIT, "1GiB")],
                "SPILLWAY_REQUEST=2GiB is above SPILLWAY_LIMIT=1GiB",
            ),
            (&[(ENV_REQUEST, "50%"), (ENV_LIMIT, "0.4")], "is above"),
            (
                &[(ENV_PRIORITY, "high")],
                "SPILLWAY_PRIORITY=high: write an integer",
            ),
            (&[(ENV_SWAP, "no")], "SPILLWAY_SWAP=no: write auto or never"),
            (
                &[(ENV_WORKLOAD, "a b")],
                "SPILLWAY_WORKLOAD=a b is no workload name",
            ),
            (
                &[(ENV_DISABLE, "yes")],
                "SPILLWAY_DISABLE=yes: write 1 or 0",
            ),
            (&[("NVIDIA_GPU_MEMORY_LIMIT", "4g")], "whole MiB"),
            (
                &[("CUDA_DEVICE_MEMORY_LIMIT", "4")],
                "CUDA_DEVICE_MEMORY_LIMIT: ",
            ),
            (
                &[("CUDA_DEVICE_MEMORY_LIMIT_3", "x")],
                "CUDA_DEVICE_MEMORY_LIMIT_3: ",
            ),
        ] {
            let problems = check(&Options::default(), env).expect_err(says);
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains(says), "{says}: {problems:?}");
        }
        let options = Options {
            limit: Some("1.5"),
            priority: Some("x"),
            workload: Some(""),
            ..Options::default()
        };
        let problems = check(&options, &[]).expect_err("three problems");
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].contains("--limit"), "{problems:?}");
    }

    #[test]
    fn what_the_library_takes_is_taken() {
        for env in [
            &[(ENV_WORKLOAD, ""), (ENV_SWAP, ""), (ENV_DISABLE, "0")][..],
            &[
                (ENV_LIMIT, "1GiB"),
                ("NVIDIA_GPU_MEMORY_LIMIT", "not read then"),
            ],
            &[
                ("NVIDIA_GPU_MEMORY_LIMIT", "64"),
                ("CUDA_DEVICE_MEMORY_LIMIT", "not read then"),
            ],
            &[
                ("CUDA_DEVICE_MEMORY_LIMIT", "4g"),
                ("CUDA_DEVICE_MEMORY_LIMIT_0", "40%"),
            ],
            &[(ENV_PRIORITY, " -3 ")],
        ] {
            assert!(check(&Options::default(), env).is_ok(), "{env:?}");
        }
        let settings = check(
            &Options::default(),
            &[(ENV_DISABLE, "1"), (ENV_NO_COORDINATOR, "y")],
        );
        assert!(settings.is_ok_and(|s| s.disabled && s.no_coordinator));
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
        let settings = check(&Options::default(), &[]).expect("nothing is good");
        let name = get(&settings, ENV_WORKLOAD);
        assert!(name.is_some_and(|name| name.starts_with("my-prog-")));
    }
}
