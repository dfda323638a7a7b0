// What the plugin depends on; nobody else sees it.
const char *scope_probe(void) { return "library"; }
const char *scope_local_only(void) { return "library"; }
