//! The driver's private tables, by which a library may submit work that no hook sees.
//!
//! They pass through. A table that the CUDA runtime asks for in every program carries start-up and
//! storage functions only; any other makes the process unswappable, with an event that says so.
//! Identifiers are facts of the driver, as public projects that trace it list them.

use spillway_protocol::page::unswappable;

use super::limited;

/// What libcudart asks for: its own interface, the tools' callback hooks and thread storage, context
/// storage, and its checks.
const RUNTIME: [u128; 7] = [
    // Asked for first, before cuInit, by libcudart 12 and 13, and so by whatever has that built in (cuBLAS).
    0xf8cf_f951_2146_8b4e_b9e2_fb46_9e7c_0dd9,
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
    if RUNTIME.contains(&id) {
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
