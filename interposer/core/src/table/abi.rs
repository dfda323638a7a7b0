//! That the rows' signatures are the driver's: compared with cudarc's bindings when compiled.
//!
//! Types differ on purpose (raw integers here, enums and structures there), so what is compared is what
//! a call needs: the number of arguments, and the size of each. Where cudarc has no binding (legacy
//! names, per-thread variants, what is newer than its headers) the row stands alone.

use super::sig;
use cudarc::driver::sys;

/// `CUipcMemHandle`: 64 bytes, passed by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CUipcMemHandle(pub [u8; 64]);

/// `CUipcEventHandle`: 64 bytes, passed by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CUipcEventHandle(pub [u8; 64]);

/// `CUmemLocation`: a type and an id, passed by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CUmemLocation {
    /// `CUmemLocationType`, raw.
    pub kind: u32,
    /// Device or NUMA node, as the type says.
    pub id: i32,
}

/// The sizes in bytes of a function's arguments.
trait Arguments {
    const SIZES: &'static [usize];
}

macro_rules! arguments {
    ($($name:ident)*) => {
        impl<Result, $($name),*> Arguments for unsafe extern "C" fn($($name),*) -> Result {
            const SIZES: &'static [usize] = &[$(size_of::<$name>()),*];
        }
        impl<Result, $($name),*> Arguments for unsafe fn($($name),*) -> Result {
            const SIZES: &'static [usize] = &[$(size_of::<$name>()),*];
        }
    };
}
arguments!();
arguments!(A);
arguments!(A B);
arguments!(A B C);
arguments!(A B C D);
arguments!(A B C D E);
arguments!(A B C D E F);
arguments!(A B C D E F G);
arguments!(A B C D E F G H);
arguments!(A B C D E F G H I);
arguments!(A B C D E F G H I J);
arguments!(A B C D E F G H I J K);
arguments!(A B C D E F G H I J K L);
arguments!(A B C D E F G H I J K L M);
arguments!(A B C D E F G H I J K L M N);
arguments!(A B C D E F G H I J K L M N O);
arguments!(A B C D E F G H I J K L M N O P);
arguments!(A B C D E F G H I J K L M N O P Q);

const fn same(a: &[usize], b: &[usize]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

const fn agree<Theirs: Arguments + Copy, Ours: Arguments>(_theirs: Theirs) -> bool {
    same(Theirs::SIZES, Ours::SIZES)
}

macro_rules! compare {
    ($($name:ident ($($any:tt)*);)*) => {
        $(const _: () = assert!(
            agree::<_, sig::$name>(sys::$name as unsafe fn($($any),*) -> _),
            concat!("signature differs from cudarc's: ", stringify!($name)),
        );)*
    };
}
cudarc_names!(compare);
