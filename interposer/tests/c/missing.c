// Linked against a driver that has a function, run with one that lacks it: only our export has the name.
#include <stdio.h>
int cuMemcpyHtoD_v2(unsigned long, const void *, unsigned long);
int cuMemcpyBatchAsync_v2(void);
int main(void) {
    printf("copy %d\n", cuMemcpyHtoD_v2(11, (void *)22, 33));
    printf("missing %d\n", cuMemcpyBatchAsync_v2());
    return 0;
}
