//! How `libspillway.so` is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Our own exports are meant when we take their addresses, whoever else defines the same names.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic");
    // Thread-specific data and fork handlers point into this library: it stays, even if somebody who
    // opened it by hand closes it.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // No lazy binding: what a hook calls is known before the program starts.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,now");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libspillway.so");
}
