//! Parts of `scripts/gpu-check` that can be tried where there is no GPU: its bench of single calls, the traces of
//! PyTorch, with a program in PyTorch's place that answers the same lines, and that it ends with all it started.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use spillway_tests::{Place, Shot, lay_out, repository};

const PROGRAMS: [&str; 4] = [
    "model-server",
    "bench-hooks",
    "bench-alloc",
    "libcuda_free.so",
];

/// What is built here, laid out like an archive; none where there is no Python.
fn place(name: &str) -> Option<Place> {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: no python3");
        return None;
    }
    let place = Place::new(name)
        .memory("4GiB")
        .time(Duration::from_secs(120))
        .build();
    lay_out(&place.dir().join("base"), &PROGRAMS);
    Some(place)
}

fn json(path: &Path) -> Value {
    let text =
        std::fs::read_to_string(path).unwrap_or_else(|why| panic!("{}: {why}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

/// The figures of `bench-calls.py` for some cases.
fn calls(place: &Place, bench: &str, only: &str) -> Vec<Value> {
    let mut command = place.command("python3");
    command
        .arg(repository().join("scripts/bench-calls.py"))
        .arg("--base")
        .arg(place.dir().join("base"))
        .arg("--out")
        .arg(place.dir().join(bench))
        .args(["--smoke", "--json", "--only", only, bench]);
    let shot = place.run(command);
    assert_eq!(shot.code, Some(0), "{}\n{}", shot.stdout, shot.stderr);
    let written = json(&place.dir().join(bench).join(format!("{bench}.json")));
    assert_eq!(written["failed"], serde_json::json!([]), "{written}");
    written["figures"].as_array().expect("figures").clone()
}

#[test]
fn calls_are_measured_on_the_machines_driver_and_on_one_that_costs_nothing() {
    let Some(place) = place("gpu-calls") else {
        return;
    };
    for (bench, only, case) in [
        ("hooks", "launch_1", "launch_1"),
        ("alloc", "4KiB_1", "4KiB_1"),
    ] {
        let figures = calls(&place, bench, only);
        for (case, free) in [(case.to_owned(), false), (format!("free_{case}"), true)] {
            let figure = figures
                .iter()
                .find(|f| f["case"] == case && f["metric"] == "added_ns")
                .unwrap_or_else(|| panic!("no {case}: {figures:?}"));
            assert_eq!(figure["driver"] == "Free driver", free, "{figure}");
            assert_eq!(figure["preload"], "libspillway.so", "{figure}");
            // Spillway's functions are what was called.
            assert!(figure["replaced"].as_u64() > Some(0), "{figure}");
        }
    }
}

/// Just enough of PyTorch for gpu-torch.py to believe that it can begin.
const TORCH: &str = "\
__version__ = 'stand-in'
class cuda:
    is_available = staticmethod(lambda: True)
    mem_get_info = staticmethod(lambda: (3 << 30, 4 << 30))
    get_device_name = staticmethod(lambda index: 'stand-in')
    get_device_capability = staticmethod(lambda index: (9, 0))
def zeros(*shape, device): pass
";

/// The case `traces`, with what goes wrong in the program: its result, and how it ended.
fn traces(name: &str, wrong: &str) -> Option<(Place, Value, Shot)> {
    let place = place(name)?;
    std::fs::write(place.dir().join("torch.py"), TORCH).expect("written");
    let mut command = place.command("python3");
    command
        .env("PYTHONPATH", place.dir())
        .env("STAND_IN", wrong)
        .arg(repository().join("scripts/gpu-torch.py"))
        .arg("--base")
        .arg(place.dir().join("base"))
        .arg("--out")
        .arg(place.dir().join("torch"))
        .arg("--program")
        .arg(repository().join("tests/e2e/programs/torch_stand_in.py"))
        .arg("traces");
    let shot = place.run(command);
    let report = json(&place.dir().join("torch/torch.json"));
    let cases = report["cases"].as_array().expect("cases");
    let case = cases.iter().find(|case| case["name"] == "traces");
    let case = case.unwrap_or_else(|| panic!("{report}")).clone();
    Some((place, case, shot))
}

const KINDS: [(&str, &str); 4] = [
    ("torch-caching", "cuMemAlloc_v2"),
    ("torch-expandable", "cuMemMap"),
    ("torch-async", "cuMemAllocAsync"),
    ("torch-graphs", "cuGraphLaunch"),
];

#[test]
fn each_allocator_of_pytorch_leaves_a_trace() {
    let Some((place, case, shot)) = traces("gpu-traces", "") else {
        return;
    };
    assert_eq!(
        (shot.code, &case["result"]),
        (Some(0), &"ok".into()),
        "{case}"
    );
    for (name, call) in KINDS {
        let path = place.dir().join(format!("torch/traces/{name}.jsonl"));
        let text = std::fs::read_to_string(path).expect("a trace");
        let lines = text.lines().map(serde_json::from_str::<Value>);
        let lines: Vec<Value> = lines.collect::<Result<_, _>>().expect("JSON");
        let found = lines.iter().filter(|line| line["call"] == call).count();
        assert!(found > 0, "{name}: no {call}");
        let figures = &case["figures"][name];
        let calls = lines.iter().filter(|line| line["call"].is_string()).count();
        assert_eq!(figures["calls"], calls, "{figures}");
        assert_eq!(figures["bytes"], text.len(), "{figures}");
    }
}

#[test]
fn a_trace_that_is_not_whole_fails() {
    for (wrong, reason, how_many) in [
        ("silent", "no trace was made", 4),
        ("cut", "the trace is cut off after", 4),
        ("early", "before the program did (spillway", 4),
        ("graphless", "none is cuStreamBeginCapture", 1),
    ] {
        let Some((_place, case, shot)) = traces(&format!("gpu-traces-{wrong}"), wrong) else {
            return;
        };
        assert_eq!(
            (shot.code, &case["result"]),
            (Some(1), &"FAIL".into()),
            "{wrong}: {case}"
        );
        let said = case["reason"].as_str().expect("a reason");
        assert_eq!(said.matches(reason).count(), how_many, "{wrong}: {said}");
    }
}

/// The command lines of the processes that have this TMPDIR, or one below it.
fn running(tmp: &Path) -> Vec<String> {
    let wanted = format!("TMPDIR={}", tmp.display());
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let found = processes.filter_map(|process| {
        // Gone meanwhile, another user's, or no process: not one of ours.
        let environ = std::fs::read(process.path().join("environ")).ok()?;
        let mut vars = environ.split(|byte| *byte == 0);
        vars.find(|var| var.starts_with(wanted.as_bytes()))?;
        let line = std::fs::read(process.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    });
    found.collect()
}

fn within(time: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < time, "not within {time:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn gpu_check_ends_with_all_that_it_started() {
    let Some(place) = place("gpu-ends") else {
        return;
    };
    let base = place.dir().join("base");
    let more = [
        "spillway-conformance",
        "gpu-hold",
        "libcuda.so",
        "libnvidia_ml.so",
    ];
    for name in more {
        let from = spillway_tests::artifact(name);
        std::os::unix::fs::symlink(from, base.join("test-bin").join(name)).expect("a link");
    }
    std::os::unix::fs::symlink(repository().join("scripts"), base.join("scripts")).expect("a link");
    let tmp = place.dir().join("t");
    std::fs::create_dir(&tmp).expect("a folder");
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let out = place.dir().join(signal.as_str());
        // A shell that starts a command in the background lets it ignore SIGINT.
        let mut command = place.command("env");
        command
            .args(["--default-signal=INT", "python3"])
            .arg(repository().join("scripts/gpu-check.py"))
            .args(["hooks", "--simulator", "--quick", "--from"])
            .arg(&base)
            .arg("--out")
            .arg(&out)
            .env("TMPDIR", &tmp)
            .stdout(Stdio::null());
        let mut check = command.spawn().expect("gpu-check starts");
        within(
            Duration::from_secs(10),
            "the daemon and the bench run",
            || {
                let lines = running(&tmp);
                let runs = |name: &str| lines.iter().any(|line| line.contains(name));
                runs("/spillwayd ") && runs("/bench-hooks ")
            },
        );
        let pid = Pid::from_raw(check.id().try_into().expect("a pid"));
        kill(pid, signal).expect("it runs");
        let mut status = None;
        within(Duration::from_secs(8), "gpu-check ends", || {
            status = check.try_wait().expect("ours");
            status.is_some()
        });
        assert_eq!(status.and_then(|s| s.code()), Some(code), "{signal}");
        assert_eq!(running(&tmp), [""; 0], "{signal}");
        let left = std::fs::read_dir(&tmp).expect("a folder").flatten();
        let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
        assert!(left.is_empty(), "{signal}: {left:?}");
        let part = &json(&out.join("report.json"))["parts"][0];
        let said = part["problems"].to_string();
        assert!(said.contains(signal.as_str()), "{signal}: {said}");
    }
}

#[test]
fn what_gpu_check_cannot_read_or_write_is_one_line() {
    let Some(place) = place("gpu-lines") else {
        return;
    };
    let check = |arguments: &[&Path]| {
        let mut command = place.command("python3");
        command
            .arg(repository().join("scripts/gpu-check.py"))
            .args(arguments);
        let shot = place.run(command);
        assert_eq!(shot.code, Some(2), "{}", shot.stderr);
        assert_eq!(shot.stderr.lines().count(), 1, "{}", shot.stderr);
        assert!(shot.stderr.starts_with("gpu-check: "), "{}", shot.stderr);
    };
    let folder = place.dir().join("report");
    std::fs::create_dir(&folder).expect("a folder");
    let kept = ["report.md", "serving.svg"].map(|name| folder.join(name));
    for path in &kept {
        std::fs::write(path, "kept").expect("written");
    }
    for broken in [
        "{",
        "[]",
        r#"{"parts":[]}"#,
        r#"{"parts":7}"#,
        r#"{"parts":[7],"machine":{"devices":[]},"simulator":true,"on":"","date":"","archive":[]}"#,
    ] {
        std::fs::write(folder.join("report.json"), broken).expect("written");
        check(&[Path::new("--again"), &folder]);
        for path in &kept {
            assert_eq!(std::fs::read_to_string(path).expect("there"), "kept");
        }
    }
    let more = ["spillway-conformance", "gpu-hold"];
    lay_out(&place.dir().join("whole"), &more);
    let whole = place.dir().join("whole");
    let [from, out] = ["--from", "--out"].map(Path::new);
    check(&[from, &whole, out, Path::new("/proc/x")]);
    check(&[from, &whole, out, &kept[0]]);
}
