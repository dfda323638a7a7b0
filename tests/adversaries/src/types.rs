//! The C structures that the adversaries pass, laid out as in the driver's header; enums are raw integers.

use std::ffi::c_void;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Location {
    pub kind: u32,
    pub id: i32,
}

/// `CU_MEM_LOCATION_TYPE_*`.
pub const DEVICE: u32 = 1;
pub const HOST: u32 = 2;
pub const HOST_NUMA: u32 = 3;

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub const POSIX_FD: u32 = 1;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AllocationProperties {
    pub kind: u32,
    pub handle_types: u32,
    pub location: Location,
    pub windows: usize,
    pub flags: [u8; 8],
}

impl AllocationProperties {
    /// Pinned memory of a device.
    pub fn device(device: i32, handle_types: u32) -> Self {
        Self {
            kind: 1,
            handle_types,
            location: Location {
                kind: DEVICE,
                id: device,
            },
            ..Self::default()
        }
    }
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AccessDescriptor {
    pub location: Location,
    pub flags: u32,
}

impl AccessDescriptor {
    /// Reading and writing by a device.
    pub fn device(device: i32) -> Self {
        Self {
            location: Location {
                kind: DEVICE,
                id: device,
            },
            flags: 3,
        }
    }
}

/// `CUmemPoolProps`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PoolProperties {
    pub kind: u32,
    pub handle_types: u32,
    pub location: Location,
    pub windows: usize,
    /// 0: no limit of its own.
    pub most: usize,
    pub usage: u16,
    pub reserved: [u8; 54],
}

impl PoolProperties {
    /// A pool of a device's memory.
    pub fn device(device: i32, handle_types: u32) -> Self {
        Self {
            kind: 1,
            handle_types,
            location: Location {
                kind: DEVICE,
                id: device,
            },
            windows: 0,
            most: 0,
            usage: 0,
            reserved: [0; 54],
        }
    }
}

/// `CU_MEMPOOL_ATTR_*`.
pub const POOL_RELEASE_THRESHOLD: u32 = 4;
pub const POOL_RESERVED: u32 = 5;

/// `CUmemPoolPtrExportData`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PoolShare(pub [u8; 64]);

/// `CUDA_MEM_ALLOC_NODE_PARAMS`.
#[repr(C)]
pub struct MemAllocNode {
    pub pool: PoolProperties,
    pub access: *const AccessDescriptor,
    pub access_count: usize,
    pub bytes: usize,
    pub at: u64,
}

/// `CUDA_ARRAY_DESCRIPTOR`, and what it was before version 3.2.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Array2 {
    pub width: usize,
    pub height: usize,
    pub format: u32,
    pub channels: u32,
}

/// The old one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ArrayOld {
    pub width: u32,
    pub height: u32,
    pub format: u32,
    pub channels: u32,
}

/// `CUDA_ARRAY3D_DESCRIPTOR`, and what it was before version 3.2.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Array3 {
    pub width: usize,
    pub height: usize,
    pub depth: usize,
    pub format: u32,
    pub channels: u32,
    pub flags: u32,
}

/// The old one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Array3Old {
    pub width: u32,
    pub height: u32,
    pub depth: u32,
    pub format: u32,
    pub channels: u32,
    pub flags: u32,
}

/// `CUDA_ARRAY3D_LAYERED`, `CUDA_ARRAY3D_CUBEMAP`.
pub const LAYERED: u32 = 1;
pub const CUBEMAP: u32 = 4;

/// `CUmulticastObjectProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Multicast {
    pub devices: u32,
    pub bytes: usize,
    pub handle_types: u64,
    pub flags: u64,
}

/// `CUipcMemHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcHandle(pub [u8; 64]);

/// `CUDA_EXTERNAL_MEMORY_HANDLE_DESC`, for a descriptor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ExternalMemory {
    pub kind: u32,
    /// The union's other members are pointers, so it lies at 8.
    pub padding: u32,
    pub descriptor: i32,
    /// The rest of a union of 16 bytes.
    pub rest: [i32; 3],
    pub bytes: u64,
    pub flags: u32,
    pub reserved: [u32; 16],
}

/// `CUDA_EXTERNAL_MEMORY_BUFFER_DESC`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ExternalBuffer {
    pub offset: u64,
    pub bytes: u64,
    pub flags: u32,
    pub reserved: [u32; 16],
}

/// Room for a `CUdevResource` of any version so far.
#[repr(C, align(8))]
pub struct DeviceResource(pub [u8; 256]);

/// What the driver's pointers to nothing are.
pub const NOTHING: *const c_void = std::ptr::null();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_header() {
        assert_eq!(size_of::<AllocationProperties>(), 32);
        assert_eq!(size_of::<PoolProperties>(), 88);
        assert_eq!(size_of::<MemAllocNode>(), 120);
        assert_eq!(size_of::<Array2>(), 24);
        assert_eq!(size_of::<Array3>(), 40);
        assert_eq!(size_of::<Multicast>(), 32);
        assert_eq!(size_of::<ExternalMemory>(), 104);
        assert_eq!(size_of::<ExternalBuffer>(), 88);
    }
}
