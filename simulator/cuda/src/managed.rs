//! Managed memory: allocation, prefetches, advice, and what ranges are told of it.

use crate::abi::{In, Out, exports, put_bytes};
use crate::layout::{LOCATION_DEVICE, Location};
use crate::submit::{here, stream, submit};
use spillway_simulator_core::capture;
use spillway_simulator_core::code::{INVALID_DEVICE, INVALID_VALUE, R};
use spillway_simulator_core::driver::{self, Driver};
use spillway_simulator_core::exec::Op;
use spillway_simulator_core::graph::EMPTY;
use spillway_simulator_core::host::{self, HostRegion, Kind};
use spillway_simulator_core::managed::{self, Place};
use spillway_simulator_core::space::fresh_id;
use spillway_simulator_core::sync::write;
use std::ffi::c_void;

const CPU: i32 = -1;

fn gpu_place(driver: &Driver, ordinal: i32) -> R<Place> {
    let gpu = u32::try_from(ordinal).map_err(|_| INVALID_DEVICE)?;
    if gpu < driver.shared.config().gpus {
        Ok(Place::gpu(gpu))
    } else {
        Err(INVALID_DEVICE)
    }
}

/// The place of an ordinal, as the calls of the first version have it.
fn place_of(driver: &Driver, ordinal: i32) -> R<Place> {
    if ordinal == CPU {
        Ok(Place::HOST)
    } else {
        gpu_place(driver, ordinal)
    }
}

/// The place of a location; the one NUMA node is 0.
///
/// # Errors
/// `INVALID_DEVICE` for a GPU that is not there, `INVALID_VALUE` for another kind or node.
pub fn place_at(driver: &Driver, location: Location) -> R<Place> {
    match (location.kind, location.id) {
        (LOCATION_DEVICE, id) => gpu_place(driver, id),
        (2, _) => Ok(Place::HOST),
        (3, 0) | (4, _) => Ok(Place::NODE),
        _ => Err(INVALID_VALUE),
    }
}

fn prefetch(at: u64, bytes: usize, to: Place, on: u64, per_thread: bool) -> R {
    let driver = driver::get()?;
    let stream = stream(on, per_thread)?;
    let length = bytes as u64;
    if !managed::covers(driver, at, length) {
        return Err(INVALID_VALUE);
    }
    submit(&stream, EMPTY, Op::Prefetch { at, length, to })?;
    managed::note_prefetch(driver, at, length, to)
}

fn advise(at: u64, bytes: usize, advice: u32, place: impl FnOnce(&Driver) -> R<Place>) -> R {
    let driver = driver::get()?;
    // Only who is preferred or accesses is looked at.
    let place = if matches!(advice, 3 | 5 | 6) {
        place(driver)?
    } else {
        Place::NONE
    };
    if advice == 5 && !matches!(place.kind, LOCATION_DEVICE | 2) {
        return Err(INVALID_VALUE);
    }
    managed::advise(driver, at, bytes as u64, advice, place)
}

/// One attribute of a range, as ints; `room` of them for the list of those that access it.
fn range_attribute(driver: &Driver, which: u32, at: u64, bytes: usize, room: usize) -> R<Vec<i32>> {
    let common = managed::common(driver, at, bytes as u64)?;
    let mut all = vec![match which {
        1 => i32::from(common.read_mostly),
        2 => common.preferred.ordinal(),
        3 => {
            let gpus = (0..31).filter(|gpu| common.accessed_by >> gpu & 1 != 0);
            let cpu = (common.accessed_by & managed::CPU_BIT != 0).then_some(CPU);
            let mut list: Vec<i32> = gpus.chain(cpu).take(room).collect();
            list.resize(room, -2);
            return Ok(list);
        }
        4 => common.prefetched.ordinal(),
        5 => common.preferred.kind as i32,
        6 => common.preferred.id,
        7 => common.prefetched.kind as i32,
        8 => common.prefetched.id,
        _ => return Err(INVALID_VALUE),
    }];
    all.truncate(room);
    Ok(all)
}

fn put_range_attribute(out: Out<c_void>, size: usize, which: u32, at: u64, bytes: usize) -> R {
    const ACCESSED_BY: u32 = 3;
    out.needed()?;
    if size == 0 || !size.is_multiple_of(4) || size != 4 && which != ACCESSED_BY {
        return Err(INVALID_VALUE);
    }
    let values = range_attribute(driver::get()?, which, at, bytes, size / 4)?;
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    put_bytes(out.raw(), &bytes);
    Ok(())
}

/// Calls `f` with each range of a batch and the place that it is to go to.
fn each_of_batch(
    addresses: In<u64>,
    sizes: In<usize>,
    count: usize,
    places: In<Location>,
    firsts: In<usize>,
    places_count: usize,
    f: impl Fn(u64, usize, Place) -> R,
) -> R {
    let driver = driver::get()?;
    let (addresses, sizes) = (addresses.list(count)?, sizes.list(count)?);
    let (places, firsts) = (places.list(places_count)?, firsts.list(places_count)?);
    let ordered = firsts.windows(2).all(|pair| pair[0] < pair[1]);
    if count == 0 || firsts.first() != Some(&0) || !ordered {
        return Err(INVALID_VALUE);
    }
    let whole = addresses.iter().zip(&sizes);
    if !whole
        .clone()
        .all(|(at, n)| managed::covers(driver, *at, *n as u64))
    {
        return Err(INVALID_VALUE);
    }
    for (index, (at, bytes)) in whole.enumerate() {
        // The last place that begins at or before this range.
        let place = firsts
            .iter()
            .rposition(|first| *first <= index)
            .ok_or(INVALID_VALUE)?;
        f(*at, *bytes, place_at(driver, places[place])?)?;
    }
    Ok(())
}

exports! {
    fn cuMemAllocManaged(out: Out<u64>, bytes: usize, flags: u32) {
        out.needed()?;
        let (driver, context) = here()?;
        capture::allow_unsafe(driver)?;
        if bytes == 0 || !matches!(flags, 1 | 2) {
            return Err(INVALID_VALUE);
        }
        let start = host::pages(bytes as u64)?;
        let region = HostRegion {
            start,
            length: bytes as u64,
            kind: Kind::Managed,
            flags,
            context: context.id,
            gpu: context.gpu,
            id: fresh_id(),
            managed: Some(managed::register(driver, start, bytes as u64)),
        };
        write(&driver.host).insert(region);
        out.set(start)
    }

    fn cuMemPrefetchAsync / cuMemPrefetchAsync_ptsz [per_thread] (at: u64, bytes: usize, ordinal: i32, on: u64) {
        prefetch(at, bytes, place_of(driver::get()?, ordinal)?, on, per_thread)
    }

    fn cuMemPrefetchAsync_v2 / cuMemPrefetchAsync_v2_ptsz [per_thread] (
        at: u64, bytes: usize, location: Location, flags: u32, on: u64,
    ) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        prefetch(at, bytes, place_at(driver::get()?, location)?, on, per_thread)
    }

    fn cuMemPrefetchBatchAsync / cuMemPrefetchBatchAsync_ptsz [per_thread] (
        addresses: In<u64>, sizes: In<usize>, count: usize, places: In<Location>, firsts: In<usize>,
        places_count: usize, flags: u64, on: u64,
    ) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        each_of_batch(addresses, sizes, count, places, firsts, places_count, |at, bytes, to| {
            prefetch(at, bytes, to, on, per_thread)
        })
    }

    fn cuMemDiscardBatchAsync / cuMemDiscardBatchAsync_ptsz [per_thread] (
        addresses: In<u64>, sizes: In<usize>, count: usize, flags: u64, on: u64,
    ) {
        if flags != 0 || count == 0 {
            return Err(INVALID_VALUE);
        }
        let driver = driver::get()?;
        let stream = stream(on, per_thread)?;
        let (addresses, sizes) = (addresses.list(count)?, sizes.list(count)?);
        if !addresses.iter().zip(&sizes).all(|(at, n)| managed::covers(driver, *at, *n as u64)) {
            return Err(INVALID_VALUE);
        }
        for (at, bytes) in addresses.iter().zip(&sizes) {
            // What is not needed any more need not be on a GPU; it is no prefetch.
            submit(&stream, EMPTY, Op::Prefetch { at: *at, length: *bytes as u64, to: Place::HOST })?;
        }
        Ok(())
    }

    fn cuMemDiscardAndPrefetchBatchAsync / cuMemDiscardAndPrefetchBatchAsync_ptsz [per_thread] (
        addresses: In<u64>, sizes: In<usize>, count: usize, places: In<Location>, firsts: In<usize>,
        places_count: usize, flags: u64, on: u64,
    ) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        each_of_batch(addresses, sizes, count, places, firsts, places_count, |at, bytes, to| {
            prefetch(at, bytes, to, on, per_thread)
        })
    }

    fn cuMemAdvise(at: u64, bytes: usize, advice: u32, ordinal: i32) {
        advise(at, bytes, advice, |driver| place_of(driver, ordinal))
    }

    fn cuMemAdvise_v2(at: u64, bytes: usize, advice: u32, location: Location) {
        advise(at, bytes, advice, |driver| place_at(driver, location))
    }

    fn cuMemRangeGetAttribute(out: Out<c_void>, size: usize, which: u32, at: u64, bytes: usize) {
        put_range_attribute(out, size, which, at, bytes)
    }

    fn cuMemRangeGetAttributes(
        outs: In<Out<c_void>>, sizes: In<usize>, which: In<u32>, count: usize, at: u64, bytes: usize,
    ) {
        if count == 0 {
            return Err(INVALID_VALUE);
        }
        for index in 0..count {
            put_range_attribute(outs.at(index)?, sizes.at(index)?, which.at(index)?, at, bytes)?;
        }
        Ok(())
    }

    fn cuStreamAttachMemAsync / cuStreamAttachMemAsync_ptsz [per_thread] (on: u64, at: u64, length: usize, flags: u32) {
        let driver = driver::get()?;
        let stream = stream(on, per_thread)?;
        // GLOBAL, HOST, SINGLE; all the same where the host may use managed memory at any time.
        if !managed::covers(driver, at, (length as u64).max(1)) || !matches!(flags, 1 | 2 | 4) {
            return Err(INVALID_VALUE);
        }
        submit(&stream, EMPTY, Op::Empty).map(|_| ())
    }
}
