//! A loaded library's functions, read from its own tables.
//!
//! `dlsym` is what preloaded libraries answer in the loader's place; here nobody is asked.

use std::ffi::{CStr, c_char, c_void};

use anyhow::{Result, bail};

/// The beginning of glibc's `struct link_map`, which is public.
#[repr(C)]
struct LinkMap {
    bias: usize,
    name: *const c_char,
    dynamic: *const Dyn,
}

#[repr(C)]
struct Dyn {
    tag: i64,
    value: usize,
}

#[repr(C)]
struct Sym {
    name: u32,
    info: u8,
    other: u8,
    section: u16,
    value: usize,
    size: usize,
}

const DT_NULL: i64 = 0;
const DT_STRTAB: i64 = 5;
const DT_SYMTAB: i64 = 6;
const DT_GNU_HASH: i64 = 0x6fff_fef5;
const STT_FUNC: u8 = 2;
const RTLD_DI_LINKMAP: i32 = 2;

/// A library that was opened and is never closed.
pub struct Library {
    handle: *mut c_void,
    map: *const LinkMap,
}

impl Library {
    /// Opens a library as a program does.
    ///
    /// # Errors
    /// The loader's words.
    pub fn open(name: &CStr) -> Result<Self> {
        // SAFETY: a C string.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if handle.is_null() {
            // SAFETY: after a failure this is a C string.
            let why = unsafe { CStr::from_ptr(libc::dlerror()) };
            bail!("{}", why.to_string_lossy());
        }
        let mut map: *const LinkMap = std::ptr::null();
        // SAFETY: an open handle, and a place for the pointer that this request writes.
        let got = unsafe { libc::dlinfo(handle, RTLD_DI_LINKMAP, (&raw mut map).cast()) };
        if got != 0 || map.is_null() {
            bail!(
                "{}: the loader does not tell where it is",
                name.to_string_lossy()
            );
        }
        Ok(Self { handle, map })
    }

    /// The file that was loaded.
    #[must_use]
    pub fn path(&self) -> String {
        // SAFETY: the map lives as long as the library, which is never closed; its name is a C string.
        unsafe { CStr::from_ptr((*self.map).name) }
            .to_string_lossy()
            .into_owned()
    }

    /// What a program gets for a name: a preloaded library's function where it has one, or null.
    #[must_use]
    pub fn as_programs(&self, name: &CStr) -> *mut c_void {
        // A program that is linked to the library finds it in the global scope, where a preloaded one
        // comes first; one that opens it asks for its handle, which some preloaded libraries answer.
        // SAFETY: C strings and an open handle.
        let (linked, opened) = unsafe {
            (
                libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()),
                libc::dlsym(self.handle, name.as_ptr()),
            )
        };
        let own = self.own(name);
        if linked.is_null() || linked == own {
            opened
        } else {
            linked
        }
    }

    /// The library's own function of a name, or null.
    #[must_use]
    pub fn own(&self, name: &CStr) -> *mut c_void {
        // SAFETY: the tables of a loaded library, laid out by the ELF and GNU conventions, stay mapped as
        // long as the library does. Chains end with an odd hash, so reads stay within them.
        unsafe { self.look_up(name) }.unwrap_or(std::ptr::null_mut())
    }

    /// An address that the dynamic section holds; most loaders have added the bias to it.
    fn table(&self, wanted: i64) -> Option<usize> {
        // SAFETY: the dynamic section of a loaded library, which ends with DT_NULL.
        unsafe {
            let mut at = (*self.map).dynamic;
            while (*at).tag != DT_NULL {
                if (*at).tag == wanted {
                    let bias = (*self.map).bias;
                    let value = (*at).value;
                    return Some(if value < bias { value + bias } else { value });
                }
                at = at.add(1);
            }
        }
        None
    }

    /// # Safety
    /// The library's tables are as its conventions say.
    unsafe fn look_up(&self, name: &CStr) -> Option<*mut c_void> {
        let symbols = self.table(DT_SYMTAB)? as *const Sym;
        let strings = self.table(DT_STRTAB)? as *const c_char;
        let hashes = self.table(DT_GNU_HASH)? as *const u32;
        let hash = name.to_bytes().iter().fold(5381_u32, |h, &b| {
            h.wrapping_mul(33).wrapping_add(u32::from(b))
        });
        // SAFETY: as promised by the caller: header, filter, buckets, chains follow one another.
        unsafe {
            let (buckets, first, filter) = (*hashes, *hashes.add(1), *hashes.add(2) as usize);
            let bucket = hashes.add(4 + 2 * filter);
            let chain = bucket.add(buckets as usize);
            let mut index = *bucket.add((hash % buckets) as usize);
            if index < first {
                return None;
            }
            loop {
                let found = *chain.add((index - first) as usize);
                let symbol = &*symbols.add(index as usize);
                if found | 1 == hash | 1
                    && symbol.section != 0
                    && symbol.info & 15 == STT_FUNC
                    && CStr::from_ptr(strings.add(symbol.name as usize)) == name
                {
                    return Some(((*self.map).bias + symbol.value) as *mut c_void);
                }
                if found & 1 != 0 {
                    return None;
                }
                index += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Library;

    #[test]
    fn own_functions_are_what_dlsym_finds_where_nobody_answers_for_it() {
        let library = Library::open(c"libc.so.6").expect("the C library");
        for name in [c"getpid", c"strtoull", c"qsort"] {
            assert!(!library.own(name).is_null(), "{name:?}");
            assert_eq!(library.own(name), library.as_programs(name), "{name:?}");
        }
        assert!(library.own(c"no_such_function_here").is_null());
    }
}
