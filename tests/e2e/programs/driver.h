// The few driver calls that the programs here use, looked up at run time: no CUDA toolkit is needed.
//
// A block of device memory is filled with words that depend on a seed and on the position, and is
// verified by reading it back; `must` ends the program with code 99 and says which call failed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef int Result;
typedef unsigned long long Pointer;
typedef void *Handle;

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3 };

// Name, name of the symbol, parameters.
#define CALLS(X)                                                                             \
    X(init, "cuInit", (unsigned flags))                                                      \
    X(device_count, "cuDeviceGetCount", (int *count))                                        \
    X(device_get, "cuDeviceGet", (int *device, int ordinal))                                 \
    X(device_total, "cuDeviceTotalMem_v2", (size_t *bytes, int device))                      \
    X(ctx_create, "cuCtxCreate_v2", (Handle *context, unsigned flags, int device))           \
    X(ctx_destroy, "cuCtxDestroy_v2", (Handle context))                                      \
    X(ctx_set, "cuCtxSetCurrent", (Handle context))                                          \
    X(ctx_synchronize, "cuCtxSynchronize", (void))                                           \
    X(mem_info, "cuMemGetInfo_v2", (size_t *free, size_t *total))                            \
    X(alloc, "cuMemAlloc_v2", (Pointer *pointer, size_t bytes))                              \
    X(release, "cuMemFree_v2", (Pointer pointer))                                            \
    X(to_device, "cuMemcpyHtoD_v2", (Pointer to, const void *from, size_t bytes))            \
    X(to_host, "cuMemcpyDtoH_v2", (void *to, Pointer from, size_t bytes))                    \
    X(fill32, "cuMemsetD32_v2", (Pointer to, unsigned value, size_t words))                  \
    X(stream_create, "cuStreamCreate", (Handle *stream, unsigned flags))                     \
    X(stream_synchronize, "cuStreamSynchronize", (Handle stream))                            \
    X(module_load, "cuModuleLoadData", (Handle *module, const void *image))                  \
    X(module_function, "cuModuleGetFunction", (Handle *function, Handle module, const char *name)) \
    X(launch, "cuLaunchKernel",                                                              \
      (Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,     \
       unsigned bz, unsigned shared, Handle stream, void **parameters, void **extra))        \
    X(host_function, "cuLaunchHostFunc", (Handle stream, void (*run)(void *), void *data))

static struct {
    void *library;
#define X(name, symbol, parameters) Result(*name) parameters;
    CALLS(X)
#undef X
} cu;

static inline void driver_open(void) {
    cu.library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!cu.library) { fprintf(stderr, "%s\n", dlerror()); exit(98); }
#define X(name, symbol, parameters)                                            \
    cu.name = (Result(*) parameters)dlsym(cu.library, symbol);                 \
    if (!cu.name) { fprintf(stderr, "%s\n", dlerror()); exit(98); }
    CALLS(X)
#undef X
}

static inline void must_be(Result got, Result expected, const char *what, int line) {
    if (got == expected) return;
    fprintf(stderr, "line %d: %s answered %d, expected %d\n", line, what, got, expected);
    _exit(99);
}
#define must(call) must_be((call), SUCCESS, #call, __LINE__)
#define must_answer(code, call) must_be((call), (code), #call, __LINE__)
#define check(condition) must_be((condition) ? 0 : 1, 0, #condition, __LINE__)

// Opens the driver and makes a context on device 0.
static inline Handle driver_start(void) {
    Handle context;
    int device;
    if (!cu.library) driver_open();
    must(cu.init(0));
    must(cu.device_get(&device, 0));
    must(cu.ctx_create(&context, 0, device));
    return context;
}

typedef struct { Pointer at; size_t words; unsigned seed; } Block;

static inline unsigned word_of(unsigned seed, size_t position) {
    return seed * 2654435761u + (unsigned)position * 40503u + 7u;
}

static inline void block_write(Block *block) {
    unsigned *host = malloc(block->words * 4);
    for (size_t i = 0; i < block->words; i++) host[i] = word_of(block->seed, i);
    must(cu.to_device(block->at, host, block->words * 4));
    free(host);
}

static inline Block block_make(size_t bytes, unsigned seed) {
    Block block = {0, bytes / 4, seed};
    must(cu.alloc(&block.at, bytes));
    block_write(&block);
    return block;
}

// 1: every word is what was written.
static inline int block_right(const Block *block) {
    unsigned *host = malloc(block->words * 4);
    must(cu.to_host(host, block->at, block->words * 4));
    size_t i = 0;
    while (i < block->words && host[i] == word_of(block->seed, i)) i++;
    free(host);
    return i == block->words;
}

// Says a line and waits for one on standard input; the test does something in between.
static inline void rendezvous(const char *line) {
    char answer[64];
    printf("%s\n", line);
    fflush(stdout);
    if (!fgets(answer, sizeof answer, stdin)) _exit(97);
}

static inline int exit_code(int status) {
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
