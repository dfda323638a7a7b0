//! Entry points of libcuda that are declared beside cuda.h: for OpenGL, EGL, VDPAU and profilers.
//!
//! They pass through, are no unknown entry points, and strict mode does not refuse them: none allocates device
//! memory or submits work of its own. What they map belongs to the other interface, which this library does not
//! charge. libcudart asks for all of them in every program.
//! Source: cudaGL.h, cudaEGL.h, cudaVDPAU.h, cudaProfiler.h of CUDA 13.0.

/// Sorted, without `_ptds` and `_ptsz`.
const NAMES: [&[u8]; 35] = [
    b"cuEGLStreamConsumerAcquireFrame",
    b"cuEGLStreamConsumerConnect",
    b"cuEGLStreamConsumerConnectWithFlags",
    b"cuEGLStreamConsumerDisconnect",
    b"cuEGLStreamConsumerReleaseFrame",
    b"cuEGLStreamProducerConnect",
    b"cuEGLStreamProducerDisconnect",
    b"cuEGLStreamProducerPresentFrame",
    b"cuEGLStreamProducerReturnFrame",
    b"cuGLCtxCreate",
    b"cuGLCtxCreate_v2",
    b"cuGLGetDevices",
    b"cuGLGetDevices_v2",
    b"cuGLInit",
    b"cuGLMapBufferObject",
    b"cuGLMapBufferObjectAsync",
    b"cuGLMapBufferObjectAsync_v2",
    b"cuGLMapBufferObject_v2",
    b"cuGLRegisterBufferObject",
    b"cuGLSetBufferObjectMapFlags",
    b"cuGLUnmapBufferObject",
    b"cuGLUnmapBufferObjectAsync",
    b"cuGLUnregisterBufferObject",
    b"cuGraphicsEGLRegisterImage",
    b"cuGraphicsGLRegisterBuffer",
    b"cuGraphicsGLRegisterImage",
    b"cuGraphicsResourceGetMappedEglFrame",
    b"cuGraphicsVDPAURegisterOutputSurface",
    b"cuGraphicsVDPAURegisterVideoSurface",
    b"cuProfilerInitialize",
    b"cuProfilerStart",
    b"cuProfilerStop",
    b"cuVDPAUCtxCreate",
    b"cuVDPAUCtxCreate_v2",
    b"cuVDPAUGetDevice",
];

/// Whether a name is one of these.
#[must_use]
pub fn is_interop(name: &[u8]) -> bool {
    let base = name
        .strip_suffix(b"_ptds")
        .or_else(|| name.strip_suffix(b"_ptsz"))
        .unwrap_or(name);
    NAMES.binary_search(&base).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_sorted_and_none_has_a_row() {
        assert!(NAMES.is_sorted());
        for name in NAMES {
            let name = std::str::from_utf8(name).expect("ASCII");
            assert!(is_interop(name.as_bytes()), "{name}");
            assert!(crate::table::ROWS.iter().all(|row| row.name != name));
        }
        assert!(is_interop(b"cuGLMapBufferObject_v2_ptds"));
        assert!(!is_interop(b"cuMemAlloc_v2"));
    }
}
