//! Modules, functions, libraries, kernels.

use crate::abi::{In, Out, exports, image, text};
use crate::launch;
use crate::submit::here;
use spillway_simulator_core::code::{FILE_NOT_FOUND, INVALID_HANDLE, INVALID_VALUE, NOT_FOUND, R};
use spillway_simulator_core::driver;
use spillway_simulator_core::module::{Function, Library, Module, lazy};
use spillway_simulator_core::ptx;
use std::ffi::{CString, c_char, c_void};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

fn load(out: Out<u64>, text: &str) -> R {
    out.needed()?;
    let (driver, context) = here()?;
    out.set(Module::load(driver, &context, text)?.id)
}

/// The PTX in a file.
///
/// # Errors
/// `FILE_NOT_FOUND`, and what the file's first bytes say about anything else than PTX.
pub fn file(path: In<c_char>) -> R<String> {
    let bytes = std::fs::read(text(path)?).map_err(|_| FILE_NOT_FOUND)?;
    let mut first = [b'.'; 4];
    for (to, from) in first.iter_mut().zip(&bytes) {
        *to = *from;
    }
    ptx::check_magic(first)?;
    String::from_utf8(bytes).map_err(|_| INVALID_VALUE)
}

fn library(handle: u64) -> R<Arc<Library>> {
    driver::get()?.libraries.get(handle).ok_or(INVALID_HANDLE)
}

fn param(out: (Out<usize>, Out<usize>), entry: &ptx::Entry, index: usize) -> R {
    let found = entry.params.get(index).ok_or(INVALID_VALUE)?;
    out.0.set(found.offset)?;
    out.1.offer(found.size);
    Ok(())
}

/// Names handed out as C strings live for ever; there are as many as there are kernels.
fn c_name(name: &str) -> *const c_char {
    static NAMES: Mutex<Vec<CString>> = Mutex::new(Vec::new());
    let mut names = spillway_simulator_core::sync::lock(&NAMES);
    if let Some(known) = names.iter().find(|n| n.as_bytes() == name.as_bytes()) {
        return known.as_ptr();
    }
    names.push(CString::new(name).unwrap_or_default());
    names.last().map_or(std::ptr::null(), |n| n.as_ptr())
}

const MAX_DYNAMIC_SHARED: i32 = 8;

fn attribute(function: &Function, attribute: i32) -> R<i32> {
    Ok(match attribute {
        // Threads per block, static shared, constant and local memory, registers, PTX and binary version.
        0 => 1024,
        1 => function.entry().shared_bytes as i32,
        2 => function.entry().const_bytes as i32,
        3 => function.entry().local_bytes as i32,
        4 => 32,
        5 => 70,
        6 => 90,
        7 => 0,
        MAX_DYNAMIC_SHARED => function.dynamic_shared_max.load(Ordering::Relaxed),
        9 => -1,
        10..=15 => 0,
        _ => return Err(INVALID_VALUE),
    })
}

fn set_attribute(function: &Function, attribute: i32, value: i32) -> R {
    match attribute {
        MAX_DYNAMIC_SHARED if (0..=227 << 10).contains(&value) => {
            function.dynamic_shared_max.store(value, Ordering::Relaxed);
            Ok(())
        }
        9 if (-1..=100).contains(&value) => Ok(()),
        10..=15 => Ok(()),
        _ => Err(INVALID_VALUE),
    }
}

/// A variable of a module: no built-in kernel has any.
///
/// # Errors
/// `INVALID_HANDLE`, `NOT_FOUND`.
pub fn global(handle: u64, name: In<c_char>) -> R {
    driver::get()?.modules.get(handle).ok_or(INVALID_HANDLE)?;
    text(name)?;
    Err(NOT_FOUND)
}

exports! {
    fn cuModuleLoad(out: Out<u64>, path: In<c_char>) {
        load(out, &file(path)?)
    }

    fn cuModuleLoadData(out: Out<u64>, data: In<u8>) {
        here()?;
        load(out, &image(data)?)
    }

    fn cuModuleLoadDataEx(out: Out<u64>, data: In<u8>, count: u32, options: In<u32>, values: In<u64>) {
        // Options tune a compiler that is not there.
        let _ = (count, options, values);
        here()?;
        load(out, &image(data)?)
    }

    fn cuModuleLoadFatBinary(out: Out<u64>, data: In<u8>) {
        here()?;
        load(out, &image(data)?)
    }

    fn cuModuleUnload(handle: u64) {
        let (driver, _) = here()?;
        let module = driver.modules.get(handle).ok_or(INVALID_HANDLE)?;
        if let Some(context) = driver.contexts.get(module.context) {
            context.drain();
        }
        module.unload(driver);
        Ok(())
    }

    fn cuModuleGetLoadingMode(mode: Out<u32>) {
        driver::get()?;
        mode.set(if lazy() { 2 } else { 1 })
    }

    fn cuModuleGetFunction(out: Out<u64>, handle: u64, name: In<c_char>) {
        out.needed()?;
        let (driver, _) = here()?;
        let module = driver.modules.get(handle).ok_or(INVALID_HANDLE)?;
        out.set(module.find(&text(name)?).ok_or(NOT_FOUND)?)
    }

    fn cuModuleGetFunctionCount(count: Out<u32>, handle: u64) {
        let module = driver::get()?.modules.get(handle).ok_or(INVALID_HANDLE)?;
        count.set(module.entries.len() as u32)
    }

    fn cuModuleEnumerateFunctions(out: Out<u64>, capacity: u32, handle: u64) {
        let module = driver::get()?.modules.get(handle).ok_or(INVALID_HANDLE)?;
        module.functions().into_iter().take(capacity as usize).enumerate().try_for_each(|(i, f)| out.set_at(i, f))
    }

    fn cuModuleGetGlobal_v2(address: Out<u64>, bytes: Out<usize>, handle: u64, name: In<c_char>) {
        let _ = (address, bytes);
        global(handle, name)
    }

    fn cuFuncGetAttribute(out: Out<i32>, which: i32, handle: u64) {
        here()?;
        out.set(attribute(&*launch::function(handle)?, which)?)
    }

    fn cuFuncSetAttribute(handle: u64, which: i32, value: i32) {
        here()?;
        set_attribute(&*launch::function(handle)?, which, value)
    }

    fn cuFuncSetCacheConfig(handle: u64, config: u32) {
        launch::function(handle)?;
        if config > 3 { Err(INVALID_VALUE) } else { Ok(()) }
    }

    fn cuFuncSetSharedMemConfig(handle: u64, config: u32) {
        launch::function(handle)?;
        if config > 2 { Err(INVALID_VALUE) } else { Ok(()) }
    }

    fn cuFuncGetModule(out: Out<u64>, handle: u64) {
        out.set(launch::function(handle)?.module.id)
    }

    fn cuFuncGetName(out: Out<*const c_char>, handle: u64) {
        out.set(c_name(&launch::function(handle)?.entry().name))
    }

    fn cuFuncGetParamInfo(handle: u64, index: usize, offset: Out<usize>, size: Out<usize>) {
        param((offset, size), launch::function(handle)?.entry(), index)
    }

    fn cuFuncIsLoaded(state: Out<u32>, handle: u64) {
        state.set(u32::from(launch::function(handle)?.module.loaded()))
    }

    fn cuFuncLoad(handle: u64) {
        launch::function(handle)?.module.need(driver::get()?)
    }

    fn cuLibraryLoadData(
        out: Out<u64>, data: In<u8>, jit: In<u32>, jit_values: In<c_void>, jit_count: u32,
        options: In<u32>, values: In<c_void>, count: u32,
    ) {
        let _ = (jit, jit_values, jit_count, options, values, count);
        out.needed()?;
        let driver = driver::get()?;
        out.set(Library::load(driver, &image(data)?)?.id)
    }

    fn cuLibraryLoadFromFile(
        out: Out<u64>, path: In<c_char>, jit: In<u32>, jit_values: In<c_void>, jit_count: u32,
        options: In<u32>, values: In<c_void>, count: u32,
    ) {
        let _ = (jit, jit_values, jit_count, options, values, count);
        out.needed()?;
        let driver = driver::get()?;
        out.set(Library::load(driver, &file(path)?)?.id)
    }

    fn cuLibraryUnload(handle: u64) {
        let driver = driver::get()?;
        library(handle)?.unload(driver);
        Ok(())
    }

    fn cuLibraryGetKernel(out: Out<u64>, handle: u64, name: In<c_char>) {
        out.needed()?;
        let library = library(handle)?;
        let name = text(name)?;
        let index = library.entries.iter().position(|e| e.name == name).ok_or(NOT_FOUND)?;
        out.set(library.kernels[index])
    }

    fn cuLibraryGetKernelCount(count: Out<u32>, handle: u64) {
        count.set(library(handle)?.kernels.len() as u32)
    }

    fn cuLibraryEnumerateKernels(out: Out<u64>, capacity: u32, handle: u64) {
        let library = library(handle)?;
        library.kernels.iter().take(capacity as usize).enumerate().try_for_each(|(i, k)| out.set_at(i, *k))
    }

    fn cuLibraryGetModule(out: Out<u64>, handle: u64) {
        out.needed()?;
        let (driver, context) = here()?;
        out.set(library(handle)?.module(driver, &context)?.id)
    }

    fn cuLibraryGetGlobal(address: Out<u64>, bytes: Out<usize>, handle: u64, name: In<c_char>) {
        let _ = (address, bytes);
        library(handle)?;
        text(name)?;
        Err(NOT_FOUND)
    }

    fn cuLibraryGetManaged(address: Out<u64>, bytes: Out<usize>, handle: u64, name: In<c_char>) {
        let _ = (address, bytes);
        library(handle)?;
        text(name)?;
        Err(NOT_FOUND)
    }

    fn cuKernelGetFunction(out: Out<u64>, handle: u64) {
        out.needed()?;
        let (driver, context) = here()?;
        let kernel = driver.kernels.get(handle).ok_or(INVALID_HANDLE)?;
        let module = library(kernel.library)?.module(driver, &context)?;
        out.set(*module.functions().get(kernel.index).ok_or(INVALID_HANDLE)?)
    }

    fn cuKernelGetLibrary(out: Out<u64>, handle: u64) {
        out.set(driver::get()?.kernels.get(handle).ok_or(INVALID_HANDLE)?.library)
    }

    fn cuKernelGetName(out: Out<*const c_char>, handle: u64) {
        let kernel = driver::get()?.kernels.get(handle).ok_or(INVALID_HANDLE)?;
        out.set(c_name(&library(kernel.library)?.entries[kernel.index].name))
    }

    fn cuKernelGetParamInfo(handle: u64, index: usize, offset: Out<usize>, size: Out<usize>) {
        let kernel = driver::get()?.kernels.get(handle).ok_or(INVALID_HANDLE)?;
        param((offset, size), &library(kernel.library)?.entries[kernel.index], index)
    }

    fn cuKernelGetAttribute(out: Out<i32>, which: i32, handle: u64, ordinal: i32) {
        crate::device::device(ordinal)?;
        here()?;
        out.set(attribute(&*launch::function(handle)?, which)?)
    }

    fn cuKernelSetAttribute(which: i32, value: i32, handle: u64, ordinal: i32) {
        crate::device::device(ordinal)?;
        here()?;
        set_attribute(&*launch::function(handle)?, which, value)
    }

    fn cuKernelSetCacheConfig(handle: u64, config: u32, ordinal: i32) {
        crate::device::device(ordinal)?;
        driver::get()?.kernels.get(handle).ok_or(INVALID_HANDLE)?;
        if config > 3 { Err(INVALID_VALUE) } else { Ok(()) }
    }
}
