//! How `libspillway.so` is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Our own exports are meant when we take their addresses, whoever else defines the same names. Not
    // `-Bsymbolic`: that marks the library, and the loader then searches it first whenever it asks for
    // RTLD_DEFAULT, so that another preload's functions in front of ours would not be found.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic-functions");
    // Thread-specific data and fork handlers point into this library: it stays, even if somebody who
    // opened it by hand closes it.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // No lazy binding: what a hook calls is known before the program starts.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,now");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libspillway.so");
}
