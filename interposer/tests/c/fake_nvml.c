// Built by the tests as libnvidia-ml.so.1.
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) { (void)device; memory[0] = 1; return 0; }
