//! Result codes of the driver API, as plain integers: a closed enum could not hold what a newer
//! program passes in. Source: the `CUresult` list of cuda.h 13.

/// What every fallible operation of the simulator returns; the error is a `CUresult`.
pub type R<T = ()> = Result<T, u32>;

pub const SUCCESS: u32 = 0;
pub const INVALID_VALUE: u32 = 1;
pub const OUT_OF_MEMORY: u32 = 2;
pub const NOT_INITIALIZED: u32 = 3;
pub const DEINITIALIZED: u32 = 4;
pub const NO_DEVICE: u32 = 100;
pub const INVALID_DEVICE: u32 = 101;
pub const INVALID_IMAGE: u32 = 200;
pub const INVALID_CONTEXT: u32 = 201;
pub const NO_BINARY_FOR_GPU: u32 = 209;
pub const INVALID_PTX: u32 = 218;
pub const UNSUPPORTED_PTX_VERSION: u32 = 222;
pub const FILE_NOT_FOUND: u32 = 301;
pub const OPERATING_SYSTEM: u32 = 304;
pub const INVALID_HANDLE: u32 = 400;
pub const ILLEGAL_STATE: u32 = 401;
pub const NOT_FOUND: u32 = 500;
pub const NOT_READY: u32 = 600;
pub const ILLEGAL_ADDRESS: u32 = 700;
pub const PEER_ACCESS_ALREADY_ENABLED: u32 = 704;
pub const PEER_ACCESS_NOT_ENABLED: u32 = 705;
pub const PEER_ACCESS_UNSUPPORTED: u32 = 217;
pub const PRIMARY_CONTEXT_ACTIVE: u32 = 708;
pub const CONTEXT_IS_DESTROYED: u32 = 709;
pub const INVALID_RESOURCE_TYPE: u32 = 914;
pub const INVALID_RESOURCE_CONFIGURATION: u32 = 915;
pub const SHARED_OBJECT_INIT_FAILED: u32 = 303;
pub const HOST_MEMORY_ALREADY_REGISTERED: u32 = 712;
pub const HOST_MEMORY_NOT_REGISTERED: u32 = 713;
pub const MISALIGNED_ADDRESS: u32 = 716;
pub const LAUNCH_FAILED: u32 = 719;
pub const LAUNCH_OUT_OF_RESOURCES: u32 = 701;
pub const LAUNCH_TIMEOUT: u32 = 702;
pub const NOT_PERMITTED: u32 = 800;
pub const NOT_SUPPORTED: u32 = 801;
pub const SYSTEM_DRIVER_MISMATCH: u32 = 803;
pub const STREAM_CAPTURE_UNSUPPORTED: u32 = 900;
pub const STREAM_CAPTURE_INVALIDATED: u32 = 901;
pub const STREAM_CAPTURE_MERGE: u32 = 902;
pub const STREAM_CAPTURE_UNMATCHED: u32 = 903;
pub const STREAM_CAPTURE_UNJOINED: u32 = 904;
pub const STREAM_CAPTURE_ISOLATION: u32 = 905;
pub const STREAM_CAPTURE_IMPLICIT: u32 = 906;
pub const CAPTURED_EVENT: u32 = 907;
pub const STREAM_CAPTURE_WRONG_THREAD: u32 = 908;
pub const UNSUPPORTED_LIMIT: u32 = 215;
pub const TIMEOUT: u32 = 909;
pub const UNKNOWN: u32 = 999;

/// `(code, name, description)`; names and descriptions end in NUL because C callers get them.
const TABLE: &[(u32, &str, &str)] = &[
    (0, "CUDA_SUCCESS\0", "no error\0"),
    (1, "CUDA_ERROR_INVALID_VALUE\0", "invalid argument\0"),
    (2, "CUDA_ERROR_OUT_OF_MEMORY\0", "out of memory\0"),
    (3, "CUDA_ERROR_NOT_INITIALIZED\0", "initialization error\0"),
    (4, "CUDA_ERROR_DEINITIALIZED\0", "deinitialized\0"),
    (5, "CUDA_ERROR_PROFILER_DISABLED\0", "profiler disabled\0"),
    (
        6,
        "CUDA_ERROR_PROFILER_NOT_INITIALIZED\0",
        "profiler not initialized\0",
    ),
    (
        7,
        "CUDA_ERROR_PROFILER_ALREADY_STARTED\0",
        "profiler already started\0",
    ),
    (
        8,
        "CUDA_ERROR_PROFILER_ALREADY_STOPPED\0",
        "profiler already stopped\0",
    ),
    (34, "CUDA_ERROR_STUB_LIBRARY\0", "stub library\0"),
    (
        36,
        "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER\0",
        "call requires newer driver\0",
    ),
    (
        46,
        "CUDA_ERROR_DEVICE_UNAVAILABLE\0",
        "device unavailable\0",
    ),
    (
        47,
        "CUDA_ERROR_MULTICAST_RESOURCE_FULL\0",
        "multicast resource full\0",
    ),
    (
        100,
        "CUDA_ERROR_NO_DEVICE\0",
        "no CUDA-capable device is detected\0",
    ),
    (
        101,
        "CUDA_ERROR_INVALID_DEVICE\0",
        "invalid device ordinal\0",
    ),
    (
        102,
        "CUDA_ERROR_DEVICE_NOT_LICENSED\0",
        "device not licensed\0",
    ),
    (200, "CUDA_ERROR_INVALID_IMAGE\0", "invalid image\0"),
    (
        201,
        "CUDA_ERROR_INVALID_CONTEXT\0",
        "invalid device context\0",
    ),
    (
        202,
        "CUDA_ERROR_CONTEXT_ALREADY_CURRENT\0",
        "context already current\0",
    ),
    (205, "CUDA_ERROR_MAP_FAILED\0", "map failed\0"),
    (206, "CUDA_ERROR_UNMAP_FAILED\0", "unmap failed\0"),
    (207, "CUDA_ERROR_ARRAY_IS_MAPPED\0", "array is mapped\0"),
    (208, "CUDA_ERROR_ALREADY_MAPPED\0", "already mapped\0"),
    (209, "CUDA_ERROR_NO_BINARY_FOR_GPU\0", "no binary for gpu\0"),
    (210, "CUDA_ERROR_ALREADY_ACQUIRED\0", "already acquired\0"),
    (211, "CUDA_ERROR_NOT_MAPPED\0", "not mapped\0"),
    (
        212,
        "CUDA_ERROR_NOT_MAPPED_AS_ARRAY\0",
        "not mapped as array\0",
    ),
    (
        213,
        "CUDA_ERROR_NOT_MAPPED_AS_POINTER\0",
        "not mapped as pointer\0",
    ),
    (214, "CUDA_ERROR_ECC_UNCORRECTABLE\0", "ecc uncorrectable\0"),
    (215, "CUDA_ERROR_UNSUPPORTED_LIMIT\0", "unsupported limit\0"),
    (
        216,
        "CUDA_ERROR_CONTEXT_ALREADY_IN_USE\0",
        "context already in use\0",
    ),
    (
        217,
        "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED\0",
        "peer access unsupported\0",
    ),
    (218, "CUDA_ERROR_INVALID_PTX\0", "invalid ptx\0"),
    (
        219,
        "CUDA_ERROR_INVALID_GRAPHICS_CONTEXT\0",
        "invalid graphics context\0",
    ),
    (
        220,
        "CUDA_ERROR_NVLINK_UNCORRECTABLE\0",
        "nvlink uncorrectable\0",
    ),
    (
        221,
        "CUDA_ERROR_JIT_COMPILER_NOT_FOUND\0",
        "jit compiler not found\0",
    ),
    (
        222,
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION\0",
        "unsupported ptx version\0",
    ),
    (
        223,
        "CUDA_ERROR_JIT_COMPILATION_DISABLED\0",
        "jit compilation disabled\0",
    ),
    (
        224,
        "CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY\0",
        "unsupported exec affinity\0",
    ),
    (
        225,
        "CUDA_ERROR_UNSUPPORTED_DEVSIDE_SYNC\0",
        "unsupported devside sync\0",
    ),
    (226, "CUDA_ERROR_CONTAINED\0", "contained\0"),
    (
        227,
        "CUDA_ERROR_INSUFFICIENT_LOADER_VERSION\0",
        "insufficient loader version\0",
    ),
    (300, "CUDA_ERROR_INVALID_SOURCE\0", "invalid source\0"),
    (301, "CUDA_ERROR_FILE_NOT_FOUND\0", "file not found\0"),
    (
        302,
        "CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND\0",
        "shared object symbol not found\0",
    ),
    (
        303,
        "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED\0",
        "shared object init failed\0",
    ),
    (304, "CUDA_ERROR_OPERATING_SYSTEM\0", "operating system\0"),
    (
        400,
        "CUDA_ERROR_INVALID_HANDLE\0",
        "invalid resource handle\0",
    ),
    (401, "CUDA_ERROR_ILLEGAL_STATE\0", "illegal state\0"),
    (402, "CUDA_ERROR_LOSSY_QUERY\0", "lossy query\0"),
    (500, "CUDA_ERROR_NOT_FOUND\0", "named symbol not found\0"),
    (600, "CUDA_ERROR_NOT_READY\0", "device not ready\0"),
    (
        700,
        "CUDA_ERROR_ILLEGAL_ADDRESS\0",
        "an illegal memory access was encountered\0",
    ),
    (
        701,
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES\0",
        "launch out of resources\0",
    ),
    (702, "CUDA_ERROR_LAUNCH_TIMEOUT\0", "launch timeout\0"),
    (
        703,
        "CUDA_ERROR_LAUNCH_INCOMPATIBLE_TEXTURING\0",
        "launch incompatible texturing\0",
    ),
    (
        704,
        "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED\0",
        "peer access already enabled\0",
    ),
    (
        705,
        "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED\0",
        "peer access not enabled\0",
    ),
    (
        708,
        "CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE\0",
        "primary context active\0",
    ),
    (
        709,
        "CUDA_ERROR_CONTEXT_IS_DESTROYED\0",
        "context is destroyed\0",
    ),
    (710, "CUDA_ERROR_ASSERT\0", "assert\0"),
    (711, "CUDA_ERROR_TOO_MANY_PEERS\0", "too many peers\0"),
    (
        712,
        "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED\0",
        "host memory already registered\0",
    ),
    (
        713,
        "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED\0",
        "host memory not registered\0",
    ),
    (
        714,
        "CUDA_ERROR_HARDWARE_STACK_ERROR\0",
        "hardware stack error\0",
    ),
    (
        715,
        "CUDA_ERROR_ILLEGAL_INSTRUCTION\0",
        "illegal instruction\0",
    ),
    (
        716,
        "CUDA_ERROR_MISALIGNED_ADDRESS\0",
        "misaligned address\0",
    ),
    (
        717,
        "CUDA_ERROR_INVALID_ADDRESS_SPACE\0",
        "invalid address space\0",
    ),
    (718, "CUDA_ERROR_INVALID_PC\0", "invalid pc\0"),
    (719, "CUDA_ERROR_LAUNCH_FAILED\0", "launch failed\0"),
    (
        720,
        "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE\0",
        "cooperative launch too large\0",
    ),
    (
        721,
        "CUDA_ERROR_TENSOR_MEMORY_LEAK\0",
        "tensor memory leak\0",
    ),
    (
        800,
        "CUDA_ERROR_NOT_PERMITTED\0",
        "operation not permitted\0",
    ),
    (
        801,
        "CUDA_ERROR_NOT_SUPPORTED\0",
        "operation not supported\0",
    ),
    (802, "CUDA_ERROR_SYSTEM_NOT_READY\0", "system not ready\0"),
    (
        803,
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH\0",
        "system driver mismatch\0",
    ),
    (
        804,
        "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE\0",
        "compat not supported on device\0",
    ),
    (
        805,
        "CUDA_ERROR_MPS_CONNECTION_FAILED\0",
        "mps connection failed\0",
    ),
    (806, "CUDA_ERROR_MPS_RPC_FAILURE\0", "mps rpc failure\0"),
    (
        807,
        "CUDA_ERROR_MPS_SERVER_NOT_READY\0",
        "mps server not ready\0",
    ),
    (
        808,
        "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED\0",
        "mps max clients reached\0",
    ),
    (
        809,
        "CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED\0",
        "mps max connections reached\0",
    ),
    (
        810,
        "CUDA_ERROR_MPS_CLIENT_TERMINATED\0",
        "mps client terminated\0",
    ),
    (811, "CUDA_ERROR_CDP_NOT_SUPPORTED\0", "cdp not supported\0"),
    (
        812,
        "CUDA_ERROR_CDP_VERSION_MISMATCH\0",
        "cdp version mismatch\0",
    ),
    (
        900,
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED\0",
        "stream capture unsupported\0",
    ),
    (
        901,
        "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED\0",
        "stream capture invalidated\0",
    ),
    (
        902,
        "CUDA_ERROR_STREAM_CAPTURE_MERGE\0",
        "stream capture merge\0",
    ),
    (
        903,
        "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED\0",
        "stream capture unmatched\0",
    ),
    (
        904,
        "CUDA_ERROR_STREAM_CAPTURE_UNJOINED\0",
        "stream capture unjoined\0",
    ),
    (
        905,
        "CUDA_ERROR_STREAM_CAPTURE_ISOLATION\0",
        "stream capture isolation\0",
    ),
    (
        906,
        "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT\0",
        "stream capture implicit\0",
    ),
    (907, "CUDA_ERROR_CAPTURED_EVENT\0", "captured event\0"),
    (
        908,
        "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD\0",
        "stream capture wrong thread\0",
    ),
    (909, "CUDA_ERROR_TIMEOUT\0", "timeout\0"),
    (
        910,
        "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE\0",
        "graph exec update failure\0",
    ),
    (911, "CUDA_ERROR_EXTERNAL_DEVICE\0", "external device\0"),
    (
        912,
        "CUDA_ERROR_INVALID_CLUSTER_SIZE\0",
        "invalid cluster size\0",
    ),
    (
        913,
        "CUDA_ERROR_FUNCTION_NOT_LOADED\0",
        "function not loaded\0",
    ),
    (
        914,
        "CUDA_ERROR_INVALID_RESOURCE_TYPE\0",
        "invalid resource type\0",
    ),
    (
        915,
        "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION\0",
        "invalid resource configuration\0",
    ),
    (916, "CUDA_ERROR_KEY_ROTATION\0", "key rotation\0"),
    (917, "CUDA_ERROR_STREAM_DETACHED\0", "stream detached\0"),
    (
        918,
        "CUDA_ERROR_GRAPH_RECAPTURE_FAILURE\0",
        "graph recapture failure\0",
    ),
    (919, "CUDA_ERROR_FABRIC_NOT_READY\0", "fabric not ready\0"),
    (999, "CUDA_ERROR_UNKNOWN\0", "unknown error\0"),
];

/// The NUL-terminated name and description of `code`, if it is a known one.
#[must_use]
pub fn lookup(code: u32) -> Option<(&'static str, &'static str)> {
    TABLE
        .iter()
        .find(|row| row.0 == code)
        .map(|row| (row.1, row.2))
}
