/*
 * Calls every entry point of the fake driver in every way that a program has: linked, by dlsym, and by
 * both versions of cuGetProcAddress, at each version at which the answer changes and with each flag.
 * Every argument has a value of its own, with all bits used; it has to arrive whole, and the function's
 * own code has to come back. And cuGetProcAddress has to answer with the library's export exactly where
 * the real answer is a hooked function.
 *
 * usage: calls LIBRARY    the file name of the preloaded library; "" without one: nothing is hooked then
 */
#define _GNU_SOURCE
#include "abi.h"
#include <dlfcn.h>
#include <stdarg.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { DIRECT, ADDRESS, DLSYM, PROC_ADDRESS, PROC_ADDRESS_V2, WAYS };
static const char *const way_names[WAYS] = {"linked", "by address", "dlsym", "cuGetProcAddress",
                                            "cuGetProcAddress_v2"};
static const char *const names[];
static int way, failures;
static const char *library = "";

/* Says what is wrong, once for each entry point and way. */
__attribute__((format(printf, 3, 4))) static int fail(const char *name, int by, const char *format, ...) {
    static struct {
        const char *name;
        int way;
    } said[100];
    failures++;
    for (int i = 0; i < 100; i++) {
        if (said[i].name == name && said[i].way == by)
            return 0;
        if (!said[i].name) {
            said[i].name = name;
            said[i].way = by;
            va_list list;
            va_start(list, format);
            printf("%s, %s: ", name, way_names[by]);
            vprintf(format, list);
            putchar('\n');
            va_end(list);
            return 0;
        }
    }
    return 0;
}

/* ---- values for arguments ---- */

static unsigned char expected[512];
static size_t expected_size;
static unsigned long long state, flip;
/* Where an argument that is an address points: memory of its own, or nothing at all. */
static unsigned char *arena;
static int valid_pointers, pointers;

/* Rounds 2n and 2n+1 have each bit once set and once clear. */
static void prepare(int number, int round) {
    state = 0x9e3779b97f4a7c15ull * (unsigned)(number * 64 + round / 2 + 1);
    flip = round % 2 ? ~0ull : 0;
    expected_size = 0;
    pointers = 0;
}

static void keep(const void *argument, size_t size) {
    memcpy(expected + expected_size, argument, size);
    expected_size += size;
}

static void give(void *argument, size_t size) {
    for (size_t i = 0; i < size; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((unsigned char *)argument)[i] = (unsigned char)((state >> 32) ^ flip);
    }
    keep(argument, size);
}

static void give_pointer(void *argument, size_t size) {
    if (!valid_pointers) {
        give(argument, size);
        return;
    }
    unsigned char *memory = arena + 4096 * pointers++;
    memcpy(argument, &memory, size);
    keep(argument, size);
}

/* Whether the call that was just made has arrived as function `number`, whole, and has come back. */
static int check(int number, CUresult result) {
    const struct fake_record *got = &fake_record;
    if (result != code(number))
        return fail(names[number], way, "returned %#x, not %#x", result, code(number));
    if (got->number != number)
        return fail(names[number], way, "reached %s", names[got->number]);
    if (got->size != expected_size || memcmp(got->bytes, expected, expected_size) != 0)
        return fail(names[number], way, "the arguments did not arrive whole");
    return 1;
}

#include "calls.inc"

/* ---- the table ---- */

#define ROW(number, name, base, version, per_thread, hooked, gated) #name,
static const char *const names[] = {
#include "rows.inc"
};
#undef ROW
enum { ROWS = sizeof names / sizeof *names };

static const struct {
    const char *base;
    int version, hooked, gated;
    int (*call)(void *function, int round);
    void *linked;
} rows[ROWS] = {
#define ROW(number, name, base, version, per_thread, hooked, gated) \
    {#base, version, hooked, gated, call_##name, (void *)name},
#include "rows.inc"
#undef ROW
};

static int is_hooked(int row) { return *library && rows[row].hooked; }

static unsigned long calls[WAYS], answers, rounds;

static void call(int row, int by, void *function) {
    way = by;
    /* A gated call reads none of its arguments; a hook of its own may. */
    valid_pointers = !rows[row].gated;
    for (int round = 0; round < 2; round++)
        calls[by] += (unsigned long)rows[row].call(function, (int)(rounds % 16) * 2 + round);
    rounds++;
}

/* ---- before the gate has been started ---- */

/* Each hooked function is called first of all in a process of its own; its addresses point nowhere. */
static void in_processes_of_their_own(void) {
    int forks = 0, reads = 0;
    char readers[4096] = "";
    for (int row = 0; row < ROWS; row++) {
        if (!is_hooked(row))
            continue;
        forks++;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            way = DIRECT;
            int good = rows[row].call(NULL, 0) && rows[row].call(NULL, 1);
            fflush(stdout);
            _exit(!good);
        }
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child)
            exit(99);
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV && !rows[row].gated) {
            reads++;
            strncat(readers, " ", sizeof readers - strlen(readers) - 1);
            strncat(readers, names[row], sizeof readers - strlen(readers) - 1);
        } else if (status != 0) {
            fail(names[row], DIRECT, "the first call of a process ended with status %#x", status);
        }
    }
    printf("%d hooked entry points called first in a process of their own; %d read their arguments before "
           "the driver does:%s\n", forks, reads, readers);
}

/* ---- every way, with the gate started ---- */

/* Which row the fake driver's function is. */
static int row_of(const void *function) {
    for (int row = 0; row < ROWS; row++)
        if (fake_addresses[row] == function)
            return row;
    return -1;
}

static void by_name(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    for (int row = 0; row < ROWS; row++) {
        Dl_info info = {0};
        void *linked = rows[row].linked;
        int ours = dladdr(linked, &info) && info.dli_fname && *library && strstr(info.dli_fname, library);
        if (is_hooked(row) ? !ours : linked != fake_addresses[row])
            fail(names[row], ADDRESS, "is in %s", info.dli_fname);
        call(row, DIRECT, NULL);
        call(row, ADDRESS, linked);
        void *places[] = {driver, RTLD_DEFAULT};
        for (int i = 0; i < 2; i++) {
            void *found = dlsym(places[i], names[row]);
            if (found != linked)
                fail(names[row], DLSYM, "answers %p, not %p", found, linked);
            else
                call(row, DLSYM, found);
        }
    }
}

static void ask(const char *base, int version, int flags, int by) {
    void *real = NULL, *answer = &answer;
    CUdriverProcAddressQueryResult real_found = 7, found = 7;
    CUresult wanted = fake_look_up(base, &real, version, (cuuint64_t)flags, &real_found), result;
    if (by == PROC_ADDRESS) {
        result = cuGetProcAddress(base, &answer, version, (cuuint64_t)flags);
        found = real_found;
    } else {
        result = cuGetProcAddress_v2(base, &answer, version, (cuuint64_t)flags, &found);
    }
    answers++;
    if (result != wanted || found != real_found) {
        fail(base, by, "version %d, flags %d: %d, found %d; the driver says %d, found %d", version, flags, result,
             found, wanted, real_found);
        return;
    }
    int row = row_of(real);
    void *right = row < 0 ? real : is_hooked(row) ? rows[row].linked : fake_addresses[row];
    if (answer != right)
        fail(base, by, "version %d, flags %d: not %s's %s", version, flags,
             row >= 0 && is_hooked(row) ? "the library" : "the driver", row < 0 ? "null" : names[row]);
    else if (row >= 0)
        call(row, by, answer);
}

/* At each version at which the answer changes, just below it, and at later ones. */
static void by_proc_address(void) {
    for (int row = 0; row < ROWS; row++) {
        int versions[] = {rows[row].version, rows[row].version - 1, CUDA_VERSION, CUDA_VERSION + 1000};
        for (int i = 0; i < 4; i++)
            for (int flags = 0; flags <= 2; flags++)
                for (int by = PROC_ADDRESS; by <= PROC_ADDRESS_V2; by++)
                    ask(rows[row].base, versions[i], flags, by);
    }
    for (int by = PROC_ADDRESS; by <= PROC_ADDRESS_V2; by++)
        ask("cuNoSuchFunction", CUDA_VERSION, 0, by);
}

int main(int count, char **arguments) {
    if (count != 2)
        return 98;
    library = arguments[1];
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    arena = mmap(NULL, 64 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        return 97;
    in_processes_of_their_own();
    by_name();
    by_proc_address();
    int hooked = 0;
    for (int row = 0; row < ROWS; row++)
        hooked += is_hooked(row);
    printf("%d entry points, %d hooked; calls that arrived whole:", (int)ROWS, hooked);
    for (int by = 0; by < WAYS; by++)
        printf(" %lu %s%s", calls[by], way_names[by], by + 1 < WAYS ? "," : "");
    printf("; %lu answers of cuGetProcAddress compared; %d failures\n", answers, failures);
    return failures ? 1 : 0;
}
