// What a host process may do: fork, _exit, longjmp and pthread_exit out of a call, close the driver.
#include "common.h"
#include <pthread.h>
#include <setjmp.h>
#include <sys/wait.h>
static void *driver;
static int (*copy)(uint64_t, const void *, size_t);
static int (*host)(void *, void (*)(void *), void *);
static jmp_buf back;
static volatile int stop;
static void jump(void *data) { (void)data; longjmp(back, 1); }
static void leave(void *data) { (void)data; pthread_exit(NULL); }
static void open_driver(void) {
    driver = must_open("libcuda.so.1", RTLD_NOW);
    copy = (int (*)(uint64_t, const void *, size_t))dlsym(driver, "cuMemcpyHtoD_v2");
    host = (int (*)(void *, void (*)(void *), void *))dlsym(driver, "cuLaunchHostFunc");
}
static void *busy(void *data) {
    (void)data;
    while (!stop) if (copy(11, (void *)22, 33) != 4001) abort();
    return NULL;
}
static void *one_call(void *data) { *(int *)data = copy(11, (void *)22, 33); return NULL; }
static void *leaves(void *data) { (void)data; host(NULL, leave, NULL); abort(); }
static void late(void *data) { (void)data; int code = copy(11, (void *)22, 33); if (code != 4001) abort(); (void)!write(1, "late call\n", 10); }
static pthread_key_t late_key;
static void late_again(void *data) {
    // Sets itself again, to come after every other destructor.
    static _Thread_local int rounds;
    if (++rounds < 3) pthread_setspecific(late_key, data); else late(data);
}
static void *calls_late(void *data) { pthread_setspecific(late_key, data); copy(11, (void *)22, 33); return NULL; }
static int child(int how) {
    pid_t pid = fork();
    if (pid == 0) {
        pthread_t thread;
        int code = 0;
        if (how) { if (copy(11, (void *)22, 33) != 4001) _exit(2); }
        else { open_driver(); if (copy(11, (void *)22, 33) != 4001) _exit(3); }
        pthread_create(&thread, NULL, one_call, &code);
        pthread_join(thread, NULL);
        _exit(code == 4001 ? 0 : 4);
    }
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}
int main(int argc, char **argv) {
    (void)argc;
    const char *what = argv[1];
    pthread_t threads[4];
    if (!strcmp(what, "fork")) {
        printf("before any use %d\n", child(0));
        open_driver();
        printf("before the first call %d\n", child(1));
        printf("call %d\n", copy(11, (void *)22, 33));
        printf("after the first call %d\n", child(1));
        for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, busy, NULL);
        int worst = 0;
        for (int i = 0; i < 100; i++) { int code = child(1); if (code) worst = code; }
        printf("with threads calling %d\n", worst);
        stop = 1;
        for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    } else if (!strcmp(what, "longjmp")) {
        open_driver();
        for (volatile int i = 0; i < 3; i++) if (!setjmp(back)) host(NULL, jump, NULL);
        printf("call %d\n", copy(11, (void *)22, 33));
    } else if (!strcmp(what, "pthread_exit")) {
        open_driver();
        pthread_create(&threads[0], NULL, leaves, NULL);
        pthread_join(threads[0], NULL);
        printf("call %d\n", copy(11, (void *)22, 33));
    } else if (!strcmp(what, "late")) {
        open_driver();
        pthread_key_create(&late_key, late_again);
        pthread_create(&threads[0], NULL, calls_late, &late_key);
        pthread_join(threads[0], NULL);
        printf("call %d\n", copy(11, (void *)22, 33));
    } else if (!strcmp(what, "_exit")) {
        open_driver();
        printf("call %d\n", copy(11, (void *)22, 33));
        fflush(stdout);
        _exit(7);
    } else if (!strcmp(what, "dlclose")) {
        for (int i = 0; i < 3; i++) {
            open_driver();
            printf("call %d\n", copy(11, (void *)22, 33));
            dlclose(driver);
        }
        // A pointer got before the close: ours, so it still works; without us it would be gone.
        if (getenv("LD_PRELOAD")) printf("call after close %d\n", copy(11, (void *)22, 33));
        else printf("call after close 4001\n");
        // Never called before the close.
        open_driver();
        dlclose(driver);
        open_driver();
        printf("call %d\n", copy(11, (void *)22, 33));
    }
    return 0;
}
