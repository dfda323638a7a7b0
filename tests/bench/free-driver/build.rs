//! Gives the library the driver's name.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    // Threads' storage outlives a program that closes the driver.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
