// A plugin with a scope of its own: what RTLD_NEXT and RTLD_DEFAULT find depends on this caller.
#include "common.h"
const char *scope_probe(void) { return "plugin"; }
const char *plugin_next(const char *name) { return owner(dlsym(RTLD_NEXT, name)); }
const char *plugin_default(const char *name) { return owner(dlsym(RTLD_DEFAULT, name)); }
