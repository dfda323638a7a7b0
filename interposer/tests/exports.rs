//! What our libraries show to the loader. `libspillway.so` exports the hooked rows and `dlsym`, the strict one
//! also the driver's other names. They need the C library and nothing else, and never meet a foreign function
//! under one of their own names.

mod support;

use spillway_interposer_core::table::{NVML_ROWS, ROWS};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use support::{have, library, strict_library};

fn tool(program: &str, arguments: &[&str], file: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .arg(file)
        .output()
        .expect("the tool runs");
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn exports_are_the_hooked_rows_and_dlsym() {
    if !have("nm", "exports") {
        return;
    }
    let rows = ROWS.iter().chain(NVML_ROWS);
    let mut expected: BTreeSet<&str> = rows
        .filter(|row| row.how.is_exported())
        .map(|row| row.name)
        .collect();
    assert!(expected.len() > 300);
    expected.insert("dlsym");
    exports_are(library(), &expected);
    expected.extend(ROWS.iter().map(|row| row.name));
    assert!(expected.len() > 600);
    exports_are(&strict_library(), &expected);
}

fn exports_are(library: &Path, expected: &BTreeSet<&str>) {
    let listed = tool("nm", &["-D", "--defined-only"], library);
    let exports: BTreeSet<&str> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .collect();
    let missing: Vec<_> = expected.difference(&exports).collect();
    let unexpected: Vec<_> = exports.difference(expected).collect();
    assert!(
        missing.is_empty() && unexpected.is_empty(),
        "{}: missing {missing:?}, unexpected {unexpected:?}",
        library.display()
    );
}

#[test]
fn needs_only_the_c_library() {
    if !have("readelf", "needed libraries") {
        return;
    }
    needs_little(library());
    needs_little(&strict_library());
    let dynamic = tool("readelf", &["-dW"], &strict_library());
    assert!(dynamic.contains("soname: [libcuda.so.1]"), "{dynamic}");
}

fn needs_little(library: &Path) {
    let dynamic = tool("readelf", &["-dW"], library);
    let needed: BTreeSet<&str> = dynamic
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split(['[', ']']).nth(1))
        .collect();
    // libdl, libpthread, librt and libm are parts of the C library before glibc 2.34.
    let allowed = BTreeSet::from([
        "libc.so.6",
        "libgcc_s.so.1",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
        "libm.so.6",
    ]);
    assert!(needed.contains("libc.so.6"), "{needed:?}");
    assert!(needed.is_subset(&allowed), "{needed:?}");
    assert!(
        !dynamic.contains("SYMBOLIC"),
        "the loader would search this library first for RTLD_DEFAULT"
    );
    assert!(
        dynamic.contains("NODELETE"),
        "thread keys and fork handlers point into the library"
    );
    assert!(!dynamic.contains("TEXTREL"));
}

/// A relocation by name could be bound to a program's or another preload's function of that name.
#[test]
fn own_names_are_never_looked_up() {
    if !have("readelf", "relocations") {
        return;
    }
    let strict = strict_library();
    let relocations = [library(), &strict].map(|file| tool("readelf", &["-rW"], file));
    for line in relocations.iter().flat_map(|text| text.lines()) {
        let symbol = line.split_whitespace().nth(4).unwrap_or_default();
        let name = symbol.split('@').next().unwrap_or_default();
        let own = name == "dlsym" || ROWS.iter().chain(NVML_ROWS).any(|row| row.name == name);
        assert!(!own, "{line}");
    }
}

/// Of a release build for other machines; `scripts/release` names it.
#[test]
fn a_release_runs_on_glibc_2_28() {
    let Some(release) = std::env::var_os("SPILLWAY_RELEASE_LIBRARY") else {
        eprintln!("skipped: glibc version: SPILLWAY_RELEASE_LIBRARY does not name a release build");
        return;
    };
    let symbols = tool("nm", &["-D", "--undefined-only"], Path::new(&release));
    let highest = symbols
        .lines()
        .filter_map(|line| line.split("@GLIBC_").nth(1))
        .map(|version| {
            version
                .split('.')
                .map(|part| part.parse::<u32>().expect(version))
                .collect::<Vec<_>>()
        })
        .max()
        .expect("versions");
    assert!(highest <= vec![2, 28], "needs glibc {highest:?}");
}
