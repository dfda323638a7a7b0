//! `include/spillway.h`, as text.

use std::fmt::Write;

use super::layout::{
    MAGIC, MAX_DECISIONS, MAX_DEVICES, MAX_WORKLOADS, STATES, UNKNOWN, VERSION, structures,
};

const BEGINNING: &str = "\
/* The snapshot that spillwayd publishes in shared memory: the node and its last decisions.
 *
 * Made from coordinator/src/snapshot/layout.rs; do not edit. To make it again:
 *   SPILLWAY_WRITE_HEADER=1 cargo test -p spillway-coordinator header_is_current
 *
 * The memory is called /spillway- and 16 hexadecimal digits (spillway_snapshot_name), is readable for
 * the user who runs spillwayd alone, and stays after a crash of spillwayd. Open it with shm_open,
 * map sizeof(struct spillway_snapshot) bytes read-only and shared, and use spillway_snapshot_read.
 */
#ifndef SPILLWAY_H
#define SPILLWAY_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifdef __cplusplus
extern \"C\" {
#endif

";

const ENDING: &str = "\
/* Writes the name of the shared memory for a run directory, given by its absolute path. */
static inline void spillway_snapshot_name(const char *run_dir, char name[SPILLWAY_SNAPSHOT_NAME_BYTES]) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (const unsigned char *at = (const unsigned char *)run_dir; *at; at++) {
        hash = (hash ^ *at) * UINT64_C(0x100000001b3);
    }
    snprintf(name, SPILLWAY_SNAPSHOT_NAME_BYTES, \"/spillway-%016llx\", (unsigned long long)hash);
}

/* Copies the newest complete state. Never waits for the writer. Returns
 *    0  *node holds it,
 *   -1  nothing is published yet, or this is no snapshot,
 *   -2  it has another version,
 *   -3  it changed during each of 16 attempts. */
static inline int spillway_snapshot_read(const struct spillway_snapshot *snapshot, struct spillway_node *node) {
    if (__atomic_load_n(&snapshot->magic, __ATOMIC_ACQUIRE) != SPILLWAY_SNAPSHOT_MAGIC) {
        return -1;
    }
    if (snapshot->version != SPILLWAY_SNAPSHOT_VERSION) {
        return -2;
    }
    for (int attempt = 0; attempt < 16; attempt++) {
        uint64_t before = __atomic_load_n(&snapshot->sequence, __ATOMIC_ACQUIRE);
        if (before == 0) {
            return -1;
        }
        memcpy(node, &snapshot->copies[before % 2], sizeof(*node));
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&snapshot->sequence, __ATOMIC_RELAXED) == before) {
            return 0;
        }
    }
    return -3;
}

#ifdef __cplusplus
}
#endif

#endif
";

/// The header.
#[must_use]
pub fn text() -> String {
    let mut out = BEGINNING.to_owned();
    let constants = [
        ("SNAPSHOT_MAGIC", format!("UINT64_C(0x{MAGIC:x})")),
        ("SNAPSHOT_VERSION", format!("UINT32_C({VERSION})")),
        ("SNAPSHOT_NAME_BYTES", "27".to_owned()),
        ("MAX_DEVICES", MAX_DEVICES.to_string()),
        ("MAX_WORKLOADS", MAX_WORKLOADS.to_string()),
        ("MAX_DECISIONS", MAX_DECISIONS.to_string()),
        ("UNKNOWN", format!("UINT64_C(0x{UNKNOWN:x})")),
    ];
    for (name, value) in constants {
        let _ = writeln!(out, "#define SPILLWAY_{name} {value}");
    }
    for (name, value) in STATES {
        let name = name.to_uppercase();
        let _ = writeln!(out, "#define SPILLWAY_STATE_{name} UINT32_C({value})");
    }
    let mut checks = String::new();
    for structure in structures() {
        let doc: Vec<&str> = structure.doc.iter().map(|line| line.trim()).collect();
        let _ = writeln!(out, "\n/* {} */", doc.join(" "));
        let _ = writeln!(out, "struct {} {{", structure.name);
        for (declaration, about, name, offset) in &structure.fields {
            let _ = writeln!(out, "    /* {} */", about.trim());
            let _ = writeln!(out, "    {declaration};");
            let _ = writeln!(
                checks,
                "SPILLWAY_ASSERT(offsetof(struct {}, {name}) == {offset}, \"{}.{name}\");",
                structure.name, structure.name
            );
        }
        out.push_str("};\n");
        let _ = writeln!(
            checks,
            "SPILLWAY_ASSERT(sizeof(struct {}) == {}, \"{}\");",
            structure.name, structure.size, structure.name
        );
    }
    out.push_str("\n#ifdef __cplusplus\n#define SPILLWAY_ASSERT static_assert\n#else\n#define SPILLWAY_ASSERT _Static_assert\n#endif\n");
    out.push_str("#include <stddef.h>\n");
    out.push_str(&checks);
    out.push('\n');
    out.push_str(ENDING);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../include/spillway.h");
        if std::env::var_os("SPILLWAY_WRITE_HEADER").is_some() {
            std::fs::write(path, text()).expect("written");
        }
        let there = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            there == text(),
            "include/spillway.h is not what layout.rs says: SPILLWAY_WRITE_HEADER=1 cargo test -p spillway-coordinator header_is_current"
        );
    }
}
