//! What the snapshot holds. A change of anything here is a new [`VERSION`].

/// First word of the memory: `SPWYsnap`.
pub const MAGIC: u64 = u64::from_le_bytes(*b"SPWYsnap");
/// Version of this layout.
pub const VERSION: u32 = 1;
/// Devices that fit.
pub const MAX_DEVICES: usize = 16;
/// Workloads that fit; `workloads_total` tells whether there are more.
pub const MAX_WORKLOADS: usize = 128;
/// The last decisions that are kept.
pub const MAX_DECISIONS: usize = 64;
/// What stands for "not known".
pub const UNKNOWN: u64 = u64::MAX;

/// States of a workload.
pub const STATES: [(&str, u32); 5] = [
    ("resident", 0),
    ("evicting", 1),
    ("evicted", 2),
    ("restoring", 3),
    ("waiting", 4),
];

/// How a field is written in C.
pub trait CType {
    /// The declaration of a field with this name.
    fn declare(field: &str) -> String;
}

macro_rules! plain {
    ($($rust:ty => $c:literal),+) => {
        $(impl CType for $rust {
            fn declare(field: &str) -> String {
                format!(concat!($c, " {}"), field)
            }
        })+
    };
}

plain!(u64 => "uint64_t", u32 => "uint32_t", i32 => "int32_t", u8 => "char");

impl<T: CType, const N: usize> CType for [T; N] {
    fn declare(field: &str) -> String {
        T::declare(&format!("{field}[{N}]"))
    }
}

/// A structure of the header.
pub struct CStruct {
    /// Name in C, without `struct`.
    pub name: &'static str,
    /// What it is.
    pub doc: &'static [&'static str],
    /// Declaration and comment of each field, its name and its offset.
    pub fields: Vec<(String, &'static str, &'static str, usize)>,
    /// Its size in bytes.
    pub size: usize,
}

macro_rules! structures {
    ($($(#[doc = $doc:literal])+ $name:ident as $c:literal { $($(#[doc = $about:literal])+ $field:ident: $type:ty,)+ })+) => {
        $(
            $(#[doc = $doc])+
            #[derive(Clone, Copy)]
            #[repr(C)]
            pub struct $name { $($(#[doc = $about])+ pub $field: $type,)+ }

            impl CType for $name {
                fn declare(field: &str) -> String {
                    format!(concat!("struct ", $c, " {}"), field)
                }
            }

            impl $name {
                /// Nothing but zeros.
                #[must_use]
                pub fn zeroed() -> Box<Self> {
                    // SAFETY: integers and arrays of them, for which zero is valid; the layout is
                    // that of the type and its size is not zero.
                    unsafe {
                        let layout = std::alloc::Layout::new::<Self>();
                        let at = std::alloc::alloc_zeroed(layout).cast::<Self>();
                        if at.is_null() {
                            std::alloc::handle_alloc_error(layout);
                        }
                        Box::from_raw(at)
                    }
                }
            }
        )+

        /// All structures, each after those that it contains.
        #[must_use]
        pub fn structures() -> Vec<CStruct> {
            vec![$(CStruct {
                name: $c,
                doc: &[$($doc),+],
                fields: vec![$((
                    <$type as CType>::declare(stringify!($field)),
                    concat!($($about),+),
                    stringify!($field),
                    std::mem::offset_of!($name, $field),
                )),+],
                size: size_of::<$name>(),
            }),+]
        }
    };
}

structures! {
    /// One device.
    Device as "spillway_device" {
        /// As cuDeviceGetUuid_v2 tells it.
        uuid: [u8; 16],
        /// Product name, ended by a zero.
        name: [u8; 64],
        /// Bytes that are shared out.
        capacity_bytes: u64,
        /// The part of them that is never granted.
        reserve_bytes: u64,
        /// capacity_bytes - reserve_bytes.
        room_bytes: u64,
        /// Physical bytes set aside for workloads.
        granted_bytes: u64,
        /// room_bytes - granted_bytes, at least 0.
        free_bytes: u64,
        /// Bytes in use as NVML shows it, or SPILLWAY_UNKNOWN.
        nvml_used_bytes: u64,
    }

    /// A workload's share of one device.
    Share as "spillway_share" {
        /// Guaranteed bytes.
        request_bytes: u64,
        /// Most bytes; 0: the workload does not use this device.
        limit_bytes: u64,
        /// Bytes used, resident or not, overhead included.
        used_bytes: u64,
        /// Physical bytes on the device now, overhead included.
        resident_bytes: u64,
        /// The part of used_bytes that cannot be moved, without overhead.
        pinned_bytes: u64,
        /// Contexts, modules, code.
        overhead_bytes: u64,
    }

    /// One workload.
    Workload as "spillway_workload" {
        /// Ended by a zero.
        name: [u8; 136],
        /// What it waits for; empty: nothing. Ended by a zero.
        waiting_for: [u8; 256],
        /// Why it cannot be swapped; empty: it can. Ended by a zero.
        not_swappable: [u8; 256],
        /// One of SPILLWAY_STATE_*.
        state: u32,
        /// Higher wins.
        priority: i32,
        /// Not 0: submits work or waits.
        active: u32,
        /// Its processes.
        processes: u32,
        /// Bytes used over all devices.
        used_bytes: u64,
        /// Bytes whose only copy is on the host.
        host_bytes: u64,
        /// Completed evictions.
        swaps_out: u64,
        /// Completed restores.
        swaps_in: u64,
        /// Bytes copied to the host so far.
        bytes_out: u64,
        /// Bytes copied to the device so far.
        bytes_in: u64,
        /// By index of the device.
        shares: [Share; MAX_DEVICES],
    }

    /// One of the coordinator's decisions.
    Decision as "spillway_decision" {
        /// When, in nanoseconds since 1970.
        time_unix_ns: u64,
        /// Whom it concerns; may be empty. Ended by a zero.
        workload: [u8; 136],
        /// As in GET /v1/events: evicting, evicted, restored ... Ended by a zero.
        kind: [u8; 32],
        /// One line for people, cut if need be. Ended by a zero.
        text: [u8; 256],
    }

    /// The node at one moment.
    Node as "spillway_node" {
        /// When it was written, in nanoseconds since 1970.
        time_unix_ns: u64,
        /// Bytes of host memory that may be reserved.
        pool_capacity_bytes: u64,
        /// Bytes of host memory that are reserved.
        pool_reserved_bytes: u64,
        /// Bytes of host memory that are populated.
        pool_populated_bytes: u64,
        /// Entries of devices that are in use.
        device_count: u32,
        /// Entries of workloads that are in use.
        workload_count: u32,
        /// Workloads that there are; more than workload_count if not all fit.
        workloads_total: u32,
        /// Entries of decisions that are in use, oldest first.
        decision_count: u32,
        /// By index.
        devices: [Device; MAX_DEVICES],
        /// By name.
        workloads: [Workload; MAX_WORKLOADS],
        /// The last ones.
        decisions: [Decision; MAX_DECISIONS],
    }

    /// The whole memory. Read it with spillway_snapshot_read: a copy may be overwritten at any time.
    Snapshot as "spillway_snapshot" {
        /// SPILLWAY_SNAPSHOT_MAGIC once all below is valid.
        magic: u64,
        /// SPILLWAY_SNAPSHOT_VERSION.
        version: u32,
        /// Process id of the writer; it may be dead.
        pid: u32,
        /// sizeof(struct spillway_snapshot).
        size: u64,
        /// Random id of the writer's run.
        instance: u64,
        /// Grows with every publication; 0: none yet. copies[sequence % 2] is complete.
        sequence: u64,
        /// Zero.
        reserved: [u64; 3],
        /// See sequence.
        copies: [Node; 2],
    }
}

/// Copies a text, cut at a character's border, and ended by a zero.
pub fn put(field: &mut [u8], text: &str) {
    field.fill(0);
    let mut end = text.len().min(field.len().saturating_sub(1));
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_padded() {
        for structure in structures() {
            let mut end = 0;
            for (index, (_, _, name, offset)) in structure.fields.iter().enumerate() {
                assert!(*offset >= end, "{}.{name}", structure.name);
                if index == 0 {
                    assert_eq!(*offset, 0);
                }
                end = *offset;
            }
            assert_eq!(structure.size % 8, 0, "{}", structure.name);
        }
    }

    #[test]
    fn texts_are_cut_at_a_border_and_ended() {
        let mut field = [9u8; 4];
        put(&mut field, "aää");
        assert_eq!(&field, b"a\xc3\xa4\0");
        put(&mut field, "");
        assert_eq!(field, [0; 4]);
    }
}
