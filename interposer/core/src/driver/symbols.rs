//! What a loaded object defines, read from its own tables.
//!
//! The loader's `dlsym` must not be asked by a handle that nobody got from `dlopen`: of an object that
//! came as another's dependency glibc has made no list of scopes, and its search reads past an empty
//! one. Opening the object for the question would allocate, which is not allowed inside `dlsym`. So the
//! question is answered as the loader would: by the object's hash table and its table of symbols.

use core::ffi::{CStr, c_void};
use core::ptr::null_mut;
use core::slice;

const DT_HASH: i64 = 4;
const DT_STRTAB: i64 = 5;
const DT_SYMTAB: i64 = 6;
const DT_GNU_HASH: i64 = 0x6fff_fef5;
const STT_FUNC: u8 = 2;
const STB_LOCAL: u8 = 0;

/// A pair of a dynamic section.
#[repr(C)]
#[derive(Clone, Copy)]
struct Dynamic {
    tag: i64,
    value: usize,
}

/// The tables of an object that is loaded at `base`.
struct Tables {
    base: usize,
    strings: usize,
    symbols: usize,
    /// One of both, in the newer or the older form.
    gnu_hash: usize,
    hash: usize,
}

impl Tables {
    /// # Safety
    /// `dynamic` is null or the dynamic section of an object that is loaded at `base` and stays so.
    unsafe fn new(base: usize, mut dynamic: *const Dynamic) -> Option<Self> {
        if dynamic.is_null() {
            return None;
        }
        let (mut strings, mut symbols, mut gnu_hash, mut hash) = (0, 0, 0, 0);
        loop {
            // SAFETY: a list of pairs that ends with a zero tag, not seen yet.
            let Dynamic { tag, value } = unsafe { *dynamic };
            // glibc has made addresses of these; other loaders leave them relative.
            let address = if value < base { base + value } else { value };
            match tag {
                0 => break,
                DT_STRTAB => strings = address,
                DT_SYMTAB => symbols = address,
                DT_GNU_HASH => gnu_hash = address,
                DT_HASH => hash = address,
                _ => {}
            }
            // SAFETY: as above.
            dynamic = unsafe { dynamic.add(1) };
        }
        (strings != 0 && symbols != 0).then_some(Self {
            base,
            strings,
            symbols,
            gnu_hash,
            hash,
        })
    }

    fn find(&self, name: &CStr) -> *mut c_void {
        let found = if self.gnu_hash != 0 {
            // SAFETY: the object's own table, as its linker made it.
            unsafe { self.by_gnu_hash(name) }
        } else if self.hash != 0 {
            // SAFETY: as above.
            unsafe { self.by_hash(name) }
        } else {
            None
        };
        found.map_or(null_mut(), |address| address as *mut c_void)
    }

    /// # Safety
    /// `gnu_hash` is the object's `DT_GNU_HASH`.
    unsafe fn by_gnu_hash(&self, name: &CStr) -> Option<usize> {
        let hash = name.to_bytes().iter().fold(5381_u32, |hash, byte| {
            hash.wrapping_mul(33).wrapping_add(u32::from(*byte))
        });
        // SAFETY: number of buckets, first symbol, words of the filter (of 8 bytes each), its shift;
        // then the filter, the buckets, and a hash for every symbol from the first on.
        let (head, after) = unsafe {
            let head = slice::from_raw_parts(self.gnu_hash as *const u32, 4);
            (head, (self.gnu_hash as *const u32).add(4))
        };
        let (count, first) = (head[0] as usize, head[1] as usize);
        if count == 0 {
            return None;
        }
        // SAFETY: as above.
        let buckets = unsafe { after.add(2 * head[2] as usize) };
        // SAFETY: as above.
        let hashes = unsafe { buckets.add(count) };
        // SAFETY: a bucket's number is below their count.
        let mut index = unsafe { *buckets.add(hash as usize % count) } as usize;
        if index < first {
            return None;
        }
        loop {
            // SAFETY: a bucket's symbols follow each other; the last one's hash is odd.
            let listed = unsafe { *hashes.add(index - first) };
            if listed | 1 == hash | 1 {
                // SAFETY: the table has this symbol.
                let found = unsafe { self.symbol(index, name) };
                if found.is_some() {
                    return found;
                }
            }
            if listed & 1 != 0 {
                return None;
            }
            index += 1;
        }
    }

    /// # Safety
    /// `hash` is the object's `DT_HASH`.
    unsafe fn by_hash(&self, name: &CStr) -> Option<usize> {
        let hash = name.to_bytes().iter().fold(0_u32, |hash, byte| {
            let hash = (hash << 4).wrapping_add(u32::from(*byte));
            let high = hash & 0xf000_0000;
            (hash ^ (high >> 24)) & !high
        });
        let table = self.hash as *const u32;
        // SAFETY: number of buckets, number of symbols; then the buckets, then for each symbol the next.
        let (buckets, symbols) = unsafe { (*table as usize, *table.add(1) as usize) };
        if buckets == 0 {
            return None;
        }
        // SAFETY: a bucket's number is below their count.
        let mut index = unsafe { *table.add(2 + hash as usize % buckets) } as usize;
        // Chains end with 0; a damaged one is followed no further than there are symbols.
        for _ in 0..symbols {
            if index == 0 || index >= symbols {
                return None;
            }
            // SAFETY: the table has this symbol.
            let found = unsafe { self.symbol(index, name) };
            if found.is_some() {
                return found;
            }
            // SAFETY: as above.
            index = unsafe { *table.add(2 + buckets + index) } as usize;
        }
        None
    }

    /// The address of symbol `index` if it is a function called `name` that the object defines.
    ///
    /// # Safety
    /// The table has that symbol.
    unsafe fn symbol(&self, index: usize, name: &CStr) -> Option<usize> {
        // SAFETY: the caller's promise.
        let symbol = unsafe { &*(self.symbols as *const libc::Elf64_Sym).add(index) };
        let (kind, binding) = (symbol.st_info & 15, symbol.st_info >> 4);
        // Functions that are chosen when they are bound are left out: the driver has none.
        if symbol.st_shndx == 0 || symbol.st_value == 0 || binding == STB_LOCAL || kind != STT_FUNC
        {
            return None;
        }
        // SAFETY: an offset into the object's strings, each of which ends with zero.
        let text = unsafe { CStr::from_ptr((self.strings + symbol.st_name as usize) as *const _) };
        let address = self
            .base
            .wrapping_add(usize::try_from(symbol.st_value).ok()?);
        (text == name).then_some(address)
    }
}

/// The function `name` that a loaded object defines itself; null if it has none. Neither allocates nor
/// waits.
///
/// # Safety
/// `info` is what `dl_iterate_phdr` passes, during that call.
pub unsafe fn defined(
    info: &libc::dl_phdr_info,
    headers: &[libc::Elf64_Phdr],
    name: &CStr,
) -> *mut c_void {
    #[allow(clippy::cast_possible_truncation, reason = "addresses of this process")]
    let base = info.dlpi_addr as usize;
    let dynamic = headers.iter().find(|h| h.p_type == libc::PT_DYNAMIC);
    let Some(address) = dynamic.and_then(|header| usize::try_from(header.p_vaddr).ok()) else {
        return null_mut();
    };
    let dynamic = base.wrapping_add(address) as *const Dynamic;
    // SAFETY: the object's own section, which stays while the loader's list is held.
    unsafe { Tables::new(base, dynamic) }.map_or(null_mut(), |tables| tables.find(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ffi::c_int;

    struct Question {
        object: &'static str,
        name: &'static CStr,
        older: bool,
        answer: *mut c_void,
    }

    unsafe extern "C" fn visit(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader's description, and the question below.
        let (info, question) = unsafe { (&*info, &mut *data.cast::<Question>()) };
        // SAFETY: the loader's name and headers.
        let (path, headers) = unsafe {
            (
                CStr::from_ptr(info.dlpi_name).to_string_lossy(),
                slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)),
            )
        };
        if !path.contains(question.object) {
            return 0;
        }
        if question.older {
            let dynamic = headers.iter().find(|h| h.p_type == libc::PT_DYNAMIC);
            let dynamic = dynamic.expect("a dynamic section");
            let base = usize::try_from(info.dlpi_addr).expect("an address");
            let address = base + usize::try_from(dynamic.p_vaddr).expect("an address");
            // SAFETY: as in `defined`.
            let tables = unsafe { Tables::new(base, address as *const Dynamic) };
            let mut tables = tables.expect("tables");
            if tables.hash == 0 {
                eprintln!("skipped: the older hash table: {path} has none");
                question.answer = core::ptr::without_provenance_mut(1);
                return 1;
            }
            tables.gnu_hash = 0;
            question.answer = tables.find(question.name);
        } else {
            // SAFETY: the loader's, during its call.
            question.answer = unsafe { defined(info, headers, question.name) };
        }
        1
    }

    fn ask(object: &'static str, name: &'static CStr, older: bool) -> *mut c_void {
        let mut question = Question {
            object,
            name,
            older,
            answer: null_mut(),
        };
        // SAFETY: `visit` runs during this call only.
        unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut question).cast()) };
        question.answer
    }

    #[test]
    fn the_c_librarys_functions_are_where_the_loader_finds_them() {
        for name in [c"getpid", c"malloc", c"open64", c"pthread_create", c"qsort"] {
            // SAFETY: a C string.
            let real = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
            assert_eq!(ask("libc.so", name, false), real, "{name:?}");
        }
        assert!(ask("libc.so", c"cuMemAlloc_v2", false).is_null());
        assert!(ask("libc.so", c"", false).is_null());
        // Data is no function.
        assert!(ask("libc.so", c"environ", false).is_null());
        assert!(ask("no such object", c"malloc", false).is_null());
    }

    #[test]
    fn the_older_hash_table_says_the_same() {
        let found = ask("libc.so", c"getpid", true);
        if found.addr() != 1 {
            assert_eq!(found, ask("libc.so", c"getpid", false));
            assert!(ask("libc.so", c"cuMemAlloc_v2", true).is_null());
        }
    }
}
