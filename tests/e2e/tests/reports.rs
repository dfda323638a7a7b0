//! Reports of measurements: that what is in them is what was measured, that what was not measured says so, and that
//! no name, whatever is in it, can be read as markup.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use spillway_tests::{repository, until};

/// A folder for a report; none where there is no Python.
fn folder() -> Option<tempfile::TempDir> {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: no python3");
        return None;
    }
    Some(tempfile::tempdir().expect("a folder"))
}

fn run(command: &mut Command) {
    let output = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

fn script(name: &str) -> Command {
    let mut command = Command::new("python3");
    command.arg(repository().join("scripts").join(name));
    command
}

/// `scripts/bench report --from` of these lines.
fn of_lines(folder: &Path, lines: &[Value]) -> String {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let figures = folder.join("figures.jsonl");
    std::fs::write(&figures, text).expect("written");
    let (out, mut command) = (folder.join("report"), script("bench-report.py"));
    run(command.arg("--from").arg(figures).arg("--out").arg(&out));
    std::fs::read_to_string(out.join("report.md")).expect("a report")
}

fn plots(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "svg"))
        .collect();
    found.sort();
    found
}

fn names(plots: &[PathBuf]) -> Vec<String> {
    plots
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect()
}

/// Every plot is XML that a parser takes, and every one is shown, and nothing else.
fn check_plots(folder: &Path, report: &str) {
    let found = plots(folder);
    let parse = "import sys, xml.etree.ElementTree as t; [t.parse(f) for f in sys.argv[1:]]";
    run(Command::new("python3").args(["-c", parse]).args(&found));
    let shown = report.matches(".svg)").count();
    assert_eq!(shown, found.len(), "{:?}", names(&found));
    for name in names(&found) {
        assert!(report.contains(&format!("]({name})")), "{name}");
    }
}

/// Every row of a table has as many cells as its head.
fn check_tables(report: &str) {
    let bars = |line: &str| {
        line.replace("\\\\", "")
            .replace("\\|", "")
            .matches('|')
            .count()
    };
    let mut wanted = None;
    for line in report.lines() {
        if !line.starts_with('|') {
            wanted = None;
            continue;
        }
        assert_eq!(*wanted.get_or_insert(bars(line)), bars(line), "{line}");
    }
}

/// The cells of the first row that begins so.
fn row<'a>(report: &'a str, begin: &str) -> Vec<&'a str> {
    let line = report
        .lines()
        .find(|line| line.starts_with(&format!("| {begin} |")))
        .unwrap_or_else(|| panic!("no row {begin} in {report}"));
    line.trim_matches('|').split('|').map(str::trim).collect()
}

fn call(case: &str, driver: &str, value: f64) -> Value {
    json!({ "bench": "hooks", "case": case, "metric": "added_ns", "value": value, "unit": "ns", "baseline": 2.435,
        "quartiles": [value - 0.5, value + 0.5], "with": value + 2.435, "driver": driver, "driver_version": 12080 })
}

fn served(mode: &str, clients: u32, metric: &str, value: f64) -> Value {
    json!({ "bench": "serve", "case": format!("{mode}_c{clients}"), "metric": metric, "value": value, "unit": "s",
        "quartiles": [value, value], "computed": value })
}

#[test]
fn a_report_has_the_figures_that_were_measured_and_says_what_was_not() {
    let Some(folder) = folder() else { return };
    let mut lines = vec![
        call("launch_1", "Free driver", 1.897),
        call("launch_2", "Free driver", 7.25),
        call("sim_launch_1", "Simulated GPU", 9.5),
        json!({ "bench": "preload", "case": "python", "skipped": "no python3 on PATH" }),
        json!({ "bench": "swap", "case": "size_8_out", "metric": "rate", "value": 1.446, "unit": "GB/s", "baseline": 2.086,
            "quartiles": [1.293, 1.623], "MiB": 8, "way": "out" }),
        json!({ "bench": "serve", "case": "swap_vs_cold", "metric": "ratio", "value": 0.5214, "unit": "ratio",
            "quartiles": [0.5, 0.54], "computed": 0.53, "within": true, "tolerance": 0.1 }),
    ];
    for (clients, value) in [(1, 0.025), (16, 0.125)] {
        for metric in ["throughput", "p50"] {
            lines.push(served("request_limit", clients, metric, value));
        }
    }
    let report = of_lines(folder.path(), &lines);
    let first: String = report.lines().take(4).collect();
    assert!(first.contains("simulator, no GPU"), "{first}");
    check_tables(&report);
    check_plots(&folder.path().join("report"), &report);
    // Not of what nothing was measured for: allocations.
    assert_eq!(
        names(&plots(&folder.path().join("report"))),
        [
            "added-cost-free.svg",
            "added-cost.svg",
            "serving.svg",
            "swap-rate.svg"
        ]
    );
    let cells = row(&report, "launch, 1 thread, added");
    assert_eq!(
        cells[2..],
        ["1.897 ns", "1.397 to 2.397", "3 ns or less", "met"]
    );
    let cells = row(&report, "launch, 2 threads, added");
    assert_eq!(
        cells[2..],
        ["7.25 ns", "6.75 to 7.75", "5 ns or less", "missed"]
    );
    let cells = row(&report, "first answer: swap-in over cold start");
    assert_eq!(
        cells[2..],
        ["0.5214", "0.5 to 0.54", "computed 0.53", "within 10%"]
    );
    for missing in [
        "copy, 1 thread, added",
        "alloc + free of 4 KiB, added",
        "recorded programs replayed: results that differ",
    ] {
        assert_eq!(row(&report, missing)[2], "not measured");
    }
    // All of them, each as it was measured.
    let cells = row(&report, "size_8_out");
    assert_eq!(
        cells[1..6],
        ["rate", "1.446", "GB/s", "1.293 to 1.623", "2.086"]
    );
    assert_eq!(row(&report, "sim_launch_1")[2], "9.5");
    let cells = row(&report, "python");
    assert_eq!(
        (cells[2], cells[8]),
        ("not measured", "skipped: no python3 on PATH")
    );
    let section = report.split("## Allocation").nth(1).expect("a section");
    assert!(
        section
            .trim_start()
            .starts_with("On a driver whose calls cost nothing: not measured."),
        "{section}"
    );
}

const HOSTILE: &str =
    "<script>alert(1)</script>|a\n# b & \"c\" `d` [e](javascript:f) \u{1b}\u{7}&lt;";

#[test]
fn no_name_is_read_as_markup() {
    let Some(folder) = folder() else { return };
    let mut lines = vec![
        call(&format!("{HOSTILE}_1"), "Free driver", 3.0),
        call("launch_1", HOSTILE, 1.5),
        json!({ "bench": HOSTILE, "case": HOSTILE, "metric": HOSTILE, "value": 4.5, "unit": HOSTILE, "beside": HOSTILE }),
        json!({ "bench": "escape", "case": HOSTILE, "skipped": HOSTILE }),
        // Values that are none.
        json!({ "bench": "swap", "case": "size_2_out", "metric": "rate", "value": null, "unit": "GB/s", "MiB": 2, "way": "out" }),
        json!({ "bench": "swap", "case": "size_4_out", "metric": "rate", "value": -1.0, "unit": "GB/s", "MiB": 0, "way": "out" }),
    ];
    let mut line = served("alone", 1, "p99", 1.0);
    line["value"] = json!("NaN");
    lines.push(line);
    let report = of_lines(folder.path(), &lines);
    check_tables(&report);
    check_plots(&folder.path().join("report"), &report);
    check_text(&report);
    let svg = folder.path().join("report/added-cost-free.svg");
    let svg = std::fs::read_to_string(svg).expect("a plot");
    assert!(
        svg.contains("&lt;script&gt;"),
        "the name is not in the plot"
    );
    // gpu-check's: the device and what failed have such names, and what programs print.
    let out = folder.path().join("gpu");
    std::fs::create_dir(&out).expect("a folder");
    let device = json!({ "index": 0, "name": HOSTILE, "total_bytes": 1_u64 << 34, "compute_mode": HOSTILE,
        "pcie": { "generation": 5, "width": 16, "generation_max": 5, "width_max": 16 } });
    let case = json!({ "name": HOSTILE, "result": "FAIL", "reason": HOSTILE, "observed": [HOSTILE], "figures": { HOSTILE: HOSTILE } });
    let figures =
        json!({ "value": 2.5, "unit": "ns", "quartiles": [2.0, 3.0], "driver": "Free driver" });
    let part = |name: &str, case: &Value| json!({ "part": name, "passed": 1, "failed": 1, "skipped": 0, "seconds": 1.5, "problems": [HOSTILE], "cases": [case] });
    let report = json!({ "on": HOSTILE, "simulator": false, "date": HOSTILE, "archive": [HOSTILE, "commit"],
        "machine": { "driver": HOSTILE, "cuda": "13.0", "kernel": HOSTILE, "machine": "x86_64", "cpus": 2, "cpu": HOSTILE, "glibc": "",
            "devices": [device] },
        "parts": [part("e2e", &case), part("swap", &case),
            part("hooks", &json!({ "name": "launch_1.added_ns", "result": "ok", "figures": figures }))] });
    std::fs::write(out.join("report.json"), report.to_string()).expect("written");
    run(script("gpu-check.py").arg("--again").arg(&out));
    let report = std::fs::read_to_string(out.join("report.md")).expect("a report");
    check_tables(&report);
    check_plots(&out, &report);
    check_text(&report);
    assert_eq!(row(&report, "launch, 1 thread, added")[2], "2.5 ns");
    assert!(report.contains("| serve | not measured |"), "{report}");
}

/// Nothing of the hostile name is markup, wherever it stands.
fn check_text(report: &str) {
    assert!(
        report.contains("&lt;script&gt;"),
        "the name is not in the report"
    );
    for line in report.lines() {
        // What stands in code spans is text anyway.
        let outside = if line.contains("\": \"") { "" } else { line };
        assert!(!outside.contains("<script"), "{line}");
        assert!(!line.starts_with("# b"), "{line}");
        assert!(!outside.replace("\\[", "").contains("[e]"), "{line}");
        assert!(!line.contains('\u{1b}'), "{line}");
    }
}

#[test]
fn what_is_no_figure_is_refused() {
    let Some(folder) = folder() else { return };
    let file = folder.path().join("none.jsonl");
    std::fs::write(&file, "no figure\n[1]\n").expect("written");
    let mut command = script("bench-report.py");
    let output = command
        .arg("--from")
        .arg(&file)
        .arg("--out")
        .arg(folder.path().join("report"))
        .output();
    let output = output.expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("line 1 is no figure") && said.contains("no figure in"),
        "{said}"
    );
}

#[test]
fn wrong_input_is_one_line_and_changes_nothing() {
    let Some(folder) = folder() else { return };
    of_lines(folder.path(), &[call("launch_1", "Free driver", 1.5)]);
    let out = folder.path().join("report");
    let contents = || {
        let entries = std::fs::read_dir(&out).expect("a folder").flatten();
        let mut found: Vec<_> = entries
            .map(|entry| {
                (
                    entry.file_name(),
                    std::fs::read(entry.path()).expect("a file"),
                )
            })
            .collect();
        found.sort();
        found
    };
    let before = contents();
    let good = std::fs::read_to_string(out.join("report.json")).expect("a report");
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} is not in {good}");
        good.replacen(from, to, 1)
    };
    let line = |value: &str| format!("{{\"bench\":\"a\",\"case\":\"b\",\"value\":{value}}}\n");
    let huge = format!("1{}", "0".repeat(400));
    for (name, text) in [
        ("deep", "[".repeat(200_000)),
        ("deep line", line(&"[".repeat(200_000))),
        ("NaN", with("1.5", "NaN")),
        ("NaN line", line("NaN")),
        ("infinite", with("1.5", "-Infinity")),
        ("too large", with("1.5", "1e999")),
        ("huge", with("1.5", &huge)),
        ("no runs", with("\"runs\"", "\"walks\"")),
        (
            "no machine",
            with("\"machine\": {", "\"machine\": 1, \"m\": {"),
        ),
        ("figures", r#"{"figures": [1], "machine": {}}"#.to_owned()),
    ] {
        let file = folder.path().join("wrong.json");
        std::fs::write(&file, text).expect("written");
        let mut command = script("bench-report.py");
        let output = command.arg("--from").arg(&file).arg("--out").arg(&out);
        let output = output.output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{name}: {said}");
        assert!(said.contains("wrong.json"), "{name}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{name}: {said}");
        assert!(contents() == before, "{name} changed the report");
        let fresh = folder.path().join("fresh");
        let mut command = script("bench-report.py");
        let output = command.arg("--from").arg(&file).arg("--out").arg(&fresh);
        let output = output.output().expect("it starts");
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(!fresh.exists(), "{name} is written");
    }
}

#[test]
fn what_was_not_tried_or_compared_is_not_met() {
    let Some(folder) = folder() else { return };
    let escape = |case: &str, verdict: &str| json!({ "bench": "escape", "case": case, "metric": "bytes_over", "value": 0, "unit": "B", "verdict": verdict });
    let replay = |case: &str, metric: &str, value: u32| json!({ "bench": "replay", "case": case, "metric": metric, "value": value, "unit": "results" });
    let families = "ways past the limit: most bytes above it, 2 families";
    let report = of_lines(
        folder.path(),
        &[
            escape("classic", "ok"),
            escape("pools", "REFUSED"),
            escape("green", "skipped"),
            replay("a", "different", 0),
            replay("a", "results_compared", 0),
        ],
    );
    assert_eq!(
        row(&report, families)[5],
        "missed: pools (REFUSED); skipped: green"
    );
    let traces = row(&report, "recorded programs replayed: results that differ");
    assert_eq!(
        (traces[2], traces[5]),
        ("not measured", "nothing compared: a")
    );
    let report = of_lines(
        folder.path(),
        &[
            escape("classic", "ok"),
            escape("pools", "ok"),
            replay("a", "different", 0),
            replay("a", "results_compared", 7),
        ],
    );
    assert_eq!(row(&report, families)[5], "met");
    let text = "recorded programs replayed: results that differ, 1 traces";
    assert_eq!(row(&report, text)[5], "met");
}

/// A bench that is ended while it runs takes its processes with it, and leaves the earlier report.
#[test]
fn an_interruption_ends_the_bench_and_keeps_the_earlier_report() {
    use std::os::unix::fs::PermissionsExt;
    let Some(folder) = folder() else { return };
    of_lines(folder.path(), &[call("launch_1", "Free driver", 1.5)]);
    let out = folder.path().join("report");
    let before = std::fs::read(out.join("report.json")).expect("a report");
    let scripts = folder.path().join("scripts");
    std::fs::create_dir(&scripts).expect("a folder");
    for name in [
        "bench-report.py",
        "report_lib.py",
        "report_plots.py",
        "plots.py",
    ] {
        std::fs::copy(repository().join("scripts").join(name), scripts.join(name)).expect("copied");
    }
    let pid = folder.path().join("pid");
    let bench = format!(
        "#!/bin/sh\n[ $1 = preload ] || exit 0\nsleep 600 &\necho $! >{0}.new\nmv {0}.new {0}\nwait\n",
        pid.display()
    );
    std::fs::write(scripts.join("bench"), bench).expect("written");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(scripts.join("bench"), mode).expect("executable");
    let mut child = Command::new("python3")
        .arg(scripts.join("bench-report.py"))
        .args(["--benches", "hooks,preload", "--out"])
        .arg(&out)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("it starts");
    let appears = || std::fs::read_to_string(&pid).ok();
    let sleeper: i32 = until("the bench", appears).trim().parse().expect("a pid");
    run(Command::new("kill").args(["-TERM", &child.id().to_string()]));
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    // Nobody may be there to fetch its status.
    let stat = format!("/proc/{sleeper}/stat");
    let gone = || {
        std::fs::read_to_string(&stat).map_or(Some(()), |text| text.contains(") Z").then_some(()))
    };
    until("the bench's end", gone);
    assert_eq!(
        std::fs::read(out.join("report.json")).expect("kept"),
        before
    );
    // What was done before it is there.
    assert!(out.join("unfinished/report.md").exists());
}
