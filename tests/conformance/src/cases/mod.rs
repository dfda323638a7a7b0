//! The rules, a file per topic. Each case's doc line gives the rule and, after `Source:`, who says so.

use crate::harness::Case;

macro_rules! topics {
    ($($topic:ident),* $(,)?) => {
        $(mod $topic;)*

        /// Every case, in the order of the topics.
        pub fn all() -> impl Iterator<Item = &'static Case> {
            [$($topic::CASES),*].into_iter().flatten()
        }

        #[cfg(test)]
        const SOURCES: &[(&str, &str)] = &[$((stringify!($topic), include_str!(concat!(stringify!($topic), ".rs")))),*];
    };
}

topics!(
    device,
    context,
    green,
    limits,
    memory,
    arrays,
    copies,
    pointer,
    vmm,
    vmm_lifetime,
    vmm_host,
    vmm_sharing,
    multicast,
    host,
    managed,
    streams,
    stream_order,
    events,
    pools,
    pool_sharing,
    capture,
    capture_rules,
    graph_memory,
    modules,
    launches,
    errors,
    misuse,
    legacy,
    procaddress,
    processes,
    fork,
    nvml,
    peer,
);

#[cfg(test)]
mod tests {
    use super::*;

    /// A function that answers an `Outcome` is a case: it is in its file's table and names its source.
    #[test]
    fn every_case_is_listed_and_names_its_source() {
        let listed: Vec<String> = all().map(Case::full_name).collect();
        let mut seen = 0;
        for (topic, text) in SOURCES {
            let mut doc = String::new();
            for line in text.lines() {
                if let Some(rest) = line.strip_prefix("///") {
                    doc.push_str(rest);
                } else if let Some(rest) = line
                    .strip_prefix("fn ")
                    .filter(|l| l.ends_with("() -> Outcome {"))
                {
                    let name = rest.split('(').next().unwrap_or_default();
                    assert!(
                        listed.contains(&format!("{topic}.{name}")),
                        "{topic}.{name} is in no table"
                    );
                    assert!(doc.contains("Source: "), "{topic}.{name} names no source");
                    seen += 1;
                    doc.clear();
                } else if !line.starts_with('#') {
                    doc.clear();
                }
            }
        }
        assert_eq!(seen, listed.len(), "tables and functions differ in number");
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<String> = all().map(Case::full_name).collect();
        names.sort();
        let before = names.len();
        names.dedup();
        assert_eq!(before, names.len());
    }
}
