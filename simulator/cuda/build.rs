//! Exports every name of the driver API that the sources do not implement as a stub that answers
//! NOT_SUPPORTED, and makes the table that `cuGetProcAddress` searches, from `driver_api.csv`.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

/// The names that a source file defines: `fn cuX(` and the `/ cuX_ptsz` beside it.
fn implemented(text: &str, names: &mut BTreeSet<String>) {
    for line in text.lines().map(str::trim_start) {
        let Some(rest) = line.strip_prefix("fn cu") else {
            continue;
        };
        let head = rest.split('(').next().unwrap_or_default();
        for word in format!("cu{head}").split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
            if word.starts_with("cu") && word[2..].starts_with(|c: char| c.is_ascii_uppercase()) {
                names.insert(word.to_owned());
            }
        }
    }
}

/// The version that gave addresses and sizes 64 bits.
const WIDE: u32 = 3020;
/// They got a second version then, too, and go with contexts of both kinds: the one makes them, the other needs none.
const OF_BOTH: [&str; 2] = ["cuCtxCreate", "cuDeviceTotalMem"];

/// Which contexts an entry point works in, for `abi::Interface`.
fn interface(symbol: &str, base: &str, names: &BTreeSet<(&str, u32)>) -> &'static str {
    let wide = format!("{base}_v2");
    let widened = names.contains(&(wide.as_str(), WIDE)) && !OF_BOTH.contains(&base);
    match symbol.strip_prefix(base) {
        Some("") if widened => "Old",
        Some("_v2" | "_v2_ptds" | "_v2_ptsz") if widened => "New",
        _ => "Any",
    }
}

fn main() {
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=driver_api.csv");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    // Our own references must not be caught by a preloaded library that exports the same names.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic");
    // Threads and fork handlers live on: unloading would leave them without code.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    let mut names = BTreeSet::new();
    let mut files: Vec<_> = std::fs::read_dir("src")
        .expect("src")
        .map(|e| e.expect("entry").path())
        .collect();
    files.sort();
    for file in files {
        implemented(&std::fs::read_to_string(&file).expect("source"), &mut names);
    }
    let table = std::fs::read_to_string("driver_api.csv").expect("driver_api.csv");
    let mut stubs = String::new();
    let mut declared = String::new();
    let mut since = String::new();
    let mut rows = String::new();
    let mut interfaces = String::new();
    let versions: BTreeSet<(&str, u32)> = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut columns = line.split(',');
            Some((columns.next()?, columns.nth(1)?.parse().ok()?))
        })
        .collect();
    for line in table.lines().skip(1) {
        let columns: Vec<&str> = line.split(',').collect();
        let [symbol, base, version, variant] = columns[..] else {
            panic!("driver_api.csv: {line}")
        };
        if names.remove(symbol) {
            writeln!(since, "    pub const {symbol}: u32 = {version};").expect("write");
            let which = interface(symbol, base, &versions);
            writeln!(
                interfaces,
                "    pub const {symbol}: Interface = Interface::{which};"
            )
            .expect("write");
        } else {
            writeln!(
                stubs,
                "#[unsafe(no_mangle)]\nextern \"C\" fn {symbol}() -> u32 {{\n    crate::abi::unsupported(\"{symbol}\", {version})\n}}"
            )
            .expect("write");
        }
        writeln!(declared, "    pub fn {symbol}();").expect("write");
        writeln!(
            rows,
            "    Row {{ base: \"{base}\", symbol: \"{symbol}\", version: {version}, per_thread: {}, address: declared::{symbol} }},",
            !variant.is_empty()
        )
        .expect("write");
    }
    assert!(names.is_empty(), "not in driver_api.csv: {names:?}");
    let out = std::env::var("OUT_DIR").expect("OUT_DIR");
    std::fs::write(Path::new(&out).join("stubs.rs"), stubs).expect("stubs.rs");
    let table = format!(
        "mod declared {{\n    unsafe extern \"C\" {{\n{declared}    }}\n}}\n\n/// The version that introduced each export that the sources define.\n#[allow(non_upper_case_globals)]\npub mod since {{\n{since}}}\n\n/// Which contexts each of them works in.\n#[allow(non_upper_case_globals)]\npub mod interface {{\n    use crate::abi::Interface;\n\n{interfaces}}}\n\npub static ROWS: &[Row] = &[\n{rows}];\n"
    );
    std::fs::write(Path::new(&out).join("table.rs"), table).expect("table.rs");
}
