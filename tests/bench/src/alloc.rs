//! Allocating and freeing, and what each is compared with.

use anyhow::Result;

use crate::driver::{Driver, check};
use crate::rounds::{Case, Side};
use crate::setup::Device;

/// `CUmemAllocationProp`: page-locked memory on a device.
#[repr(C)]
struct Properties {
    kind: u32,
    handle_types: u32,
    location_type: u32,
    location: i32,
    windows: usize,
    flags: [u8; 8],
}

/// `CUmemAccessDesc`
#[repr(C)]
struct Access {
    location_type: u32,
    location: i32,
    flags: u32,
}

const DEVICE: u32 = 1;
const PINNED: u32 = 1;
const READ_WRITE: u32 = 3;
/// Granularity of physical memory on every device so far.
pub const GRANULE: usize = 2 << 20;

/// `cuMemAlloc` and `cuMemFree` of one size.
///
/// # Errors
/// The driver's code, as `Err`.
pub fn allocate(driver: &Driver, bytes: usize) -> Result<u64, i32> {
    let mut pointer = 0;
    // SAFETY: the driver fills one address.
    match unsafe { (driver.cuMemAlloc_v2)(&raw mut pointer, bytes) } {
        0 => Ok(pointer),
        code => Err(code),
    }
}

/// Frees what [`allocate`] made.
pub fn free(driver: &Driver, pointer: u64) -> i32 {
    // SAFETY: an address of the driver's, freed once.
    unsafe { (driver.cuMemFree_v2)(pointer) }
}

/// What the program is told about memory: free and total bytes.
///
/// # Errors
/// What the driver answers.
pub fn told(driver: &Driver) -> Result<(usize, usize)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the driver fills two integers.
    check("cuMemGetInfo", unsafe {
        (driver.cuMemGetInfo_v2)(&raw mut free, &raw mut total)
    })?;
    Ok((free, total))
}

/// Allocates and frees at once. Both sides by `cuMemAlloc`, one of them by the driver's own.
pub struct Pair<'a> {
    device: &'a Device,
    bytes: usize,
}

impl<'a> Pair<'a> {
    /// For the calling thread.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn new(device: &'a Device, bytes: usize) -> Result<Self> {
        device.enter()?;
        Ok(Self { device, bytes })
    }
}

fn pairs(driver: &Driver, bytes: usize, calls: u32) -> i32 {
    for _ in 0..calls {
        match allocate(driver, bytes) {
            Ok(pointer) => match free(driver, pointer) {
                0 => {}
                code => return code,
            },
            Err(code) => return code,
        }
    }
    0
}

impl Case for Pair<'_> {
    fn run(&mut self, side: Side, calls: u32) -> i32 {
        pairs(side_of(self.device, side), self.bytes, calls)
    }
}

fn side_of(device: &Device, side: Side) -> &Driver {
    match side {
        Side::Baseline => &device.both.direct,
        Side::Subject => &device.both.hooked,
    }
}

/// The program's `cuMemAlloc` and `cuMemFree` beside the driver's own steps for mapped memory: create, map,
/// set access, unmap, release, into addresses that are reserved before.
pub struct BesideMapping<'a> {
    device: &'a Device,
    bytes: usize,
    address: u64,
}

impl<'a> BesideMapping<'a> {
    /// For the calling thread.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn new(device: &'a Device, bytes: usize) -> Result<Self> {
        device.enter()?;
        let bytes = bytes.next_multiple_of(GRANULE);
        let mut address = 0;
        // SAFETY: the driver fills one address.
        check("cuMemAddressReserve", unsafe {
            (device.both.direct.cuMemAddressReserve)(&raw mut address, bytes, GRANULE, 0, 0)
        })?;
        Ok(Self {
            device,
            bytes,
            address,
        })
    }

    fn map(&self) -> Result<(), i32> {
        let driver = &self.device.both.direct;
        let properties = Properties {
            kind: PINNED,
            handle_types: 0,
            location_type: DEVICE,
            location: self.device.ordinal,
            windows: 0,
            flags: [0; 8],
        };
        let access = Access {
            location_type: DEVICE,
            location: self.device.ordinal,
            flags: READ_WRITE,
        };
        let done = |code: i32| if code == 0 { Ok(()) } else { Err(code) };
        let (address, bytes, mut handle) = (self.address, self.bytes, 0);
        // SAFETY: structures of the driver's layout, a reservation of this case's own, and each step undone.
        unsafe {
            done((driver.cuMemCreate)(
                &raw mut handle,
                bytes,
                (&raw const properties).cast(),
                0,
            ))?;
            done((driver.cuMemMap)(address, bytes, 0, handle, 0))?;
            done((driver.cuMemSetAccess)(
                address,
                bytes,
                (&raw const access).cast(),
                1,
            ))?;
            done((driver.cuMemUnmap)(address, bytes))?;
            done((driver.cuMemRelease)(handle))
        }
    }
}

impl Case for BesideMapping<'_> {
    fn run(&mut self, side: Side, calls: u32) -> i32 {
        if side == Side::Subject {
            return pairs(&self.device.both.hooked, self.bytes, calls);
        }
        for _ in 0..calls {
            if let Err(code) = self.map() {
                return code;
            }
        }
        0
    }
}

impl Drop for BesideMapping<'_> {
    fn drop(&mut self) {
        // SAFETY: reserved above, and nothing is mapped there.
        unsafe { (self.device.both.direct.cuMemAddressFree)(self.address, self.bytes) };
    }
}

/// Many live allocations, of which one after the other is freed and made anew, in no order.
pub struct Crowd<'a> {
    driver: &'a Driver,
    bytes: usize,
    live: Vec<u64>,
    state: u64,
}

impl<'a> Crowd<'a> {
    /// Empty.
    #[must_use]
    pub fn new(driver: &'a Driver, bytes: usize) -> Self {
        Self {
            driver,
            bytes,
            live: Vec::new(),
            state: 88_172_645_463_325_252,
        }
    }

    /// Allocates or frees until so many are alive.
    ///
    /// # Errors
    /// What the driver answers.
    pub fn resize(&mut self, count: usize) -> Result<()> {
        while self.live.len() > count {
            let index = self.pick();
            check("cuMemFree", free(self.driver, self.live.swap_remove(index)))?;
        }
        while self.live.len() < count {
            match allocate(self.driver, self.bytes) {
                Ok(pointer) => self.live.push(pointer),
                Err(code) => check("cuMemAlloc", code)?,
            }
        }
        Ok(())
    }

    fn pick(&mut self) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        usize::try_from(self.state % self.live.len() as u64).unwrap_or(0)
    }

    /// Allocates and frees one more, so many times.
    pub fn pairs(&mut self, calls: u32) -> i32 {
        pairs(self.driver, self.bytes, calls)
    }

    /// Replaces so many.
    pub fn churn(&mut self, calls: u32) -> i32 {
        for _ in 0..calls {
            let index = self.pick();
            let code = free(self.driver, self.live[index]);
            match allocate(self.driver, self.bytes) {
                Ok(pointer) if code == 0 => self.live[index] = pointer,
                Ok(_) => return code,
                Err(code) => {
                    self.live.swap_remove(index);
                    return code;
                }
            }
        }
        0
    }
}

impl Drop for Crowd<'_> {
    fn drop(&mut self) {
        for &pointer in &self.live {
            free(self.driver, pointer);
        }
    }
}

/// Asks for more than there is; both sides have to be refused.
pub struct Refused<'a> {
    device: &'a Device,
    bytes: usize,
}

impl<'a> Refused<'a> {
    /// For the calling thread: `bytes` beyond the limit; the driver itself is asked for what no device has.
    #[must_use]
    pub fn new(device: &'a Device, bytes: usize) -> Self {
        Self { device, bytes }
    }
}

impl Case for Refused<'_> {
    fn run(&mut self, side: Side, calls: u32) -> i32 {
        const OUT_OF_MEMORY: i32 = 2;
        let bytes = if side == Side::Baseline {
            1 << 46
        } else {
            self.bytes
        };
        for _ in 0..calls {
            match allocate(side_of(self.device, side), bytes) {
                Ok(_) => return -1,
                Err(OUT_OF_MEMORY) => {}
                Err(code) => return code,
            }
        }
        0
    }
}
