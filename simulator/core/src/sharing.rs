//! Allocations and pools as other processes name them.
//!
//! An allocation is named by the file of its exported memory (`objects.rs`), which is kept by whoever has it
//! open: naming one keeps nothing alive. A pool is a descriptor of a memfd that says which it is.

use crate::classic::{self, Importer};
use crate::code::{INVALID_VALUE, OUT_OF_MEMORY, R};
use crate::driver::Driver;
use crate::objects::object_name;
use crate::pool::{Kind, Pool};
use crate::space::{Allocation, Physical};
use crate::sync::read;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// An allocation's place in exported memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// The exported object, padded with zeros.
    object: [u8; 40],
    offset: u64,
    length: u64,
}

impl Name {
    /// Exports the memory of an allocation.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it has none of its own, `OUT_OF_MEMORY` as [`Physical::export`].
    pub fn of(driver: &Driver, allocation: &Allocation) -> R<Self> {
        let (region, physical) = read(&driver.space)
            .region(allocation.start)
            .map(|r| (r.0, Arc::clone(&r.1.physical)))
            .ok_or(INVALID_VALUE)?;
        let file = physical.export()?;
        let text = object_name(file.as_raw_fd()).ok_or(INVALID_VALUE)?;
        let mut object = [0; 40];
        object
            .get_mut(..text.len())
            .ok_or(INVALID_VALUE)?
            .copy_from_slice(text.as_bytes());
        Ok(Self {
            object,
            offset: allocation.start - region,
            length: allocation.length,
        })
    }

    /// Maps the allocation here.
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is none of that name, `OUT_OF_MEMORY` without addresses.
    pub fn import(&self, driver: &Driver, importer: &Importer) -> R<u64> {
        let end = self.object.iter().position(|b| *b == 0);
        let name = end.and_then(|end| std::str::from_utf8(&self.object[..end]).ok());
        let physical = Physical::import_named(driver.shared, name.ok_or(INVALID_VALUE)?)?;
        classic::import(driver, importer, physical, self.offset, self.length)
    }
}

/// `CUmemPoolPtrExportData`: an allocation of a pool.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolPointer {
    name: Name,
    pool: u64,
}

const MAGIC: &str = "spillway-sim-pool";

/// What identifies a pool of this process on the machine.
#[must_use]
pub fn pool_key(driver: &Driver) -> u64 {
    u64::from(driver.shared.slot()) << 48 | crate::space::fresh_id() & 0xffff_ffff_ffff
}

/// A descriptor of a pool for another process.
///
/// # Errors
/// `INVALID_VALUE` if the pool was not made for that, `OUT_OF_MEMORY` without descriptors.
pub fn export_pool(driver: &Driver, pool: &Pool) -> R<File> {
    if pool.kind != Kind::Shareable {
        return Err(INVALID_VALUE);
    }
    // SAFETY: a plain call with a C string; the descriptor is owned by the file made of it.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"spillway-sim-pool".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(OUT_OF_MEMORY);
        }
        File::from_raw_fd(fd)
    };
    let text = format!("{MAGIC} {} {}", driver.shared.machine(pool.gpu), pool.key);
    file.write_all(text.as_bytes()).map_err(|_| OUT_OF_MEMORY)?;
    Ok(file)
}

/// The pool of a descriptor, for pointers to be imported into.
///
/// # Errors
/// `INVALID_VALUE` if it is no pool's descriptor, or of a GPU that is not seen here.
pub fn import_pool(driver: &Driver, fd: i32) -> R<Arc<Pool>> {
    if fd < 0 {
        return Err(INVALID_VALUE);
    }
    // SAFETY: only used for the next call, which fails if the descriptor is not open.
    let given = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    let file = File::from(given.map_err(|_| INVALID_VALUE)?);
    let mut text = [0; 80];
    let n = file.read_at(&mut text, 0).map_err(|_| INVALID_VALUE)?;
    let text = std::str::from_utf8(&text[..n]).map_err(|_| INVALID_VALUE)?;
    let words: Vec<&str> = text.split(' ').collect();
    let &[MAGIC, machine, key] = words.as_slice() else {
        return Err(INVALID_VALUE);
    };
    let machine = machine.parse::<u32>().ok();
    let gpu = machine.and_then(|machine| driver.shared.seen(machine));
    let key = key.parse().map_err(|_| INVALID_VALUE)?;
    let pool = Pool::new(gpu.ok_or(INVALID_VALUE)?, Kind::Imported, 0, key);
    driver.pools.insert(pool.id, Arc::clone(&pool));
    Ok(pool)
}

/// An allocation of a shareable pool, for a process that imported the pool.
///
/// # Errors
/// `INVALID_VALUE` if no such allocation starts at `address`.
pub fn export_pointer(driver: &Driver, address: u64) -> R<PoolPointer> {
    let allocation = classic::find(driver, address)?;
    let pool = driver.pools.get(allocation.pool).ok_or(INVALID_VALUE)?;
    if pool.kind != Kind::Shareable {
        return Err(INVALID_VALUE);
    }
    Ok(PoolPointer {
        name: Name::of(driver, &allocation)?,
        pool: pool.key,
    })
}

/// Maps an allocation of another process's pool.
///
/// # Errors
/// `INVALID_VALUE` if it is not one of that pool, or was freed; `OUT_OF_MEMORY` without addresses.
pub fn import_pointer(driver: &Driver, pool: &Pool, pointer: &PoolPointer) -> R<u64> {
    if pool.kind != Kind::Imported || pool.key != pointer.pool {
        return Err(INVALID_VALUE);
    }
    let importer = Importer::Pool(pool.id, pool.all_access());
    pointer.name.import(driver, &importer)
}
