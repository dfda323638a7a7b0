// Opens a plugin that takes device memory: deep PLUGIN deep|usual linked|next PIECES MIB
// Deep: the plugin looks into its own dependencies first. Then asks the driver for a name that no header has.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
    char answer[64];
    if (argc != 6) return 90;
    void *plugin = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL | (strcmp(argv[2], "deep") ? 0 : RTLD_DEEPBIND));
    if (!plugin) return fprintf(stderr, "%s\n", dlerror()), 91;
    int (*take)(int, unsigned, size_t) = (int (*)(int, unsigned, size_t))dlsym(plugin, "take");
    int code = take(!strcmp(argv[3], "next"), atoi(argv[4]), (size_t)atoi(argv[5]) << 20);
    if (code) return code;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    for (int i = 0; i < 2; i++) {
        printf("newcomer %s\n", dlsym(driver, "cuSimulatedNewcomer") ? "found" : dlerror());
    }
    printf("nobody %s\n", dlsym(driver, "cuNobodyHasThis") ? "found" : "missing");
    printf("ready\n");
    fflush(stdout);
    return fgets(answer, sizeof answer, stdin) ? 0 : 92;
}
