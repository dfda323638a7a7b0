//! What the loader has mapped: reading only, without allocation and without keeping anything loaded.
//!
//! The driver is known by its file's name, whatever its version. Our own libraries are known by their note
//! (see [`spillway_protocol::note`]), since the strict one may lie there under the driver's name.

use super::symbols;
use crate::table::Library;
use core::ffi::{CStr, c_int, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicU8, Ordering};
use spillway_protocol::note::{self, Role};

/// A loaded object, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// The driver or NVML itself.
    Driver(Library),
    /// Another of NVIDIA's driver libraries.
    Companion,
    /// A library of ours: this one, or another copy.
    Spillway(Role),
    /// Anything else.
    Other,
}

/// What the file called `path` is, by its name.
fn kind(path: &[u8]) -> Object {
    let file = path
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(path, |slash| &path[slash + 1..]);
    for library in [Library::CUDA, Library::NVML] {
        if file.starts_with(library.file_prefix()) {
            return Object::Driver(library);
        }
    }
    if file.starts_with(b"libnvidia-") || file.starts_with(b"libcudadebugger.so") {
        return Object::Companion;
    }
    Object::Other
}

/// A segment of a loaded object: where it begins, and its size.
#[allow(clippy::cast_possible_truncation, reason = "addresses of this process")]
fn segment(info: &libc::dl_phdr_info, header: &libc::Elf64_Phdr) -> (usize, usize) {
    let start = (info.dlpi_addr as usize).wrapping_add(header.p_vaddr as usize);
    (start, header.p_memsz as usize)
}

/// The program headers of a loaded object.
///
/// # Safety
/// `info` is what `dl_iterate_phdr` passes, during that call.
unsafe fn headers(info: &libc::dl_phdr_info) -> &[libc::Elf64_Phdr] {
    // SAFETY: the loader's own program headers of a loaded object.
    unsafe { core::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) }
}

/// The file name of a loaded object.
///
/// # Safety
/// As for [`headers`].
unsafe fn name_of(info: &libc::dl_phdr_info) -> Option<&[u8]> {
    // SAFETY: the loader's name of the object, null or a C string.
    (!info.dlpi_name.is_null()).then(|| unsafe { CStr::from_ptr(info.dlpi_name) }.to_bytes())
}

/// What a loaded object is.
///
/// # Safety
/// As for [`headers`].
unsafe fn object(info: &libc::dl_phdr_info) -> Object {
    // SAFETY: the caller's promise.
    let (Some(name), headers) = (unsafe { (name_of(info), headers(info)) }) else {
        return Object::Other;
    };
    for header in headers.iter().filter(|h| h.p_type == libc::PT_NOTE) {
        let (start, bytes) = segment(info, header);
        // Nobody makes sure that notes are loaded: tools that rewrite files leave some that are not.
        let mapped = headers.iter().any(|load| {
            let (from, size) = segment(info, load);
            let readable = load.p_type == libc::PT_LOAD && load.p_flags & libc::PF_R != 0;
            let before = start.wrapping_sub(from);
            readable && before < size && bytes <= size - before
        });
        if !mapped {
            continue;
        }
        // SAFETY: the object's notes, which lie in a segment that is mapped for reading.
        let notes = unsafe { core::slice::from_raw_parts(start as *const u8, bytes) };
        if let Some(role) = note::find(notes) {
            return Object::Spillway(role);
        }
    }
    kind(name)
}

struct Search {
    address: usize,
    found: Object,
}

/// The object that `address` lies in.
#[must_use]
pub fn object_of(address: *const ()) -> Object {
    unsafe extern "C" fn visit(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader passes a valid description, and `data` is the `Search` below.
        let (info, search) = unsafe { (&*info, &mut *data.cast::<Search>()) };
        // SAFETY: the loader's description, during its call.
        let inside = unsafe { headers(info) }.iter().any(|header| {
            let (start, bytes) = segment(info, header);
            header.p_type == libc::PT_LOAD && search.address.wrapping_sub(start) < bytes
        });
        if inside {
            // SAFETY: as above.
            search.found = unsafe { object(info) };
        }
        c_int::from(inside)
    }
    let mut search = Search {
        address: address as usize,
        found: Object::Other,
    };
    // SAFETY: `visit` runs only during this call, with the pointer given here.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut search).cast()) };
    search.found
}

struct Wanted<'a> {
    library: Library,
    /// An address in it, once it is found.
    inside: *const c_void,
    name: Option<&'a CStr>,
    function: *mut c_void,
}

impl<'a> Wanted<'a> {
    fn search(library: Library, name: Option<&'a CStr>) -> Self {
        let mut wanted = Self {
            library,
            inside: core::ptr::null(),
            name,
            function: null_mut(),
        };
        // SAFETY: `visit` runs only during this call, with the pointer given here.
        unsafe { libc::dl_iterate_phdr(Some(Self::visit), (&raw mut wanted).cast()) };
        wanted
    }

    unsafe extern "C" fn visit(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader passes a valid description, and `data` is the value of `search`, which has no
        // name, or one that outlives the call.
        let (info, wanted) = unsafe { (&*info, &mut *data.cast::<Self>()) };
        let driver = Object::Driver(wanted.library);
        // By its name first: other objects' notes are not even looked at.
        // SAFETY: the loader's description, during its call.
        if unsafe { name_of(info) }.map(kind) != Some(driver) || unsafe { object(info) } != driver {
            return 0;
        }
        // SAFETY: as above.
        let headers = unsafe { headers(info) };
        let Some(load) = headers.iter().find(|header| header.p_type == libc::PT_LOAD) else {
            return 0;
        };
        wanted.inside = segment(info, load).0 as *const c_void;
        if let Some(name) = wanted.name {
            // SAFETY: as above.
            wanted.function = unsafe { symbols::defined(info, headers, name) };
        }
        1
    }
}

unsafe extern "C" {
    fn dladdr1(
        address: *const c_void,
        info: *mut libc::Dl_info,
        extra: *mut *mut c_void,
        flags: c_int,
    ) -> c_int;
}
/// glibc's request for the object's link map, whose address is also its `dlopen` handle.
const RTLD_DL_LINKMAP: c_int = 2;

/// A handle of `library` if it is loaded already, without a reference of its own: to read its name at once,
/// by a caller that knows nobody unloads it meanwhile. It is not one to ask `dlsym` by (see `symbols.rs`).
/// Null if it is not loaded.
#[must_use]
pub fn find_loaded(library: Library) -> *mut c_void {
    let found = Wanted::search(library, None);
    if found.inside.is_null() {
        return null_mut();
    }
    handle_of(found.inside)
}

/// The function `name` of `library` as it is loaded: `None` if it is not, null if it lacks the function.
#[must_use]
pub fn loaded_function(library: Library, name: &CStr) -> Option<*mut c_void> {
    let found = Wanted::search(library, Some(name));
    (!found.inside.is_null()).then_some(found.function)
}

/// The handle of the object that `address` lies in, without a reference of its own; null if in none.
#[must_use]
pub fn handle_of(address: *const c_void) -> *mut c_void {
    // SAFETY: all-zero is a valid Dl_info (four pointers).
    let mut info: libc::Dl_info = unsafe { core::mem::zeroed() };
    let mut map = null_mut();
    // SAFETY: both results are valid for writing.
    let found = unsafe { dladdr1(address, &raw mut info, &raw mut map, RTLD_DL_LINKMAP) };
    if found == 0 { null_mut() } else { map }
}

/// An address in this library.
fn here() -> *const c_void {
    (own_role as fn() -> Option<Role>) as *const c_void
}

/// This library's own handle.
#[must_use]
pub fn own_handle() -> *mut c_void {
    handle_of(here())
}

/// What this library is; `None` in a program that has the code built in, as tests do.
#[must_use]
pub fn own_role() -> Option<Role> {
    const UNKNOWN: u8 = 0;
    static ROLE: AtomicU8 = AtomicU8::new(UNKNOWN);
    match ROLE.load(Ordering::Relaxed) {
        1 => None,
        2 => Some(Role::Plain),
        3 => Some(Role::Strict),
        _ => {
            let (role, word) = match object_of(here().cast()) {
                Object::Spillway(Role::Plain) => (Some(Role::Plain), 2),
                Object::Spillway(Role::Strict) => (Some(Role::Strict), 3),
                _ => (None, 1),
            };
            ROLE.store(word, Ordering::Relaxed);
            role
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart_by_name() {
        for (path, expected) in [
            (
                &b"/usr/lib/x86_64-linux-gnu/libcuda.so.1"[..],
                Object::Driver(Library::CUDA),
            ),
            (b"libcuda.so.580.65.06", Object::Driver(Library::CUDA)),
            (b"/usr/lib/libnvidia-ml.so.1", Object::Driver(Library::NVML)),
            (b"/usr/lib/libnvidia-ptxjitcompiler.so.1", Object::Companion),
            (b"/opt/libcudart.so.13", Object::Other),
            (b"/opt/libcuda_wrapper.so", Object::Other),
            (b"/opt/libcuda.so.1/plugin.so", Object::Other),
            (b"", Object::Other),
        ] {
            assert_eq!(kind(path), expected, "{}", String::from_utf8_lossy(path));
        }
    }

    #[test]
    fn own_code_is_no_driver() {
        assert_eq!(object_of(own_code_is_no_driver as *const ()), Object::Other);
        assert_eq!(object_of(core::ptr::without_provenance(16)), Object::Other);
    }
}
