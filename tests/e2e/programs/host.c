// What a host process may do around CUDA. `host WHAT` prints what it saw; the test compares that with
// and without Spillway. Lines that end in "?" wait for a line on standard input.
#include "driver.h"
#include <fcntl.h>
#include <setjmp.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define MIB ((size_t)1 << 20)
static const char *self;

static void works(const char *who) {
    Handle context = driver_start();
    Block block = block_make(4 * MIB, 5);
    printf("%s: %s\n", who, block_right(&block) ? "works" : "WRONG BYTES");
    fflush(stdout);
    must(cu.release(block.at));
    must(cu.ctx_destroy(context));
}

static int wait_for(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return exit_code(status);
}

// A child that begins with CUDA itself, of a parent that has not; before and after the driver is loaded.
static int fork_before(void) {
    for (int loaded = 0; loaded < 2; loaded++) {
        if (loaded) driver_open();
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            works("child");
            exit(3);
        }
        printf("child of a parent with the driver %s: %d\n", loaded ? "loaded" : "not loaded", wait_for(child));
    }
    works("parent");
    return 0;
}

// A child of a parent that uses CUDA: the driver refuses it; its end is not the parent's.
static int fork_after(void) {
    driver_start();
    Block block = block_make(8 * MIB, 9);
    for (int how = 0; how < 3; how++) {
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            Pointer pointer = 0;
            size_t a, b;
            printf("child: init %d, alloc %d, copy %d, info %d, free %d\n", cu.init(0), cu.alloc(&pointer, MIB),
                   cu.to_device(block.at, &a, sizeof a), cu.mem_info(&a, &b), cu.release(block.at));
            fflush(stdout);
            if (how == 0) exit(4);
            if (how == 1) _exit(5);
            abort();
        }
        printf("child ended with %d\n", wait_for(child));
    }
    rendezvous("parent goes on?");
    printf("bytes %s\n", block_right(&block) ? "right" : "WRONG");
    Block more = block_make(4 * MIB, 10);
    printf("more %s\n", block_right(&more) ? "right" : "WRONG");
    return 0;
}

// A child that lives on and holds what it inherited, after its parent.
static int fork_lingers(void) {
    driver_start();
    Block block = block_make(8 * MIB, 9);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        close(1);
        // Ends with the test's own end of the pipe, or when told.
        char line[8];
        while (read(0, line, sizeof line) > 0) {}
        _exit(0);
    }
    printf("child %d\n", (int)child);
    fflush(stdout);
    check(block_right(&block));
    _exit(0);
}

// A child by vfork, system and posix_spawn, while CUDA is in use.
static int spawn(void) {
    extern char **environ;
    driver_start();
    Block block = block_make(8 * MIB, 11);
    pid_t child = vfork();
    if (child == 0) _exit(6);
    printf("vfork: %d\n", wait_for(child));
    fflush(stdout);
    printf("system: %d\n", exit_code(system("echo from the shell")));
    fflush(stdout);
    char *arguments[] = {(char *)self, "works", NULL};
    check(posix_spawn(&child, self, NULL, NULL, arguments, environ) == 0);
    printf("spawned: %d\n", wait_for(child));
    printf("bytes %s\n", block_right(&block) ? "right" : "WRONG");
    return 0;
}

// The same process as another program, twice.
static int exec_after(int round) {
    works(round ? "after exec" : "before exec");
    Block block;
    driver_start();
    block = block_make(8 * MIB, 12);
    check(block_right(&block));
    if (round == 2) return 0;
    execl(self, self, round ? "exec2" : "exec1", NULL);
    return 96;
}

// Ends in the given way, when told; by then it may be evicted.
static void *leaves(void *data) { usleep(100000); exit(*(int *)data); }
static int ends(const char *how) {
    driver_start();
    Block block = block_make(64 * MIB, 13);
    rendezvous("ready?");
    if (!strcmp(how, "return")) return 11;
    if (!strcmp(how, "exit")) exit(11);
    if (!strcmp(how, "_exit")) _exit(11);
    if (!strcmp(how, "quick_exit")) quick_exit(11);
    if (!strcmp(how, "kill")) raise(SIGTERM);
    if (!strcmp(how, "abort")) abort();
    if (!strcmp(how, "thread")) {
        // The main thread ends first, another one exits.
        static int code = 11;
        pthread_t thread;
        check(pthread_create(&thread, NULL, leaves, &code) == 0);
        pthread_exit(NULL);
    }
    (void)block;
    return 95;
}

// Destructors and atexit handlers that still call the driver, as frameworks' do.
static Block last;
static Handle last_context;
static void at_exit(void) {
    unsigned word = 0;
    Result set = cu.ctx_set(last_context), read = cu.to_host(&word, last.at, 4), freed = cu.release(last.at);
    printf("at exit: set %d, read %d, word %s, free %d\n", set, read,
           read || word == word_of(last.seed, 0) ? "right" : "WRONG", freed);
    fflush(stdout);
}
static int frees_at_exit(void) {
    last_context = driver_start();
    atexit(at_exit);
    last = block_make(16 * MIB, 14);
    rendezvous("ready?");
    return 12;
}

// A call that waits at the gate is left by longjmp from a signal handler.
static sigjmp_buf back;
static void jump(int signal) { (void)signal; siglongjmp(back, 1); }
static int jumps(void) {
    struct sigaction action = {.sa_handler = jump};
    driver_start();
    Block block = block_make(32 * MIB, 15);
    Block other = block_make(4 * MIB, 16);
    sigaction(SIGALRM, &action, NULL);
    rendezvous("ready?");
    unsigned word = 0;
    if (sigsetjmp(back, 1) == 0) {
        ualarm(300000, 0);
        must(cu.to_host(&word, block.at, 4));
        ualarm(0, 0);
        printf("call came back\n");
    } else {
        printf("left the call\n");
    }
    rendezvous("go on?");
    printf("bytes %s\n", block_right(&block) && block_right(&other) ? "right" : "WRONG");
    rendezvous("again?");
    printf("bytes %s\n", block_right(&block) && block_right(&other) ? "right" : "WRONG");
    return 0;
}

// A thread that is cancelled while it waits at the gate, and one cancelled while it allocates.
static Handle context;
static void *reads(void *data) {
    unsigned word;
    const Block *block = data;
    must(cu.ctx_set(context));
    must(cu.to_host(&word, block->at, 4));
    check(word == word_of(block->seed, 0));
    for (;;) pthread_testcancel();
    return NULL;
}
static pthread_barrier_t both;
static void *allocates(void *data) {
    (void)data;
    Pointer pointer;
    must(cu.ctx_set(context));
    pthread_barrier_wait(&both);
    usleep(100000);
    // The cancellation is pending: whatever system calls an allocation makes, they are no place to end.
    must(cu.alloc(&pointer, 40 * MIB));
    must(cu.release(pointer));
    pthread_testcancel();
    return NULL;
}
static int cancels(void) {
    pthread_t thread;
    void *result;
    context = driver_start();
    Block block = block_make(32 * MIB, 17);
    pthread_barrier_init(&both, NULL, 2);
    check(pthread_create(&thread, NULL, allocates, NULL) == 0);
    pthread_barrier_wait(&both);
    check(pthread_cancel(thread) == 0);
    check(pthread_join(thread, &result) == 0);
    printf("allocating: %s\n", result == PTHREAD_CANCELED ? "cancelled" : "returned");
    rendezvous("ready?");
    check(pthread_create(&thread, NULL, reads, &block) == 0);
    usleep(200000);
    check(pthread_cancel(thread) == 0);
    rendezvous("waiting?");
    check(pthread_join(thread, &result) == 0);
    printf("reading: %s\n", result == PTHREAD_CANCELED ? "cancelled" : "returned");
    rendezvous("again?");
    printf("bytes %s\n", block_right(&block) ? "right" : "WRONG");
    return 0;
}

// Opens and closes the driver again and again, with and without using it.
static int reopens(void) {
    for (int i = 0; i < 20; i++) {
        void *library = dlopen("libcuda.so.1", RTLD_NOW);
        check(library != NULL);
        Result (*init)(unsigned) = (Result(*)(unsigned))dlsym(library, "cuInit");
        check(init != NULL);
        if (i % 3 == 1) must(init(0));
        check(dlclose(library) == 0);
    }
    for (int i = 0; i < 5; i++) {
        works("opened again");
        check(dlclose(cu.library) == 0);
        cu.library = NULL;
    }
    return 0;
}

// Started without standard descriptors: none of ours may take their numbers, or what the program
// writes there would land in it. The report goes to a file.
static int no_standard(const char *report) {
    driver_start();
    Block block = block_make(16 * MIB, 18);
    for (int fd = 0; fd < 3; fd++) {
        struct stat stat;
        // The numbers belong to the program, unless the driver took them.
        if (fstat(fd, &stat) == 0 && S_ISSOCK(stat.st_mode)) _exit(94);
        for (int i = 0; i < 3; i++) (void)!write(fd, "a line of a program's log\n", 26);
    }
    FILE *file = fopen(report, "w");
    check(file != NULL);
    fprintf(file, "ready\n");
    fclose(file);
    // Told to go on by the file's end.
    struct stat stat;
    while (lstat(report, &stat) == 0) usleep(10000);
    return block_right(&block) ? 13 : 14;
}

// Closes every descriptor above 2, as daemons do, and opens its own: not a byte in them is ours.
static int daemonises(void) {
    driver_start();
    Block block = block_make(16 * MIB, 19);
    for (int fd = 3; fd < 4096; fd++) close(fd);
    int pairs[64][2], kind[] = {SOCK_SEQPACKET, SOCK_STREAM, SOCK_DGRAM};
    for (int i = 0; i < 64; i++) check(socketpair(AF_UNIX, kind[i % 3], 0, pairs[i]) == 0);
    printf("bytes %s\n", block_right(&block) ? "right" : "WRONG");
    Pointer pointer;
    Result got = cu.alloc(&pointer, 100 * MIB);
    printf("alloc %s\n", got == SUCCESS || got == OUT_OF_MEMORY ? "answered" : "FAILED");
    if (got == SUCCESS) must(cu.release(pointer));
    usleep(1500000);
    rendezvous("closed?");
    printf("bytes %s\n", block_right(&block) ? "right" : "WRONG");
    for (int i = 0; i < 64; i++) {
        for (int end = 0; end < 2; end++) {
            char byte;
            ssize_t n = recv(pairs[i][end], &byte, 1, MSG_DONTWAIT);
            check(n < 0 && errno == EAGAIN);
            // Still ours, still open.
            check(send(pairs[i][end], "x", 1, 0) == 1);
            check(recv(pairs[i][!end], &byte, 1, 0) == 1 && byte == 'x');
        }
    }
    printf("own descriptors untouched\n");
    return 15;
}

// Only the beginning; what cuInit says is printed.
static int inits(void) {
    driver_open();
    printf("init %d\n", cu.init(0));
    return 0;
}

// Holds memory until its input ends; on "check" it is verified, on "grow N" it becomes N MiB more.
static int holds(size_t mib) {
    static Block blocks[64];
    int count = 1;
    char line[64];
    driver_start();
    blocks[0] = block_make(mib * MIB, 20);
    printf("ready?\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        unsigned more;
        if (sscanf(line, "grow %u", &more) == 1) {
            check(count < 64);
            blocks[count] = block_make(more * MIB, 20 + (unsigned)count);
            count++;
            printf("grown\n");
        } else {
            int right = 1;
            for (int i = 0; i < count; i++) right &= block_right(&blocks[i]);
            printf("bytes %s\n", right ? "right" : "WRONG");
        }
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv) {
    self = argv[0];
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "works")) return works("it"), 0;
    if (!strcmp(what, "init")) return inits();
    if (!strcmp(what, "holds")) return holds((size_t)atoi(argv[2]));
    if (!strcmp(what, "fork-before")) return fork_before();
    if (!strcmp(what, "fork-after")) return fork_after();
    if (!strcmp(what, "fork-lingers")) return fork_lingers();
    if (!strcmp(what, "spawn")) return spawn();
    if (!strcmp(what, "exec")) return exec_after(0);
    if (!strcmp(what, "exec1")) return exec_after(1);
    if (!strcmp(what, "exec2")) return exec_after(2);
    if (!strcmp(what, "ends")) return ends(argv[2]);
    if (!strcmp(what, "at-exit")) return frees_at_exit();
    if (!strcmp(what, "jumps")) return jumps();
    if (!strcmp(what, "cancels")) return cancels();
    if (!strcmp(what, "reopens")) return reopens();
    if (!strcmp(what, "no-standard")) return no_standard(argv[2]);
    if (!strcmp(what, "daemonises")) return daemonises();
    fprintf(stderr, "unknown: %s\n", what);
    return 2;
}
