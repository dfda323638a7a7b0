// A driver with just enough entry points to see what reaches it. Built by the tests as libcuda.so.1.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct { char bytes[64]; } Handle64;
typedef struct { int kind; int id; } Location;

int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }

int cuMemAlloc_v2(uint64_t *pointer, size_t size) { *pointer = 0x700000000000ull + size; return 0; }
int cuMemFree_v2(uint64_t pointer) { return pointer ? 0 : 1; }

// Each answers a code that only the right arguments in the right places give.
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) {
    return to == 11 && from == (void *)22 && size == 33 ? 4001 : 9;
}
int cuMemcpyHtoD_v2_ptds(uint64_t to, const void *from, size_t size) {
    return to == 11 && from == (void *)22 && size == 33 ? 4002 : 9;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
    return to == (void *)1 && from == 2 && size == 3 && stream == (void *)4 ? 4004 : 9;
}
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void **extra) {
    int right = f == (void *)1 && gx == 2 && gy == 3 && gz == 4 && bx == 5 && by == 6 && bz == 7 && shared == 8 &&
                stream == (void *)0x900000009ull && params == (void *)0xa0000000aull && extra == (void *)0xb0000000bull;
    return right ? 4011 : 9;
}
int cuIpcOpenMemHandle_v2(uint64_t *pointer, Handle64 handle, unsigned flags) {
    for (int i = 0; i < 64; i++)
        if (handle.bytes[i] != (char)(i + 1)) return 9;
    *pointer = 77;
    return flags == 5 ? 4064 : 9;
}
int cuMemPrefetchAsync_v2(uint64_t pointer, size_t size, Location where, unsigned flags, void *stream) {
    return pointer == 1 && size == 2 && where.kind == 3 && where.id == -4 && flags == 5 && stream == (void *)6 ? 4008 : 9;
}
int cuTensorMapEncodeTiled(void *a, unsigned b, unsigned c, void *d, void *e, void *f, void *g, void *h, unsigned i,
                           unsigned j, unsigned k, unsigned l) {
    int right = a == (void *)1 && b == 2 && c == 3 && d == (void *)4 && e == (void *)5 && f == (void *)6 &&
                g == (void *)7 && h == (void *)8 && i == 9 && j == 10 && k == 11 && l == 12;
    return right ? 4012 : 9;
}
int cuTexRefSetMipmapLevelBias(void *reference, float bias) {
    return reference == (void *)1 && bias == 2.5f ? 4003 : 9;
}
int cuStreamGetCaptureInfo_v3(void *a, void *b, void *c, void *d, void *e, void *f, void *g) {
    int right = a == (void *)1 && b == (void *)2 && c == (void *)3 && d == (void *)4 && e == (void *)5 && f == (void *)6 &&
                g == (void *)0x700000007ull;
    return right ? 4007 : 9;
}
// Runs the host function at once, on the calling thread: a way to leave a hook by longjmp or pthread_exit.
int cuLaunchHostFunc(void *stream, void (*f)(void *), void *data) { (void)stream; f(data); return 0; }
int cuStreamSynchronize(void *stream) { (void)stream; return 0; }

// Two entry points folded into one address, as a linker may do with functions that only refuse.
int cuGraphUpload(void *graph, void *stream) { (void)graph; (void)stream; return 801; }
int cuGraphLaunch(void *graph, void *stream) __attribute__((alias("cuGraphUpload")));
int cuUserObjectRetain(void *object, void *count) __attribute__((alias("cuGraphUpload")));

// Entry points of a driver newer than the table: new names, and a new version of a known one.
int cuBrandNewCall(void) { return 4100; }
int cuFutureCall(void) { return 4101; }
static int mem_free_v9(void) { return 4102; }

#ifndef OLD_DRIVER
int cuMemcpyBatchAsync_v2(void) { return 0; }
#endif

// What the driver itself finds: never our exports.
void *fake_driver_looks_up(const char *name) { return dlsym(RTLD_DEFAULT, name); }
void *fake_driver_looks_up_in(void *handle, const char *name) { return dlsym(handle, name); }

struct Entry { const char *name; int version; int per_thread; void *function; };
int cuGetProcAddress_v2(const char *, void **, int, uint64_t, int *);
int cuGetProcAddress(const char *, void **, int, uint64_t);
static const struct Entry entries[] = {
    {"cuInit", 2000, 0, cuInit},
    {"cuDriverGetVersion", 2020, 0, cuDriverGetVersion},
    {"cuMemAlloc", 3020, 0, cuMemAlloc_v2},
    {"cuMemFree", 14000, 0, mem_free_v9},
    {"cuMemFree", 3020, 0, cuMemFree_v2},
    {"cuMemcpyHtoD", 7000, 1, cuMemcpyHtoD_v2_ptds},
    {"cuMemcpyHtoD", 3020, 0, cuMemcpyHtoD_v2},
    {"cuLaunchKernel", 4000, 0, cuLaunchKernel},
    {"cuGraphUpload", 11010, 0, cuGraphUpload},
    {"cuUserObjectRetain", 11030, 0, cuUserObjectRetain},
    {"cuBrandNewCall", 14000, 0, cuBrandNewCall},
    {"cuFutureCall", 14000, 0, cuFutureCall},
    {"cuGetProcAddress", 12000, 0, cuGetProcAddress_v2},
    {"cuGetProcAddress", 11030, 0, cuGetProcAddress},
};

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    if (status) *status = 1;
    *function = NULL;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        if (strcmp(name, entries[i].name) || version < entries[i].version) continue;
        if (entries[i].per_thread && !(flags & 2)) continue;
        *function = entries[i].function;
        if (status) *status = 0;
        return 0;
    }
    return 500;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
