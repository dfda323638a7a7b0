//! The table behind `cuGetProcAddress`: which variant answers which request.

/// One exported variant of a function.
pub struct Row {
    pub base: &'static str,
    pub symbol: &'static str,
    /// The CUDA version that introduced it, as 1000 * major + 10 * minor.
    pub version: u32,
    /// It takes default streams as per thread.
    pub per_thread: bool,
    pub address: unsafe extern "C" fn(),
}

include!(concat!(env!("OUT_DIR"), "/table.rs"));

/// Names that headers map to another function from some version on.
const RENAMED: &[(&str, u32, &str)] =
    &[("cuGraphInstantiate", 12_000, "cuGraphInstantiateWithFlags")];

/// The outcome of a search.
pub enum Found {
    Symbol(&'static Row),
    /// It exists, but only in versions later than the one asked for.
    TooNew,
    Nothing,
}

/// The newest variant of `base` introduced by `version` that a driver of version `driver` has.
pub fn search(base: &str, version: u32, per_thread: bool, driver: u32) -> Found {
    let base = RENAMED
        .iter()
        .find(|r| r.0 == base && r.1 <= version)
        .map_or(base, |r| r.2);
    let known = || {
        ROWS.iter()
            .filter(|r| r.base == base && r.version <= driver)
    };
    let best = known()
        .filter(|r| r.version <= version && (per_thread || !r.per_thread))
        .max_by_key(|r| (r.version, r.per_thread));
    match best {
        Some(row) => Found::Symbol(row),
        None if known().next().is_some() => Found::TooNew,
        None => Found::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbol(base: &str, version: u32, per_thread: bool) -> &'static str {
        match search(base, version, per_thread, 12_080) {
            Found::Symbol(row) => row.symbol,
            Found::TooNew => "too new",
            Found::Nothing => "nothing",
        }
    }

    #[test]
    fn the_newest_variant_by_the_version_asked_for() {
        assert_eq!(symbol("cuMemAlloc", 2000, false), "cuMemAlloc");
        assert_eq!(symbol("cuMemAlloc", 3020, false), "cuMemAlloc_v2");
        assert_eq!(symbol("cuMemAlloc", 12_080, true), "cuMemAlloc_v2");
        assert_eq!(symbol("cuMemAlloc", 1000, false), "too new");
        assert_eq!(symbol("cuNothing", 12_000, false), "nothing");
        assert_eq!(
            symbol("cuGetProcAddress", 11_030, false),
            "cuGetProcAddress"
        );
        assert_eq!(
            symbol("cuGetProcAddress", 12_000, false),
            "cuGetProcAddress_v2"
        );
    }

    #[test]
    fn per_thread_variants_only_when_asked_for() {
        assert_eq!(symbol("cuMemcpy", 12_000, false), "cuMemcpy");
        assert_eq!(symbol("cuMemcpy", 4000, true), "cuMemcpy");
        assert_eq!(symbol("cuMemcpy", 7000, true), "cuMemcpy_ptds");
        assert_eq!(
            symbol("cuStreamSynchronize", 12_000, true),
            "cuStreamSynchronize_ptsz"
        );
        assert_eq!(
            symbol("cuMemAllocAsync", 11_020, true),
            "cuMemAllocAsync_ptsz"
        );
    }

    #[test]
    fn what_came_after_the_driver_is_unknown() {
        assert_eq!(symbol("cuMemGetMemPool", 13_000, false), "nothing");
        assert_eq!(
            symbol("cuCtxSynchronize", 13_000, false),
            "cuCtxSynchronize"
        );
    }

    #[test]
    fn renamed_functions() {
        assert_eq!(
            symbol("cuGraphInstantiate", 11_000, false),
            "cuGraphInstantiate_v2"
        );
        assert_eq!(
            symbol("cuGraphInstantiate", 12_000, false),
            "cuGraphInstantiateWithFlags"
        );
    }
}
