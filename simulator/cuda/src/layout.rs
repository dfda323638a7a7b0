//! The C structures of the API, as far as they are read. Enums are raw integers: what another
//! header put there must not become an invalid value here.

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy2d {
    pub source: Side2d,
    pub target: Side2d,
    pub width: usize,
    pub height: usize,
}

/// One half of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Side2d {
    pub x: usize,
    pub y: usize,
    pub kind: u32,
    pub host: u64,
    pub device: u64,
    pub array: u64,
    pub pitch: usize,
}

/// `CUDA_MEMCPY3D` and `CUDA_MEMCPY3D_PEER`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy3d {
    pub source: Side3d,
    pub target: Side3d,
    pub width: usize,
    pub height: usize,
    pub depth: usize,
}

/// One half of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Side3d {
    pub x: usize,
    pub y: usize,
    pub z: usize,
    pub lod: usize,
    pub kind: u32,
    pub host: u64,
    pub device: u64,
    pub array: u64,
    pub context: u64,
    pub pitch: usize,
    pub height: usize,
}

/// `CUmemorytype`.
pub const HOST: u32 = 1;
pub const DEVICE: u32 = 2;
pub const ARRAY: u32 = 3;
pub const UNIFIED: u32 = 4;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    pub kind: u32,
    pub id: i32,
}

/// `CU_MEM_LOCATION_TYPE_DEVICE`.
pub const LOCATION_DEVICE: u32 = 1;

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub const POSIX_FD: u32 = 1;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AllocationProperties {
    pub kind: u32,
    pub handle_types: u32,
    pub location: Location,
    pub windows: u64,
    pub flags: [u8; 8],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AccessDescriptor {
    pub location: Location,
    pub flags: u32,
}

/// `CUmemPoolProps`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PoolProperties {
    pub kind: u32,
    pub handle_types: u32,
    pub location: Location,
    pub windows: u64,
    pub max_bytes: usize,
    pub rest: [u8; 56],
}

/// `CUmulticastObjectProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MulticastProperties {
    pub devices: u32,
    pub bytes: usize,
    pub handle_types: u64,
    pub flags: u64,
}

/// `CUDA_EXTERNAL_MEMORY_HANDLE_DESC`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ExternalMemory {
    pub kind: u32,
    pub handle: [u64; 2],
    pub bytes: u64,
    pub flags: u32,
    pub reserved: [u32; 16],
}

/// `CUDA_EXTERNAL_MEMORY_BUFFER_DESC`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ExternalBuffer {
    pub offset: u64,
    pub bytes: u64,
    pub flags: u32,
    pub reserved: [u32; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LaunchConfig {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub stream: u64,
    pub attributes: u64,
    pub attribute_count: u32,
}

/// `CUDA_KERNEL_NODE_PARAMS` (without the last two fields) and its second version.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KernelNode {
    pub function: u64,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub params: u64,
    pub extra: u64,
}

/// The second version.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KernelNode2 {
    pub first: KernelNode,
    pub kernel: u64,
    pub context: u64,
}

/// `CUDA_MEMSET_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MemsetNode {
    pub target: u64,
    pub pitch: usize,
    pub value: u32,
    pub element: u32,
    pub width: usize,
    pub height: usize,
}

/// `CUDA_HOST_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HostNode {
    pub function: Option<extern "C" fn(*mut std::ffi::c_void)>,
    pub data: u64,
}

/// `CUDA_MEM_ALLOC_NODE_PARAMS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AllocNode {
    pub pool: PoolProperties,
    pub access: u64,
    pub access_count: usize,
    pub bytes: usize,
    pub address: u64,
}

/// `CUgraphNodeParams`: the kind of a node and its structure.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NodeParams {
    pub kind: u32,
    pub reserved: [u32; 3],
    pub rest: [u64; 30],
}

/// `CUDA_ARRAY_DESCRIPTOR`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ArrayDescriptor {
    pub width: usize,
    pub height: usize,
    pub format: u32,
    pub channels: u32,
}

/// `CUDA_ARRAY3D_DESCRIPTOR`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Array3dDescriptor {
    pub width: usize,
    pub height: usize,
    pub depth: usize,
    pub format: u32,
    pub channels: u32,
    pub flags: u32,
}

/// `CUDA_ARRAY_MEMORY_REQUIREMENTS`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MemoryRequirements {
    pub bytes: usize,
    pub alignment: usize,
    pub reserved: [u32; 4],
}

/// `CUDA_ARRAY_SPARSE_PROPERTIES`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SparseProperties {
    pub tile: [u32; 3],
    pub tail_first: u32,
    pub tail_bytes: u64,
    pub flags: u32,
    pub reserved: [u32; 4],
}

/// `CUarrayMapInfo`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ArrayMapping {
    pub kind: u32,
    pub resource: u64,
    pub part_kind: u32,
    /// A union: a range of a level, or of the mip tail.
    pub part: [u64; 4],
    pub operation: u32,
    pub handle_kind: u32,
    pub memory: u64,
    pub offset: u64,
    pub devices: u32,
    pub flags: u32,
    pub reserved: [u32; 2],
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::driver::sys;
    use std::mem::{offset_of, size_of};

    #[test]
    fn sizes_are_those_of_the_header() {
        assert_eq!(size_of::<Copy2d>(), size_of::<sys::CUDA_MEMCPY2D_st>());
        assert_eq!(size_of::<Copy3d>(), size_of::<sys::CUDA_MEMCPY3D_st>());
        assert_eq!(size_of::<Copy3d>(), size_of::<sys::CUDA_MEMCPY3D_PEER_st>());
        assert_eq!(
            size_of::<AllocationProperties>(),
            size_of::<sys::CUmemAllocationProp_st>()
        );
        assert_eq!(
            size_of::<AccessDescriptor>(),
            size_of::<sys::CUmemAccessDesc_st>()
        );
        assert_eq!(
            size_of::<PoolProperties>(),
            size_of::<sys::CUmemPoolProps_st>()
        );
        assert_eq!(
            size_of::<MemoryRequirements>(),
            size_of::<sys::CUDA_ARRAY_MEMORY_REQUIREMENTS_st>()
        );
        assert_eq!(
            size_of::<SparseProperties>(),
            size_of::<sys::CUDA_ARRAY_SPARSE_PROPERTIES_st>()
        );
        assert_eq!(
            size_of::<ArrayMapping>(),
            size_of::<sys::CUarrayMapInfo_st>()
        );
        assert_eq!(
            size_of::<MulticastProperties>(),
            size_of::<sys::CUmulticastObjectProp_st>()
        );
        assert_eq!(
            size_of::<ExternalMemory>(),
            size_of::<sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC_st>()
        );
        assert_eq!(
            size_of::<ExternalBuffer>(),
            size_of::<sys::CUDA_EXTERNAL_MEMORY_BUFFER_DESC_st>()
        );
        assert_eq!(
            size_of::<LaunchConfig>(),
            size_of::<sys::CUlaunchConfig_st>()
        );
        assert_eq!(
            size_of::<KernelNode>(),
            size_of::<sys::CUDA_KERNEL_NODE_PARAMS_st>()
        );
        assert_eq!(
            size_of::<KernelNode2>(),
            size_of::<sys::CUDA_KERNEL_NODE_PARAMS_v2_st>()
        );
        assert_eq!(
            size_of::<MemsetNode>(),
            size_of::<sys::CUDA_MEMSET_NODE_PARAMS_st>()
        );
        assert_eq!(
            size_of::<HostNode>(),
            size_of::<sys::CUDA_HOST_NODE_PARAMS_st>()
        );
        assert_eq!(
            size_of::<AllocNode>(),
            size_of::<sys::CUDA_MEM_ALLOC_NODE_PARAMS_v2_st>()
        );
        assert_eq!(
            size_of::<NodeParams>(),
            size_of::<sys::CUgraphNodeParams_st>()
        );
        assert_eq!(
            size_of::<ArrayDescriptor>(),
            size_of::<sys::CUDA_ARRAY_DESCRIPTOR_st>()
        );
        assert_eq!(
            size_of::<Array3dDescriptor>(),
            size_of::<sys::CUDA_ARRAY3D_DESCRIPTOR_st>()
        );
    }

    #[test]
    fn fields_are_where_the_header_has_them() {
        assert_eq!(
            offset_of!(Copy2d, target),
            offset_of!(sys::CUDA_MEMCPY2D_st, dstXInBytes)
        );
        assert_eq!(
            offset_of!(Copy3d, target),
            offset_of!(sys::CUDA_MEMCPY3D_st, dstXInBytes)
        );
        assert_eq!(
            offset_of!(Copy3d, width),
            offset_of!(sys::CUDA_MEMCPY3D_st, WidthInBytes)
        );
        assert_eq!(
            offset_of!(AllocationProperties, flags),
            offset_of!(sys::CUmemAllocationProp_st, allocFlags)
        );
        assert_eq!(
            offset_of!(LaunchConfig, stream),
            offset_of!(sys::CUlaunchConfig_st, hStream)
        );
        assert_eq!(
            offset_of!(KernelNode, params),
            offset_of!(sys::CUDA_KERNEL_NODE_PARAMS_st, kernelParams)
        );
        assert_eq!(
            offset_of!(ArrayMapping, operation),
            offset_of!(sys::CUarrayMapInfo_st, memOperationType)
        );
        assert_eq!(
            offset_of!(MemsetNode, width),
            offset_of!(sys::CUDA_MEMSET_NODE_PARAMS_st, width)
        );
    }
}
