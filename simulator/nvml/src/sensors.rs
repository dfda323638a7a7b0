//! Sensors and settings: plausible constants, so that tools that show them have something to show.

use crate::abi::{NOT_SUPPORTED, Out, exports};
use crate::state::gpu;

exports! {
    fn nvmlDeviceGetTemperature(of: u64, sensor: u32, to: Out<u32>) {
        let _ = sensor;
        gpu(of)?;
        to.set(40)
    }

    fn nvmlDeviceGetPowerUsage(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(100_000)
    }

    fn nvmlDeviceGetPowerManagementMode(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(1)
    }

    fn nvmlDeviceGetPowerManagementLimit(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(700_000)
    }

    fn nvmlDeviceGetEnforcedPowerLimit(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(700_000)
    }

    fn nvmlDeviceGetFanSpeed(of: u64, to: Out<u32>) {
        let _ = to;
        gpu(of)?;
        Err(NOT_SUPPORTED)
    }

    fn nvmlDeviceGetClockInfo(of: u64, kind: u32, to: Out<u32>) {
        gpu(of)?;
        to.set(if kind == 2 { 2619 } else { 1980 })
    }

    fn nvmlDeviceGetMaxClockInfo(of: u64, kind: u32, to: Out<u32>) {
        gpu(of)?;
        to.set(if kind == 2 { 2619 } else { 1980 })
    }

    fn nvmlDeviceGetPerformanceState(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetComputeMode(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetPersistenceMode(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(1)
    }

    fn nvmlDeviceGetDisplayMode(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetDisplayActive(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetEccMode(of: u64, current: Out<u32>, pending: Out<u32>) {
        gpu(of)?;
        current.set(1)?;
        pending.set(1)
    }

    fn nvmlDeviceGetTotalEccErrors(of: u64, kind: u32, counter: u32, to: Out<u64>) {
        let _ = (kind, counter);
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetEncoderUtilization(of: u64, to: Out<u32>, period_us: Out<u32>) {
        gpu(of)?;
        to.set(0)?;
        period_us.set(166_000)
    }

    fn nvmlDeviceGetDecoderUtilization(of: u64, to: Out<u32>, period_us: Out<u32>) {
        gpu(of)?;
        to.set(0)?;
        period_us.set(166_000)
    }

    fn nvmlDeviceGetPcieThroughput(of: u64, counter: u32, to: Out<u32>) {
        let _ = counter;
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetCurrPcieLinkGeneration(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(5)
    }

    fn nvmlDeviceGetMaxPcieLinkGeneration(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(5)
    }

    fn nvmlDeviceGetCurrPcieLinkWidth(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(16)
    }

    fn nvmlDeviceGetMaxPcieLinkWidth(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(16)
    }

    fn nvmlDeviceGetCurrentClocksThrottleReasons(of: u64, to: Out<u64>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetCurrentClocksEventReasons(of: u64, to: Out<u64>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetSupportedEventTypes(of: u64, to: Out<u64>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetAccountingMode(of: u64, to: Out<u32>) {
        gpu(of)?;
        to.set(0)
    }

    fn nvmlDeviceGetTotalEnergyConsumption(of: u64, to: Out<u64>) {
        let _ = to;
        gpu(of)?;
        Err(NOT_SUPPORTED)
    }
}
