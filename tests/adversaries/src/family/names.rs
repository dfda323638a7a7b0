//! The same allocations by every way to get at an entry point: by name from the library, from the global
//! scope, from what comes after, by both versions of `cuGetProcAddress` at every version that a name had
//! and with every flag, and by direct linking.

use std::ffi::{CStr, CString, c_void};

use crate::driver::{
    Address, Code, cuCtxSynchronize, cuGetProcAddress, cuGetProcAddress_v2, cuMemFree_v2,
    cuMemRelease, symbol,
};
use crate::stage::{Stage, Stop};
use crate::types::AllocationProperties;
use crate::way::{Way, exactly, greedily};

/// What an entry point does, so what arguments it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Alloc,
    Pitch,
    Managed,
    Async,
    Create,
}

/// Base names, with the versions at which a program may ask for them, and the symbol behind each.
const NAMES: &[(Kind, &CStr, &[i32])] = &[
    (
        Kind::Alloc,
        c"cuMemAlloc",
        &[3020, 4000, 11020, 12000, 12080, 13000],
    ),
    (Kind::Pitch, c"cuMemAllocPitch", &[3020, 12000, 13000]),
    (Kind::Managed, c"cuMemAllocManaged", &[6000, 12000, 13000]),
    (Kind::Async, c"cuMemAllocAsync", &[11020, 12000, 13000]),
    (Kind::Create, c"cuMemCreate", &[10020, 12000, 13000]),
];

/// Exported symbols.
const SYMBOLS: &[(Kind, &CStr)] = &[
    (Kind::Alloc, c"cuMemAlloc_v2"),
    (Kind::Pitch, c"cuMemAllocPitch_v2"),
    (Kind::Managed, c"cuMemAllocManaged"),
    (Kind::Async, c"cuMemAllocAsync"),
    (Kind::Async, c"cuMemAllocAsync_ptsz"),
    (Kind::Create, c"cuMemCreate"),
];

/// An entry point by its address.
struct Pointer {
    kind: Kind,
    at: usize,
}

impl Way for Pointer {
    type Held = u64;

    fn elsewhere(&self) -> bool {
        matches!(self.kind, Kind::Managed)
    }

    fn take(&mut self, bytes: u64) -> Result<u64, Code> {
        const ROW: usize = 512 << 10;
        let at = self.at as *mut c_void;
        let size = bytes as usize;
        let mut out: Address = 0;
        let (mut pitch, mut properties) = (0usize, AllocationProperties::device(0, 0));
        let (to, pitch, properties) = (&raw mut out, &raw mut pitch, &raw mut properties);
        type Alloc = unsafe extern "C" fn(*mut u64, usize) -> i32;
        type Pitch = unsafe extern "C" fn(*mut u64, *mut usize, usize, usize, u32) -> i32;
        type Managed = unsafe extern "C" fn(*mut u64, usize, u32) -> i32;
        type Async = unsafe extern "C" fn(*mut u64, usize, usize) -> i32;
        type Create = unsafe extern "C" fn(*mut u64, usize, *mut AllocationProperties, u64) -> i32;
        // SAFETY: what the driver exports under a name of this kind takes these arguments; the pointers
        // are to locals.
        let code = unsafe {
            match self.kind {
                Kind::Alloc => std::mem::transmute::<*mut c_void, Alloc>(at)(to, size),
                Kind::Pitch => {
                    std::mem::transmute::<*mut c_void, Pitch>(at)(to, pitch, ROW, size / ROW, 16)
                }
                Kind::Managed => std::mem::transmute::<*mut c_void, Managed>(at)(to, size, 1),
                Kind::Async => std::mem::transmute::<*mut c_void, Async>(at)(to, size, 0),
                Kind::Create => {
                    std::mem::transmute::<*mut c_void, Create>(at)(to, size, properties, 0)
                }
            }
        };
        Code(code).then(out)
    }

    fn give(&mut self, held: u64) -> Code {
        if self.kind == Kind::Create {
            cuMemRelease(held)
        } else {
            cuMemFree_v2(held)
        }
    }

    fn settle(&mut self) {
        cuCtxSynchronize();
    }
}

fn pointer(stage: &Stage, name: &str, kind: Kind, at: *mut c_void) {
    stage.case(name, |case| {
        if at.is_null() {
            return Err(Stop::Skip(format!("{name}: not there")));
        }
        let mut way = Pointer {
            kind,
            at: at as usize,
        };
        exactly(case, &mut way, name)?;
        greedily(case, &mut way, name)
    });
}

/// `cuGetProcAddress` itself, found by itself.
fn found_by_itself(version: i32) -> *mut c_void {
    let mut at = std::ptr::null_mut();
    let name = c"cuGetProcAddress";
    cuGetProcAddress_v2(name.as_ptr(), &mut at, version, 0, std::ptr::null_mut());
    at
}

/// See the module.
pub fn run(stage: &Stage) {
    for (kind, name) in SYMBOLS {
        let text = name.to_string_lossy();
        pointer(stage, &format!("dlsym {text}"), *kind, symbol(name));
        for (scope, handle) in [("default", libc::RTLD_DEFAULT), ("next", libc::RTLD_NEXT)] {
            // SAFETY: a pseudo handle and a C string.
            let at = unsafe { libc::dlsym(handle, name.as_ptr()) };
            pointer(stage, &format!("dlsym {scope} {text}"), *kind, at);
        }
    }
    for (kind, base, versions) in NAMES {
        let text = base.to_string_lossy();
        for &version in *versions {
            for flags in [0, 1, 2] {
                let mut at = std::ptr::null_mut();
                let mut found = 0;
                cuGetProcAddress_v2(base.as_ptr(), &mut at, version, flags, &raw mut found);
                pointer(
                    stage,
                    &format!("cuGetProcAddress_v2 {text} {version} {flags}"),
                    *kind,
                    at,
                );
                at = std::ptr::null_mut();
                cuGetProcAddress(base.as_ptr(), &mut at, version, flags);
                pointer(
                    stage,
                    &format!("cuGetProcAddress {text} {version} {flags}"),
                    *kind,
                    at,
                );
            }
        }
        for version in [11030, 12000] {
            let finder = found_by_itself(version);
            let mut at = std::ptr::null_mut();
            if !finder.is_null() {
                type Old = unsafe extern "C" fn(*const i8, *mut *mut c_void, i32, u64) -> i32;
                type New =
                    unsafe extern "C" fn(*const i8, *mut *mut c_void, i32, u64, *mut i32) -> i32;
                let (name, asked) = (base.as_ptr(), versions[0]);
                // SAFETY: `cuGetProcAddress` of version 11.3 takes four arguments, that of 12.0 five.
                unsafe {
                    if version == 11030 {
                        std::mem::transmute::<*mut c_void, Old>(finder)(
                            name,
                            &raw mut at,
                            asked,
                            0,
                        );
                    } else {
                        let found = std::ptr::null_mut();
                        std::mem::transmute::<*mut c_void, New>(finder)(
                            name,
                            &raw mut at,
                            asked,
                            0,
                            found,
                        );
                    }
                }
            }
            pointer(
                stage,
                &format!("cuGetProcAddress of cuGetProcAddress {version} {text}"),
                *kind,
                at,
            );
        }
    }
    linked(stage);
}

/// Direct linking: names that the loader binds when a library that needs the driver is loaded.
fn linked(stage: &Stage) {
    for (kind, name) in SYMBOLS {
        let text = name.to_string_lossy().into_owned();
        let case = format!("linked {text}");
        match link(&text) {
            Ok(at) => pointer(stage, &case, *kind, at as *mut c_void),
            Err(why) => stage.skip(&case, &why),
        }
    }
}

/// Builds a library that is linked to the driver and gives the address that it was bound to.
fn link(name: &str) -> Result<usize, String> {
    let folder = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let folder = folder.split(':').next().unwrap_or_default().to_owned();
    let base = std::env::temp_dir().join(format!("spillway-linked-{}-{name}", std::process::id()));
    let (source, library) = (base.with_extension("c"), base.with_extension("so"));
    let text =
        format!("extern int {name}(void);\nvoid *bound(void) {{ return (void *){name}; }}\n");
    std::fs::write(&source, text).map_err(|why| why.to_string())?;
    let built = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-w", "-o"])
        .arg(&library)
        .arg(&source)
        .arg(format!("-L{folder}"))
        .arg("-lcuda")
        .env_remove("LD_PRELOAD")
        .output();
    let _ = std::fs::remove_file(&source);
    match built {
        Err(why) => return Err(format!("no C compiler: {why}")),
        Ok(output) if !output.status.success() => {
            return Err(format!("cc: {}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(_) => {}
    }
    let path =
        CString::new(library.as_os_str().as_encoded_bytes()).map_err(|why| why.to_string())?;
    // SAFETY: a C string; the library has no constructors and stays open.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    let _ = std::fs::remove_file(&library);
    if handle.is_null() {
        return Err("the library that was linked to the driver cannot be loaded".to_owned());
    }
    // SAFETY: an open library and a C string.
    let at = unsafe { libc::dlsym(handle, c"bound".as_ptr()) };
    if at.is_null() {
        return Err("no function bound".to_owned());
    }
    // SAFETY: the function above, which takes nothing and returns an address.
    Ok(unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> usize>(at)() })
}
