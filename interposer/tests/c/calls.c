// Arguments arrive whole, by dlsym and, with DIRECT, by linking against the driver.
#include "common.h"
#ifdef DIRECT
#define GET(name) name
#define DECLARE(result, name, arguments) extern result name arguments;
#else
#define GET(name) ((typeof(name) *)dlsym(driver, #name))
#define DECLARE(result, name, arguments) extern result name arguments __attribute__((weak));
#endif
DECLARE(int, cuMemcpyHtoD_v2, (uint64_t, const void *, size_t))
DECLARE(int, cuMemcpyHtoD_v2_ptds, (uint64_t, const void *, size_t))
DECLARE(int, cuMemcpyDtoHAsync_v2, (void *, uint64_t, size_t, void *))
DECLARE(int, cuLaunchKernel, (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **))
DECLARE(int, cuIpcOpenMemHandle_v2, (uint64_t *, Handle64, unsigned))
DECLARE(int, cuMemPrefetchAsync_v2, (uint64_t, size_t, Location, unsigned, void *))
DECLARE(int, cuTensorMapEncodeTiled, (void *, unsigned, unsigned, void *, void *, void *, void *, void *, unsigned, unsigned, unsigned, unsigned))
DECLARE(int, cuTexRefSetMipmapLevelBias, (void *, float))
DECLARE(int, cuStreamGetCaptureInfo_v3, (void *, void *, void *, void *, void *, void *, void *))

int main(void) {
#ifndef DIRECT
    void *driver = must_open("libcuda.so.1", RTLD_NOW);
#endif
    uint64_t pointer = 0;
    Handle64 handle;
    for (int i = 0; i < 64; i++) handle.bytes[i] = (char)(i + 1);
    for (int round = 0; round < 3; round++) {
        printf("launch %d\n", GET(cuLaunchKernel)((void *)1, 2, 3, 4, 5, 6, 7, 8, (void *)0x900000009, (void *)0xa0000000a, (void *)0xb0000000b));
        printf("copy %d\n", GET(cuMemcpyHtoD_v2)(11, (void *)22, 33));
        printf("copy ptds %d\n", GET(cuMemcpyHtoD_v2_ptds)(11, (void *)22, 33));
        printf("copy async %d\n", GET(cuMemcpyDtoHAsync_v2)((void *)1, 2, 3, (void *)4));
        printf("by value 64 %d\n", GET(cuIpcOpenMemHandle_v2)(&pointer, handle, 5));
        printf("by value 8 %d\n", GET(cuMemPrefetchAsync_v2)(1, 2, (Location){3, -4}, 5, (void *)6));
        printf("twelve %d\n", GET(cuTensorMapEncodeTiled)((void *)1, 2, 3, (void *)4, (void *)5, (void *)6, (void *)7, (void *)8, 9, 10, 11, 12));
        printf("a fraction %d\n", GET(cuTexRefSetMipmapLevelBias)((void *)1, 2.5f));
        printf("seven %d\n", GET(cuStreamGetCaptureInfo_v3)((void *)1, (void *)2, (void *)3, (void *)4, (void *)5, (void *)6, (void *)0x700000007));
    }
    return 0;
}
