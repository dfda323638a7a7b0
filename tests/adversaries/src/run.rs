//! The runner: simulated machines, coordinators and adversaries, watched by the witness.

use std::time::{Duration, Instant};

use serde_json::Value;
use spillway_tests::{Client, Daemon, MIB, Place};

use crate::family::{self, Family};
use crate::report::{self, Row};

/// What an adversary may have.
const LIMIT: u64 = 256 * MIB;
/// How long an adversary may think.
const ANSWER: Duration = Duration::from_secs(60);
const DRIVERS: [&str; 3] = ["12.4", "12.8", "13.0"];

#[derive(clap::Args)]
pub struct Options {
    /// Driver versions, separated by commas; what the simulator does not know is left out, and said.
    #[arg(long, value_delimiter = ',', default_values = DRIVERS)]
    drivers: Vec<String>,
    /// Modes, separated by commas: auto (request 64 MiB, limit 256 MiB), never (SPILLWAY_SWAP=never), alone (no
    /// coordinator: overhead is not measured there, so what the contexts take is not counted).
    #[arg(long, value_delimiter = ',', default_values = ["auto", "never", "alone"])]
    modes: Vec<String>,
    /// Families, separated by commas; all if missing.
    #[arg(long, value_delimiter = ',')]
    families: Vec<String>,
    /// One JSON object per family, as scripts/bench prints it.
    #[arg(long)]
    json: bool,
    /// One JSON object per case, driver and mode.
    #[arg(long, conflicts_with = "json")]
    rows: bool,
    /// Says on standard error what is run.
    #[arg(long)]
    verbose: bool,
    /// Without the library: the control. Everything is over the limit then.
    #[arg(long, hide = true)]
    bare: bool,
}

/// One machine's worth of work.
struct Machine<'a> {
    place: &'a Place,
    daemon: Option<Daemon<'a>>,
    witness: Client,
    driver: String,
    mode: String,
    bare: bool,
}

/// Runs and prints; the exit code is 0 if every verdict is `ok` or `skipped`.
pub fn run(options: &Options) -> i32 {
    let known = ["auto", "never", "alone"];
    if let Some(mode) = options
        .modes
        .iter()
        .find(|mode| !known.contains(&mode.as_str()))
    {
        eprintln!(
            "adversaries: no mode {mode}; there are {}",
            known.join(", ")
        );
        return 2;
    }
    let unknown = |name: &&String| family::find(name).is_none();
    if let Some(name) = options.families.iter().find(unknown) {
        let names: Vec<&str> = family::ALL.iter().map(|family| family.name).collect();
        eprintln!(
            "adversaries: no family {name}; there are {}",
            names.join(", ")
        );
        return 2;
    }
    let wanted: Vec<&Family> = family::ALL
        .iter()
        .filter(|family| {
            options.families.is_empty() || options.families.iter().any(|n| n == family.name)
        })
        .collect();
    let mut rows = Vec::new();
    let mut gpus: Vec<u32> = wanted.iter().map(|family| family.gpus).collect();
    gpus.sort_unstable();
    gpus.dedup();
    for driver in &options.drivers {
        for mode in &options.modes {
            for &count in &gpus {
                let some: Vec<&Family> = wanted
                    .iter()
                    .copied()
                    .filter(|family| family.gpus == count)
                    .collect();
                rows.extend(one_machine(options, driver, mode, count, &some));
            }
        }
    }
    // By family, as listed, whatever the order in which they ran.
    let place = |row: &Row| {
        family::ALL
            .iter()
            .position(|family| family.name == row.family)
    };
    rows.sort_by_key(place);
    if options.json {
        for figure in report::figures(&rows) {
            println!("{figure}");
        }
    } else if options.rows {
        for row in &rows {
            println!("{}", row.json());
        }
    } else {
        print!("{}", report::table(&rows));
    }
    if rows.iter().all(|row| row.skipped.is_some()) {
        eprintln!(
            "adversaries: nothing was tried: no case of these drivers, modes and families that is not skipped"
        );
        return 1;
    }
    i32::from(rows.iter().any(Row::is_bad))
}

fn one_machine(
    options: &Options,
    driver: &str,
    mode: &str,
    gpus: u32,
    families: &[&Family],
) -> Vec<Row> {
    let place = Place::new("adversaries")
        .gpus(gpus)
        .var("SPILLWAY_SIM_DRIVER", driver)
        // What is freed is free at once: the witness must not take a delay for a hold.
        .var("SPILLWAY_SIM_RELEASE_DELAY", "0")
        .var("SPILLWAY_SIM_DEATH_DELAY", "0")
        .var("SPILLWAY_SIM_VMM_COST", "0")
        .time(Duration::from_secs(1800))
        .build();
    let mut witness = place.client("adversaries").bare().arg("witness").start();
    witness.send("reset");
    if witness.try_line(ANSWER).is_none() {
        eprintln!(
            "adversaries: driver {driver} left out: {}",
            witness.stderr().trim()
        );
        return Vec::new();
    }
    let daemon = (mode != "alone").then(|| place.daemon(&["--reserve", "0", "--log", "warn"]));
    let mut machine = Machine {
        place: &place,
        daemon,
        witness,
        driver: driver.to_owned(),
        mode: mode.to_owned(),
        bare: options.bare,
    };
    let mut rows = Vec::new();
    for family in families {
        if (mode == "alone" && family.coordinator) || (mode == "never" && family.swaps) {
            continue;
        }
        let start = Instant::now();
        let found = machine.family(family);
        if options.verbose {
            let bad = found.iter().filter(|row| row.is_bad()).count();
            eprintln!(
                "{driver} {mode} {}: {} cases, {bad} bad, {:?}",
                family.name,
                found.len(),
                start.elapsed()
            );
        }
        rows.extend(found);
    }
    rows
}

impl Machine<'_> {
    fn look(&mut self, word: &str) -> Value {
        let line = self.witness.ask(word);
        serde_json::from_str(&line).unwrap_or_else(|why| panic!("{why}: {line}"))
    }

    fn row(&self, family: &Family, case: &str) -> Row {
        Row {
            family: family.name.to_owned(),
            case: case.to_owned(),
            driver: self.driver.clone(),
            mode: self.mode.clone(),
            limit: LIMIT,
            reached: 0,
            over: 0,
            held: 0,
            refused: Vec::new(),
            wrong: Vec::new(),
            leak: Vec::new(),
            broken: None,
            skipped: None,
        }
    }

    /// Nothing is left of whoever ran before.
    fn empty(&mut self) -> Result<(), String> {
        let start = Instant::now();
        loop {
            let now = self.look("look")["now"].clone();
            let used: u64 = now
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64)
                .sum();
            if used == 0 {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(5) {
                return Err(format!("{used} bytes are still used by whoever ran before"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs one adversary from its start to its end.
    fn family(&mut self, family: &Family) -> Vec<Row> {
        let mut rows = Vec::new();
        if let Err(why) = self.empty() {
            let mut row = self.row(family, "start");
            row.broken = Some(why);
            return vec![row];
        }
        let mut launch = self
            .place
            .client("adversaries")
            .arg("family")
            .arg(family.name);
        launch = launch.workload(family.name).limit("256MiB");
        launch = launch.var("SPILLWAY_LOG", "error");
        for (name, value) in family.vars {
            launch = launch.var(name, value);
        }
        launch = match self.mode.as_str() {
            "never" => launch.var("SPILLWAY_SWAP", "never"),
            "alone" => launch.var("SPILLWAY_NO_COORDINATOR", "1").arg("--alone"),
            _ => launch.request("64MiB"),
        };
        if self.bare {
            launch = launch.bare();
        }
        let mut client = launch.start();
        let mut current: Option<Row> = None;
        let mut base = Vec::new();
        loop {
            let line = client.try_line(ANSWER);
            let said: Option<Value> = line
                .as_deref()
                .and_then(|line| serde_json::from_str(line).ok());
            let Some(said) = said else {
                let mut row = current.take().unwrap_or_else(|| self.row(family, "start"));
                let how = if client.alive() {
                    "it says nothing any more"
                } else {
                    "it ended"
                };
                row.broken = Some(format!(
                    "{how}: {} {}",
                    line.unwrap_or_default(),
                    client.stderr().trim()
                ));
                rows.push(row);
                break;
            };
            let mut answer = "go".to_owned();
            match said["do"].as_str().unwrap_or_default() {
                "begin" => {
                    let now = self.look("reset");
                    // Without a coordinator overhead is not part of the limit: what the contexts took so
                    // far is taken off.
                    base = if self.mode == "alone" {
                        numbers(&now["now"])
                    } else {
                        Vec::new()
                    };
                    current = Some(self.row(family, said["case"].as_str().unwrap_or_default()));
                }
                "top" => drop(self.look("look")),
                "evict" => answer = self.evict(family.name),
                "result" => {
                    let Some(mut row) = current.take() else {
                        continue;
                    };
                    let seen = self.look("look");
                    judge(&mut row, &said, &seen, &base);
                    rows.push(row);
                }
                "end" => break,
                _ => {}
            }
            client.send(&answer);
        }
        client.kill();
        rows
    }

    fn evict(&self, workload: &str) -> String {
        let Some(daemon) = &self.daemon else {
            return "there is no coordinator".to_owned();
        };
        let start = Instant::now();
        loop {
            let answer = daemon.operate(workload, "evict");
            match answer.status {
                200 => return "ok".to_owned(),
                409 if start.elapsed() < Duration::from_secs(3) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                _ => return answer.error(),
            }
        }
    }
}

fn numbers(list: &Value) -> Vec<u64> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_u64)
        .collect()
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(|text| text.as_str().map(str::to_owned))
        .collect()
}

/// Fills a row from what the adversary said and what the witness saw.
fn judge(row: &mut Row, said: &Value, seen: &Value, base: &[u64]) {
    let workloads = said["workloads"].as_u64().unwrap_or(1);
    let left = said["left"].as_u64().unwrap_or(0);
    row.limit = LIMIT * workloads + left;
    let most = numbers(&seen["most"]);
    let net = most
        .iter()
        .enumerate()
        .map(|(device, most)| most.saturating_sub(base.get(device).copied().unwrap_or(0)));
    row.reached = net.max().unwrap_or(0);
    row.over = row.reached.saturating_sub(row.limit);
    if workloads > 1 && base.is_empty() {
        // Each of them has one process: none may live on the others' share.
        let list = seen["processes"].as_array().into_iter().flatten();
        let most = list.filter_map(|pair| pair[1].as_u64()).max().unwrap_or(0);
        row.over = row.over.max(most.saturating_sub(LIMIT + left));
    }
    row.held = said["held"].as_u64().unwrap_or(0);
    row.refused = texts(&said["refused"]);
    row.wrong = texts(&said["wrong"]);
    row.leak = texts(&said["leak"]);
    row.broken = said["broken"].as_str().map(str::to_owned);
    row.skipped = said["skipped"].as_str().map(str::to_owned);
}
