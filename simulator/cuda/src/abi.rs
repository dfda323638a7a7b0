//! The border: how a call comes in, and how its pointers are read and written.
//!
//! No panic crosses it, a null pointer where a value is required is `INVALID_VALUE`, and faults
//! asked for by name strike here. The exports themselves contain no unsafe code.

use spillway_simulator_core::code::{INVALID_CONTEXT, INVALID_VALUE, NOT_SUPPORTED, R, UNKNOWN};
use spillway_simulator_core::context;
use spillway_simulator_core::driver;
use spillway_simulator_core::release::RELEASES;
use std::ffi::{CStr, c_char, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Which contexts an entry point works in, where that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    Any,
    /// Of before CUDA 3.2, with 32-bit addresses and sizes: in contexts of that time only.
    Old,
    /// What came for it: not there.
    New,
}

/// Runs the body of an export that exists since version `since` of the driver.
pub fn enter(
    name: &'static str,
    since: u32,
    interface: Interface,
    body: impl FnOnce() -> R,
) -> u32 {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // Most are older than any driver here, and known to be when this is compiled.
        if since > RELEASES[0].cuda && driver::version().is_ok_and(|driver| since > driver) {
            return Err(NOT_SUPPORTED);
        }
        if let Ok(driver) = driver::get() {
            driver.faults.strike(name)?;
        }
        if interface != Interface::Any
            && driver::get().is_ok()
            && let Some(context) = context::top()
            && context.old != (interface == Interface::Old)
        {
            return Err(INVALID_CONTEXT);
        }
        body()
    }));
    match outcome {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(_) => UNKNOWN,
    }
}

/// What an entry point answers that exists and does nothing.
pub fn unsupported(name: &'static str, since: u32) -> u32 {
    enter(name, since, Interface::Any, || {
        driver::get().and(Err(NOT_SUPPORTED))
    })
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
    /// A result that nobody asked for.
    pub fn none() -> Self {
        Self(std::ptr::null_mut())
    }

    /// A result at an address that the caller passed as a number.
    pub fn of(address: usize) -> Self {
        Self(address as *mut T)
    }

    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// # Errors
    /// `INVALID_VALUE` if the caller passed null.
    pub fn needed(self) -> R {
        if self.0.is_null() {
            Err(INVALID_VALUE)
        } else {
            Ok(())
        }
    }

    /// # Errors
    /// `INVALID_VALUE` if the caller passed null.
    pub fn set(self, value: T) -> R {
        self.needed()?;
        // SAFETY: by the C API a non-null result pointer is valid for one T.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Writes unless the caller passed null.
    pub fn offer(self, value: T) {
        let _ = self.set(value);
    }

    /// Writes the `index`th element of a caller's array that is long enough.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the caller passed null.
    pub fn set_at(self, index: usize, value: T) -> R {
        self.needed()?;
        // SAFETY: by the C API the array has the length that the caller gave, which the callers of
        // this function respect.
        unsafe { self.0.add(index).write_unaligned(value) };
        Ok(())
    }

    pub fn raw(self) -> *mut c_void {
        self.0.cast()
    }
}

/// A value that the caller passes by pointer.
#[repr(transparent)]
pub struct In<T>(*const T);

impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for In<T> {}

impl<T: Copy> In<T> {
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// # Errors
    /// `INVALID_VALUE` if the caller passed null.
    pub fn get(self) -> R<T> {
        self.at(0)
    }

    /// # Errors
    /// `INVALID_VALUE` if the caller passed null.
    pub fn at(self, index: usize) -> R<T> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: by the C API a non-null pointer is valid for the number of T that the caller
        // gave, which the callers of this function respect.
        Ok(unsafe { self.0.add(index).read_unaligned() })
    }

    /// # Errors
    /// `INVALID_VALUE` if there should be elements and the caller passed null.
    pub fn list(self, n: usize) -> R<Vec<T>> {
        (0..n).map(|index| self.at(index)).collect()
    }

    /// What lies at an address that the caller passed as a number.
    pub fn of(address: u64) -> Self {
        Self(address as *const T)
    }
}

/// A string that the caller passes.
///
/// # Errors
/// `INVALID_VALUE` for null or not UTF-8.
pub fn text(at: In<c_char>) -> R<String> {
    if at.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: by the C API the string ends in NUL.
    let text = unsafe { CStr::from_ptr(at.0) };
    text.to_str().map(str::to_owned).map_err(|_| INVALID_VALUE)
}

/// The PTX of a module image.
///
/// # Errors
/// `INVALID_VALUE` for null, and what the image's first bytes say about anything else than PTX.
pub fn image(at: In<u8>) -> R<String> {
    let mut first = [b'.'; 4];
    for (index, byte) in first.iter_mut().enumerate() {
        *byte = at.at(index)?;
        if *byte == 0 {
            break;
        }
    }
    spillway_simulator_core::ptx::check_magic(first)?;
    text(In(at.0.cast()))
}

/// Closes a descriptor that the caller gave away.
pub fn take_descriptor(fd: i32) {
    // SAFETY: by the C API the descriptor is the driver's from now on; it was just seen to be open.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// Copies `bytes` bytes out of the caller's memory.
pub fn bytes(at: u64, bytes: usize) -> Vec<u8> {
    let mut copy = vec![0_u8; bytes];
    // SAFETY: by the C API the source has that many bytes; a wrong one faults as it would with
    // the real driver.
    unsafe { std::ptr::copy_nonoverlapping(at as *const u8, copy.as_mut_ptr(), bytes) };
    copy
}

/// Copies into the caller's memory.
pub fn put_bytes(at: *mut c_void, bytes: &[u8]) {
    // SAFETY: by the C API the target has that many bytes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.cast(), bytes.len()) };
}

/// Defines exports. `fn name(args) { body }` is one; `fn name / name_ptsz [flag] (args) { body }`
/// is two, in which `flag` says whether default streams are per thread. The body is an `R`.
macro_rules! exports {
    () => {};
    (fn $name:ident ($($arg:ident: $type:ty),* $(,)?) $body:block $($rest:tt)*) => {
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($arg: $type),*) -> u32 {
            $crate::abi::enter(stringify!($name), $crate::table::since::$name, $crate::table::interface::$name, move || $body)
        }
        exports! { $($rest)* }
    };
    (fn $name:ident / $twin:ident [$flag:ident] ($($arg:ident: $type:ty),* $(,)?) $body:block $($rest:tt)*) => {
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($arg: $type),*) -> u32 {
            let $flag = false;
            $crate::abi::enter(stringify!($name), $crate::table::since::$name, $crate::table::interface::$name, move || $body)
        }
        #[unsafe(no_mangle)]
        pub extern "C" fn $twin($($arg: $type),*) -> u32 {
            let $flag = true;
            $crate::abi::enter(stringify!($twin), $crate::table::since::$twin, $crate::table::interface::$twin, move || $body)
        }
        exports! { $($rest)* }
    };
}
pub(crate) use exports;
