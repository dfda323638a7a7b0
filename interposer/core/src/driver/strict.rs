//! Whether strict mode is on: unknown entry points of the driver are refused.
//!
//! It is on in the strict library, and in the plain one with `SPILLWAY_STRICT=1`, but not where
//! `SPILLWAY_DISABLE=1` turns everything off. `dlsym` asks before anything has started, so the variables
//! are read here, once, from the process's own block of them: the C library's `getenv` may be a program's
//! (bash defines one that allocates). Reading has the hazard of any `getenv`, a thread that changes the
//! environment meanwhile, and no other.

use super::own_role;
use crate::say;
use core::ffi::{CStr, c_char};
use core::sync::atomic::{AtomicU8, Ordering};
use spillway_protocol::names;
use spillway_protocol::note::Role;

unsafe extern "C" {
    static environ: *const *const c_char;
}

/// The value of a variable, from the environment as it is now. Calls nothing and allocates nothing.
pub fn variable(name: &str) -> Option<&'static [u8]> {
    // SAFETY: a word of the C library's; null before it has started.
    let mut entry = unsafe { environ };
    if entry.is_null() {
        return None;
    }
    loop {
        // SAFETY: a list of C strings that ends with null.
        let text = unsafe { *entry };
        if text.is_null() {
            return None;
        }
        // SAFETY: as above. Strings of the environment are not freed while somebody may read them.
        let text = unsafe { CStr::from_ptr(text) }.to_bytes();
        let value = text.strip_prefix(name.as_bytes());
        if let Some(value) = value.and_then(|rest| rest.strip_prefix(b"=")) {
            return Some(value);
        }
        // SAFETY: not the end yet.
        entry = unsafe { entry.add(1) };
    }
}

/// Whether the C library has started far enough for there to be an environment.
pub fn has_environment() -> bool {
    // SAFETY: a word of the C library's.
    !unsafe { environ }.is_null()
}

/// What the variables and the library's own role make of it. A value that cannot be read is strict:
/// `cuInit` refuses it anyway.
fn decide(role: Option<Role>, strict: Option<&[u8]>, disable: Option<&[u8]>) -> bool {
    let asked = !matches!(strict, None | Some(b"" | b"0"));
    (asked || role == Some(Role::Strict)) && disable != Some(b"1")
}

/// Whether unknown entry points are refused.
#[must_use]
pub fn is_strict() -> bool {
    static MODE: AtomicU8 = AtomicU8::new(0);
    match MODE.load(Ordering::Relaxed) {
        1 => false,
        2 => true,
        _ => {
            let strict = decide(
                own_role(),
                variable(names::ENV_STRICT),
                variable(names::ENV_DISABLE),
            );
            if has_environment() {
                MODE.store(if strict { 2 } else { 1 }, Ordering::Relaxed);
            }
            strict
        }
    }
}

/// Says that an entry point was refused, where that is so.
pub fn refused(name: &CStr) {
    if is_strict() {
        // Nobody has read this one if CUDA has not started.
        say::set_level_from_environment();
        say::warning!(
            "{} is refused: the driver has it, this library does not know it ({})",
            name.to_str().unwrap_or("?"),
            names::ENV_STRICT
        );
    }
}

/// Says it if only half of strict mode is on.
pub fn check_library(asked: bool) {
    if asked && own_role() == Some(Role::Plain) {
        say::warning!(
            "{}=1 with libspillway.so: unknown entry points are refused, but plugins opened with \
             RTLD_DEEPBIND go past it; preload libspillway_strict.so instead",
            names::ENV_STRICT
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_it_strict() {
        let on = Some(&b"1"[..]);
        let off = Some(&b"0"[..]);
        for role in [None, Some(Role::Plain)] {
            assert!(!decide(role, None, None));
            assert!(!decide(role, off, None));
            assert!(!decide(role, Some(b""), None));
            assert!(decide(role, on, None));
            assert!(decide(role, on, off));
            assert!(decide(role, Some(b"yes"), None));
            assert!(!decide(role, on, on));
        }
        assert!(decide(Some(Role::Strict), None, None));
        assert!(decide(Some(Role::Strict), off, None));
        assert!(!decide(Some(Role::Strict), on, on));
    }

    #[test]
    fn the_environment_is_read_as_getenv_would() {
        let path = std::env::var("PATH").expect("a path");
        assert_eq!(variable("PATH"), Some(path.as_bytes()));
        assert_eq!(variable("PAT"), None);
        assert_eq!(variable("SPILLWAY_NO_SUCH_VARIABLE"), None);
    }
}
