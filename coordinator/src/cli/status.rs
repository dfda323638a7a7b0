//! `spillway status`: the node as tables, or one workload in full.

use std::time::Duration;

use spillway_protocol::format_bytes;

use super::EXIT_FAILED;
use super::args::{Place, StatusArgs};
use super::out::{Failure, clean, print};
use super::table::Table;
use crate::api::http::percent_encode;
use crate::api::{Client, ClientError};
use crate::model::{Status, Stranger, Workload};

/// Status is answered from a copy: a daemon that takes this long is stopped.
const TIME: Duration = Duration::from_secs(5);

/// Prints the node's status, or one workload's.
pub fn run(place: &Place, args: &StatusArgs) -> Result<(), Failure> {
    let client = place.client();
    let Some(name) = &args.name else {
        if args.json {
            return print(&ask::<Status>(&client, "/v1/status")?.1);
        }
        return print(&node(&fetch(&client)?));
    };
    let target = format!("/v1/workloads/{}", percent_encode(name));
    let (workload, json) = ask::<Workload>(&client, &target)?;
    print(&if args.json { json } else { one(&workload) })
}

/// The node's status.
pub fn fetch(client: &Client) -> Result<Status, Failure> {
    Ok(ask(client, "/v1/status")?.0)
}

/// Asks for JSON of a known shape; gives the value and the text as it came.
fn ask<T: serde::de::DeserializeOwned>(
    client: &Client,
    target: &str,
) -> Result<(T, String), Failure> {
    let answer = client.ask("GET", target, TIME)?;
    let foreign = |what: String| ClientError::Foreign(client.socket().to_owned(), what);
    if answer.status != 200 {
        // Only an error in our own words is ours; any HTTP server says 404.
        let ours = serde_json::from_slice::<serde_json::Value>(&answer.body)
            .is_ok_and(|json| json["error"].is_string());
        let text = answer.error_text();
        return Err(if ours {
            Failure::new(EXIT_FAILED, text)
        } else {
            foreign(text).into()
        });
    }
    let value = serde_json::from_slice(&answer.body)
        .map_err(|error| foreign(format!("its status cannot be read: {error}")))?;
    Ok((value, String::from_utf8_lossy(&answer.body).into_owned()))
}

/// The whole node.
fn node(status: &Status) -> String {
    let mut text = format!(
        "spillwayd {}, pid {}, up {}, {}{}\n\n",
        clean(&status.version),
        status.pid,
        span(status.uptime_seconds),
        clean(&status.run_dir),
        if status.adopting {
            ", waiting for processes of its predecessor"
        } else {
            ""
        },
    );
    text.push_str(&devices(status));
    text.push('\n');
    if status.workloads.is_empty() {
        text.push_str("no workloads: start one with spillway run -- PROGRAM ...\n");
    } else {
        text.push_str(&workloads(&status.workloads));
    }
    if !status.strangers.is_empty() {
        text.push('\n');
        text.push_str(&strangers(&status.strangers));
    }
    text
}

/// Who uses a device without Spillway.
fn strangers(strangers: &[Stranger]) -> String {
    let headings = [
        "WITHOUT SPILLWAY",
        "PID",
        "USER",
        "DEVICE",
        "HOLDS",
        "CONTAINER",
        "NOTE",
    ];
    let mut table = Table::new(&headings, &[1, 2, 3, 4]);
    let unknown = || "?".to_owned();
    for stranger in strangers {
        let note = match stranger.library {
            Some(true) => "libspillway.so is loaded, but it has no session with this device",
            Some(false) => "libspillway.so is not loaded",
            None => "what is loaded cannot be read",
        };
        table.row([
            if stranger.command.is_empty() {
                unknown()
            } else {
                stranger.command.clone()
            },
            stranger.pid.to_string(),
            stranger.uid.map_or_else(unknown, |uid| uid.to_string()),
            stranger.device.to_string(),
            stranger.bytes.map_or_else(unknown, format_bytes),
            stranger.container.clone().unwrap_or_default(),
            note.to_owned(),
        ]);
    }
    table.text()
}

fn devices(status: &Status) -> String {
    let headings = [
        "DEVICE", "NAME", "CAPACITY", "ROOM", "GRANTED", "FREE", "IN USE",
    ];
    let mut table = Table::new(&headings, &[2, 3, 4, 5, 6]);
    for device in &status.devices {
        let in_use = device.nvml_used_bytes;
        table.row([
            device.index.to_string(),
            device.name.clone(),
            format_bytes(device.capacity_bytes),
            format_bytes(device.room_bytes),
            format_bytes(device.granted_bytes),
            format_bytes(device.free_bytes),
            in_use.map_or_else(|| "?".to_owned(), format_bytes),
        ]);
    }
    let pool = &status.pool;
    table.row([
        "host".to_owned(),
        "pool for what is swapped out".to_owned(),
        format_bytes(pool.capacity_bytes),
        String::new(),
        format_bytes(pool.reserved_bytes),
        format_bytes(pool.capacity_bytes.saturating_sub(pool.reserved_bytes)),
        format_bytes(pool.populated_bytes),
    ]);
    table.text()
}

fn workloads(workloads: &[Workload]) -> String {
    let headings = [
        "WORKLOAD",
        "STATE",
        "REQUEST",
        "LIMIT",
        "USED",
        "RESIDENT",
        "HOST",
        "OVERHEAD",
        "OUT",
        "IN",
        "PROCESSES",
        "NOTE",
    ];
    let mut table = Table::new(&headings, &[2, 3, 4, 5, 6, 7, 8, 9]);
    for workload in workloads {
        let sum = |figure: fn(&crate::model::DeviceShare) -> u64| {
            format_bytes(workload.devices.iter().map(figure).sum())
        };
        table.row([
            workload.name.clone(),
            state(workload),
            sum(|share| share.request_bytes),
            sum(|share| share.limit_bytes),
            format_bytes(workload.used_bytes),
            sum(|share| share.resident_bytes),
            format_bytes(workload.host_bytes),
            sum(|share| share.overhead_bytes),
            workload.swaps_out.to_string(),
            workload.swaps_in.to_string(),
            processes(workload),
            notes(workload).join("; "),
        ]);
    }
    table.text()
}

/// The state, with what the workload does in it.
fn state(workload: &Workload) -> String {
    match (workload.state.as_str(), workload.active) {
        ("resident", true) => "resident, active".to_owned(),
        ("resident", false) => "resident, idle".to_owned(),
        (state, _) => state.to_owned(),
    }
}

fn processes(workload: &Workload) -> String {
    let shown = workload.processes.iter().take(3);
    let shown: Vec<_> = shown.map(|p| format!("{} {}", p.pid, p.command)).collect();
    let more = workload.processes.len().saturating_sub(3);
    match more {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// What a person should know beyond the figures.
fn notes(workload: &Workload) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(what) = &workload.waiting_for {
        notes.push(format!("waits for {what}"));
    }
    match &workload.not_swappable {
        Some(why) => notes.push(format!("not swappable: {why}")),
        None if workload.swap == "never" => notes.push("never swapped".to_owned()),
        None => {}
    }
    match workload.unknown_entry_points {
        0 => {}
        1 => notes.push("1 unknown driver entry point".to_owned()),
        n => notes.push(format!("{n} unknown driver entry points")),
    }
    if workload.priority != 0 {
        notes.push(format!("priority {}", workload.priority));
    }
    notes
}

/// How many entry points are unknown, and which.
pub fn unknown(workload: &Workload) -> String {
    let count = workload.unknown_entry_points;
    let names = &workload.unknown_entry_point_names;
    if names.is_empty() {
        return count.to_string();
    }
    // A name comes a little before the count that includes it.
    let count = count.max(names.len() as u64);
    format!("{count}: {}", names.join(", "))
}

/// One workload in full.
fn one(workload: &Workload) -> String {
    let rate = |bytes: u64, times: u64, last: f64| match times {
        0 => "none".to_owned(),
        times => format!(
            "{times}, {} in all, the last took {last:.3} s",
            format_bytes(bytes)
        ),
    };
    let mut lines = vec![
        ("workload", workload.name.clone()),
        ("state", state(workload)),
        ("priority", workload.priority.to_string()),
        ("swap", workload.swap.clone()),
        ("used", format_bytes(workload.used_bytes)),
        ("on the host only", format_bytes(workload.host_bytes)),
        (
            "swaps out",
            rate(
                workload.bytes_out,
                workload.swaps_out,
                workload.last_out_seconds,
            ),
        ),
        (
            "swaps in",
            rate(
                workload.bytes_in,
                workload.swaps_in,
                workload.last_in_seconds,
            ),
        ),
        ("blocked", format!("{:.3} s", workload.blocked_seconds)),
        (
            "active",
            format!("{:.0} % of its time", workload.active_ratio * 100.0),
        ),
    ];
    let or_nothing =
        |text: &Option<String>, nothing: &str| text.clone().unwrap_or_else(|| nothing.to_owned());
    lines.push(("waits for", or_nothing(&workload.waiting_for, "nothing")));
    lines.push((
        "not swappable",
        or_nothing(&workload.not_swappable, "it is swappable"),
    ));
    lines.push(("unknown entry points", unknown(workload)));
    let mut text = String::new();
    for (key, value) in lines {
        text.push_str(&format!("{key:<22}{}\n", clean(&value)));
    }
    let headings = [
        "DEVICE", "REQUEST", "LIMIT", "USED", "RESIDENT", "PINNED", "OVERHEAD", "GRANT", "UUID",
    ];
    let mut shares = Table::new(&headings, &[1, 2, 3, 4, 5, 6, 7]);
    for share in &workload.devices {
        shares.row([
            share.index.to_string(),
            format_bytes(share.request_bytes),
            format_bytes(share.limit_bytes),
            format_bytes(share.used_bytes),
            format_bytes(share.resident_bytes),
            format_bytes(share.pinned_bytes),
            format_bytes(share.overhead_bytes),
            format_bytes(share.grant_bytes),
            share.uuid.clone(),
        ]);
    }
    let mut processes = Table::new(&["PID", "USER", "STATE", "PROGRAM"], &[0, 1]);
    for process in &workload.processes {
        processes.row([
            process.pid.to_string(),
            process.uid.to_string(),
            process.state.clone(),
            process.command.clone(),
        ]);
    }
    format!("{text}\n{}\n{}", shares.text(), processes.text())
}

/// `75 s`, `3 min 12 s`, `2 h 5 min`, `3 d 1 h`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "whole seconds are shown; a negative or absurd figure saturates"
)]
fn span(seconds: f64) -> String {
    let s = seconds as u64;
    match s {
        0..100 => format!("{s} s"),
        100..6_000 => format!("{} min {} s", s / 60, s % 60),
        6_000..172_800 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Device, DeviceShare, Pool, Process};

    const GIB: u64 = 1 << 30;

    fn workload(name: &str) -> Workload {
        Workload {
            name: name.into(),
            state: "resident".into(),
            swap: "auto".into(),
            active: true,
            active_ratio: 0.5,
            used_bytes: GIB + (96 << 20),
            devices: vec![DeviceShare {
                index: 0,
                uuid: "GPU-1".into(),
                request_bytes: GIB / 2,
                limit_bytes: 3 * GIB / 2,
                used_bytes: GIB + (96 << 20),
                resident_bytes: GIB + (96 << 20),
                pinned_bytes: 2 << 20,
                overhead_bytes: 64 << 20,
                grant_bytes: GIB + (64 << 20),
            }],
            swaps_out: 3,
            swaps_in: 3,
            bytes_out: 3 * GIB,
            bytes_in: 3 * GIB,
            last_out_seconds: 0.25,
            last_in_seconds: 0.1254,
            processes: vec![Process {
                pid: 4711,
                uid: 1000,
                command: "server".into(),
                state: "resident".into(),
            }],
            ..Workload::default()
        }
    }

    fn status() -> Status {
        let mut out = workload("b-model");
        out.state = "evicted".into();
        out.active = false;
        out.devices[0].resident_bytes = 66 << 20;
        out.host_bytes = GIB + (30 << 20);
        out.waiting_for = Some("a-model to go idle".into());
        out.unknown_entry_points = 2;
        out.priority = -1;
        let mut fixed = workload("c\x1b[31m");
        fixed.active = false;
        fixed.not_swappable = Some("SPILLWAY_SWAP=never".into());
        fixed.processes = (1..=5)
            .map(|pid| Process {
                pid,
                command: "rank".into(),
                ..Process::default()
            })
            .collect();
        Status {
            version: "0.1.0".into(),
            pid: 42,
            uptime_seconds: 200.9,
            run_dir: "/run/spillway".into(),
            devices: vec![Device {
                index: 0,
                uuid: "GPU-1".into(),
                name: "Simulated GPU".into(),
                capacity_bytes: 2 * GIB,
                reserve_bytes: 61 << 20,
                room_bytes: 2 * GIB - (61 << 20),
                granted_bytes: GIB,
                free_bytes: GIB - (61 << 20),
                nvml_used_bytes: None,
                outside_bytes: 0,
            }],
            pool: Pool {
                capacity_bytes: 6 * GIB,
                reserved_bytes: 2 * GIB,
                populated_bytes: GIB,
            },
            workloads: vec![workload("a-model"), out, fixed],
            ..Status::default()
        }
    }

    #[test]
    fn the_node_as_tables() {
        let golden = "\
spillwayd 0.1.0, pid 42, up 3 min 20 s, /run/spillway

DEVICE  NAME                          CAPACITY      ROOM  GRANTED     FREE  IN USE
0       Simulated GPU                    2 GiB  1.94 GiB    1 GiB  963 MiB       ?
host    pool for what is swapped out     6 GiB              2 GiB    4 GiB   1 GiB

WORKLOAD  STATE             REQUEST    LIMIT      USED  RESIDENT      HOST  OVERHEAD  OUT  IN  PROCESSES                      NOTE
a-model   resident, active  512 MiB  1.5 GiB  1.09 GiB  1.09 GiB       0 B    64 MiB    3   3  4711 server
b-model   evicted           512 MiB  1.5 GiB  1.09 GiB    66 MiB  1.03 GiB    64 MiB    3   3  4711 server                    waits for a-model to go idle; 2 unknown driver entry points; priority -1
c?[31m    resident, idle    512 MiB  1.5 GiB  1.09 GiB  1.09 GiB       0 B    64 MiB    3   3  1 rank, 2 rank, 3 rank and 2 more  not swappable: SPILLWAY_SWAP=never
";
        // The widest cell of a column decides; the literal above leaves that to the code.
        let squeeze = |text: &str| {
            let lines = text.lines();
            let words = lines.map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "));
            words.collect::<Vec<_>>().join("\n")
        };
        assert_eq!(squeeze(&node(&status())), squeeze(golden));
    }

    #[test]
    fn who_uses_a_device_without_spillway_is_shown() {
        let mut status = status();
        assert!(!node(&status).contains("WITHOUT"), "nobody does");
        let known = Stranger {
            pid: 99,
            uid: Some(1000),
            command: "python3\n".into(),
            container: Some("docker 0123".into()),
            library: Some(false),
            device: 1,
            uuid: "GPU-2".into(),
            bytes: Some(GIB),
        };
        status.strangers = vec![
            known,
            Stranger {
                pid: 98,
                ..Stranger::default()
            },
        ];
        let golden = "
WITHOUT SPILLWAY  PID  USER  DEVICE  HOLDS  CONTAINER    NOTE
python3?           99  1000       1  1 GiB  docker 0123  libspillway.so is not loaded
?                  98     ?       0      ?               what is loaded cannot be read
";
        let text = node(&status);
        assert!(text.ends_with(golden), "{text}");
    }

    #[test]
    fn columns_line_up() {
        let text = node(&status());
        let rows: Vec<_> = text
            .lines()
            .skip_while(|l| !l.starts_with("WORKLOAD"))
            .collect();
        let note = rows[0].find("NOTE").expect("the last heading");
        assert_eq!(rows[2].find("waits for"), Some(note), "{text}");
        assert_eq!(rows[3].find("not swappable"), Some(note), "{text}");
        assert!(text.lines().all(|line| line == line.trim_end()));
    }

    #[test]
    fn one_workload_in_full() {
        let golden = "\
workload              a-model
state                 resident, active
priority              0
swap                  auto
used                  1.09 GiB
on the host only      0 B
swaps out             3, 3 GiB in all, the last took 0.250 s
swaps in              3, 3 GiB in all, the last took 0.125 s
blocked               0.000 s
active                50 % of its time
waits for             nothing
not swappable         it is swappable
unknown entry points  0

DEVICE  REQUEST    LIMIT      USED  RESIDENT  PINNED  OVERHEAD     GRANT  UUID
0       512 MiB  1.5 GiB  1.09 GiB  1.09 GiB   2 MiB    64 MiB  1.06 GiB  GPU-1

 PID  USER  STATE     PROGRAM
4711  1000  resident  server
";
        assert_eq!(one(&workload("a-model")), golden);
        let mut new = workload("new");
        new.unknown_entry_points = 1;
        new.unknown_entry_point_names = vec!["cuNew".into(), "cuNew_v2".into()];
        let line = "unknown entry points  2: cuNew, cuNew_v2\n";
        assert!(one(&new).contains(line), "{}", one(&new));
    }

    #[test]
    fn an_empty_node_says_what_to_do() {
        let status = Status {
            workloads: Vec::new(),
            adopting: true,
            ..status()
        };
        let text = node(&status);
        assert!(text.contains("no workloads: start one with spillway run"));
        assert!(text.contains("predecessor"));
    }

    #[test]
    fn spans() {
        for (seconds, text) in [
            (0.0, "0 s"),
            (99.9, "99 s"),
            (6_001.0, "1 h 40 min"),
            (200_000.0, "2 d 7 h"),
            (-1.0, "0 s"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }
}
