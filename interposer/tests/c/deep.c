// Opens a plugin, which looks into its own dependencies first if "deep" is asked for.
#include "common.h"
int main(int argc, char **argv) {
    int deep = argc > 2 && !strcmp(argv[2], "deep") ? RTLD_DEEPBIND : 0;
    void *plugin = must_open(argv[1], RTLD_NOW | RTLD_LOCAL | deep);
    return ((int (*)(void))dlsym(plugin, "plugin_run"))();
}
