/* Reads a snapshot and prints it: `read_snapshot RUN_DIR`. Also a check that the header compiles. */
#define _POSIX_C_SOURCE 200809L
#include "spillway.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int main(int argc, char **argv) {
    char name[SPILLWAY_SNAPSHOT_NAME_BYTES];
    static struct spillway_node node;
    struct stat stat;
    if (argc != 2) {
        fprintf(stderr, "usage: read_snapshot RUN_DIR\n");
        return 2;
    }
    spillway_snapshot_name(argv[1], name);
    int file = shm_open(name, O_RDONLY, 0);
    if (file < 0 || fstat(file, &stat) != 0) {
        perror(name);
        return 1;
    }
    if ((uint64_t)stat.st_size < sizeof(struct spillway_snapshot)) {
        fprintf(stderr, "%s is too small\n", name);
        return 1;
    }
    const struct spillway_snapshot *snapshot =
        mmap(NULL, sizeof(struct spillway_snapshot), PROT_READ, MAP_SHARED, file, 0);
    if (snapshot == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    int result = spillway_snapshot_read(snapshot, &node);
    if (result != 0) {
        fprintf(stderr, "nothing to read: %d\n", result);
        return 1;
    }
    printf("mode %o\n", (unsigned)(stat.st_mode & 0777));
    printf("pid %u\n", (unsigned)snapshot->pid);
    for (uint32_t i = 0; i < node.device_count; i++) {
        printf("device %s room %llu granted %llu\n", node.devices[i].name,
               (unsigned long long)node.devices[i].room_bytes,
               (unsigned long long)node.devices[i].granted_bytes);
    }
    for (uint32_t i = 0; i < node.workload_count; i++) {
        const struct spillway_workload *w = &node.workloads[i];
        printf("workload %s state %u used %llu limit %llu processes %u\n", w->name,
               (unsigned)w->state, (unsigned long long)w->used_bytes,
               (unsigned long long)w->shares[0].limit_bytes, (unsigned)w->processes);
    }
    for (uint32_t i = 0; i < node.decision_count; i++) {
        printf("decision %s %s\n", node.decisions[i].kind, node.decisions[i].workload);
    }
    return 0;
}
