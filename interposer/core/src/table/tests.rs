//! That the table is whole and consistent. `reasons.rs` asks for reasons; that names, versions and
//! signatures are those of NVIDIA's header is what `scripts/check-header` compares.

mod reasons;

use super::*;
use std::collections::BTreeMap;

/// Every name that cuda.h 13.5 declares, with base name, version, per-thread variant, and what a rule
/// over names and arguments takes it to do.
const HEADER: &str = include_str!("../../table/cuda_h_13_5.csv");

fn lines() -> impl Iterator<Item = &'static str> {
    HEADER.lines().filter(|line| !line.starts_with('#'))
}

#[test]
fn the_table_has_the_headers_names_one_row_each() {
    let mut header = BTreeMap::new();
    for line in lines() {
        let fields: Vec<&str> = line.split(',').collect();
        let [name, base, version, variant, _] = fields[..] else {
            panic!("{line}")
        };
        assert_eq!(
            header.insert(name, (base, version.parse::<i32>().expect(line), variant)),
            None,
            "{name} twice"
        );
    }
    assert_eq!(header.len(), 685);
    assert_eq!(ROWS.len(), header.len());
    for row in ROWS {
        let (base, version, variant) = header[row.name];
        assert_eq!(row.base.to_str(), Ok(base), "{}", row.name);
        assert_eq!(row.version, version, "{}", row.name);
        assert_eq!(row.is_per_thread(), !variant.is_empty(), "{}", row.name);
        assert_eq!(row.symbol.to_str(), Ok(row.name));
    }
}

#[test]
fn rows_are_sorted_and_found() {
    for rows in [ROWS, NVML_ROWS] {
        assert!(rows.is_sorted_by(|a, b| a.name < b.name));
        for (index, row) in rows.iter().enumerate() {
            let (found, same) = find(row.name.as_bytes()).expect(row.name);
            assert_eq!((found, same.name), (index, row.name));
        }
    }
    for absent in [
        "cuMemAlloc_v",
        "cuMemAlloc_v22",
        "cu",
        "nvml",
        "nvmlDeviceGetMemoryInfo_v",
        "",
        "zz",
    ] {
        assert!(find(absent.as_bytes()).is_none(), "{absent}");
    }
}

/// Rows whose hook enters the gate itself, around the driver's call: each was read for it.
const GATED_BY_HAND: &[&str] = &[
    "cuCtxSetLimit",
    "cuExternalMemoryGetMappedBuffer",
    "cuExternalMemoryGetMappedMipmappedArray",
    "cuGraphAddNode",
    "cuGraphAddNode_v2",
    "cuGraphAddNode_v3",
    "cuGraphInstantiate",
    "cuGraphInstantiateWithFlags",
    "cuGraphInstantiateWithParams",
    "cuGraphInstantiateWithParams_ptsz",
    "cuGraphInstantiate_v2",
    "cuGraphLaunch",
    "cuGraphLaunch_ptsz",
    "cuGraphUpload",
    "cuGraphUpload_ptsz",
    "cuImportExternalMemory",
    "cuIpcOpenMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuKernelGetFunction",
    "cuLibraryLoadData",
    "cuLibraryLoadFromFile",
    "cuLogicalEndpointBindAddr",
    "cuLogicalEndpointBindMem",
    "cuLogicalEndpointCreate",
    "cuMemDiscardAndPrefetchBatchAsync",
    "cuMemDiscardAndPrefetchBatchAsync_ptsz",
    "cuMemExportToShareableHandle",
    "cuMemGetHandleForAddressRange",
    "cuMemImportFromShareableHandle",
    "cuMemPoolExportPointer",
    "cuMemPrefetchAsync",
    "cuMemPrefetchAsync_ptsz",
    "cuMemPrefetchAsync_v2",
    "cuMemPrefetchAsync_v2_ptsz",
    "cuMemPrefetchBatchAsync",
    "cuMemPrefetchBatchAsync_ptsz",
    "cuModuleGetFunction",
    "cuModuleLoad",
    "cuModuleLoadData",
    "cuModuleLoadDataEx",
    "cuModuleLoadFatBinary",
    "cuMulticastBindAddr",
    "cuMulticastBindAddr_v2",
    "cuMulticastBindMem",
    "cuMulticastBindMem_v2",
];

/// The rule that the gate's promise rests on.
#[test]
fn work_and_what_needs_residency_goes_through_the_gate_or_a_hook() {
    for row in ROWS {
        let gated = matches!(row.how, How::hot | How::gated);
        match row.class {
            // A hook of its own enters the gate by hand.
            Class::submits | Class::needs_residency => {
                let by_hand = row.how == How::custom && GATED_BY_HAND.contains(&row.name);
                assert!(gated || by_hand, "{} would run while evicted", row.name);
            }
            Class::allocates | Class::frees if row.how == How::off => {
                assert!(
                    row.marks.contains(&Mark::gives),
                    "{} would escape",
                    row.name
                );
            }
            _ => {}
        }
        if gated {
            // Pure waits and queries stay outside, so that they never hold up a close.
            for wait in ["Synchronize", "Query", "GetInfo", "EndCapture"] {
                assert!(!row.name.contains(wait), "{} is gated", row.name);
            }
        }
    }
}

/// A variant must be treated as its base is: programs get whichever the flags of their build choose.
#[test]
fn variants_of_one_entry_point_are_treated_alike() {
    for row in ROWS.iter().filter(|row| row.is_per_thread()) {
        let plain = &row.name[..row.name.len() - "_ptsz".len()];
        let (_, plain) = find(plain.as_bytes()).expect(plain);
        let treatment = |how: How| match how {
            How::hot | How::gated => "gated",
            How::slot | How::off => "seen by nobody",
            How::custom => "custom",
            How::entry => "entry",
        };
        assert_eq!(treatment(row.how), treatment(plain.how), "{}", row.name);
        assert_eq!(row.class, plain.class, "{}", row.name);
    }
    for row in ROWS.iter().filter(|row| row.how.is_exported()) {
        for other in ROWS.iter().filter(|other| other.base == row.base) {
            assert!(
                other.how.is_exported(),
                "{} is hooked, {} is not",
                row.name,
                other.name
            );
        }
    }
}
