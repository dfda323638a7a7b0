//! An entry point that no header has.
//!
//! Every driver may be newer than the tools that watch it: what they do with a name that they do not know
//! is tried with this one. It is exported and does nothing; `cuGetProcAddress` does not know it.

/// Answers NOT_SUPPORTED.
#[unsafe(no_mangle)]
extern "C" fn cuSimulatedNewcomer() -> u32 {
    crate::abi::unsupported("cuSimulatedNewcomer", 0)
}
