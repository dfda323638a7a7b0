// Linked against the driver, as programs are that do not look it up at run time.
#include <stddef.h>
#include <stdio.h>

int cuInit(unsigned);
int cuDeviceGet(int *, int);
int cuCtxCreate_v2(void **, unsigned, int);
int cuMemAlloc_v2(unsigned long long *, size_t);
int cuMemFree_v2(unsigned long long);
int cuMemcpyHtoD_v2(unsigned long long, const void *, size_t);
int cuMemcpyDtoH_v2(void *, unsigned long long, size_t);

int main(void) {
    void *context;
    int device;
    if (cuInit(0) || cuDeviceGet(&device, 0) || cuCtxCreate_v2(&context, 0, device)) return 1;
    for (int i = 0; i < 3; i++) {
        unsigned long long pointer;
        int in = 41 + i, out = 0;
        if (cuMemAlloc_v2(&pointer, 4 << 20)) return 2;
        if (cuMemcpyHtoD_v2(pointer + 4096, &in, sizeof in)) return 3;
        if (cuMemcpyDtoH_v2(&out, pointer + 4096, sizeof out)) return 4;
        if (out != in || cuMemFree_v2(pointer)) return 5;
    }
    printf("all right\n");
    return 0;
}
