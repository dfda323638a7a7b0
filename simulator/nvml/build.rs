//! Link options of the simulated NVML.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnvidia-ml.so.1");
    // Our own references must not be caught by a preloaded library that exports the same names.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic");
    // Descriptors held for the life of the process would leak with every unload.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
