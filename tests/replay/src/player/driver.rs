//! The driver that the process finds, called by name with words.

use std::collections::HashMap;
use std::ffi::{CString, c_void};

use anyhow::{Result, ensure};

/// More than any entry point has.
const WORDS: usize = 18;

/// See the module.
pub struct Driver {
    library: usize,
    functions: HashMap<&'static str, Option<Function>>,
}

/// Every argument of the calls in the table is an integer or a pointer, so it travels as a word; words too many
/// are not looked at by the callee and taken away by the caller.
type Function = unsafe extern "C" fn(
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
    u64,
) -> i32;

impl Driver {
    /// Opens `libcuda.so.1`, as programs do.
    ///
    /// # Errors
    /// There is none.
    pub fn open() -> Result<Self> {
        // SAFETY: a C string; the driver's constructors are what any program runs.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        ensure!(!library.is_null(), "libcuda.so.1 cannot be loaded");
        Ok(Self {
            library: library as usize,
            functions: HashMap::new(),
        })
    }

    /// Calls; `None`: the driver has no such function.
    ///
    /// # Safety
    /// The words are arguments that the function of this name can be called with.
    pub unsafe fn call(&mut self, name: &'static str, words: &[u64]) -> Option<i32> {
        let library = self.library;
        let function = *self.functions.entry(name).or_insert_with(|| {
            let name = CString::new(name).ok()?;
            // SAFETY: an open library and a C string.
            let found = unsafe { libc::dlsym(library as *mut c_void, name.as_ptr()) };
            // SAFETY: null, or a function whose arguments are words, as `Function` explains.
            unsafe { std::mem::transmute::<*mut c_void, Option<Function>>(found) }
        });
        let function = function?;
        let mut all = [0; WORDS];
        all[..words.len()].copy_from_slice(words);
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r] = all;
        // SAFETY: the caller's promise.
        Some(unsafe { function(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r) })
    }
}
