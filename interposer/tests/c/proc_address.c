// cuGetProcAddress by both versions, answered with the object and name of what came back.
#include "common.h"
static int (*v2)(const char *, void **, int, uint64_t, int *);
static int (*v1)(const char *, void **, int, uint64_t);
static void *ask(const char *name, int version, uint64_t flags) {
    void *found = (void *)1, *old = (void *)1;
    int status = 7;
    int code = v2(name, &found, version, flags, &status);
    int code1 = v1(name, &old, version, flags);
    printf("%s %d flags %d -> %d %d %s%s\n", name, version, (int)flags, code, status, owner(found),
           code1 == code && old == found ? "" : " (v1 differs)");
    return found;
}
int main(void) {
    void *driver = must_open("libcuda.so.1", RTLD_NOW);
    v2 = (int (*)(const char *, void **, int, uint64_t, int *))dlsym(driver, "cuGetProcAddress_v2");
    v1 = (int (*)(const char *, void **, int, uint64_t))dlsym(driver, "cuGetProcAddress");
    ask("cuInit", 13000, 0);
    ask("cuDriverGetVersion", 13000, 0);
    ask("cuMemAlloc", 13000, 0);
    ask("cuMemcpyHtoD", 13000, 0);
    ask("cuMemcpyHtoD", 13000, 1);
    ask("cuMemcpyHtoD", 13000, 2);
    ask("cuMemcpyHtoD", 3020, 2);
    ask("cuLaunchKernel", 13000, 0);
    ask("cuGraphUpload", 13000, 0);
    ask("cuUserObjectRetain", 13000, 0);
    ask("cuBrandNewCall", 14000, 0);
    ask("cuNoSuchThing", 13000, 0);
    ask("cuGetProcAddress", 11030, 0);
    void *again = ask("cuGetProcAddress", 13000, 0);
    int (*copy)(uint64_t, const void *, size_t);
    void *found;
    int (*through)(const char *, void **, int, uint64_t, int *) = (int (*)(const char *, void **, int, uint64_t, int *))again;
    printf("through itself %d\n", through("cuMemcpyHtoD", &found, 13000, 2, NULL));
    copy = (int (*)(uint64_t, const void *, size_t))found;
    printf("copy %d\n", copy(11, (void *)22, 33));
    return 0;
}
