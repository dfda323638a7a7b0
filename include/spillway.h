/* The snapshot that spillwayd publishes in shared memory: the node and its last decisions.
 *
 * Made from coordinator/src/snapshot/layout.rs; do not edit. To make it again:
 *   SPILLWAY_WRITE_HEADER=1 cargo test -p spillway-coordinator header_is_current
 *
 * The memory is called /spillway- and 16 hexadecimal digits (spillway_snapshot_name), is readable for
 * the user who runs spillwayd alone, and stays after a crash of spillwayd. Open it with shm_open,
 * map sizeof(struct spillway_snapshot) bytes read-only and shared, and use spillway_snapshot_read.
 */
#ifndef SPILLWAY_H
#define SPILLWAY_H

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPILLWAY_SNAPSHOT_MAGIC UINT64_C(0x70616e7359575053)
#define SPILLWAY_SNAPSHOT_VERSION UINT32_C(1)
#define SPILLWAY_SNAPSHOT_NAME_BYTES 27
#define SPILLWAY_MAX_DEVICES 16
#define SPILLWAY_MAX_WORKLOADS 128
#define SPILLWAY_MAX_DECISIONS 64
#define SPILLWAY_UNKNOWN UINT64_C(0xffffffffffffffff)
#define SPILLWAY_STATE_RESIDENT UINT32_C(0)
#define SPILLWAY_STATE_EVICTING UINT32_C(1)
#define SPILLWAY_STATE_EVICTED UINT32_C(2)
#define SPILLWAY_STATE_RESTORING UINT32_C(3)
#define SPILLWAY_STATE_WAITING UINT32_C(4)

/* One device. */
struct spillway_device {
    /* As cuDeviceGetUuid_v2 tells it. */
    char uuid[16];
    /* Product name, ended by a zero. */
    char name[64];
    /* Bytes that are shared out. */
    uint64_t capacity_bytes;
    /* The part of them that is never granted. */
    uint64_t reserve_bytes;
    /* capacity_bytes - reserve_bytes. */
    uint64_t room_bytes;
    /* Physical bytes set aside for workloads. */
    uint64_t granted_bytes;
    /* room_bytes - granted_bytes, at least 0. */
    uint64_t free_bytes;
    /* Bytes in use as NVML shows it, or SPILLWAY_UNKNOWN. */
    uint64_t nvml_used_bytes;
};

/* A workload's share of one device. */
struct spillway_share {
    /* Guaranteed bytes. */
    uint64_t request_bytes;
    /* Most bytes; 0: the workload does not use this device. */
    uint64_t limit_bytes;
    /* Bytes used, resident or not, overhead included. */
    uint64_t used_bytes;
    /* Physical bytes on the device now, overhead included. */
    uint64_t resident_bytes;
    /* The part of used_bytes that cannot be moved, without overhead. */
    uint64_t pinned_bytes;
    /* Contexts, modules, code. */
    uint64_t overhead_bytes;
};

/* One workload. */
struct spillway_workload {
    /* Ended by a zero. */
    char name[136];
    /* What it waits for; empty: nothing. Ended by a zero. */
    char waiting_for[256];
    /* Why it cannot be swapped; empty: it can. Ended by a zero. */
    char not_swappable[256];
    /* One of SPILLWAY_STATE_*. */
    uint32_t state;
    /* Higher wins. */
    int32_t priority;
    /* Not 0: submits work or waits. */
    uint32_t active;
    /* Its processes. */
    uint32_t processes;
    /* Bytes used over all devices. */
    uint64_t used_bytes;
    /* Bytes whose only copy is on the host. */
    uint64_t host_bytes;
    /* Completed evictions. */
    uint64_t swaps_out;
    /* Completed restores. */
    uint64_t swaps_in;
    /* Bytes copied to the host so far. */
    uint64_t bytes_out;
    /* Bytes copied to the device so far. */
    uint64_t bytes_in;
    /* By index of the device. */
    struct spillway_share shares[16];
};

/* One of the coordinator's decisions. */
struct spillway_decision {
    /* When, in nanoseconds since 1970. */
    uint64_t time_unix_ns;
    /* Whom it concerns; may be empty. Ended by a zero. */
    char workload[136];
    /* As in GET /v1/events: evicting, evicted, restored ... Ended by a zero. */
    char kind[32];
    /* One line for people, cut if need be. Ended by a zero. */
    char text[256];
};

/* The node at one moment. */
struct spillway_node {
    /* When it was written, in nanoseconds since 1970. */
    uint64_t time_unix_ns;
    /* Bytes of host memory that may be reserved. */
    uint64_t pool_capacity_bytes;
    /* Bytes of host memory that are reserved. */
    uint64_t pool_reserved_bytes;
    /* Bytes of host memory that are populated. */
    uint64_t pool_populated_bytes;
    /* Entries of devices that are in use. */
    uint32_t device_count;
    /* Entries of workloads that are in use. */
    uint32_t workload_count;
    /* Workloads that there are; more than workload_count if not all fit. */
    uint32_t workloads_total;
    /* Entries of decisions that are in use, oldest first. */
    uint32_t decision_count;
    /* By index. */
    struct spillway_device devices[16];
    /* By name. */
    struct spillway_workload workloads[128];
    /* The last ones. */
    struct spillway_decision decisions[64];
};

/* The whole memory. Read it with spillway_snapshot_read: a copy may be overwritten at any time. */
struct spillway_snapshot {
    /* SPILLWAY_SNAPSHOT_MAGIC once all below is valid. */
    uint64_t magic;
    /* SPILLWAY_SNAPSHOT_VERSION. */
    uint32_t version;
    /* Process id of the writer; it may be dead. */
    uint32_t pid;
    /* sizeof(struct spillway_snapshot). */
    uint64_t size;
    /* Random id of the writer's run. */
    uint64_t instance;
    /* Grows with every publication; 0: none yet. copies[sequence % 2] is complete. */
    uint64_t sequence;
    /* Zero. */
    uint64_t reserved[3];
    /* See sequence. */
    struct spillway_node copies[2];
};

#ifdef __cplusplus
#define SPILLWAY_ASSERT static_assert
#else
#define SPILLWAY_ASSERT _Static_assert
#endif
#include <stddef.h>
SPILLWAY_ASSERT(offsetof(struct spillway_device, uuid) == 0, "spillway_device.uuid");
SPILLWAY_ASSERT(offsetof(struct spillway_device, name) == 16, "spillway_device.name");
SPILLWAY_ASSERT(offsetof(struct spillway_device, capacity_bytes) == 80, "spillway_device.capacity_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_device, reserve_bytes) == 88, "spillway_device.reserve_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_device, room_bytes) == 96, "spillway_device.room_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_device, granted_bytes) == 104, "spillway_device.granted_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_device, free_bytes) == 112, "spillway_device.free_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_device, nvml_used_bytes) == 120, "spillway_device.nvml_used_bytes");
SPILLWAY_ASSERT(sizeof(struct spillway_device) == 128, "spillway_device");
SPILLWAY_ASSERT(offsetof(struct spillway_share, request_bytes) == 0, "spillway_share.request_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_share, limit_bytes) == 8, "spillway_share.limit_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_share, used_bytes) == 16, "spillway_share.used_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_share, resident_bytes) == 24, "spillway_share.resident_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_share, pinned_bytes) == 32, "spillway_share.pinned_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_share, overhead_bytes) == 40, "spillway_share.overhead_bytes");
SPILLWAY_ASSERT(sizeof(struct spillway_share) == 48, "spillway_share");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, name) == 0, "spillway_workload.name");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, waiting_for) == 136, "spillway_workload.waiting_for");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, not_swappable) == 392, "spillway_workload.not_swappable");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, state) == 648, "spillway_workload.state");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, priority) == 652, "spillway_workload.priority");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, active) == 656, "spillway_workload.active");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, processes) == 660, "spillway_workload.processes");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, used_bytes) == 664, "spillway_workload.used_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, host_bytes) == 672, "spillway_workload.host_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, swaps_out) == 680, "spillway_workload.swaps_out");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, swaps_in) == 688, "spillway_workload.swaps_in");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, bytes_out) == 696, "spillway_workload.bytes_out");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, bytes_in) == 704, "spillway_workload.bytes_in");
SPILLWAY_ASSERT(offsetof(struct spillway_workload, shares) == 712, "spillway_workload.shares");
SPILLWAY_ASSERT(sizeof(struct spillway_workload) == 1480, "spillway_workload");
SPILLWAY_ASSERT(offsetof(struct spillway_decision, time_unix_ns) == 0, "spillway_decision.time_unix_ns");
SPILLWAY_ASSERT(offsetof(struct spillway_decision, workload) == 8, "spillway_decision.workload");
SPILLWAY_ASSERT(offsetof(struct spillway_decision, kind) == 144, "spillway_decision.kind");
SPILLWAY_ASSERT(offsetof(struct spillway_decision, text) == 176, "spillway_decision.text");
SPILLWAY_ASSERT(sizeof(struct spillway_decision) == 432, "spillway_decision");
SPILLWAY_ASSERT(offsetof(struct spillway_node, time_unix_ns) == 0, "spillway_node.time_unix_ns");
SPILLWAY_ASSERT(offsetof(struct spillway_node, pool_capacity_bytes) == 8, "spillway_node.pool_capacity_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_node, pool_reserved_bytes) == 16, "spillway_node.pool_reserved_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_node, pool_populated_bytes) == 24, "spillway_node.pool_populated_bytes");
SPILLWAY_ASSERT(offsetof(struct spillway_node, device_count) == 32, "spillway_node.device_count");
SPILLWAY_ASSERT(offsetof(struct spillway_node, workload_count) == 36, "spillway_node.workload_count");
SPILLWAY_ASSERT(offsetof(struct spillway_node, workloads_total) == 40, "spillway_node.workloads_total");
SPILLWAY_ASSERT(offsetof(struct spillway_node, decision_count) == 44, "spillway_node.decision_count");
SPILLWAY_ASSERT(offsetof(struct spillway_node, devices) == 48, "spillway_node.devices");
SPILLWAY_ASSERT(offsetof(struct spillway_node, workloads) == 2096, "spillway_node.workloads");
SPILLWAY_ASSERT(offsetof(struct spillway_node, decisions) == 191536, "spillway_node.decisions");
SPILLWAY_ASSERT(sizeof(struct spillway_node) == 219184, "spillway_node");
SPILLWAY_ASSERT(offsetof(struct spillway_snapshot, magic) == 0, "spillway_snapshot.magic");
SPILLWAY_ASSERT(offsetof(struct spillway_snapshot, version) == 8, "spillway_snapshot.version");
SPILLWAY_ASSERT(offsetof(struct spillway_snapshot, pid) == 12, "spillway_snapshot.pid");
SPILLWAY_ASSERT(offsetof(struct spillway_snapshot, size) == 16, "spillway_snapshot.size");
SPILLWAY_ASSERT(offsetof(struct spillway_snapshot, instance) == 24, "spillway_snapshot.instance");
SPILLWAY_ASSERT(offsetof(struct spillway_snapshot, sequence) == 32, "spillway_snapshot.sequence");
SPILLWAY_ASSERT(offsetof(struct spillway_snapshot, reserved) == 40, "spillway_snapshot.reserved");
SPILLWAY_ASSERT(offsetof(struct spillway_snapshot, copies) == 64, "spillway_snapshot.copies");
SPILLWAY_ASSERT(sizeof(struct spillway_snapshot) == 438432, "spillway_snapshot");

/* Writes the name of the shared memory for a run directory, given by its absolute path. */
static inline void spillway_snapshot_name(const char *run_dir, char name[SPILLWAY_SNAPSHOT_NAME_BYTES]) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (const unsigned char *at = (const unsigned char *)run_dir; *at; at++) {
        hash = (hash ^ *at) * UINT64_C(0x100000001b3);
    }
    snprintf(name, SPILLWAY_SNAPSHOT_NAME_BYTES, "/spillway-%016llx", (unsigned long long)hash);
}

/* Copies the newest complete state. Never waits for the writer. Returns
 *    0  *node holds it,
 *   -1  nothing is published yet, or this is no snapshot,
 *   -2  it has another version,
 *   -3  it changed during each of 16 attempts. */
static inline int spillway_snapshot_read(const struct spillway_snapshot *snapshot, struct spillway_node *node) {
    if (__atomic_load_n(&snapshot->magic, __ATOMIC_ACQUIRE) != SPILLWAY_SNAPSHOT_MAGIC) {
        return -1;
    }
    if (snapshot->version != SPILLWAY_SNAPSHOT_VERSION) {
        return -2;
    }
    for (int attempt = 0; attempt < 16; attempt++) {
        uint64_t before = __atomic_load_n(&snapshot->sequence, __ATOMIC_ACQUIRE);
        if (before == 0) {
            return -1;
        }
        memcpy(node, &snapshot->copies[before % 2], sizeof(*node));
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&snapshot->sequence, __ATOMIC_RELAXED) == before) {
            return 0;
        }
    }
    return -3;
}

#ifdef __cplusplus
}
#endif

#endif
