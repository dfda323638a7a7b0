// Shared by the test programs: each prints what it sees; the test compares or matches the output.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { char bytes[64]; } Handle64;
typedef struct { int kind; int id; } Location;

// The file name of the object that an address lies in, "null" for none.
static inline const char *owner(void *address) {
    static char copy[4][64];
    static int turn;
    Dl_info info;
    if (!address) return "null";
    if (!dladdr(address, &info)) return "unmapped";
    const char *slash = strrchr(info.dli_fname, '/');
    char *out = copy[turn++ % 4];
    snprintf(out, 64, "%s:%s", slash ? slash + 1 : info.dli_fname, info.dli_sname ? info.dli_sname : "?");
    return out;
}

static inline void *must_open(const char *name, int flags) {
    void *handle = dlopen(name, flags);
    if (!handle) { printf("dlopen %s: %s\n", name, dlerror()); exit(1); }
    return handle;
}
