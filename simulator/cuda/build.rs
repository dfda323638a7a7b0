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
    for line in table.lines().skip(1) {
        let columns: Vec<&str> = line.split(',').collect();
        let [symbol, base, version, variant] = columns[..] else {
            panic!("driver_api.csv: {line}")
        };
        if names.remove(symbol) {
            writeln!(since, "    pub const {symbol}: u32 = {version};").expect("write");
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
        "mod declared {{\n    unsafe extern \"C\" {{\n{declared}    }}\n}}\n\n/// The version that introduced each export that the sources define.\n#[allow(non_upper_case_globals)]\npub mod since {{\n{since}}}\n\npub static ROWS: &[Row] = &[\n{rows}];\n"
    );
    std::fs::write(Path::new(&out).join("table.rs"), table).expect("table.rs");
}
