/*
 * A driver that only remembers: it exports every name of cuda.h, keeps the bytes of the arguments of the
 * last call, and returns a code that tells which function it was. Its cuGetProcAddress answers by base
 * name, version and flags as the entry points of cudaTypedefs.h have them.
 */
#include "abi.h"
#include <string.h>

struct fake_record fake_record;

static void begin(int number) {
    fake_record.calls++;
    fake_record.number = number;
    fake_record.size = 0;
}

static void take(const void *argument, size_t size) {
    if (fake_record.size + size <= sizeof fake_record.bytes)
        memcpy(fake_record.bytes + fake_record.size, argument, size);
    fake_record.size += size;
}

static int probed(const char *symbol) { return symbol && strcmp(symbol, PROBE) == 0; }

static CUresult look_up(const char *base, void **function, int version, cuuint64_t flags,
                        CUdriverProcAddressQueryResult *found);

#include "driver.inc"

#define ROW(number, name, base, version, per_thread, hooked, gated) (void *)name,
void *const fake_addresses[] = {
#include "rows.inc"
};
#undef ROW

static const struct {
    const char *base;
    int version, per_thread;
} entry_points[] = {
#define ROW(number, name, base, version, per_thread, hooked, gated) {#base, version, per_thread},
#include "rows.inc"
#undef ROW
};

/* The newest one up to `version`; flag 2 prefers the variant for per-thread streams where there is one. */
static CUresult look_up(const char *base, void **function, int version, cuuint64_t flags,
                        CUdriverProcAddressQueryResult *found) {
    int best = -1, known = 0;
    for (int i = 0; i < (int)(sizeof entry_points / sizeof *entry_points); i++) {
        if (strcmp(entry_points[i].base, base) != 0)
            continue;
        known = 1;
        if (entry_points[i].version > version)
            continue;
        if (entry_points[i].per_thread && !(flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM))
            continue;
        if (best < 0 || entry_points[i].per_thread > entry_points[best].per_thread ||
            (entry_points[i].per_thread == entry_points[best].per_thread &&
             entry_points[i].version > entry_points[best].version))
            best = i;
    }
    *function = best < 0 ? NULL : fake_addresses[best];
    if (found)
        *found = best >= 0 ? CU_GET_PROC_ADDRESS_SUCCESS
                 : known   ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                           : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return best < 0 ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUresult fake_look_up(const char *base, void **function, int version, cuuint64_t flags,
                      CUdriverProcAddressQueryResult *found) {
    return look_up(base, function, version, flags, found);
}
