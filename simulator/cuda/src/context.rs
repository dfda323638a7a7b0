//! Contexts: creation, the thread's stack, limits, peers.

use crate::abi::{In, Out, exports};
use crate::device::{device, flags_valid};
use crate::submit::here;
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{
    INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NOT_SUPPORTED, PEER_ACCESS_ALREADY_ENABLED,
    PEER_ACCESS_NOT_ENABLED, PEER_ACCESS_UNSUPPORTED, R,
};
use spillway_simulator_core::context::{self, Context, Current};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::limits::STACK;
use spillway_simulator_core::space::fresh_id;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The context of a handle; 0 is the current one.
///
/// # Errors
/// `INVALID_CONTEXT`.
pub fn context_of(driver: &Driver, handle: u64) -> R<Arc<Context>> {
    if handle == 0 {
        context::top().ok_or(INVALID_CONTEXT)
    } else {
        entry_of(driver, handle).map(|entry| entry.context)
    }
}

/// As [`context_of`], with the green context that it may be.
///
/// # Errors
/// `INVALID_CONTEXT`.
pub fn entry_of(driver: &Driver, handle: u64) -> R<Current> {
    let entry = match handle {
        0 => context::top_entry(),
        _ => Current::of(driver, handle),
    };
    entry.ok_or(INVALID_CONTEXT)
}

fn create(out: Out<u64>, flags: u32, ordinal: i32, old: bool) -> R {
    out.needed()?;
    let (driver, gpu) = device(ordinal)?;
    if !flags_valid(flags) {
        return Err(INVALID_VALUE);
    }
    let made = Context::new(driver, fresh_id(), gpu, false, flags, old)?;
    context::push(Arc::clone(&made))?;
    out.set(made.id)
}

fn destroy(handle: u64) -> R {
    let driver = driver::get()?;
    let target = driver
        .contexts
        .get(handle)
        .filter(|_| handle != 0)
        .ok_or(INVALID_CONTEXT)?;
    if target.primary {
        return Err(INVALID_CONTEXT);
    }
    target.destroy(driver);
    // It is popped only where it is current.
    if context::top().is_some_and(|top| Arc::ptr_eq(&top, &target)) {
        context::pop()?;
    }
    Ok(())
}

fn push(handle: u64) -> R {
    let driver = driver::get()?;
    context::push(Current::of(driver, handle).ok_or(INVALID_CONTEXT)?)
}

fn pop(out: Out<u64>) -> R {
    driver::get()?;
    let popped = context::pop()?;
    out.offer(popped.handle());
    Ok(())
}

fn synchronize(current: &Current) -> R {
    let context = &current.context;
    if let Some(green) = &current.green {
        green.synchronize()?;
        driver::get()?.trim_pools(context.gpu, false);
        return Ok(());
    }
    context.check()?;
    capture::refuse_in(context)?;
    context.drain();
    context.check()?;
    driver::get()?.trim_pools(context.gpu, false);
    Ok(())
}

exports! {
    fn cuCtxCreate(out: Out<u64>, flags: u32, ordinal: i32) {
        create(out, flags, ordinal, true)
    }

    fn cuCtxCreate_v2(out: Out<u64>, flags: u32, ordinal: i32) {
        create(out, flags, ordinal, false)
    }

    fn cuCtxCreate_v3(out: Out<u64>, affinity: In<c_void>, count: i32, flags: u32, ordinal: i32) {
        let _ = affinity;
        if count != 0 {
            return Err(NOT_SUPPORTED);
        }
        create(out, flags, ordinal, false)
    }

    fn cuCtxCreate_v4(out: Out<u64>, params: In<[u64; 3]>, flags: u32, ordinal: i32) {
        // Execution affinity and graphics sharing are not simulated.
        if !params.is_null() && (params.get()?[0] != 0 || params.get()?[2] != 0) {
            return Err(NOT_SUPPORTED);
        }
        create(out, flags, ordinal, false)
    }

    fn cuCtxDestroy(handle: u64) {
        destroy(handle)
    }

    fn cuCtxDestroy_v2(handle: u64) {
        destroy(handle)
    }

    fn cuCtxPushCurrent(handle: u64) {
        push(handle)
    }

    fn cuCtxPushCurrent_v2(handle: u64) {
        push(handle)
    }

    fn cuCtxPopCurrent(out: Out<u64>) {
        pop(out)
    }

    fn cuCtxPopCurrent_v2(out: Out<u64>) {
        pop(out)
    }

    fn cuCtxSetCurrent(handle: u64) {
        let driver = driver::get()?;
        if handle == 0 {
            return context::set(None);
        }
        context::set(Some(Current::of(driver, handle).ok_or(INVALID_CONTEXT)?))
    }

    fn cuCtxGetCurrent(out: Out<u64>) {
        driver::get()?;
        out.set(context::top_entry().map_or(0, |current| current.handle()))
    }

    fn cuCtxGetDevice(out: Out<i32>) {
        driver::get()?;
        out.set(context::top().ok_or(INVALID_CONTEXT)?.gpu as i32)
    }

    fn cuCtxGetDevice_v2(out: Out<i32>, handle: u64) {
        out.set(context_of(driver::get()?, handle)?.gpu as i32)
    }

    fn cuCtxGetFlags(out: Out<u32>) {
        let (_, context) = here()?;
        out.set(context.flags.load(Ordering::Relaxed))
    }

    fn cuCtxSetFlags(flags: u32) {
        let (_, context) = here()?;
        if !flags_valid(flags) {
            return Err(INVALID_VALUE);
        }
        context.flags.store(flags, Ordering::Relaxed);
        Ok(())
    }

    fn cuCtxGetId(handle: u64, out: Out<u64>) {
        out.set(entry_of(driver::get()?, handle)?.handle())
    }

    fn cuCtxGetApiVersion(handle: u64, out: Out<u32>) {
        out.set(if context_of(driver::get()?, handle)?.old { 3010 } else { 3020 })
    }

    fn cuCtxSynchronize() {
        driver::get()?;
        synchronize(&context::current_entry()?)
    }

    fn cuCtxSynchronize_v2(handle: u64) {
        synchronize(&entry_of(driver::get()?, handle)?)
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        here()?;
        least.offer(0);
        greatest.offer(-5);
        Ok(())
    }

    fn cuCtxGetLimit(out: Out<usize>, limit: i32) {
        let (_, context) = here()?;
        out.needed()?;
        out.set(context.limits.get(limit)? as usize)
    }

    fn cuCtxSetLimit(limit: i32, value: usize) {
        let (_, context) = here()?;
        // What was asked for before has ended before stacks change.
        if limit == STACK as i32 {
            context.drain();
        }
        context.limits.set(limit, value as u64)
    }

    fn cuCtxGetCacheConfig(out: Out<u32>) {
        let (_, context) = here()?;
        out.set(context.cache_config.load(Ordering::Relaxed))
    }

    fn cuCtxSetCacheConfig(config: u32) {
        let (_, context) = here()?;
        if config > 3 {
            return Err(INVALID_VALUE);
        }
        context.cache_config.store(config, Ordering::Relaxed);
        Ok(())
    }

    fn cuCtxGetSharedMemConfig(out: Out<u32>) {
        let (_, context) = here()?;
        out.set(context.shared_config.load(Ordering::Relaxed))
    }

    fn cuCtxSetSharedMemConfig(config: u32) {
        let (_, context) = here()?;
        if config > 2 {
            return Err(INVALID_VALUE);
        }
        context.shared_config.store(config, Ordering::Relaxed);
        Ok(())
    }

    fn cuCtxResetPersistingL2Cache() {
        here().map(|_| ())
    }

    fn cuCtxEnablePeerAccess(handle: u64, flags: u32) {
        let (driver, context) = here()?;
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        let peer = driver.contexts.get(handle).ok_or(INVALID_CONTEXT)?;
        if peer.gpu == context.gpu {
            return Err(if Arc::ptr_eq(&peer, &context) { INVALID_DEVICE } else { PEER_ACCESS_UNSUPPORTED });
        }
        if driver.set_peer(context.gpu, peer.gpu, true) { Err(PEER_ACCESS_ALREADY_ENABLED) } else { Ok(()) }
    }

    fn cuCtxDisablePeerAccess(handle: u64) {
        let (driver, context) = here()?;
        let peer = driver.contexts.get(handle).ok_or(INVALID_CONTEXT)?;
        if peer.gpu != context.gpu && driver.set_peer(context.gpu, peer.gpu, false) {
            Ok(())
        } else {
            Err(PEER_ACCESS_NOT_ENABLED)
        }
    }
}
