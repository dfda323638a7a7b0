//! `GET /metrics` in Prometheus' text format, version 0.0.4.
//!
//! The renderer takes names, types, labels and help texts from [`FAMILIES`] alone; `metrics.md`
//! beside this file is what people read, and a test holds the two together.

use std::fmt::Write as _;

use super::reply::Reply;
use crate::model::{HISTOGRAM_BOUNDS, Histogram, Metrics, Status};

/// What a metric's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only grows, while its workload lives.
    Counter,
    /// `_bucket`, `_sum` and `_count`.
    Histogram,
}

/// One metric family.
#[derive(Debug)]
pub struct Family {
    /// The full name.
    pub name: &'static str,
    /// The type.
    pub kind: Kind,
    /// The labels, in order.
    pub labels: &'static [&'static str],
    /// One sentence.
    pub help: &'static str,
}

macro_rules! families {
    ($($id:ident = $name:literal $kind:ident [$($label:literal),*] $help:literal;)*) => {
        $(static $id: Family = Family {
            name: $name,
            kind: Kind::$kind,
            labels: &[$($label),*],
            help: $help,
        };)*
        /// Every metric, in the order of the page.
        pub static FAMILIES: &[&Family] = &[$(&$id),*];
    };
}

families! {
    USED = "spillway_used_bytes" Gauge ["workload", "device", "uuid"]
        "Device memory that the workload uses, resident or not, overhead included.";
    RESIDENT = "spillway_resident_bytes" Gauge ["workload", "device", "uuid"]
        "Physical device memory that the workload holds now, overhead included.";
    PINNED = "spillway_pinned_bytes" Gauge ["workload", "device", "uuid"]
        "The part of the used memory that cannot be moved, without overhead.";
    OVERHEAD = "spillway_overhead_bytes" Gauge ["workload", "device", "uuid"]
        "Measured device memory of contexts, modules and code.";
    REQUEST = "spillway_request_bytes" Gauge ["workload", "device", "uuid"]
        "Device memory that the workload is guaranteed.";
    LIMIT = "spillway_limit_bytes" Gauge ["workload", "device", "uuid"]
        "The most device memory that the workload may use.";
    HOST = "spillway_host_bytes" Gauge ["workload"]
        "Memory of the workload whose only copy is on the host.";
    SWAP_BYTES = "spillway_swap_bytes_total" Counter ["workload", "direction"]
        "Bytes copied by swaps: out to the host, in to the device.";
    SWAP_SECONDS = "spillway_swap_seconds" Histogram ["workload", "direction"]
        "Durations of swaps, from the command to the last process.";
    BLOCKED_SECONDS = "spillway_blocked_seconds" Histogram ["workload"]
        "How long the workload waited to be resident again.";
    REFUSED = "spillway_refused_total" Counter ["workload", "reason"]
        "Growth refused, by reason; with an empty workload: registrations refused.";
    ACTIVE = "spillway_active" Gauge ["workload"]
        "1 while the workload has work in flight, waits, or had some within the idle time.";
    WORKLOAD_ACTIVE = "spillway_workload_active_ratio" Gauge ["workload"]
        "Share of the workload's time for which it was active.";
    DEVICE_ACTIVE = "spillway_device_active_ratio" Gauge ["device", "uuid"]
        "Share of the time for which some workload was active on the device.";
    CAPACITY = "spillway_device_capacity_bytes" Gauge ["device", "uuid"]
        "Device memory that is shared out, the reserve included.";
    ROOM = "spillway_device_room_bytes" Gauge ["device", "uuid"]
        "Device memory that can be granted.";
    GRANTED = "spillway_device_granted_bytes" Gauge ["device", "uuid"]
        "Device memory that is granted.";
    OUTSIDE = "spillway_outside_bytes" Gauge ["device", "uuid"]
        "Device memory of processes that use the device without Spillway.";
    ESCAPES = "spillway_escapes_total" Counter ["reason"]
        "Processes without Spillway, and workloads beyond their limit or account, by reason.";
    POOL_CAPACITY = "spillway_pool_capacity_bytes" Gauge []
        "Host memory that may be reserved for what is swapped out.";
    POOL_RESERVED = "spillway_pool_reserved_bytes" Gauge []
        "Host memory reserved for what is swapped out.";
    POOL_POPULATED = "spillway_pool_populated_bytes" Gauge []
        "Host memory populated for what is swapped out.";
    UNKNOWN = "spillway_unknown_entry_points" Gauge ["workload"]
        "Driver entry points that the workload asked for and that Spillway does not know.";
    UPTIME = "spillway_uptime_seconds" Gauge []
        "Seconds since spillwayd started.";
    INFO = "spillway_build_info" Gauge ["version", "protocol", "instance"]
        "Always 1; the labels say which spillwayd this is.";
}

/// The answer to `GET /metrics`.
pub(super) fn reply(metrics: &Metrics) -> Reply {
    Reply {
        status: 200,
        content_type: "text/plain; version=0.0.4; charset=utf-8",
        allow: None,
        body: render(metrics).into_bytes(),
    }
}

/// The whole page. A family without values still has its HELP and TYPE lines.
#[must_use]
pub fn render(metrics: &Metrics) -> String {
    let mut page = Page::default();
    shares(&mut page, &metrics.status);
    counters(&mut page, metrics);
    node(&mut page, metrics);
    page.finish()
}

fn shares(page: &mut Page, status: &Status) {
    for workload in &status.workloads {
        for share in &workload.devices {
            let index = share.index.to_string();
            let labels = [workload.name.as_str(), &index, &share.uuid];
            page.bytes(&USED, &labels, share.used_bytes);
            page.bytes(&RESIDENT, &labels, share.resident_bytes);
            page.bytes(&PINNED, &labels, share.pinned_bytes);
            page.bytes(&OVERHEAD, &labels, share.overhead_bytes);
            page.bytes(&REQUEST, &labels, share.request_bytes);
            page.bytes(&LIMIT, &labels, share.limit_bytes);
        }
        let name = workload.name.as_str();
        page.bytes(&HOST, &[name], workload.host_bytes);
        page.bytes(&SWAP_BYTES, &[name, "out"], workload.bytes_out);
        page.bytes(&SWAP_BYTES, &[name, "in"], workload.bytes_in);
        page.bytes(&ACTIVE, &[name], u64::from(workload.active));
        page.number(&WORKLOAD_ACTIVE, &[name], workload.active_ratio);
        page.bytes(&UNKNOWN, &[name], workload.unknown_entry_points);
    }
}

fn counters(page: &mut Page, metrics: &Metrics) {
    for (name, workload) in &metrics.workloads {
        page.histogram(&SWAP_SECONDS, &[name, "out"], &workload.swap_out_seconds);
        page.histogram(&SWAP_SECONDS, &[name, "in"], &workload.swap_in_seconds);
        page.histogram(&BLOCKED_SECONDS, &[name], &workload.blocked_seconds);
        for (reason, count) in &workload.refused {
            page.bytes(&REFUSED, &[name, reason], *count);
        }
    }
    for (reason, count) in &metrics.refused_registrations {
        page.bytes(&REFUSED, &["", reason], *count);
    }
}

fn node(page: &mut Page, metrics: &Metrics) {
    let status = &metrics.status;
    for (at, device) in status.devices.iter().enumerate() {
        let index = device.index.to_string();
        let labels = [index.as_str(), &device.uuid];
        if let Some(ratio) = metrics.device_active_ratio.get(at) {
            page.number(&DEVICE_ACTIVE, &labels, *ratio);
        }
        page.bytes(&CAPACITY, &labels, device.capacity_bytes);
        page.bytes(&ROOM, &labels, device.room_bytes);
        page.bytes(&GRANTED, &labels, device.granted_bytes);
        page.bytes(&OUTSIDE, &labels, device.outside_bytes);
    }
    // All reasons, also those that did not occur: who watches a rate needs the zero before the one.
    for reason in ["stranger", "limit", "uncharged"] {
        let count = metrics.escapes.get(reason).copied().unwrap_or(0);
        page.bytes(&ESCAPES, &[reason], count);
    }
    page.bytes(&POOL_CAPACITY, &[], status.pool.capacity_bytes);
    page.bytes(&POOL_RESERVED, &[], status.pool.reserved_bytes);
    page.bytes(&POOL_POPULATED, &[], status.pool.populated_bytes);
    page.number(&UPTIME, &[], status.uptime_seconds);
    let protocol = status.protocol.to_string();
    page.bytes(&INFO, &[&status.version, &protocol, &status.instance], 1);
}

/// Collects samples by family, since the format wants each family's lines together.
struct Page {
    bodies: Vec<String>,
}

impl Default for Page {
    fn default() -> Self {
        Self {
            bodies: vec![String::new(); FAMILIES.len()],
        }
    }
}

impl Page {
    fn sample(
        &mut self,
        family: &'static Family,
        suffix: &str,
        labels: &[&str],
        bound: Option<&str>,
        value: &str,
    ) {
        debug_assert_eq!(family.labels.len(), labels.len(), "{}", family.name);
        let Some(at) = FAMILIES.iter().position(|f| f.name == family.name) else {
            return;
        };
        let pairs = family.labels.iter().copied().zip(labels.iter().copied());
        let pairs: Vec<String> = pairs
            .chain(bound.map(|bound| ("le", bound)))
            .map(|(label, value)| format!("{label}=\"{}\"", escape(value)))
            .collect();
        let labels = match pairs.as_slice() {
            [] => String::new(),
            pairs => format!("{{{}}}", pairs.join(",")),
        };
        let _ = writeln!(self.bodies[at], "{}{suffix}{labels} {value}", family.name);
    }

    fn bytes(&mut self, family: &'static Family, labels: &[&str], value: u64) {
        self.sample(family, "", labels, None, &value.to_string());
    }

    fn number(&mut self, family: &'static Family, labels: &[&str], value: f64) {
        self.sample(family, "", labels, None, &value.to_string());
    }

    fn histogram(&mut self, family: &'static Family, labels: &[&str], histogram: &Histogram) {
        let mut below = 0u64;
        for (at, count) in histogram.counts.iter().enumerate() {
            below += count;
            let bound = HISTOGRAM_BOUNDS
                .get(at)
                .map_or_else(|| "+Inf".to_owned(), f64::to_string);
            self.sample(family, "_bucket", labels, Some(&bound), &below.to_string());
        }
        let sum = histogram.sum_seconds.to_string();
        self.sample(family, "_sum", labels, None, &sum);
        self.sample(family, "_count", labels, None, &below.to_string());
    }

    fn finish(self) -> String {
        let mut text = String::new();
        for (family, body) in FAMILIES.iter().zip(&self.bodies) {
            let kind = match family.kind {
                Kind::Gauge => "gauge",
                Kind::Counter => "counter",
                Kind::Histogram => "histogram",
            };
            let _ = writeln!(text, "# HELP {} {}", family.name, family.help);
            let _ = writeln!(text, "# TYPE {} {kind}", family.name);
            text.push_str(body);
        }
        text
    }
}

fn escape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Device, DeviceShare, Workload, WorkloadMetrics};
    use std::collections::{BTreeMap, BTreeSet};

    fn metrics() -> Metrics {
        let mut counters = WorkloadMetrics::default();
        counters.swap_out_seconds.add(0.004);
        counters.swap_out_seconds.add(40.0);
        counters.refused.insert("limit".into(), 3);
        Metrics {
            status: Status {
                version: "0.1.0".into(),
                devices: vec![Device {
                    index: 2,
                    uuid: "GPU-x".into(),
                    ..Device::default()
                }],
                workloads: vec![Workload {
                    name: "a\"b\\c\nd".into(),
                    bytes_out: 7,
                    devices: vec![DeviceShare {
                        index: 2,
                        uuid: "GPU-x".into(),
                        used_bytes: 123,
                        ..DeviceShare::default()
                    }],
                    ..Workload::default()
                }],
                ..Status::default()
            },
            workloads: BTreeMap::from([("a\"b\\c\nd".to_owned(), counters)]),
            refused_registrations: BTreeMap::from([("quota".to_owned(), 2)]),
            escapes: BTreeMap::from([("stranger".to_owned(), 1)]),
            device_active_ratio: vec![0.25],
        }
    }

    #[test]
    fn code_and_documentation_name_the_same_metrics() {
        let documented: Vec<String> = include_str!("metrics.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .map(|line| {
                let (name, rest) = line.split_once("` | ").expect("a table row");
                let (kind, labels) = rest
                    .split_once(" | ")
                    .unwrap_or((rest.trim_end_matches(" | |"), ""));
                let words = labels
                    .split(", ")
                    .map(|l| l.split([' ', '|']).next().unwrap_or(""));
                let labels: Vec<_> = words
                    .filter(|word| !word.is_empty() && !word.starts_with('`'))
                    .collect();
                format!("{name} {kind} {}", labels.join(","))
            })
            .collect();
        let in_code: Vec<String> = FAMILIES
            .iter()
            .map(|f| {
                let kind = format!("{:?}", f.kind).to_lowercase();
                format!("{} {kind} {}", f.name, f.labels.join(","))
            })
            .collect();
        assert_eq!(in_code, documented);
    }

    /// The names that dashboards were promised.
    #[test]
    fn the_promised_ones_are_there() {
        let names: BTreeSet<_> = FAMILIES.iter().map(|f| f.name).collect();
        for name in [
            "used_bytes",
            "resident_bytes",
            "host_bytes",
            "request_bytes",
            "limit_bytes",
            "swap_bytes_total",
            "swap_seconds",
            "blocked_seconds",
            "refused_total",
            "device_active_ratio",
        ] {
            assert!(names.contains(&*format!("spillway_{name}")), "{name}");
        }
    }

    /// A family that nothing fills would be a promise without a value.
    #[test]
    fn every_family_has_values() {
        let page = render(&metrics());
        for family in FAMILIES {
            let samples = page
                .lines()
                .filter(|line| line.starts_with(family.name))
                .count();
            assert!(samples > 0, "{} is never filled", family.name);
        }
    }

    #[test]
    fn labels_are_escaped() {
        let page = render(&metrics());
        let line = r#"spillway_used_bytes{workload="a\"b\\c\nd",device="2",uuid="GPU-x"} 123"#;
        assert!(page.lines().any(|l| l == line), "{page}");
    }

    #[test]
    fn histograms_are_cumulative() {
        let page = render(&metrics());
        let of = |le: &str| {
            let label = format!("direction=\"out\",le=\"{le}\"}} ");
            let line = page.lines().find(|l| l.contains(&label));
            line.and_then(|l| l.rsplit(' ').next()).map(str::to_owned)
        };
        assert_eq!(of("0.0025").as_deref(), Some("0"));
        assert_eq!(of("0.005").as_deref(), Some("1"));
        assert_eq!(of("30").as_deref(), Some("1"));
        assert_eq!(of("+Inf").as_deref(), Some("2"));
        assert!(page.contains("direction=\"out\"} 40.004"), "{page}");
    }

    /// Every line is a comment or `name{labels} number`, each family's lines are together, and no
    /// sample comes twice.
    #[test]
    fn the_page_is_well_formed() {
        let page = render(&metrics());
        let (mut current, mut seen, mut samples) =
            (String::new(), BTreeSet::new(), BTreeSet::new());
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                current = rest.split(' ').next().expect("a name").to_owned();
                assert!(seen.insert(current.clone()), "{current} comes twice");
                continue;
            }
            if line.starts_with("# TYPE ") {
                continue;
            }
            assert!(line.starts_with(&current), "{line} under {current}");
            let (sample, value) = line.rsplit_once(' ').expect("a value");
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(samples.insert(sample.to_owned()), "{sample} comes twice");
        }
        assert!(page.ends_with('\n'));
    }
}
