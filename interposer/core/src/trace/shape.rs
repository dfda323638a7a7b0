//! What is recorded of what a call's arguments point to, by their names and types in the table.
//!
//! A pointer's target is read only where the driver is known to have read or written it: single results, after
//! success; names; and a few structures of sizes and handles. Nothing else is touched: a program may pass any
//! word where the driver does not look.

use super::line::Line;
use crate::driver::Status;
use crate::table::{CUipcEventHandle, CUipcMemHandle, CUmemLocation};
use core::ffi::{CStr, c_char, c_void};

/// The most arguments that an entry point has.
const ARGUMENTS: usize = 17;

/// What is recorded of an argument besides its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Word,
    /// The four bytes that the driver wrote.
    Out4,
    /// The eight bytes that the driver wrote.
    Out8,
    /// Four bytes, before and after.
    InOut4,
    /// A name.
    Text,
}

/// The kinds of a call's arguments.
#[derive(Clone, Copy, Debug)]
pub struct Shape([Kind; ARGUMENTS]);

/// Arguments of a result's type that are lists, or are read too.
const LISTS: &[&str] = &[
    "attributes",
    "attrsIdxs",
    "capabilities",
    "data",
    "dataSizes",
    "dependencies",
    "dependentNodes",
    "dptrs",
    "dsts",
    "extra",
    "from",
    "functions",
    "iterator",
    "jitOptions",
    "jitOptionsValues",
    "kernelParams",
    "kernels",
    "libraryOptionValues",
    "libraryOptions",
    "nbGroups",
    "nodes",
    "optionValues",
    "options",
    "pBorderColor",
    "prefetchLocIdxs",
    "resources",
    "rootNodes",
    "size",
    "sizes",
    "srcs",
    "to",
    "queryStatus",
];

/// Arguments that are one result each.
const RESULTS: &[&str] = &[
    "ByteOffset",
    "active",
    "baseLeId",
    "bindAlignment",
    "blockSize",
    "bytes",
    "callback",
    "callbackOut",
    "callback_out",
    "canAccessPeer",
    "captureStatus",
    "captureStatus_out",
    "clusterSize",
    "count",
    "ctxId",
    "cubinOut",
    "dev",
    "devPtr",
    "device",
    "deviceNodeMask",
    "dptr",
    "dptr_out",
    "driverVersion",
    "dynamicSmemSize",
    "errorIndex",
    "event_out",
    "extMem_out",
    "extSem_out",
    "failIdx",
    "flags",
    "fptr",
    "free",
    "granularity",
    "graphId",
    "graph_out",
    "greatestPriority",
    "greenCtxId",
    "hErrorNode_out",
    "handle",
    "hfunc",
    "hmod",
    "id_out",
    "isEnabled",
    "iterator_out",
    "leastPriority",
    "library",
    "major",
    "maxSize",
    "maxWidthInElements",
    "mcHandle",
    "minGridSize",
    "minor",
    "mipmap",
    "module",
    "nodeId",
    "numBlocks",
    "numClusters",
    "numDependencies",
    "numDependencies_out",
    "numDependentNodes",
    "numEdges",
    "numNodes",
    "numRootNodes",
    "object_out",
    "outAllocClass",
    "pArray",
    "pConfig",
    "pContext",
    "pCtx",
    "pDevPtr",
    "pFlags",
    "pFormat",
    "pFunc",
    "pGreenCtx",
    "pHandle",
    "pHandle_out",
    "pKernel",
    "pLevelArray",
    "pLib",
    "pMilliseconds",
    "pMipmappedArray",
    "pMod",
    "pNumChannels",
    "pPitch",
    "pPlaneArray",
    "pSize",
    "pSurfObject",
    "pSurfRef",
    "pTexObject",
    "pTexRef",
    "pam",
    "paramCount",
    "paramOffset",
    "paramSize",
    "pbase",
    "pbias",
    "pconfig",
    "pctx",
    "pdptr",
    "pfm",
    "pfn",
    "phArray",
    "phCtx",
    "phDesc",
    "phErrorNode",
    "phEvent",
    "phGraph",
    "phGraphClone",
    "phGraphExec",
    "phGraphNode",
    "phMipmappedArray",
    "phNode",
    "phStream",
    "pi",
    "pmaxAniso",
    "pmaxMipmapLevelClamp",
    "pminMipmapLevelClamp",
    "pool",
    "pool_out",
    "pp",
    "priority",
    "psize",
    "ptr",
    "ptr_out",
    "pvalue",
    "sizeOut",
    "state",
    "stateOut",
    "streamId",
    "symbolStatus",
    "tid",
    "toolsNodeId",
    "total",
    "type_",
    "updateResult_out",
    "value",
    "version",
];

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

const fn listed(names: &[&str], name: &str) -> bool {
    let mut i = 0;
    while i < names.len() {
        if same(names[i], name) {
            return true;
        }
        i += 1;
    }
    false
}

/// Decided when compiled: a result's type under a name that is on neither list does not compile.
const fn kind(name: &str, pointed: usize, text: bool) -> Kind {
    if text {
        return if same(name, "name") || same(name, "symbol") {
            Kind::Text
        } else {
            Kind::Word
        };
    }
    if pointed == 0 || listed(LISTS, name) {
        return Kind::Word;
    }
    if same(name, "mode") {
        return Kind::InOut4;
    }
    assert!(listed(RESULTS, name), "an argument that is on no list");
    if pointed == 4 { Kind::Out4 } else { Kind::Out8 }
}

/// An argument as a word, and what its type says about what it points to.
pub(super) trait Argument: Copy {
    /// The size of the result behind it; 0: not a result's type.
    const POINTED: usize = 0;
    /// A C string.
    const TEXT: bool = false;
    /// As recorded.
    fn word(self) -> u64;
}

macro_rules! integers {
    ($($type:ty)*) => {
        $(impl Argument for $type {
            #[allow(clippy::cast_lossless, reason = "one macro for all widths")]
            fn word(self) -> u64 {
                self as u64
            }
        })*
    };
}
integers!(u8 u16 u32 u64 usize);

impl Argument for i32 {
    fn word(self) -> u64 {
        u64::from(self.cast_unsigned())
    }
}

impl Argument for f32 {
    fn word(self) -> u64 {
        u64::from(self.to_bits())
    }
}

macro_rules! pointers {
    ($($type:ty: $pointed:expr, $text:expr;)*) => {
        $(impl Argument for $type {
            const POINTED: usize = $pointed;
            const TEXT: bool = $text;
            fn word(self) -> u64 {
                self as usize as u64
            }
        })*
    };
}
pointers! {
    *mut *mut c_void: 8, false;
    *mut u64: 8, false;
    *mut usize: 8, false;
    *mut u32: 4, false;
    *mut i32: 4, false;
    *mut f32: 4, false;
    *const c_char: 0, true;
    *mut c_char: 0, false;
    *mut c_void: 0, false;
    *const c_void: 0, false;
    *const *mut c_void: 0, false;
    *mut *const c_void: 0, false;
    *mut *const c_char: 0, false;
    *mut *const *mut c_void: 0, false;
    *const u32: 0, false;
    *const u64: 0, false;
    *const i32: 0, false;
}

impl Argument for CUmemLocation {
    fn word(self) -> u64 {
        u64::from(self.kind) | u64::from(self.id.cast_unsigned()) << 32
    }
}

impl Argument for CUipcMemHandle {
    /// What it says is another process's.
    fn word(self) -> u64 {
        0
    }
}

impl Argument for CUipcEventHandle {
    /// As above.
    fn word(self) -> u64 {
        0
    }
}

/// An argument as the address that it is.
fn pointer<T>(word: u64) -> *const T {
    core::ptr::with_exposed_provenance(usize::try_from(word).unwrap_or(0))
}

impl Shape {
    /// The shape of a call, from its arguments' names and types.
    pub(super) const fn of(arguments: &[(&str, usize, bool)]) -> Self {
        let mut kinds = [Kind::Word; ARGUMENTS];
        let mut i = 0;
        while i < arguments.len() {
            let (name, pointed, text) = arguments[i];
            kinds[i] = kind(name, pointed, text);
            i += 1;
        }
        Self(kinds)
    }

    /// What an argument that is read and written holds now.
    pub(super) fn read_and_written(&self, words: &[u64]) -> u32 {
        let all = self.0.iter().zip(words);
        let mut found = all.filter(|(kind, word)| **kind == Kind::InOut4 && **word != 0);
        // SAFETY: the driver is about to read it.
        found.next().map_or(0, |(_, &word)| unsafe {
            pointer::<u32>(word).read_unaligned()
        })
    }

    /// Records what the arguments point to.
    pub(super) fn rest(
        &self,
        name: &str,
        words: &[u64],
        status: Status,
        input: u32,
        line: &mut Line,
    ) {
        let pointers = || {
            let all = self.0.iter().zip(words).enumerate();
            all.filter(|(_, (_, word))| **word != 0)
                .map(|(index, (kind, word))| (index, *kind, *word))
        };
        let mut first = true;
        if status.is_success() {
            for (index, kind, word) in pointers() {
                // SAFETY: the driver has written these bytes, or may have: it says that it succeeded.
                let value = unsafe {
                    match kind {
                        Kind::Out4 | Kind::InOut4 => pointer::<u32>(word).read_unaligned().into(),
                        Kind::Out8 => pointer::<u64>(word).read_unaligned(),
                        Kind::Word | Kind::Text => continue,
                    }
                };
                line.output(first, index, value);
                first = false;
            }
        }
        if !first {
            line.end_group();
        }
        for (index, kind, word) in pointers() {
            match kind {
                Kind::InOut4 => line.input(index, input),
                // It has been looked for.
                Kind::Text if status.is_success() || status == Status::NOT_FOUND => {
                    // SAFETY: the driver has read this C string.
                    let text = unsafe { CStr::from_ptr(pointer::<c_char>(word)) };
                    line.text(index, text.to_bytes());
                }
                _ => {}
            }
        }
        if (status.is_success() || status == Status::OUT_OF_MEMORY)
            && let Some((index, bytes)) = structure(name, words)
            && let Some(&word) = words.get(index)
        {
            let mut copy = [0_u64; STRUCTURE / 8];
            let bytes = bytes.min(STRUCTURE);
            if word != 0 {
                // SAFETY: a structure of the driver's headers, which the driver has read.
                unsafe {
                    core::ptr::copy_nonoverlapping(
                        pointer::<u8>(word),
                        copy.as_mut_ptr().cast(),
                        bytes,
                    );
                };
                line.block(index, &copy[..bytes.div_ceil(8)]);
            }
        }
    }
}

/// The most bytes of a structure that are recorded.
const STRUCTURE: usize = 256;

/// The argument that points to a structure of sizes, handles and addresses, and how many bytes that has.
fn structure(name: &str, words: &[u64]) -> Option<(usize, usize)> {
    let word = |index: usize| words.get(index).copied().unwrap_or(0);
    let many = |index, each: usize| usize::try_from(word(index)).map_or(0, |n| n.min(8) * each);
    Some(match name {
        // CUmemAllocationProp
        "cuMemCreate" => (2, 32),
        "cuMemGetAllocationGranularity" => (1, 32),
        // CUmemAccessDesc, a list
        "cuMemSetAccess" => (2, many(3, 12)),
        "cuMemPoolSetAccess" => (1, many(2, 12)),
        // CUmemPoolProps
        "cuMemPoolCreate" => (1, 88),
        // An integer or a cuuint64_t
        "cuMemPoolSetAttribute" => (2, if word(1) <= 3 { 4 } else { 8 }),
        // CUpointer_attribute, a list
        "cuPointerGetAttributes" => (1, many(0, 4)),
        // CUDA_MEMCPY2D, CUDA_MEMCPY3D
        "cuMemcpy2D_v2" | "cuMemcpy2DAsync_v2" | "cuMemcpy2DUnaligned_v2" => (0, 128),
        "cuMemcpy2D_v2_ptds" | "cuMemcpy2DAsync_v2_ptsz" | "cuMemcpy2DUnaligned_v2_ptds" => {
            (0, 128)
        }
        "cuMemcpy3D_v2" | "cuMemcpy3DAsync_v2" => (0, 200),
        "cuMemcpy3D_v2_ptds" | "cuMemcpy3DAsync_v2_ptsz" => (0, 200),
        // CUDA_ARRAY_DESCRIPTOR, CUDA_ARRAY3D_DESCRIPTOR
        "cuArrayCreate_v2" => (1, 24),
        "cuArray3DCreate_v2" | "cuMipmappedArrayCreate" => (1, 40),
        // CUlaunchConfig, without what it points to
        "cuLaunchKernelEx" | "cuLaunchKernelEx_ptsz" => (0, 56),
        // CUDA_MEM_ALLOC_NODE_PARAMS
        "cuGraphAddMemAllocNode" => (4, 120),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_results_are_apart() {
        for name in LISTS {
            assert!(!RESULTS.contains(name), "{name}");
        }
        assert_eq!(kind("dptr", 8, false), Kind::Out8);
        assert_eq!(kind("dptrs", 8, false), Kind::Word);
        assert_eq!(kind("hStream", 0, false), Kind::Word);
        assert_eq!(kind("name", 0, true), Kind::Text);
        assert_eq!(kind("fname", 0, true), Kind::Word);
    }

    #[test]
    fn structures_belong_to_names_of_the_table() {
        let mut found = 0;
        for row in crate::table::ROWS {
            if let Some((_, bytes)) = structure(row.name, &[8; ARGUMENTS]) {
                assert!(bytes <= STRUCTURE);
                found += 1;
            }
        }
        assert_eq!(found, 23, "one row for each name above");
    }
}
