//! Contexts: creation, the thread's stack, limits, peers.

use crate::abi::{In, Out, exports};
use crate::device::{device, flags_valid};
use crate::submit::here;
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{
    INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NOT_SUPPORTED, PEER_ACCESS_ALREADY_ENABLED,
    PEER_ACCESS_NOT_ENABLED, PEER_ACCESS_UNSUPPORTED, R, UNSUPPORTED_LIMIT,
};
use spillway_simulator_core::context::{self, Context};
use spillway_simulator_core::driver::{self, Driver};
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
        driver.contexts.get(handle).ok_or(INVALID_CONTEXT)
    }
}

fn create(out: Out<u64>, flags: u32, ordinal: i32) -> R {
    out.needed()?;
    let (driver, gpu) = device(ordinal)?;
    if !flags_valid(flags) {
        return Err(INVALID_VALUE);
    }
    let made = Context::new(driver, fresh_id(), gpu, false, flags)?;
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
    let target = driver.contexts.get(handle).ok_or(INVALID_CONTEXT)?;
    context::push(target)
}

fn pop(out: Out<u64>) -> R {
    driver::get()?;
    let popped = context::pop()?;
    out.offer(popped.id);
    Ok(())
}

fn synchronize(context: &Arc<Context>) -> R {
    context.check()?;
    capture::refuse_in(context)?;
    context.drain();
    context.check()?;
    driver::get()?.trim_pools(context.gpu, false);
    Ok(())
}

exports! {
    fn cuCtxCreate(out: Out<u64>, flags: u32, ordinal: i32) {
        create(out, flags, ordinal)
    }

    fn cuCtxCreate_v2(out: Out<u64>, flags: u32, ordinal: i32) {
        create(out, flags, ordinal)
    }

    fn cuCtxCreate_v3(out: Out<u64>, affinity: In<c_void>, count: i32, flags: u32, ordinal: i32) {
        let _ = affinity;
        if count != 0 {
            return Err(NOT_SUPPORTED);
        }
        create(out, flags, ordinal)
    }

    fn cuCtxCreate_v4(out: Out<u64>, params: In<[u64; 3]>, flags: u32, ordinal: i32) {
        // Execution affinity and graphics sharing are not simulated.
        if !params.is_null() && (params.get()?[0] != 0 || params.get()?[2] != 0) {
            return Err(NOT_SUPPORTED);
        }
        create(out, flags, ordinal)
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
        context::set(Some(driver.contexts.get(handle).ok_or(INVALID_CONTEXT)?))
    }

    fn cuCtxGetCurrent(out: Out<u64>) {
        driver::get()?;
        out.set(context::top().map_or(0, |c| c.id))
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
        out.set(context_of(driver::get()?, handle)?.id)
    }

    fn cuCtxGetApiVersion(handle: u64, out: Out<u32>) {
        context_of(driver::get()?, handle)?;
        out.set(3020)
    }

    fn cuCtxSynchronize() {
        let (_, context) = here()?;
        synchronize(&context)
    }

    fn cuCtxSynchronize_v2(handle: u64) {
        synchronize(&context_of(driver::get()?, handle)?)
    }

    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        here()?;
        least.offer(0);
        greatest.offer(-5);
        Ok(())
    }

    fn cuCtxGetLimit(out: Out<usize>, limit: i32) {
        let (_, context) = here()?;
        let value = usize::try_from(limit).ok().and_then(|i| context.limits.get(i)).filter(|_| limit < 8);
        out.set(value.ok_or(UNSUPPORTED_LIMIT)?.load(Ordering::Relaxed) as usize)
    }

    fn cuCtxSetLimit(limit: i32, value: usize) {
        let (_, context) = here()?;
        let word = usize::try_from(limit).ok().and_then(|i| context.limits.get(i)).filter(|_| limit < 8);
        word.ok_or(UNSUPPORTED_LIMIT)?.store(value as u64, Ordering::Relaxed);
        Ok(())
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
