//! The settings of a program, read as the library will read them when it first uses CUDA: there a
//! bad value makes `cuInit` fail, so both `spillway run` and `spillway doctor` name it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use spillway_protocol::names::{
    ENV_DISABLE, ENV_LIMIT, ENV_NO_COORDINATOR, ENV_PRIORITY, ENV_REQUEST, ENV_SWAP, ENV_WORKLOAD,
    valid_workload_name,
};
use spillway_protocol::{Amount, MAX_DEVICES, MAX_NAME, SizeError, parse_amount};

use super::args::{RunArgs, Swap};

/// Others' names for the same, read where ours are not set.
const WHOLE_MIB: [&str; 2] = ["NVIDIA_GPU_MEMORY_REQUEST", "NVIDIA_GPU_MEMORY_LIMIT"];
const OTHER_LIMIT: &str = "CUDA_DEVICE_MEMORY_LIMIT";

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
        }
    }
}

/// Settings that the library will take.
#[derive(Debug)]
pub struct Settings {
    values: Vec<Value>,
    /// `SPILLWAY_DISABLE=1`: the library does nothing.
    pub disabled: bool,
    /// The library looks for no coordinator.
    pub no_coordinator: bool,
}

/// A setting, and who made it.
#[derive(Debug)]
struct Value {
    text: String,
    variable: &'static str,
    from: &'static str,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let between = if self.from.starts_with('-') { ' ' } else { '=' };
        write!(f, "{}{between}{}", self.from, self.text)
    }
}

impl Settings {
    /// Checks everything.
    ///
    /// # Errors
    /// A line for each value that the library would refuse, naming who set it and what to write.
    pub fn check(options: &Options<'_>, environment: Lookup<'_>) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let value = |option: Option<&str>, from, variable: &'static str| {
            let set = |text: &str, from| Value {
                text: text.to_owned(),
                variable,
                from,
            };
            // What is not UTF-8 counts as not set for the library, too.
            let inherited = environment(variable).and_then(|text| text.into_string().ok());
            option
                .map(|text| set(text, from))
                .or_else(|| inherited.map(|text| set(&text, variable)))
        };
        let request = value(options.request, "--request", ENV_REQUEST);
        let limit = value(options.limit, "--limit", ENV_LIMIT);
        let priority = value(options.priority, "--priority", ENV_PRIORITY);
        let swap = value(options.swap, "--swap", ENV_SWAP).filter(|v| !v.text.is_empty());
        let name = value(options.workload, "--workload", ENV_WORKLOAD);
        let workload = name.filter(|v| !(v.text.is_empty() && v.from == ENV_WORKLOAD));

        let mut amount = |value: Option<&Value>| {
            let value = value?;
            let amount = parse_amount(&value.text);
            amount
                .map_err(|error| problems.push(format!("{}: {error}", value.from)))
                .ok()
        };
        let amounts = (amount(request.as_ref()), amount(limit.as_ref()));
        let over = match amounts {
            (Some(Amount::Bytes(request)), Some(Amount::Bytes(limit))) => request > limit,
            (Some(Amount::Fraction(request)), Some(Amount::Fraction(limit))) => request > limit,
            // A share against bytes: only the device can tell.
            _ => false,
        };
        if let (true, Some(request), Some(limit)) = (over, &request, &limit) {
            problems.push(format!(
                "{request} is above {limit}: lower the request or raise the limit"
            ));
        }
        let mut require = |value: Option<&Value>, valid: &dyn Fn(&str) -> bool, says: &str| {
            if let Some(value) = value.filter(|value| !valid(&value.text)) {
                problems.push(format!("{value}{says}"));
            }
        };
        let integer = |text: &str| text.trim().parse::<i32>().is_ok();
        require(priority.as_ref(), &integer, ": write an integer");
        let known = |text: &str| matches!(text, "auto" | "never");
        require(swap.as_ref(), &known, ": write auto or never");
        let says = format!(
            " is no workload name: 1 to {MAX_NAME} letters, digits, or any of . _ - / : after the \
             first"
        );
        require(workload.as_ref(), &valid_workload_name, &says);
        let text = |name: &str| environment(name).and_then(|text| text.into_string().ok());
        let disabled = match text(ENV_DISABLE).as_deref() {
            None | Some("" | "0") => false,
            Some("1") => true,
            Some(other) => {
                problems.push(format!("{ENV_DISABLE}={other}: write 1 or 0"));
                false
            }
        };
        aliases(&mut problems, &text, (request.is_none(), limit.is_none()));
        if !problems.is_empty() {
            return Err(problems);
        }
        let alone = text(ENV_NO_COORDINATOR).is_some_and(|v| !v.is_empty() && v != "0");
        Ok(Self {
            values: [request, limit, workload, priority, swap]
                .into_iter()
                .flatten()
                .collect(),
            disabled,
            no_coordinator: options.no_coordinator || alone,
        })
    }

    /// What to set for a program: all of these, and a workload's name in any case.
    pub fn variables(&self, program: &OsStr) -> Vec<(&'static str, OsString)> {
        let values = self.values.iter();
        let mut variables: Vec<_> = values
            .map(|v| (v.variable, OsString::from(&v.text)))
            .collect();
        if !variables.iter().any(|pair| pair.0 == ENV_WORKLOAD) {
            variables.push((ENV_WORKLOAD, default_name(program, unique()).into()));
        }
        if self.no_coordinator {
            variables.push((ENV_NO_COORDINATOR, "1".into()));
        }
        variables
    }
}

/// The values that others' names give; `wanted`: request, limit are not set by our own.
fn aliases(
    problems: &mut Vec<String>,
    text: &dyn Fn(&str) -> Option<String>,
    wanted: (bool, bool),
) {
    let mut limited = false;
    for (name, wanted) in WHOLE_MIB.into_iter().zip([wanted.0, wanted.1]) {
        let Some(value) = text(name).filter(|_| wanted) else {
            continue;
        };
        limited |= name == WHOLE_MIB[1];
        let mib = value.trim().parse::<u64>().ok();
        if mib.is_none_or(|mib| mib == 0 || mib.checked_mul(1 << 20).is_none()) {
            problems.push(format!(
                "{name}={value}: write whole MiB, for example 24576"
            ));
        }
    }
    if !wanted.1 || limited {
        return;
    }
    let single = (0..MAX_DEVICES).map(|device| format!("{OTHER_LIMIT}_{device}"));
    for name in std::iter::once(OTHER_LIMIT.to_owned()).chain(single) {
        let read = |value: String| -> Result<Amount, SizeError> { parse_amount(&value) };
        if let Some(Err(error)) = text(&name).map(read) {
            problems.push(format!("{name}: {error}"));
        }
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
