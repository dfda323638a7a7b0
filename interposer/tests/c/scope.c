// RTLD_NEXT and RTLD_DEFAULT from callers in different scopes.
#include "common.h"
char *getenv(const char *name) { (void)name; return NULL; }
int main(int argc, char **argv) {
    (void)argc;
    printf("main: next getenv is %s\n", owner(dlsym(RTLD_NEXT, "getenv")));
    printf("main: default getenv is %s\n", owner(dlsym(RTLD_DEFAULT, "getenv")));
    void *plugin = must_open(argv[1], RTLD_NOW | RTLD_LOCAL);
    const char *(*next)(const char *) = (const char *(*)(const char *))dlsym(plugin, "plugin_next");
    const char *(*deflt)(const char *) = (const char *(*)(const char *))dlsym(plugin, "plugin_default");
    printf("plugin: next scope_probe is %s\n", next("scope_probe"));
    printf("plugin: next scope_local_only is %s\n", next("scope_local_only"));
    printf("plugin: default scope_local_only is %s\n", deflt("scope_local_only"));
    printf("plugin: next strlen is %s\n", strncmp(next("strlen"), "libc.so", 7) ? "elsewhere" : "libc");
    printf("main: default scope_local_only is %s\n", owner(dlsym(RTLD_DEFAULT, "scope_local_only")));
    void *malloc_next = dlsym(RTLD_NEXT, "malloc");
    printf("main: next malloc is %s\n", malloc_next == (void *)malloc ? "malloc" : "another");
    return 0;
}
