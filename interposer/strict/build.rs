//! How `libspillway_strict.so` is linked: as `libspillway.so` (see `interposer/build.rs` for the reasons),
//! but under the driver's soname.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic-functions");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,now");
    // The loader takes an object that is loaded under this name for every later `libcuda.so.1`, by `dlopen`
    // or as somebody's dependency, whatever the scope of who asks.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
}
