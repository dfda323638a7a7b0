//! Every row that its name and arguments do not explain has a reason in `table/reasons.csv`.
//!
//! What they would say is the last column of `table/cuda_h_13_5.csv`: a rule's opinion, derived once from
//! names and arguments. The table decides; where it differs, somebody has to say why.

use super::*;
use std::collections::BTreeSet;

const REASONS: &str = include_str!("../../../table/reasons.csv");

struct Reason {
    names: Vec<&'static str>,
    source: &'static str,
    text: &'static str,
}

fn reasons() -> Vec<Reason> {
    let lines = REASONS.lines().filter(|line| !line.starts_with('#'));
    let parse = |line: &'static str| {
        let (names, rest) = line.split_once(',').expect(line);
        let (source, text) = rest.split_once(',').expect(line);
        let text = text
            .strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'));
        Reason {
            names: names.split(' ').collect(),
            source,
            text: text.unwrap_or_else(|| panic!("the reason belongs in quotes: {line}")),
        }
    };
    lines.map(parse).collect()
}

/// Whether `name` is an entry point, or the base name of several.
fn exists(name: &str) -> bool {
    ROWS.iter()
        .any(|row| row.name == name || row.base.to_str() == Ok(name))
}

/// What the rule says about each name: words of [`Class`] and [`Mark`].
fn by_rule() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    lines()
        .map(|line| {
            let fields: Vec<&str> = line.split(',').collect();
            (fields[0], fields[4].split_whitespace().collect())
        })
        .collect()
}

/// The class that the rule's words amount to.
fn class_by_rule(words: &BTreeSet<&'static str>) -> &'static str {
    [
        "allocates",
        "frees",
        "submits",
        "maps",
        "shares",
        "capture",
        "reports",
        "loader",
    ]
    .into_iter()
    .find(|class| words.contains(class))
    .unwrap_or("none")
}

/// Why this row needs a reason; empty: it needs none.
fn unexplained(row: &Row, rule: &BTreeSet<&'static str>) -> Vec<String> {
    let mut why = Vec::new();
    let class = format!("{:?}", row.class);
    if class != class_by_rule(rule) {
        why.push(format!("class {class}, by rule {}", class_by_rule(rule)));
    } else {
        let mut words: BTreeSet<String> =
            row.marks.iter().map(|mark| format!("{mark:?}")).collect();
        words.insert(class);
        for silent in ["none", "needs_residency", "legacy", "ptsz", "ptds"] {
            words.remove(silent);
        }
        if !words.iter().map(String::as_str).eq(rule.iter().copied()) {
            why.push(format!("effects {words:?}, by rule {rule:?}"));
        }
    }
    let touches = row.marks.contains(&Mark::takes) || row.marks.contains(&Mark::gives);
    if touches && row.how != How::custom {
        why.push("takes or gives memory, with no hook of its own".into());
    }
    let plain = ["cuLaunch", "cuGraphLaunch", "cuMemcpy", "cuMemset"];
    if matches!(row.how, How::hot | How::gated) && !plain.iter().any(|p| row.name.starts_with(p)) {
        why.push("waits at the gate and is no launch, copy or fill".into());
    }
    let moves = matches!(
        row.class,
        Class::allocates | Class::frees | Class::shares | Class::maps
    );
    if row.how == How::off && moves {
        why.push(format!("{:?}, and not hooked", row.class));
    }
    why
}

#[test]
fn every_name_that_needs_a_reason_has_one() {
    let reasons = reasons();
    let explained: BTreeSet<&str> = reasons
        .iter()
        .flat_map(|r| r.names.iter().copied())
        .collect();
    let rules = by_rule();
    let missing: Vec<String> = ROWS
        .iter()
        .filter(|row| {
            !explained.contains(row.name) && !explained.contains(row.base.to_str().expect(row.name))
        })
        .filter_map(|row| {
            let why = unexplained(row, &rules[row.name]);
            (!why.is_empty()).then(|| format!("{}: {}", row.name, why.join("; ")))
        })
        .collect();
    assert!(
        missing.is_empty(),
        "no reason in interposer/core/table/reasons.csv for\n{}",
        missing.join("\n")
    );
}

#[test]
fn every_reason_is_for_names_that_exist_once_and_says_where_it_is_from() {
    let mut seen = BTreeSet::new();
    for reason in reasons() {
        for name in reason.names {
            assert!(exists(name), "{name} is no entry point");
            assert!(seen.insert(name), "{name} has two reasons");
        }
        match reason.source.strip_prefix("cuda.h: ") {
            Some(name) => assert!(exists(name), "{name} is no entry point"),
            None => assert!(
                ["arguments", "design", "open"].contains(&reason.source),
                "source {:?} of {:?}",
                reason.source,
                reason.text
            ),
        }
        assert!(
            reason.text.ends_with('.') && !reason.text.contains('"'),
            "{}",
            reason.text
        );
    }
}

/// The rule's words are words of the table.
#[test]
fn the_rule_speaks_the_tables_language() {
    let known = [
        "allocates",
        "takes",
        "host",
        "frees",
        "gives",
        "maps",
        "submits",
        "orders",
        "reports",
        "shares",
        "capture",
        "loader",
    ];
    for (name, words) in by_rule() {
        for word in words {
            assert!(known.contains(&word), "{name}: {word}");
        }
    }
}
