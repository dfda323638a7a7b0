// A profiler's library: defines the driver's calls itself, counts, and passes on by RTLD_NEXT.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static int allocations, frees;

static void *next(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found || dlsym(RTLD_DEFAULT, name) == found) {
        // Found itself, or nothing.
        fprintf(stderr, "RTLD_NEXT of %s is not what comes next\n", name);
        exit(90);
    }
    return found;
}

int cuMemAlloc_v2(unsigned long long *pointer, size_t bytes) {
    int (*real)(unsigned long long *, size_t) = (int (*)(unsigned long long *, size_t))next("cuMemAlloc_v2");
    allocations++;
    return real(pointer, bytes);
}

int cuMemFree_v2(unsigned long long pointer) {
    int (*real)(unsigned long long) = (int (*)(unsigned long long))next("cuMemFree_v2");
    frees++;
    return real(pointer);
}

__attribute__((destructor)) static void report(void) {
    if (allocations) printf("counted %d allocations, %d frees\n", allocations, frees);
}
