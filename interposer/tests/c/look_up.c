// Every way to ask for a name, printed with the object that answered.
#include "common.h"

static void ask(const char *how, void *handle, const char *name) {
    dlerror();
    void *found = dlsym(handle, name);
    const char *error = dlerror();
    printf("%s %s -> %s%s\n", how, name, owner(found), found ? "" : error ? " with dlerror" : " without dlerror");
}

int main(void) {
    ask("default-unloaded", RTLD_DEFAULT, "cuInit");
    ask("next-unloaded", RTLD_NEXT, "cuInit");
    ask("self-unloaded", dlopen(NULL, RTLD_LAZY), "cuMemAlloc_v2");
    void *driver = must_open("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    ask("handle", driver, "cuInit");
    ask("handle", driver, "cuMemAlloc_v2");
    ask("handle", driver, "cuMemcpyHtoD_v2_ptds");
    ask("handle", driver, "cuGetProcAddress_v2");
    ask("handle", driver, "cuDriverGetVersion");
    ask("handle", driver, "cuStreamSynchronize");
    ask("handle", driver, "cuBrandNewCall");
    ask("handle", driver, "cuNoSuchThing");
    ask("handle", driver, "cuMemcpyDtoD_v2");
    ask("handle", driver, "fake_driver_looks_up");
    void *nvml = must_open("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    ask("handle", nvml, "nvmlDeviceGetMemoryInfo");
    ask("handle", nvml, "nvmlDeviceGetCount_v2");
    ask("handle", nvml, "nvmlNoSuchThing");
    void *(*inside)(const char *) = (void *(*)(const char *))dlsym(driver, "fake_driver_looks_up");
    void *(*inside_in)(void *, const char *) = (void *(*)(void *, const char *))dlsym(driver, "fake_driver_looks_up_in");
    printf("driver itself cuMemAlloc_v2 in its handle -> %s\n", owner(inside_in(driver, "cuMemAlloc_v2")));
    printf("driver itself cuNoSuchThing -> %s\n", owner(inside("cuNoSuchThing")));
    must_open("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    ask("default-global", RTLD_DEFAULT, "cuInit");
    ask("next-global", RTLD_NEXT, "cuInit");
    ask("self-global", dlopen(NULL, RTLD_LAZY), "cuMemAlloc_v2");
    ask("default-global", RTLD_DEFAULT, "cuDriverGetVersion");
    ask("default", RTLD_DEFAULT, "c");
    ask("default", RTLD_DEFAULT, "");
    ask("default", RTLD_DEFAULT, "cu");
    ask("default", RTLD_DEFAULT, "n");
    ask("default", RTLD_DEFAULT, "nvm");
    ask("default", RTLD_DEFAULT, "nvml");
    ask("default", RTLD_DEFAULT, "cuda_plain_name");
    printf("strlen is %s\n", dlsym(RTLD_DEFAULT, "strlen") ? "found" : "missing");
    return 0;
}
