//! A real test suite: numba-cuda's own tests of its driver layer end the same, test by test, without
//! Spillway, under it, and while they are evicted again and again. Those that the simulator cannot run
//! are listed with a reason in `tests/clients/python/numba-cannot.txt`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use spillway_tests::{Client, Daemon, Place, artifact, repository};

/// Fewer than this many that pass is another suite than the one that is pinned.
const PASSED: usize = 200;
/// The suite takes a few times what it takes alone when everything else runs beside it.
const TIME: Duration = Duration::from_secs(300);
const NAME: &str = "numba";

/// How a test ended, and why, by its id.
type Results = BTreeMap<String, (String, String)>;

fn python() -> Option<PathBuf> {
    let found = std::env::var_os("SPILLWAY_TEST_NUMBA_PYTHON").filter(|path| !path.is_empty());
    if found.is_none() {
        eprintln!(
            "skipped: numba_suite: SPILLWAY_TEST_NUMBA_PYTHON names no python3 with tests/clients/python/requirements-numba.txt"
        );
    }
    found.map(PathBuf::from)
}

fn folder() -> PathBuf {
    repository().join("tests/clients/python")
}

/// The ids of the tests that the simulator cannot run; each has a reason that the list explains.
fn cannot() -> BTreeSet<String> {
    let text = std::fs::read_to_string(folder().join("numba-cannot.txt")).expect("the list");
    let (comments, lines): (Vec<&str>, Vec<&str>) = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .partition(|line| line.starts_with('#'));
    let reasons: BTreeSet<&str> = comments
        .iter()
        .filter_map(|line| line.strip_prefix("# ")?.split_once("  "))
        .map(|(word, _)| word)
        .collect();
    let mut ids = BTreeSet::new();
    for line in lines {
        let (id, reason) = line.split_once("  ").expect("an id and a reason");
        assert!(
            reasons.contains(reason.trim()),
            "{line}: no such reason above"
        );
        assert!(ids.insert(id.to_owned()), "{id} is there twice");
    }
    ids
}

/// Two GPUs, as some of the tests want; CUDA 13.0, as the pinned wheels are.
fn place(name: &str) -> Place {
    let _ = artifact("libspillway.so");
    let place = Place::new(name).memory("1GiB").gpus(2).time(TIME);
    place.var("SPILLWAY_SIM_DRIVER", "13.0").build()
}

fn file(place: &Place) -> PathBuf {
    place.dir().join("results.json")
}

fn suite<'a>(place: &'a Place, python: &Path) -> spillway_tests::Launch<'a> {
    place
        .program(python)
        .arg("-B")
        .arg(folder().join("numba_suite.py"))
        .arg(file(place))
        .arg(folder().join("numba-cannot.txt"))
}

fn results(place: &Place, mut client: Client) -> Results {
    let code = client.wait(TIME);
    let mut said = Vec::new();
    while let Some(line) = client.try_line(Duration::from_millis(200)) {
        said.push(line);
    }
    let said = said.join("\n");
    assert_eq!(code, Some(0), "{said}\n{}", client.stderr());
    let text = std::fs::read_to_string(file(place)).expect("results");
    let json: serde_json::Value = serde_json::from_str(&text).expect("results are JSON");
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let tests = json["tests"].as_object().expect("tests").iter();
    tests
        .map(|(id, test)| (id.clone(), (word(&test["outcome"]), word(&test["why"]))))
        .collect()
}

fn bare(python: &Path) -> Results {
    let place = place("numba-bare");
    results(&place, suite(&place, python).bare().start())
}

fn registered(daemon: &Daemon<'_>) -> usize {
    daemon.events_of(NAME, "registered").len()
}

fn under(python: &Path) -> Results {
    let place = place("numba-under");
    let daemon = place.daemon(&[]);
    let found = results(&place, suite(&place, python).workload(NAME).start());
    assert!(registered(&daemon) > 0, "it was under Spillway");
    found
}

/// About five times a second, whatever it is doing; its next call brings it back.
fn evicted(python: &Path) -> (Results, u32) {
    let place = place("numba-evicted");
    let daemon = place.daemon(&[]);
    let mut client = suite(&place, python).workload(NAME).start();
    let (mut evicted, mut answers) = (0, BTreeMap::new());
    let start = Instant::now();
    while client.alive() && start.elapsed() < TIME {
        let answer = daemon.operate(NAME, "evict");
        let moved = answer.status == 200 && answer.json()["bytes"].as_u64() > Some(0);
        evicted += u32::from(moved);
        *answers.entry(answer.status).or_insert(0) += 1;
        std::thread::sleep(Duration::from_millis(200));
    }
    let found = results(&place, client);
    println!("evict answered {answers:?}; memory was moved {evicted} times");
    (found, evicted)
}

fn count(results: &Results, outcome: &str) -> usize {
    results.values().filter(|(how, _)| how == outcome).count()
}

/// Tests that ended otherwise than without Spillway, a line each.
fn differences(how: &str, bare: &Results, other: &Results) -> Vec<String> {
    let ids: BTreeSet<&String> = bare.keys().chain(other.keys()).collect();
    ids.into_iter()
        .filter(|id| bare.get(*id) != other.get(*id))
        .map(|id| format!("{id}: {:?}; {how}: {:?}", bare.get(id), other.get(id)))
        .collect()
}

/// What is wrong with the list, a line each.
fn list_errors(cannot: &BTreeSet<String>, bare: &Results) -> Vec<String> {
    let mut wrong = Vec::new();
    for (id, (outcome, why)) in bare {
        match (outcome.as_str(), cannot.contains(id)) {
            ("passed", true) => wrong.push(format!("{id}: listed in numba-cannot.txt, and passes")),
            ("failed" | "not run", false) => wrong.push(format!("{id}: {outcome}: {why}")),
            _ => {}
        }
    }
    let gone = cannot.iter().filter(|id| !bare.contains_key(*id));
    wrong.extend(gone.map(|id| format!("{id}: listed in numba-cannot.txt, and not in the suite")));
    wrong
}

#[test]
fn numba_cuda_tests_end_the_same() {
    let cannot = cannot();
    let Some(python) = python() else { return };
    let (bare, under, (evicted, evictions)) = std::thread::scope(|scope| {
        let bare = scope.spawn(|| bare(&python));
        let under = scope.spawn(|| under(&python));
        let evicted = scope.spawn(|| evicted(&python));
        (
            bare.join().expect("without Spillway"),
            under.join().expect("under Spillway"),
            evicted.join().expect("under evictions"),
        )
    });
    for (how, results) in [("without", &bare), ("under", &under), ("evicted", &evicted)] {
        let [passed, failed, skipped] =
            ["passed", "failed", "skipped"].map(|outcome| count(results, outcome));
        println!(
            "{how}: {} tests, {passed} passed, {failed} failed, {skipped} skipped",
            results.len()
        );
    }
    let mut wrong = list_errors(&cannot, &bare);
    wrong.extend(differences("under Spillway", &bare, &under));
    wrong.extend(differences("under evictions", &bare, &evicted));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count(&bare, "passed") >= PASSED);
    assert!(evictions > 10, "memory was moved {evictions} times");
}
