// A plugin that is linked to the driver. Opened with RTLD_DEEPBIND it looks into its own dependencies first.
#include "common.h"
int cuInit(unsigned);
int cuMemAlloc_v2(uint64_t *, size_t);
int cuDriverGetVersion(int *);

static void show(const char *how, void *found) { printf("plugin: %s is %s\n", how, owner(found)); }

int plugin_run(void) {
    int version = 0;
    uint64_t pointer;
    // Before anything has opened the driver: it is there as this plugin's dependency only.
    show("early default cuMemAlloc_v2", dlsym(RTLD_DEFAULT, "cuMemAlloc_v2"));
    show("early next cuMemAlloc_v2", dlsym(RTLD_NEXT, "cuMemAlloc_v2"));
    show("early default cuBrandNewCall", dlsym(RTLD_DEFAULT, "cuBrandNewCall"));
    show("linked cuMemAlloc_v2", (void *)cuMemAlloc_v2);
    show("linked cuDriverGetVersion", (void *)cuDriverGetVersion);
    printf("plugin: init %d\n", cuInit(7));
    int called = cuDriverGetVersion(&version);
    printf("plugin: version %d %d\n", called, version);
    printf("plugin: alloc %d\n", cuMemAlloc_v2(&pointer, 64));
    show("next cuMemAlloc_v2", dlsym(RTLD_NEXT, "cuMemAlloc_v2"));
    show("next cuDriverGetVersion", dlsym(RTLD_NEXT, "cuDriverGetVersion"));
    show("default cuMemAlloc_v2", dlsym(RTLD_DEFAULT, "cuMemAlloc_v2"));
    void *driver = must_open("libcuda.so.1", RTLD_NOW);
    show("opened cuMemAlloc_v2", dlsym(driver, "cuMemAlloc_v2"));
    show("opened cuBrandNewCall", dlsym(driver, "cuBrandNewCall"));
    show("opened cuNoSuchThing", dlsym(driver, "cuNoSuchThing"));
    return 0;
}
