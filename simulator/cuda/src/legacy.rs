//! The entry points of before CUDA 3.2, which a driver still exports: addresses and sizes have 32 bits.
//!
//! They work in contexts that the first `cuCtxCreate` made (`cuCtxGetApiVersion` says 3010), and nowhere else;
//! their successors work everywhere but there. Mixing them is INVALID_CONTEXT, as the driver's header says (at that
//! code) and as programs have found out that called an old name in a new context. `abi.rs` sees to it.
//! What a driver answers when 32 bits are too few is not published. Here: no address below 4 GiB is OUT_OF_MEMORY,
//! sizes are told as the largest number that fits, a host address that does not fit is INVALID_VALUE.

use crate::abi::{In, Out, exports};
use crate::array;
use crate::copy::{self, Wait, linear, run_shaped};
use crate::device::device;
use crate::fill::{self, flat, shaped};
use crate::layout::{Array3dDescriptor, ArrayDescriptor, Copy3d, Side3d};
use crate::memory::{self, allocate};
use crate::{host, module};
use spillway_simulator_core::code::{INVALID_VALUE, OUT_OF_MEMORY, R};
use std::ffi::c_char;

use Wait::{Asynchronous, Synchronous};

/// As many as fit.
fn told(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn address(at: u64) -> R<u32> {
    u32::try_from(at).map_err(|_| OUT_OF_MEMORY)
}

/// `CUDA_ARRAY_DESCRIPTOR` and `CUDA_ARRAY3D_DESCRIPTOR` of that time.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Array2 {
    width: u32,
    height: u32,
    format: u32,
    channels: u32,
}

/// The other one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Array3 {
    width: u32,
    height: u32,
    depth: u32,
    format: u32,
    channels: u32,
    flags: u32,
}

/// One half of `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Side2 {
    x: u32,
    y: u32,
    kind: u32,
    host: u64,
    device: u32,
    array: u64,
    pitch: u32,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2 {
    source: Side2,
    target: Side2,
    width: u32,
    height: u32,
}

/// One half of `CUDA_MEMCPY3D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Side3 {
    x: u32,
    y: u32,
    z: u32,
    lod: u32,
    kind: u32,
    host: u64,
    device: u32,
    array: u64,
    reserved: u64,
    pitch: u32,
    height: u32,
}

/// `CUDA_MEMCPY3D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy3 {
    source: Side3,
    target: Side3,
    width: u32,
    height: u32,
    depth: u32,
}

impl Copy2 {
    fn wide(&self) -> Copy3d {
        let side = |s: &Side2| Side3d {
            x: s.x as usize,
            y: s.y as usize,
            z: 0,
            lod: 0,
            kind: s.kind,
            host: s.host,
            device: u64::from(s.device),
            array: s.array,
            context: 0,
            pitch: s.pitch as usize,
            height: 0,
        };
        Copy3d {
            source: side(&self.source),
            target: side(&self.target),
            width: self.width as usize,
            height: self.height as usize,
            depth: 1,
        }
    }
}

impl Copy3 {
    fn wide(&self) -> Copy3d {
        let side = |s: &Side3| Side3d {
            x: s.x as usize,
            y: s.y as usize,
            z: s.z as usize,
            lod: s.lod as usize,
            kind: s.kind,
            host: s.host,
            device: u64::from(s.device),
            array: s.array,
            context: 0,
            pitch: s.pitch as usize,
            height: s.height as usize,
        };
        Copy3d {
            source: side(&self.source),
            target: side(&self.target),
            width: self.width as usize,
            height: self.height as usize,
            depth: self.depth as usize,
        }
    }
}

fn in_array(handle: u64, offset: u32) -> R<u64> {
    Ok(array::storage(handle)?.0 + u64::from(offset))
}

exports! {
    fn cuDeviceTotalMem(bytes: Out<u32>, ordinal: i32) {
        let (driver, _) = device(ordinal)?;
        bytes.set(told(driver.shared.config().memory))
    }

    fn cuMemGetInfo(free: Out<u32>, total: Out<u32>) {
        free.needed()?;
        let (left, memory) = memory::info()?;
        free.set(told(left))?;
        total.set(told(memory))
    }

    fn cuMemAlloc(out: Out<u32>, bytes: u32) {
        out.needed()?;
        out.set(address(allocate(u64::from(bytes))?)?)
    }

    fn cuMemAllocPitch(out: Out<u32>, pitch: Out<u32>, width: u32, height: u32, element: u32) {
        out.needed()?;
        pitch.needed()?;
        let row = memory::row(width as usize, height as usize, element)?;
        let at = allocate(row.checked_mul(height as usize).ok_or(INVALID_VALUE)? as u64)?;
        pitch.set(told(row as u64))?;
        out.set(address(at)?)
    }

    fn cuMemFree(at: u32) {
        memory::free(u64::from(at))
    }

    fn cuMemGetAddressRange(base: Out<u32>, size: Out<u32>, at: u32) {
        let (start, length) = memory::address_range(u64::from(at))?;
        base.offer(address(start)?);
        size.offer(told(length));
        Ok(())
    }

    fn cuMemAllocHost(out: Out<u64>, bytes: u32) {
        host::allocate(out, bytes as usize, 0)
    }

    fn cuMemHostGetDevicePointer(out: Out<u32>, at: u64, flags: u32) {
        out.needed()?;
        let at = host::device_pointer(at, flags)?;
        out.set(u32::try_from(at).map_err(|_| INVALID_VALUE)?)
    }

    fn cuModuleGetGlobal(at: Out<u32>, bytes: Out<u32>, handle: u64, name: In<c_char>) {
        let _ = (at, bytes);
        module::global(handle, name)
    }

    fn cuArrayCreate(out: Out<u64>, shape: In<Array2>) {
        let s = shape.get()?;
        array::create_array(out, Array3dDescriptor {
            width: s.width as usize, height: s.height as usize, depth: 0,
            format: s.format, channels: s.channels, flags: 0,
        })
    }

    fn cuArray3DCreate(out: Out<u64>, shape: In<Array3>) {
        let s = shape.get()?;
        array::create_array(out, Array3dDescriptor {
            width: s.width as usize, height: s.height as usize, depth: s.depth as usize,
            format: s.format, channels: s.channels, flags: s.flags,
        })
    }

    fn cuArrayGetDescriptor(out: Out<Array2>, handle: u64) {
        let s: ArrayDescriptor = array::descriptor(handle)?;
        out.set(Array2 { width: told(s.width as u64), height: told(s.height as u64), format: s.format, channels: s.channels })
    }

    fn cuArray3DGetDescriptor(out: Out<Array3>, handle: u64) {
        let s = array::descriptor3(handle)?;
        out.set(Array3 {
            width: told(s.width as u64), height: told(s.height as u64), depth: told(s.depth as u64),
            format: s.format, channels: s.channels, flags: s.flags,
        })
    }

    fn cuMemcpyHtoD(target: u32, source: u64, n: u32) {
        linear(source, u64::from(target), n as usize, copy::TO_DEVICE, 0, false, Synchronous)
    }

    fn cuMemcpyHtoDAsync(target: u32, source: u64, n: u32, on: u64) {
        linear(source, u64::from(target), n as usize, copy::TO_DEVICE, on, false, Asynchronous)
    }

    fn cuMemcpyDtoH(target: u64, source: u32, n: u32) {
        linear(u64::from(source), target, n as usize, copy::TO_HOST, 0, false, Synchronous)
    }

    fn cuMemcpyDtoHAsync(target: u64, source: u32, n: u32, on: u64) {
        linear(u64::from(source), target, n as usize, copy::TO_HOST, on, false, Asynchronous)
    }

    fn cuMemcpyDtoD(target: u32, source: u32, n: u32) {
        linear(u64::from(source), u64::from(target), n as usize, copy::WITHIN, 0, false, Synchronous)
    }

    fn cuMemcpyDtoDAsync(target: u32, source: u32, n: u32, on: u64) {
        linear(u64::from(source), u64::from(target), n as usize, copy::WITHIN, on, false, Asynchronous)
    }

    fn cuMemcpyDtoA(array: u64, offset: u32, source: u32, n: u32) {
        linear(u64::from(source), in_array(array, offset)?, n as usize, copy::WITHIN, 0, false, Synchronous)
    }

    fn cuMemcpyAtoD(target: u32, array: u64, offset: u32, n: u32) {
        linear(in_array(array, offset)?, u64::from(target), n as usize, copy::WITHIN, 0, false, Synchronous)
    }

    fn cuMemcpyHtoA(array: u64, offset: u32, source: u64, n: u32) {
        linear(source, in_array(array, offset)?, n as usize, copy::ANY, 0, false, Synchronous)
    }

    fn cuMemcpyAtoH(target: u64, array: u64, offset: u32, n: u32) {
        linear(in_array(array, offset)?, target, n as usize, copy::ANY, 0, false, Synchronous)
    }

    fn cuMemcpy2D(copy: In<Copy2>) {
        run_shaped(&copy.get()?.wide(), 0, false, Synchronous)
    }

    fn cuMemcpy2DUnaligned(copy: In<Copy2>) {
        run_shaped(&copy.get()?.wide(), 0, false, Synchronous)
    }

    fn cuMemcpy2DAsync(copy: In<Copy2>, on: u64) {
        run_shaped(&copy.get()?.wide(), on, false, Asynchronous)
    }

    fn cuMemcpy3D(copy: In<Copy3>) {
        run_shaped(&copy.get()?.wide(), 0, false, Synchronous)
    }

    fn cuMemcpy3DAsync(copy: In<Copy3>, on: u64) {
        run_shaped(&copy.get()?.wide(), on, false, Asynchronous)
    }

    fn cuMemsetD8(target: u32, value: u8, n: u32) {
        fill::run(flat(u64::from(target), u32::from(value), 1, n as usize), 0, false, true)
    }

    fn cuMemsetD16(target: u32, value: u16, n: u32) {
        fill::run(flat(u64::from(target), u32::from(value), 2, n as usize), 0, false, true)
    }

    fn cuMemsetD32(target: u32, value: u32, n: u32) {
        fill::run(flat(u64::from(target), value, 4, n as usize), 0, false, true)
    }

    fn cuMemsetD2D8(target: u32, pitch: u32, value: u8, w: u32, h: u32) {
        fill::run(shaped(u64::from(target), pitch as usize, u32::from(value), 1, w as usize, h as usize), 0, false, true)
    }

    fn cuMemsetD2D16(target: u32, pitch: u32, value: u16, w: u32, h: u32) {
        fill::run(shaped(u64::from(target), pitch as usize, u32::from(value), 2, w as usize, h as usize), 0, false, true)
    }

    fn cuMemsetD2D32(target: u32, pitch: u32, value: u32, w: u32, h: u32) {
        fill::run(shaped(u64::from(target), pitch as usize, value, 4, w as usize, h as usize), 0, false, true)
    }
}
