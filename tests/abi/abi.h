/* What the fake driver (driver.c) and its caller (calls.c) know of each other. */
#ifndef SPILLWAY_TESTS_ABI_H
#define SPILLWAY_TESTS_ABI_H

/* Declares all names under their own names: legacy ones, versions, per-thread variants. */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <stddef.h>

/* The call that came last: which function, and its arguments' bytes one after the other. */
struct fake_record {
    unsigned long calls;
    int number;
    size_t size;
    unsigned char bytes[512];
};
extern struct fake_record fake_record;

/* The fake driver's own functions, by number. */
extern void *const fake_addresses[];

/* What the fake driver's cuGetProcAddress answers; asked past every hook. `found` may be null. */
CUresult fake_look_up(const char *base, void **function, int version, cuuint64_t flags,
                      CUdriverProcAddressQueryResult *found);

/* A name for which cuGetProcAddress answers its code like any other function. */
#define PROBE "cuProbe"

/* What function `number` returns: never success, so that nobody reads what it did not write. */
static inline CUresult code(int number) { return (CUresult)(0x40000000 + number); }

#endif
