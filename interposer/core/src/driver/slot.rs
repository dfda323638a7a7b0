//! One word that holds where a function of the real driver is.

use core::marker::PhantomData;
use core::sync::atomic::{AtomicPtr, Ordering};

/// A function pointer type that a [`Slot`] may hold.
///
/// # Safety
/// Implementors are function pointers: as large as a data pointer, never null.
pub unsafe trait Function: Copy {}

macro_rules! functions {
    ($($name:ident)*) => {
        // SAFETY: a function pointer.
        unsafe impl<Result, $($name),*> Function for unsafe extern "C" fn($($name),*) -> Result {}
    };
}
functions!();
functions!(A);
functions!(A B);
functions!(A B C);
functions!(A B C D);
functions!(A B C D E);
functions!(A B C D E F);
functions!(A B C D E F G);
functions!(A B C D E F G H);
functions!(A B C D E F G H I);
functions!(A B C D E F G H I J);
functions!(A B C D E F G H I J K);
functions!(A B C D E F G H I J K L);
functions!(A B C D E F G H I J K L M);
functions!(A B C D E F G H I J K L M N);
functions!(A B C D E F G H I J K L M N O);
functions!(A B C D E F G H I J K L M N O P);
functions!(A B C D E F G H I J K L M N O P Q);

/// A function pointer of type `F` that is always callable: first a stub, later the real function.
#[repr(transparent)]
pub struct Slot<F> {
    address: AtomicPtr<()>,
    function: PhantomData<F>,
}

impl<F> Slot<F> {
    /// A slot that holds `stub`, which must be a function of type `F`.
    pub(crate) const fn new(stub: *mut ()) -> Self {
        Self {
            address: AtomicPtr::new(stub),
            function: PhantomData,
        }
    }
}

impl<F: Function> Slot<F> {
    /// The function to call now.
    #[inline(always)]
    pub fn get(&self) -> F {
        // Relaxed: whoever calls it gets a function; which of the two makes no difference.
        let address = self.address.load(Ordering::Relaxed);
        // SAFETY: the word holds a function of type F at all times (see `new` and `set`).
        unsafe { core::mem::transmute_copy::<*mut (), F>(&address) }
    }

    /// Holds `function` from now on, for a test that stands in for the driver.
    #[cfg(feature = "testing")]
    pub fn stand_in(&self, function: F) {
        self.set(function);
    }

    /// Holds `function` from now on.
    pub(crate) fn set(&self, function: F) {
        // SAFETY: F is a function pointer, as large as this one.
        let address = unsafe { core::mem::transmute_copy::<F, *mut ()>(&function) };
        self.address.store(address, Ordering::Relaxed);
    }
}
