//! Two devices: peer access and copies between them.

use crate::api::*;
use crate::gpu::*;
use crate::harness::*;

cases!("peer":
    a_device_is_not_its_own_peer,
    access_is_enabled_once,
    peer_copies_need_no_access,
);

/// The contexts of two devices, or a skip.
fn two() -> Result<(Handle, Handle), Stop> {
    ok!(cuInit(0));
    let (mut n, mut a, mut b) = (0, 0, 0);
    ok!(cuDeviceGetCount(&mut n));
    if n < 2 {
        skip!("there is one device");
    }
    ok!(cuDevicePrimaryCtxRetain(&mut a, 0));
    ok!(cuDevicePrimaryCtxRetain(&mut b, 1));
    ok!(cuCtxSetCurrent(a));
    Ok((a, b))
}

/// As [`two`], where each reaches the other's memory.
pub(super) fn reaching() -> Result<(Handle, Handle), Stop> {
    let contexts = two()?;
    for (from, to) in [(0, 1), (1, 0)] {
        let mut can = 0;
        ok!(cuDeviceCanAccessPeer(&mut can, from, to));
        if can == 0 {
            skip!("device {from} cannot reach device {to}");
        }
    }
    Ok(contexts)
}

/// cuDeviceCanAccessPeer of a device with itself is no.
/// Source: NVIDIA CUDA Driver API, Peer Context Memory Access, cuDeviceCanAccessPeer.
fn a_device_is_not_its_own_peer() -> Outcome {
    let _gpu = Gpu::start()?;
    let mut can = 9;
    ok!(cuDeviceCanAccessPeer(&mut can, 0, 0));
    check!(can == 0, "the device says that it is its own peer");
    Ok(())
}

/// Enabling twice and disabling what is not enabled have codes of their own.
/// Source: NVIDIA CUDA Driver API, Peer Context Memory Access, cuCtxEnablePeerAccess.
fn access_is_enabled_once() -> Outcome {
    let (_, b) = two()?;
    let mut can = 0;
    ok!(cuDeviceCanAccessPeer(&mut can, 0, 1));
    if can == 0 {
        skip!("device 0 cannot reach device 1");
    }
    is!(cuCtxDisablePeerAccess(b), PEER_ACCESS_NOT_ENABLED);
    ok!(cuCtxEnablePeerAccess(b, 0));
    is!(cuCtxEnablePeerAccess(b, 0), PEER_ACCESS_ALREADY_ENABLED);
    ok!(cuCtxDisablePeerAccess(b));
    Ok(())
}

/// Copies between devices work without peer access.
/// Source: NVIDIA CUDA Driver API, Memory Management, cuMemcpyPeer.
fn peer_copies_need_no_access() -> Outcome {
    let (a, b) = two()?;
    let here = alloc(4 * MIB)?;
    let bytes = pattern(4 * MIB, 51);
    write(here, &bytes)?;
    ok!(cuCtxSetCurrent(b));
    let there = alloc(4 * MIB)?;
    ok!(cuMemcpyPeer(there, b, here, a, 4 * MIB));
    ok!(cuCtxSynchronize());
    check!(read(there, 4 * MIB)? == bytes, "contents differ");
    Ok(())
}
