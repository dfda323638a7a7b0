//! Every public name that is not implemented.

include!(concat!(env!("OUT_DIR"), "/stubs.rs"));
