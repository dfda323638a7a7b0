//! What a pointer is.

use crate::abi::{In, Out, exports, put_bytes};
use spillway_simulator_core::classic::{EXTERNAL, IMPORTED};
use spillway_simulator_core::code::{INVALID_VALUE, NOT_SUPPORTED, R};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::host::Kind;
use spillway_simulator_core::sync::{lock, read};
use std::ffi::c_void;

/// What is known of an address.
struct Known {
    host: bool,
    managed: bool,
    context: u64,
    gpu: u32,
    start: u64,
    length: u64,
    id: u64,
    pool: u64,
    vmm: bool,
    mapped: bool,
    access: u32,
}

fn known(driver: &Driver, address: u64) -> Option<Known> {
    let space = read(&driver.space);
    if let Some(a) = space.allocation(address) {
        return Some(Known {
            host: false,
            managed: false,
            context: a.context,
            gpu: a.gpu,
            start: a.start,
            length: a.length,
            id: a.id,
            pool: a.pool,
            vmm: false,
            mapped: true,
            access: 3,
        });
    }
    if let Some((start, length)) = space.reservation(address) {
        let region = space.region(address).map(|r| r.1);
        return Some(Known {
            host: region.is_some_and(|r| r.physical.on_host().is_some()),
            managed: false,
            context: 0,
            gpu: region.and_then(|r| r.physical.gpu()).unwrap_or(0),
            start,
            length,
            id: region.map_or(0, |r| r.physical.id),
            pool: 0,
            vmm: true,
            mapped: region.is_some(),
            access: region.map_or(0, |r| u32::from(*r.access.iter().max().unwrap_or(&0))),
        });
    }
    drop(space);
    let table = read(&driver.host);
    let r = table.find(address)?;
    Some(Known {
        host: r.kind != Kind::Managed,
        managed: r.kind == Kind::Managed,
        context: r.context,
        gpu: r.gpu,
        start: r.start,
        length: r.length,
        id: r.id,
        pool: 0,
        vmm: false,
        mapped: true,
        access: 3,
    })
}

fn wide(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn narrow(value: u32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

/// The bytes of one attribute, or `None` if it does not apply to the pointer.
fn attribute(known: Option<&Known>, attribute: u32, address: u64) -> R<Option<Vec<u8>>> {
    if !(1..=21).contains(&attribute) {
        return Err(INVALID_VALUE);
    }
    let Some(k) = known else { return Ok(None) };
    // A reserved address with nothing behind it knows only that.
    if !k.mapped && !matches!(attribute, 11..=13) {
        return Ok(None);
    }
    Ok(Some(match attribute {
        1 => wide(k.context),
        2 => narrow(if k.host { 1 } else { 2 }),
        3 => wide(address),
        4 if k.host || k.managed => wide(address),
        // Tokens for peer-to-peer by third parties; host pointers of device memory.
        4 | 5 => return Ok(None),
        6 => narrow(u32::from(
            driver::get().is_ok_and(|d| lock(&d.sync_memops).contains(&k.id)),
        )),
        7 => wide(k.id),
        8 => narrow(u32::from(k.managed)),
        9 => narrow(k.gpu),
        // Memory of cuMemAlloc can be shared by handle; a boolean of one byte.
        10 => vec![u8::from(!k.host && !k.managed && !k.vmm && k.pool == 0)],
        11 => wide(k.start),
        12 => wide(k.length),
        13 => vec![u8::from(k.mapped)],
        14 => wide(u64::from(k.vmm)),
        15 => narrow(0),
        16 => narrow(if k.host || k.managed { 3 } else { k.access }),
        17 => wide(if matches!(k.pool, IMPORTED | EXTERNAL) {
            0
        } else {
            k.pool
        }),
        18 => wide(0),
        19 => wide(k.start),
        20 => narrow(0),
        _ => return Ok(None),
    }))
}

/// Bytes that a query of an attribute that does not apply is answered with.
fn nothing(attribute: u32) -> Vec<u8> {
    match attribute {
        // The ordinal of no device.
        9 => narrow(u32::MAX - 1),
        2 | 6 | 8 | 15 | 16 | 20 => narrow(0),
        10 | 13 => vec![0],
        5 => vec![0; 16],
        _ => wide(0),
    }
}

exports! {
    fn cuPointerGetAttribute(out: Out<c_void>, which: u32, address: u64) {
        out.needed()?;
        let driver = driver::get()?;
        let known = known(driver, address);
        let value = attribute(known.as_ref(), which, address)?.ok_or(INVALID_VALUE)?;
        put_bytes(out.raw(), &value);
        Ok(())
    }

    fn cuPointerGetAttributes(count: u32, which: In<u32>, outs: In<Out<c_void>>, address: u64) {
        let driver = driver::get()?;
        let known = known(driver, address);
        for index in 0..count as usize {
            let (which, out) = (which.at(index)?, outs.at(index)?);
            out.needed()?;
            // Unlike the single query, what does not apply is no error here.
            let value = attribute(known.as_ref(), which, address)?.unwrap_or_else(|| nothing(which));
            put_bytes(out.raw(), &value);
        }
        Ok(())
    }

    fn cuPointerSetAttribute(value: In<u32>, which: u32, address: u64) {
        let driver = driver::get()?;
        let on = value.get()? != 0;
        // SYNC_MEMOPS is the only one that can be set.
        let known = known(driver, address).filter(|_| which == 6).ok_or(INVALID_VALUE)?;
        if known.vmm {
            // As driver 580.
            return Err(NOT_SUPPORTED);
        }
        let mut all = lock(&driver.sync_memops);
        if on {
            all.insert(known.id);
        } else {
            all.remove(&known.id);
        }
        Ok(())
    }
}
