//! Host memory that the driver knows: allocated by it, or registered by the application.

use crate::code::{
    HOST_MEMORY_ALREADY_REGISTERED, HOST_MEMORY_NOT_REGISTERED, INVALID_VALUE, OUT_OF_MEMORY, R,
};
use crate::config::FRAME;
use std::collections::BTreeMap;

/// `CU_MEMHOSTALLOC_PORTABLE` and `CU_MEMHOSTREGISTER_PORTABLE`.
pub const PORTABLE: u32 = 1;
/// `CU_MEMHOSTALLOC_DEVICEMAP` and `CU_MEMHOSTREGISTER_DEVICEMAP`.
pub const DEVICE_MAP: u32 = 2;

/// How a range came to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `cuMemHostAlloc`, `cuMemAllocHost`.
    Allocated,
    /// `cuMemHostRegister`.
    Registered,
    /// `cuMemAllocManaged`.
    Managed,
}

/// A known range.
#[derive(Clone, Debug)]
pub struct HostRegion {
    pub start: u64,
    pub length: u64,
    pub kind: Kind,
    pub flags: u32,
    pub context: u64,
    pub gpu: u32,
    pub id: u64,
    /// Where the pages of managed memory are.
    pub managed: Option<std::sync::Arc<crate::managed::Entry>>,
}

impl HostRegion {
    /// Whether work of `context` sees the range as pinned. What the driver allocated is portable
    /// wherever addressing is unified, whatever its flags; a registration only if it says so.
    #[must_use]
    pub fn pinned_for(&self, context: u64) -> bool {
        self.kind != Kind::Registered || self.flags & PORTABLE != 0 || self.context == context
    }
}

/// Fresh pages of this process, at a multiple of 2 MiB.
///
/// # Errors
/// `OUT_OF_MEMORY`.
pub fn pages(length: u64) -> R<u64> {
    let length = length.checked_next_multiple_of(4096).ok_or(OUT_OF_MEMORY)?;
    let with_slack = length.checked_add(FRAME).ok_or(OUT_OF_MEMORY)?;
    // SAFETY: a fresh private mapping.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            with_slack as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(OUT_OF_MEMORY);
    }
    let base = base as u64;
    let start = base.next_multiple_of(FRAME);
    let cut = |from: u64, to: u64| {
        if to > from {
            // SAFETY: whole pages of the mapping just made, which nobody knows.
            unsafe { libc::munmap(from as *mut libc::c_void, (to - from) as usize) };
        }
    };
    cut(base, start);
    cut(start + length, base + with_slack);
    Ok(start)
}

/// All known ranges; they never overlap.
#[derive(Default)]
pub struct HostTable(pub BTreeMap<u64, HostRegion>);

impl HostTable {
    /// The range that `address` lies in.
    #[must_use]
    pub fn find(&self, address: u64) -> Option<&HostRegion> {
        let (_, region) = self.0.range(..=address).next_back()?;
        (address < region.start + region.length).then_some(region)
    }

    fn overlaps(&self, start: u64, length: u64) -> bool {
        self.0
            .range(..start + length)
            .next_back()
            .is_some_and(|(s, r)| s + r.length > start)
    }

    /// Whether `[address, address + length)` is pinned for `context`.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it lies partly in a known range: a copy may not cross its border.
    pub fn pinned(&self, address: u64, length: u64, context: u64) -> R<bool> {
        match self.find(address) {
            Some(region) if !region.pinned_for(context) => Ok(false),
            Some(region) if address + length > region.start + region.length => Err(INVALID_VALUE),
            Some(_) => Ok(true),
            None => match self.0.range(address..address.saturating_add(length)).next() {
                Some((_, region)) if region.pinned_for(context) => Err(INVALID_VALUE),
                _ => Ok(false),
            },
        }
    }

    /// Notes a registration.
    ///
    /// # Errors
    /// `HOST_MEMORY_ALREADY_REGISTERED` if it overlaps a known range, `INVALID_VALUE` if part of it
    /// is not memory of this process.
    pub fn register(&mut self, region: HostRegion) -> R {
        if region.start == 0
            || region.length == 0
            || region.start.checked_add(region.length).is_none()
        {
            return Err(INVALID_VALUE);
        }
        if self.overlaps(region.start, region.length) {
            return Err(HOST_MEMORY_ALREADY_REGISTERED);
        }
        let page = 4096;
        let first = region.start / page * page;
        let length = (region.start + region.length).next_multiple_of(page) - first;
        const READ_ONLY: u32 = 8;
        let advice = if region.flags & READ_ONLY != 0 {
            libc::MADV_POPULATE_READ
        } else {
            libc::MADV_POPULATE_WRITE
        };
        // SAFETY: populating changes no contents, and fails for what is not mapped.
        let populated =
            unsafe { libc::madvise(first as *mut libc::c_void, length as usize, advice) };
        if populated != 0 && std::io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
            return Err(INVALID_VALUE);
        }
        self.0.insert(region.start, region);
        Ok(())
    }

    /// Forgets a registration.
    ///
    /// # Errors
    /// `HOST_MEMORY_NOT_REGISTERED` if no registration starts there.
    pub fn unregister(&mut self, start: u64) -> R {
        match self.0.get(&start) {
            Some(region) if region.kind == Kind::Registered => {
                self.0.remove(&start);
                Ok(())
            }
            _ => Err(HOST_MEMORY_NOT_REGISTERED),
        }
    }

    /// Enters memory of [`pages`].
    pub fn insert(&mut self, region: HostRegion) {
        self.0.insert(region.start, region);
    }

    /// Frees memory of [`pages`].
    ///
    /// # Errors
    /// `INVALID_VALUE` if no such allocation starts there.
    pub fn free(&mut self, start: u64, managed: bool) -> R {
        let kind = if managed {
            Kind::Managed
        } else {
            Kind::Allocated
        };
        if self.0.get(&start).is_none_or(|region| region.kind != kind) {
            return Err(INVALID_VALUE);
        }
        if let Some(region) = self.0.remove(&start) {
            // SAFETY: exactly the mapping that `pages` left.
            unsafe {
                libc::munmap(
                    start as *mut libc::c_void,
                    (region.length as usize).next_multiple_of(4096),
                )
            };
        }
        Ok(())
    }

    /// Frees and forgets all that `context` owns.
    pub fn drop_context(&mut self, context: u64) {
        let owned: Vec<(u64, Kind)> = self
            .0
            .values()
            .filter(|r| r.context == context)
            .map(|r| (r.start, r.kind))
            .collect();
        for (start, kind) in owned {
            let _ = match kind {
                Kind::Registered => self.unregister(start),
                Kind::Allocated => self.free(start, false),
                Kind::Managed => self.free(start, true),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, length: u64, flags: u32) -> HostRegion {
        HostRegion {
            start,
            length,
            kind: Kind::Registered,
            flags,
            context: 1,
            gpu: 0,
            id: 0,
            managed: None,
        }
    }

    #[test]
    fn a_copy_may_not_cross_a_registration_border() {
        let mut memory = vec![0_u8; 64 << 10];
        let start = memory.as_mut_ptr() as u64;
        let mut table = HostTable::default();
        table.register(region(start, 4096, PORTABLE)).unwrap();
        table.register(region(start + 4096, 4096, 0)).unwrap();
        assert_eq!(table.pinned(start, 4096, 1), Ok(true));
        assert_eq!(table.pinned(start, 4097, 1), Err(INVALID_VALUE));
        assert_eq!(table.pinned(start + 8192, 100, 1), Ok(false));
        assert_eq!(table.pinned(start - 1, 2, 1), Err(INVALID_VALUE));
        // Another context sees only the portable one.
        assert_eq!(table.pinned(start + 4096, 4096, 2), Ok(false));
        assert_eq!(table.pinned(start, 4096, 2), Ok(true));
        assert_eq!(
            table.register(region(start + 100, 10, 0)),
            Err(HOST_MEMORY_ALREADY_REGISTERED)
        );
        assert_eq!(
            table.unregister(start + 100),
            Err(HOST_MEMORY_NOT_REGISTERED)
        );
        table.unregister(start).unwrap();
        assert_eq!(table.pinned(start, 100, 1), Ok(false));
    }

    #[test]
    fn what_is_not_mapped_cannot_be_registered() {
        let mut table = HostTable::default();
        assert_eq!(table.register(region(4096, 4096, 0)), Err(INVALID_VALUE));
    }
}
