// What a program finds before and after its first call of the driver, by name and by cuGetProcAddress.
#include "common.h"

static void ask(const char *how, void *handle, const char *name) {
    dlerror();
    void *found = dlsym(handle, name);
    const char *error = dlerror();
    printf("%s %s -> %s%s\n", how, name, owner(found), found ? "" : error ? " with dlerror" : " without dlerror");
}

static void names(const char *when, void *driver) {
    static const char *const all[] = {"cuInit", "cuDriverGetVersion", "cuMemcpyDtoD_v2", "cuBrandNewCall", "cuNoSuchThing", "cuda_plain_name"};
    for (int i = 0; i < 6; i++) ask(when, driver, all[i]);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    void *driver = must_open("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    names("before", driver);
    int version = 0;
    int (*get)(int *) = (int (*)(int *))dlsym(driver, "cuDriverGetVersion");
    int called = get(&version);
    printf("call %d version %d\n", called, version);
    names("after", driver);
    ask("default", RTLD_DEFAULT, "cuInit");
    ask("default", RTLD_DEFAULT, "cuBrandNewCall");
    ask("next", RTLD_NEXT, "cuInit");
    ask("next", RTLD_NEXT, "cuBrandNewCall");
    int (*v2)(const char *, void **, int, uint64_t, int *) = (int (*)(const char *, void **, int, uint64_t, int *))dlsym(driver, "cuGetProcAddress_v2");
    int (*v1)(const char *, void **, int, uint64_t) = (int (*)(const char *, void **, int, uint64_t))dlsym(driver, "cuGetProcAddress");
    static const char *const asked[] = {"cuMemAlloc", "cuDriverGetVersion", "cuBrandNewCall", "cuFutureCall", "cuMemFree", "cuNoSuchThing"};
    for (int i = 0; i < 6; i++) {
        void *found = (void *)1, *old = (void *)1;
        int status = 7, code = v2(asked[i], &found, 14000, 0, &status), code1 = v1(asked[i], &old, 14000, 0);
        printf("%s -> %d %d %s, v1 %d %s\n", asked[i], code, status, owner(found), code1, owner(old));
    }
    // The driver by its path, as some programs open it, and what the driver itself finds.
    if (argc < 2) return 0;
    void *real = must_open(argv[1], RTLD_NOW);
    names("by path", real);
    void *(*inside_in)(void *, const char *) = (void *(*)(void *, const char *))dlsym(real, "fake_driver_looks_up_in");
    printf("driver itself cuMemAlloc_v2 -> %s\n", owner(inside_in(driver, "cuMemAlloc_v2")));
    printf("driver itself cuBrandNewCall -> %s\n", owner(inside_in(driver, "cuBrandNewCall")));
    return 0;
}
