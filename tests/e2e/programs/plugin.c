// A plugin that is linked to the driver, and takes device memory until it is refused.
//   take 0: by the functions that it is linked to; 1: by those that dlsym(RTLD_NEXT) finds
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

typedef unsigned long long Pointer;
int cuInit(unsigned);
int cuDeviceGet(int *, int);
int cuCtxCreate_v2(void **, unsigned, int);
int cuMemAlloc_v2(Pointer *, size_t);
int cuMemcpyHtoD_v2(Pointer, const void *, size_t);
int cuMemcpyDtoH_v2(void *, Pointer, size_t);

int take(int next, unsigned pieces, size_t bytes) {
    int (*alloc)(Pointer *, size_t) = cuMemAlloc_v2;
    if (next) alloc = (int (*)(Pointer *, size_t))dlsym(RTLD_NEXT, "cuMemAlloc_v2");
    void *context;
    int device, code = 0, in = 41, out = 0;
    if (!alloc || cuInit(0) || cuDeviceGet(&device, 0) || cuCtxCreate_v2(&context, 0, device)) return 1;
    unsigned got = 0;
    Pointer at = 0;
    for (; got < pieces && !(code = alloc(&at, bytes)); got++) {
        if (cuMemcpyHtoD_v2(at, &in, sizeof in) || cuMemcpyDtoH_v2(&out, at, sizeof out) || out != in) return 2;
    }
    printf("%u then %d\n", got, code);
    return 0;
}
