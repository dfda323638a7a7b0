//! Modules, libraries, functions.

use std::ffi::{CString, c_void};

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("modules":
    ptx_is_loaded_and_functions_found,
    what_is_not_there_is_not_found,
    nonsense_images_are_refused,
    functions_tell_their_limits,
    modules_go_with_their_context,
    unloading_twice_is_refused,
    libraries_hold_kernels_for_every_context,
    kernels_of_libraries_can_be_launched,
    options_of_the_loader_are_taken,
    the_loading_mode_is_known,
    modules_need_a_context,
    linked_ptx_can_be_loaded,
    functions_tell_their_variables,
);

/// A module made of PTX has the functions that the PTX names.
/// Source: NVIDIA CUDA Driver API, Module Management, cuModuleLoadData, cuModuleGetFunction.
fn ptx_is_loaded_and_functions_found() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let again = function(kernels.module, "fill_u32")?;
    check!(again == kernels.fill, "the same function has two handles");
    check!(kernels.fill != kernels.checksum && kernels.checksum != kernels.spin, "two functions have one handle");
    let mut module = 0;
    ok!(cuFuncGetModule(&mut module, kernels.fill));
    check!(module == kernels.module, "the function's module is another");
    for name in ["rendezvous", "persist"] {
        let _function = function(kernels.module, name)?;
    }
    Ok(())
}

/// A function or global that the module does not have is NOT_FOUND.
/// Source: NVIDIA CUDA Driver API, Module Management, cuModuleGetFunction, cuModuleGetGlobal.
fn what_is_not_there_is_not_found() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let name = CString::new("no_such_thing").unwrap_or_default();
    let (mut function, mut address, mut bytes) = (0, 0, 0);
    is!(cuModuleGetFunction(&mut function, kernels.module, name.as_ptr()), NOT_FOUND);
    is!(cuModuleGetGlobal_v2(Some(&mut address), Some(&mut bytes), kernels.module, name.as_ptr()), NOT_FOUND);
    Ok(())
}

/// What is neither PTX nor a binary is refused.
/// Source: NVIDIA CUDA Driver API, Module Management, cuModuleLoadData (returned codes).
fn nonsense_images_are_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut module = 0;
    let text = CString::new("this is not PTX at all").unwrap_or_default();
    let code = cuModuleLoadData(&mut module, text.as_ptr().cast());
    check!(code == Code::INVALID_PTX || code == Code::INVALID_IMAGE, "text: {code:?}");
    is!(cuModuleLoadData(&mut module, std::ptr::null()), INVALID_VALUE);
    let _kernels = Kernels::load()?;
    Ok(())
}

/// A function tells how many threads a block may have, and occupancy follows.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuFuncGetAttribute; Occupancy.
fn functions_tell_their_limits() -> Outcome {
    let _gpu = Gpu::start()?;
    let kernels = Kernels::load()?;
    let (mut threads, mut shared, mut ptx, mut blocks) = (0, -1, 0, 0);
    ok!(cuFuncGetAttribute(&mut threads, 0, kernels.fill));
    check!((32..=1024).contains(&threads), "{threads} threads per block");
    ok!(cuFuncGetAttribute(&mut shared, 1, kernels.fill));
    check!(shared == 0, "{shared} bytes of shared memory");
    ok!(cuFuncGetAttribute(&mut ptx, 5, kernels.fill));
    observe!("PTX version of fill_u32: {ptx}");
    fails!(cuFuncGetAttribute(&mut threads, 4711, kernels.fill));
    ok!(cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, kernels.fill, 128, 0));
    check!(blocks >= 1, "{blocks} blocks per multiprocessor");
    Ok(())
}

/// Modules live in the context that was current, and go with it.
/// Source: NVIDIA CUDA Driver API, Module Management ("into the current context").
fn modules_go_with_their_context() -> Outcome {
    let gpu = Gpu::start()?;
    let mut context = 0;
    ok!(cuCtxCreate_v2(&mut context, 0, gpu.device));
    let inside = Kernels::load()?;
    let address = alloc(4096)?;
    ok!(inside.fill(0, address, 4, 1));
    ok!(cuCtxSynchronize());
    ok!(cuCtxDestroy_v2(context));
    ok!(cuCtxSetCurrent(gpu.context));
    let again = Kernels::load()?;
    let address = alloc(4096)?;
    ok!(again.fill(0, address, 4, 2));
    ok!(cuCtxSynchronize());
    check!(read_u32(address)? == 2, "got {}", read_u32(address)?);
    Ok(())
}

/// A module can be unloaded and loaded again; a null module is refused.
/// Source: NVIDIA CUDA Driver API, Module Management, cuModuleUnload.
fn unloading_twice_is_refused() -> Outcome {
    let _gpu = Gpu::start()?;
    for _ in 0..5 {
        let kernels = Kernels::load()?;
        kernels.warm()?;
        ok!(cuModuleUnload(kernels.module));
    }
    fails!(cuModuleUnload(0));
    Ok(())
}

fn library() -> Result<Handle, Stop> {
    let mut library = 0;
    ok!(cuLibraryLoadData(&mut library, PTX.as_ptr().cast::<c_void>(), 0, 0, 0, 0, 0, 0));
    Ok(library)
}

/// A library's kernels become functions of the current context; what it lacks is NOT_FOUND.
/// Source: NVIDIA CUDA Driver API, Library Management.
fn libraries_hold_kernels_for_every_context() -> Outcome {
    let _gpu = Gpu::start()?;
    let library = library()?;
    let name = CString::new("fill_u32").unwrap_or_default();
    let missing = CString::new("no_such_thing").unwrap_or_default();
    let (mut kernel, mut function, mut module) = (0, 0, 0);
    ok!(cuLibraryGetKernel(&mut kernel, library, name.as_ptr()));
    is!(cuLibraryGetKernel(&mut function, library, missing.as_ptr()), NOT_FOUND);
    ok!(cuKernelGetFunction(&mut function, kernel));
    ok!(cuLibraryGetModule(&mut module, library));
    let address = alloc(4096)?;
    ok!(launch(function, 1, 32, 0, &[Arg::U64(address), Arg::U64(8), Arg::U32(31)]));
    ok!(cuCtxSynchronize());
    check!(read_u32(address)? == 31, "got {}", read_u32(address)?);
    ok!(cuLibraryUnload(library));
    Ok(())
}

/// cuLaunchKernel takes a kernel of a library in place of a function.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuLaunchKernel ("CUkernel cast to CUfunction").
fn kernels_of_libraries_can_be_launched() -> Outcome {
    let _gpu = Gpu::start()?;
    let library = library()?;
    let name = CString::new("fill_u32").unwrap_or_default();
    let mut kernel = 0;
    ok!(cuLibraryGetKernel(&mut kernel, library, name.as_ptr()));
    let address = alloc(4096)?;
    ok!(launch(kernel, 1, 32, 0, &[Arg::U64(address), Arg::U64(8), Arg::U32(32)]));
    ok!(cuCtxSynchronize());
    check!(read_u32(address)? == 32, "got {}", read_u32(address)?);
    Ok(())
}

/// cuModuleLoadDataEx takes log buffers.
/// Source: NVIDIA CUDA Driver API, Module Management, cuModuleLoadDataEx.
fn options_of_the_loader_are_taken() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut log = [0_u8; 1024];
    let mut options = [5, 6];
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), 1024 as *mut c_void];
    let mut module = 0;
    ok!(cuModuleLoadDataEx(&mut module, PTX.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr()));
    let _function = function(module, "fill_u32")?;
    ok!(cuModuleUnload(module));
    Ok(())
}

/// Modules are loaded eagerly or lazily.
/// Source: NVIDIA CUDA Driver API, Module Management, cuModuleGetLoadingMode.
fn the_loading_mode_is_known() -> Outcome {
    ok!(cuInit(0));
    let mut mode = 0;
    ok!(cuModuleGetLoadingMode(&mut mode));
    check!(mode == 1 || mode == 2, "mode {mode}");
    observe!("loading is {}", if mode == 1 { "eager" } else { "lazy" });
    Ok(())
}

/// Loading a module without a current context is INVALID_CONTEXT.
/// Source: NVIDIA CUDA Driver API, Module Management, cuModuleLoadData (returned codes).
fn modules_need_a_context() -> Outcome {
    ok!(cuInit(0));
    let mut module = 0;
    is!(cuModuleLoadData(&mut module, PTX.as_ptr().cast()), INVALID_CONTEXT);
    Ok(())
}

const LINK_PTX: i32 = 1;

fn link_ptx(link: Handle, text: &str) -> Code {
    let (name, none) = (CString::new("part").unwrap_or_default(), std::ptr::null_mut());
    cuLinkAddData_v2(link, LINK_PTX, text.as_ptr().cast(), text.len(), name.as_ptr(), 0, none, std::ptr::null_mut())
}

/// A kernel with variables in two memories, and one that does nothing.
const VARIABLES: &str = "\
.version 7.0
.target sm_70
.address_size 64
.const .align 4 .b8 table[80] = {1, 2};
.shared .align 4 .b8 tile[400];
.visible .entry busy(.param .u64 out)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd0, [out];
    cvta.to.global.u64 %rd0, %rd0;
    mov.u32 %r0, %tid.x;
    shl.b32 %r1, %r0, 2;
    mov.u32 %r2, tile;
    add.u32 %r2, %r2, %r1;
    st.volatile.shared.u32 [%r2], %r0;
    mov.u32 %r2, table;
    add.u32 %r2, %r2, %r1;
    ld.const.u32 %r1, [%r2];
    st.global.u32 [%rd0], %r1;
    ret;
}
.visible .entry idle(.param .u64 out)
{
    ret;
}
\0";

/// What is linked of two pieces of PTX is an image with the functions of both.
/// Source: NVIDIA CUDA Driver API, Module Management, cuLinkCreate, cuLinkAddData, cuLinkComplete.
fn linked_ptx_can_be_loaded() -> Outcome {
    let _gpu = Gpu::start()?;
    let (mut link, mut image, mut bytes, mut module) = (0, std::ptr::null(), 0, 0);
    ok!(cuLinkCreate_v2(0, std::ptr::null_mut(), std::ptr::null_mut(), &mut link));
    ok!(link_ptx(link, PTX));
    ok!(link_ptx(link, VARIABLES));
    ok!(cuLinkComplete(link, &mut image, &mut bytes));
    check!(!image.is_null() && bytes > 0, "{bytes} bytes at {image:?}");
    ok!(cuModuleLoadData(&mut module, image));
    ok!(cuLinkDestroy(link));
    let address = alloc(4096)?;
    ok!(launch(function(module, "fill_u32")?, 1, 32, 0, &[Arg::U64(address), Arg::U64(8), Arg::U32(33)]));
    ok!(launch(function(module, "idle")?, 1, 32, 0, &[Arg::U64(address)]));
    ok!(cuCtxSynchronize());
    check!(read_u32(address)? == 33, "got {}", read_u32(address)?);
    ok!(cuLinkCreate_v2(0, std::ptr::null_mut(), std::ptr::null_mut(), &mut link));
    fails!(link_ptx(link, "this is not PTX at all\0"));
    ok!(cuLinkDestroy(link));
    Ok(())
}

/// A function tells how much shared and constant memory its variables take.
/// Source: NVIDIA CUDA Driver API, Execution Control, cuFuncGetAttribute.
fn functions_tell_their_variables() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut module = 0;
    ok!(cuModuleLoadData(&mut module, VARIABLES.as_ptr().cast()));
    let busy = function(module, "busy")?;
    let (mut shared, mut constant) = (0, 0);
    ok!(cuFuncGetAttribute(&mut shared, 1, busy));
    ok!(cuFuncGetAttribute(&mut constant, 2, busy));
    check!(shared == 400, "{shared} bytes of shared memory");
    check!(constant >= 80, "{constant} bytes of constants");
    ok!(cuFuncGetAttribute(&mut shared, 1, function(module, "idle")?));
    check!(shared == 0, "{shared} bytes of shared memory where none is used");
    Ok(())
}
