//! The driver's private tables, by which a library may submit work that no hook sees.
//!
//! They pass through. A table that the CUDA runtime asks for in every program carries start-up, storage and
//! context queries only; any other makes the process unswappable, with an event that says so.
//! Identifiers are facts of the driver, as public projects that trace it list them; which library has which is
//! seen by looking for their bytes in it.

use spillway_protocol::page::unswappable;

use super::limited;

/// What libcudart asks for: its own interface, the tools' callback hooks and thread storage, context
/// storage and queries, and its checks.
const RUNTIME: [u128; 8] = [
    // Asked for first, before cuInit, by libcudart 12 and 13, and so by whatever has that built in.
    0xf8cf_f951_2146_8b4e_b9e2_fb46_9e7c_0dd9,
    // Queries about contexts (a context's number, which cuCtxGetId tells, too): cuBLAS, and libcudart from 13.4 on.
    0x2131_8c60_9714_3248_8ca6_41ff_7324_c8f2,
    0x6bd5_fb6c_5bf4_e74a_8987_d939_12fd_9df9,
    0xa094_798c_2e74_2e74_93f2_0800_200c_0a66,
    0x42d8_5a81_23f6_cb47_8298_f6e7_8a3a_ecdc,
    0xc693_336e_1121_df11_a8c3_68f3_55d8_9593,
    0xd408_2055_bde6_704b_8d34_ba12_3c66_e1f2,
    0x263e_8860_7cd2_6143_92f6_bbd5_006d_fa7e,
];

/// A table was handed out to the program.
pub(super) fn handed_out(id: &[u8; 16]) {
    let id = u128::from_be_bytes(*id);
    if is_runtimes(id) {
        return;
    }
    if let Some(runtime) = limited() {
        let text = format!(
            "not swappable: a library asked for the private driver table {id:032x}, through which it \
             could submit work unseen"
        );
        runtime.unswappable(unswappable::EXPORT_TABLE, &text);
    }
}

fn is_runtimes(id: u128) -> bool {
    RUNTIME.contains(&id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_program_asks_for_does_not_pin_it() {
        // As libcudart and cuBLAS hand them over: sixteen bytes, in the order in which they are written.
        let first = *b"\xf8\xcf\xf9\x51\x21\x46\x8b\x4e\xb9\xe2\xfb\x46\x9e\x7c\x0d\xd9";
        let contexts = *b"\x21\x31\x8c\x60\x97\x14\x32\x48\x8c\xa6\x41\xff\x73\x24\xc8\xf2";
        assert!(is_runtimes(u128::from_be_bytes(first)));
        assert!(is_runtimes(u128::from_be_bytes(contexts)));
        assert!(!is_runtimes(0));
    }
}
