//! Kernel launches.

use crate::abi::{In, bytes, exports};
use crate::layout::LaunchConfig;
use crate::submit::{here, stream, submit};
use spillway_simulator_core::code::{
    INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED, R,
};
use spillway_simulator_core::context;
use spillway_simulator_core::driver;
use spillway_simulator_core::exec::Op;
use spillway_simulator_core::graph::KERNEL;
use spillway_simulator_core::kernels::Launch;
use spillway_simulator_core::module::Function;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The function of a handle, which may also be a kernel's: then the one of the current context.
///
/// # Errors
/// `INVALID_HANDLE`.
pub fn function(handle: u64) -> R<Arc<Function>> {
    let driver = driver::get()?;
    if let Some(function) = driver.functions.get(handle) {
        return Ok(function);
    }
    let kernel = driver.kernels.get(handle).ok_or(INVALID_HANDLE)?;
    let library = driver.libraries.get(kernel.library).ok_or(INVALID_HANDLE)?;
    let module = library.module(driver, &*context::current()?)?;
    let handle = *module.functions().get(kernel.index).ok_or(INVALID_HANDLE)?;
    driver.functions.get(handle).ok_or(INVALID_HANDLE)
}

/// Shape of a launch.
pub struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
}

const BUFFER_POINTER: u64 = 1;
const BUFFER_SIZE: u64 = 2;

/// The parameter buffer, as the caller gave it by pointers or in one piece.
fn parameters(function: &Function, params: In<u64>, extra: In<u64>) -> R<Vec<u8>> {
    let entry = function.entry();
    let mut buffer = vec![0_u8; entry.params_bytes()];
    if !params.is_null() {
        if !extra.is_null() {
            return Err(INVALID_VALUE);
        }
        for (index, param) in entry.params.iter().enumerate() {
            let at = params.at(index)?;
            if at == 0 {
                return Err(INVALID_VALUE);
            }
            buffer[param.offset..param.offset + param.size].copy_from_slice(&bytes(at, param.size));
        }
    } else if !extra.is_null() {
        let (mut at, mut size) = (0, None);
        for index in (0..16).step_by(2) {
            match extra.at(index)? {
                0 => break,
                BUFFER_POINTER => at = extra.at(index + 1)?,
                BUFFER_SIZE => size = Some(In::<usize>::of(extra.at(index + 1)?).get()?),
                _ => return Err(INVALID_VALUE),
            }
        }
        let given = size
            .filter(|size| at != 0 && *size >= buffer.len())
            .ok_or(INVALID_VALUE)?;
        let given = bytes(at, given.min(buffer.len()));
        buffer.copy_from_slice(&given);
    } else if !buffer.is_empty() {
        return Err(INVALID_VALUE);
    }
    Ok(buffer)
}

/// A launch with its parameters taken.
///
/// # Errors
/// `INVALID_VALUE` for a shape that no device runs, more shared memory than the function may have
/// or parameters that are missing, `NOT_SUPPORTED` for a kernel that is not
/// built in, and what loading its code fails with.
pub fn prepare(handle: u64, shape: &Shape, params: In<u64>, extra: In<u64>) -> R<Launch> {
    let (driver, context) = here()?;
    let function = function(handle)?;
    if function.module.context != context.id {
        return Err(INVALID_CONTEXT);
    }
    let [bx, by, bz] = shape.block;
    let [gx, gy, gz] = shape.grid;
    let threads = u64::from(bx) * u64::from(by) * u64::from(bz);
    let blocks_fit = gx >= 1
        && (1..=65_535).contains(&gy)
        && (1..=65_535).contains(&gz)
        && gx <= i32::MAX as u32;
    if !blocks_fit || threads == 0 || threads > 1024 || bx > 1024 || by > 1024 || bz > 64 {
        return Err(INVALID_VALUE);
    }
    if i64::from(shape.shared_bytes)
        > i64::from(function.dynamic_shared_max.load(Ordering::Relaxed))
    {
        return Err(INVALID_VALUE);
    }
    let params = parameters(&function, params, extra)?;
    if function.builtin.is_none() {
        eprintln!(
            "spillway simulator: kernel {:?} is not built in and cannot run",
            function.entry().name
        );
        return Err(NOT_SUPPORTED);
    }
    function.module.need(driver)?;
    context
        .limits
        .need_stack(function.entry().local_bytes as u64)?;
    Ok(Launch {
        builtin: function.builtin,
        function: function.id,
        params,
        grid: shape.grid,
        block: shape.block,
        shared_bytes: shape.shared_bytes,
    })
}

fn launch(
    handle: u64,
    shape: &Shape,
    on: u64,
    per_thread: bool,
    params: In<u64>,
    extra: In<u64>,
) -> R {
    let (_, context) = here()?;
    let stream = stream(on, per_thread)?;
    if stream.context.id != context.id {
        return Err(INVALID_HANDLE);
    }
    let launch = prepare(handle, shape, params, extra)?;
    submit(&stream, KERNEL, Op::Kernel(Arc::new(launch))).map(|_| ())
}

exports! {
    fn cuLaunchKernel / cuLaunchKernel_ptsz [per_thread] (
        function: u64, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared_bytes: u32, on: u64,
        params: In<u64>, extra: In<u64>,
    ) {
        let shape = Shape { grid: [gx, gy, gz], block: [bx, by, bz], shared_bytes };
        launch(function, &shape, on, per_thread, params, extra)
    }

    fn cuLaunchKernelEx / cuLaunchKernelEx_ptsz [per_thread] (
        config: In<LaunchConfig>, function: u64, params: In<u64>, extra: In<u64>,
    ) {
        let config = config.get()?;
        let shape = Shape { grid: config.grid, block: config.block, shared_bytes: config.shared_bytes };
        launch(function, &shape, config.stream, per_thread, params, extra)
    }

    fn cuLaunchCooperativeKernel / cuLaunchCooperativeKernel_ptsz [per_thread] (
        function: u64, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared_bytes: u32, on: u64,
        params: In<u64>,
    ) {
        let shape = Shape { grid: [gx, gy, gz], block: [bx, by, bz], shared_bytes };
        launch(function, &shape, on, per_thread, params, In::of(0))
    }
}
