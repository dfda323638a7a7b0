//! The linker, as far as there is one without machine code: it joins PTX texts, and what it makes of
//! them is PTX again. Names that no text defines are not looked for.

use crate::abi::{In, Out, bytes, exports};
use crate::module::file;
use crate::submit::here;
use spillway_simulator_core::code::{INVALID_HANDLE, INVALID_VALUE, NO_BINARY_FOR_GPU, R};
use spillway_simulator_core::driver;
use spillway_simulator_core::ptx;
use spillway_simulator_core::space::fresh_id;
use spillway_simulator_core::sync::lock;
use std::collections::HashMap;
use std::ffi::{c_char, c_void};
use std::sync::{LazyLock, Mutex};

#[derive(Default)]
struct Link {
    text: String,
    /// What `cuLinkComplete` handed out: it lies still until the link is destroyed.
    image: Option<Box<[u8]>>,
}

static LINKS: LazyLock<Mutex<HashMap<u64, Link>>> = LazyLock::new(Mutex::default);

/// `CU_JIT_INPUT_PTX`.
const PTX: u32 = 1;
/// Cubins, fat binaries, objects, libraries and NVVM code.
const OTHERS: [u32; 5] = [0, 2, 3, 4, 5];

fn create(out: Out<u64>) -> R {
    out.needed()?;
    here()?;
    let id = fresh_id();
    lock(&LINKS).insert(id, Link::default());
    out.set(id)
}

fn with<T>(state: u64, body: impl FnOnce(&mut Link) -> R<T>) -> R<T> {
    driver::get()?;
    body(lock(&LINKS).get_mut(&state).ok_or(INVALID_HANDLE)?)
}

fn add(state: u64, kind: u32, text: impl FnOnce() -> R<String>) -> R {
    with(state, |link| {
        if link.image.is_some() {
            return Err(INVALID_VALUE);
        }
        if kind != PTX {
            let known = OTHERS.contains(&kind);
            return Err(if known {
                NO_BINARY_FOR_GPU
            } else {
                INVALID_VALUE
            });
        }
        let text = text()?;
        ptx::parse(&text, driver::get()?.shared.config().release().ptx)?;
        link.text.push_str(&text);
        link.text.push('\n');
        Ok(())
    })
}

fn data(at: u64, size: usize) -> R<String> {
    if at == 0 || size == 0 {
        return Err(INVALID_VALUE);
    }
    let mut data = bytes(at, size);
    // The size may count the NUL that ends the text.
    while data.pop_if(|last| *last == 0).is_some() {}
    String::from_utf8(data).map_err(|_| INVALID_VALUE)
}

// Options tune a compiler that is not there.
exports! {
    fn cuLinkCreate(count: u32, options: In<u32>, values: In<c_void>, out: Out<u64>) {
        let _ = (count, options, values);
        create(out)
    }

    fn cuLinkCreate_v2(count: u32, options: In<u32>, values: In<c_void>, out: Out<u64>) {
        let _ = (count, options, values);
        create(out)
    }

    fn cuLinkAddData(
        state: u64, kind: u32, at: u64, size: usize, name: In<c_char>,
        count: u32, options: In<u32>, values: In<c_void>,
    ) {
        let _ = (name, count, options, values);
        add(state, kind, || data(at, size))
    }

    fn cuLinkAddData_v2(
        state: u64, kind: u32, at: u64, size: usize, name: In<c_char>,
        count: u32, options: In<u32>, values: In<c_void>,
    ) {
        let _ = (name, count, options, values);
        add(state, kind, || data(at, size))
    }

    fn cuLinkAddFile(state: u64, kind: u32, path: In<c_char>, count: u32, options: In<u32>, values: In<c_void>) {
        let _ = (count, options, values);
        add(state, kind, || file(path))
    }

    fn cuLinkAddFile_v2(state: u64, kind: u32, path: In<c_char>, count: u32, options: In<u32>, values: In<c_void>) {
        let _ = (count, options, values);
        add(state, kind, || file(path))
    }

    fn cuLinkComplete(state: u64, image: Out<*const u8>, size: Out<usize>) {
        image.needed()?;
        with(state, |link| {
            if link.text.is_empty() {
                return Err(INVALID_VALUE);
            }
            let text = &link.text;
            let made = link.image.get_or_insert_with(|| [text.as_bytes(), &[0]].concat().into());
            size.offer(made.len());
            image.set(made.as_ptr())
        })
    }

    fn cuLinkDestroy(state: u64) {
        driver::get()?;
        lock(&LINKS).remove(&state).map(drop).ok_or(INVALID_HANDLE)
    }
}
