//! `scripts/bench serve` and `swap` in their short form: that they run, that what they print can be read, and what
//! is exact about it: the capacities that follow from the scenario, the bytes that move, and that nothing is faster
//! than the link. Other times are nobody's promise on a machine that does other things.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use spillway_tests::{Place, lay_out, repository};

const PROGRAMS: [&str; 6] = [
    "model-server",
    "make-weights",
    "gpu-hold",
    "serve-load",
    "alloc-stress",
    "bench-copy",
];

/// The figures of a bench in its short form; nothing where there is no Python.
fn figures(bench: &str, arguments: &[&str]) -> Vec<Value> {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: no python3");
        return Vec::new();
    }
    let place = Place::new(bench).time(Duration::from_secs(180)).build();
    let base = place.dir().join("base");
    lay_out(&base, &PROGRAMS);
    let mut command = place.command("python3");
    command
        .arg(repository().join(format!("scripts/bench-{bench}.py")))
        .arg("--base")
        .arg(&base)
        .arg("--out")
        .arg(place.dir().join("logs"))
        .args(["--smoke", "--json"])
        .args(arguments);
    let shot = place.run(command);
    assert_eq!(shot.code, Some(0), "{}\n{}", shot.stdout, shot.stderr);
    let lines: Vec<Value> = shot
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|why| panic!("{line}: {why}")))
        .collect();
    for line in &lines {
        let whole =
            line["metric"].is_string() && line["value"].is_number() && line["unit"].is_string();
        assert!(
            line["bench"] == bench && line["case"].is_string() && whole,
            "{line}"
        );
    }
    lines
}

fn find<'a>(lines: &'a [Value], case: &str, metric: &str) -> &'a Value {
    lines
        .iter()
        .find(|line| line["case"] == case && line["metric"] == metric)
        .unwrap_or_else(|| panic!("no {case}.{metric}"))
}

fn number(line: &Value, field: &str) -> f64 {
    line[field]
        .as_f64()
        .unwrap_or_else(|| panic!("no {field} in {line}"))
}

#[test]
fn what_request_and_limit_give_is_measured_beside_what_is_computed() {
    let lines = figures("serve", &["spread"]);
    if lines.is_empty() {
        return;
    }
    // 32 against 8 at a time: 32 / (5 + 32) over 8 / (5 + 8).
    let ratio = find(&lines, "dynamic_vs_static", "throughput_ratio");
    assert_eq!(ratio["fit"].to_string(), "[32,8]");
    assert!((number(ratio, "computed") - 1.405).abs() < 0.001, "{ratio}");
    assert!(number(ratio, "value") > 1.1, "{ratio}");
    find(&lines, "dynamic_vs_static", "p50_ratio");
    find(&lines, "control", "throughput_ratio");
    for mode in ["alone", "static", "request_limit", "swap"] {
        for metric in ["throughput", "p50", "p99", "first_p50"] {
            let line = find(&lines, &format!("{mode}_c1"), metric);
            assert!(number(line, "value") > 0.0, "{line}");
        }
    }
}

#[test]
fn turns_take_the_time_of_the_link_and_cold_starts_that_of_the_disk() {
    let lines = figures("serve", &["turns"]);
    if lines.is_empty() {
        return;
    }
    for case in ["swap_in", "cold_start"] {
        let line = find(&lines, case, "first_answer");
        let least = match line.get("computed_overlapped") {
            Some(overlapped) => overlapped.as_f64().expect("a number"),
            None => number(line, "computed"),
        };
        assert!(number(line, "value") > 0.97 * least, "{line}");
    }
    for case in ["swap_vs_cold", "swap_control", "cold_control"] {
        assert!(number(find(&lines, case, "ratio"), "value") > 0.0);
    }
}

#[test]
fn three_models_in_the_memory_of_one_and_a_half_move_as_computed() {
    let lines = figures("serve", &["trio"]);
    if lines.is_empty() {
        return;
    }
    let line = find(&lines, "consolidated", "share");
    let (moved, computed) = (
        number(line, "swapped_in_GB"),
        number(line, "computed_in_GB"),
    );
    assert!(computed > 0.1, "{line}");
    assert!((moved / computed - 1.0).abs() < 0.1, "{line}");
    let control = find(&lines, "consolidated_control", "share");
    assert_eq!(number(control, "swapped_in_GB"), 0.0, "{control}");
}

#[test]
fn swaps_are_measured_beside_plain_copies() {
    let lines = figures("swap", &[]);
    if lines.is_empty() {
        return;
    }
    for (case, metric) in [
        ("one_way_out", "share"),
        ("one_way_in", "share"),
        ("small_allocations", "share"),
        ("exchange", "ratio"),
        ("clean_exchange", "ratio"),
    ] {
        assert!(number(find(&lines, case, metric), "value") > 0.0);
    }
    // The rate against the size: several sizes, each way, each beside the plain copy's.
    let rates: Vec<&Value> = lines.iter().filter(|l| l["metric"] == "rate").collect();
    for way in ["out", "in"] {
        let sizes = rates.iter().filter(|line| line["way"] == way);
        let sizes: std::collections::BTreeSet<u64> =
            sizes.filter_map(|line| line["MiB"].as_u64()).collect();
        assert!(sizes.len() > 2, "{way}: {sizes:?}");
    }
    for line in rates {
        assert!(
            number(line, "value") > 0.0 && number(line, "baseline") > 0.0,
            "{line}"
        );
    }
    let bytes = find(&lines, "clean_exchange", "bytes_out");
    assert!(
        number(bytes, "value") <= 1.1 * number(bytes, "baseline"),
        "{bytes}"
    );
}
