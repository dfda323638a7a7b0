//! The border: results, pointers, and the macro that defines exports.

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// `nvmlReturn_t`.
pub const UNINITIALIZED: u32 = 1;
pub const INVALID_ARGUMENT: u32 = 2;
pub const NOT_SUPPORTED: u32 = 3;
pub const NOT_FOUND: u32 = 6;
pub const INSUFFICIENT_SIZE: u32 = 7;
pub const DRIVER_NOT_LOADED: u32 = 9;
pub const ARGUMENT_VERSION_MISMATCH: u32 = 25;
pub const UNKNOWN: u32 = 999;

pub type R<T = ()> = Result<T, u32>;

/// Runs the body of an export; a panic stays inside.
pub fn enter(body: impl FnOnce() -> R) -> u32 {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(_) => UNKNOWN,
    }
}

/// Where the caller wants a result.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Out<T> {}

impl<T> Out<T> {
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// # Errors
    /// `INVALID_ARGUMENT` if the caller passed null.
    pub fn set(self, value: T) -> R {
        self.set_at(0, value)
    }

    /// # Errors
    /// `INVALID_ARGUMENT` if the caller passed null.
    pub fn set_at(self, index: usize, value: T) -> R {
        if self.0.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        // SAFETY: by the C API the array has the length that the caller gave, which the callers of
        // this function respect.
        unsafe { self.0.add(index).write_unaligned(value) };
        Ok(())
    }

    /// What is there already.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` if the caller passed null.
    pub fn get(self) -> R<T>
    where
        T: Copy,
    {
        if self.0.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        // SAFETY: by the C API a non-null pointer is valid for one T.
        Ok(unsafe { self.0.read_unaligned() })
    }
}

/// A string that the caller passes.
///
/// # Errors
/// `INVALID_ARGUMENT` for null or not UTF-8.
pub fn text(at: *const c_char) -> R<String> {
    if at.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: by the C API the string ends in NUL.
    let text = unsafe { CStr::from_ptr(at) };
    text.to_str()
        .map(str::to_owned)
        .map_err(|_| INVALID_ARGUMENT)
}

/// Gives the caller a string.
///
/// # Errors
/// `INVALID_ARGUMENT` for null, `INSUFFICIENT_SIZE` if it does not fit.
pub fn put_text(to: Out<u8>, capacity: u32, text: &str) -> R {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    if text.len() >= capacity as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    for (index, byte) in text.bytes().chain([0]).enumerate() {
        to.set_at(index, byte)?;
    }
    Ok(())
}

/// Defines exports; each body is an [`R`].
macro_rules! exports {
    ($(fn $name:ident ($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            pub extern "C" fn $name($($arg: $type),*) -> u32 {
                $crate::abi::enter(move || $body)
            }
        )*
    };
}
pub(crate) use exports;
