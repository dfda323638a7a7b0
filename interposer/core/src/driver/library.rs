//! Where the real functions come from: the real `dlsym`, and a handle of each driver library.
//!
//! Libraries are opened at the first call of one of their functions, never earlier: preloading this
//! library into a program that does not use CUDA loads nothing. Once opened, one reference is kept for
//! the life of the process, so a program that closes the driver leaves no dangling address here.
//!
//! What the loader gives for the driver's name may be this library itself: always so in strict mode. Then
//! the driver is opened by its path (see `find.rs`).

use super::{Function, Slot, Status, find, find_loaded, own_handle, unknown};
use crate::table::Library;
use core::ffi::{CStr, c_char, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, Ordering};

/// glibc's `dlsym`.
pub type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;

/// The real `dlsym`, null until first needed. The exported `dlsym` jumps through this word.
pub static REAL_DLSYM: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

/// The version under which every glibc exports `dlsym` on this architecture.
#[cfg(target_arch = "x86_64")]
const DLSYM_VERSION: &CStr = c"GLIBC_2.2.5";
#[cfg(not(target_arch = "x86_64"))]
const DLSYM_VERSION: &CStr = c"GLIBC_2.17";

/// Looks the real `dlsym` up and remembers it; null if the C library has none, which glibc does not do.
/// Called by the exported `dlsym` before its first jump.
#[cold]
pub extern "C" fn find_real_dlsym() -> *mut c_void {
    // SAFETY: two C strings; RTLD_NEXT from here is whatever follows this library.
    let real = unsafe { libc::dlvsym(libc::RTLD_NEXT, c"dlsym".as_ptr(), DLSYM_VERSION.as_ptr()) };
    REAL_DLSYM.store(real, Ordering::Relaxed);
    real
}

/// The real `dlsym` as a function. `RTLD_NEXT` and `RTLD_DEFAULT` mean as seen from this library.
#[must_use]
pub fn real_dlsym() -> Option<Dlsym> {
    let mut real = REAL_DLSYM.load(Ordering::Relaxed);
    if real.is_null() {
        real = find_real_dlsym();
    }
    // SAFETY: null or glibc's dlsym, which has this type.
    unsafe { core::mem::transmute::<*mut c_void, Option<Dlsym>>(real) }
}

/// A handle of `library` that stays valid, opened if need be; null if it cannot be opened.
///
/// Loads the library if the program has not: call it only for a program that uses CUDA.
pub fn handle(library: Library) -> *mut c_void {
    static HANDLES: [AtomicPtr<c_void>; 2] = [const { AtomicPtr::new(null_mut()) }; 2];
    let word = &HANDLES[library as usize];
    let known = word.load(Ordering::Acquire);
    if !known.is_null() {
        return known;
    }
    let name = library.soname();
    let ours = own_handle();
    // SAFETY: a C string.
    let mut opened = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if opened.is_null() || opened == ours {
        opened = reopen(library);
    }
    if opened.is_null() {
        // SAFETY: a C string; the program called a function of this library, so it wants it loaded.
        opened = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) };
        if opened == ours {
            opened = find::open();
        }
    }
    if opened.is_null() {
        return null_mut();
    }
    // A second thread that came here too has one reference more: harmless, it is never given back.
    word.store(opened, Ordering::Release);
    if library == Library::CUDA {
        unknown::settle(|name| has(opened, name));
    }
    opened
}

/// Whether the object behind `handle`, or what it depends on, has `name`.
fn has(handle: *mut c_void, name: &CStr) -> bool {
    // SAFETY: a valid handle and a C string.
    real_dlsym().is_some_and(|dlsym| !unsafe { dlsym(handle, name.as_ptr()) }.is_null())
}

/// What a call of a function answers that `library` lacks. Without a driver there is no device: programs
/// that look whether CUDA can be used go on without it.
#[cold]
pub fn missing(library: Library) -> Status {
    if library == Library::CUDA && handle(library).is_null() {
        return Status::NO_DEVICE;
    }
    Status::missing(library)
}

/// A reference to a copy that is loaded under a name that is not its soname.
fn reopen(library: Library) -> *mut c_void {
    let map = find_loaded(library);
    if map.is_null() {
        return null_mut();
    }
    // SAFETY: a link map of a loaded object begins with its load address and its name.
    let path = unsafe { *map.cast::<*const c_char>().add(1) };
    // SAFETY: the loader's own string.
    unsafe { libc::dlopen(path, libc::RTLD_LAZY | libc::RTLD_NOLOAD) }
}

/// The address of `name` in the real `library`, null if it has none.
pub fn symbol(library: Library, name: &CStr) -> *mut c_void {
    let handle = handle(library);
    match real_dlsym() {
        // SAFETY: a handle that stays valid and a C string.
        Some(dlsym) if !handle.is_null() => unsafe { dlsym(handle, name.as_ptr()) },
        _ => null_mut(),
    }
}

/// Looks `name` up and puts it into its slot.
#[inline]
pub(crate) fn resolve<F: Function>(
    library: Library,
    name: &'static CStr,
    slot: &Slot<F>,
) -> Option<F> {
    let address = symbol_or_null(library, name.as_ptr());
    if address.is_null() {
        return None;
    }
    // SAFETY: the library's function of that name, whose signature the row states.
    let real = unsafe { core::mem::transmute_copy::<*mut c_void, F>(&address) };
    slot.set(real);
    Some(real)
}

/// [`symbol`], in a form that cannot unwind: a stub's frame stays on the stack while the driver runs, and
/// must not need a landing pad (see [`crate::gate::settle`]).
#[cold]
#[inline(never)]
extern "C" fn symbol_or_null(library: Library, name: *const c_char) -> *mut c_void {
    // SAFETY: `resolve` passes a C string.
    symbol(library, unsafe { CStr::from_ptr(name) })
}
