/* LD_PRELOAD: the wall clock is CLOCK_SHIFT seconds ahead, as on a machine whose clock was set so. What waits until a
   moment of that clock is handed the kernel's moment, so that waits last as long as on such a machine. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static long shift(void) {
    const char *text = getenv("CLOCK_SHIFT");
    return text ? atol(text) : 0;
}

/* The monotonic clock, which counts from a machine's start, is never so far. */
static const struct timespec *unshifted(const struct timespec *until, struct timespec *own) {
    if (!until || until->tv_sec < 1000000000)
        return until;
    own->tv_sec = until->tv_sec - shift();
    own->tv_nsec = until->tv_nsec;
    return own;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int code = real(clock, now);
    if (!code && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += shift();
    return code;
}

int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday);
    int code = real(now, zone);
    if (!code)
        now->tv_sec += shift();
    return code;
}

time_t time(time_t *now) {
    REAL(time);
    time_t found = real(NULL) + shift();
    if (now)
        *now = found;
    return found;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    REAL(pthread_cond_timedwait);
    struct timespec own;
    return real(condition, mutex, unshifted(until, &own));
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    REAL(sem_timedwait);
    struct timespec own;
    return real(semaphore, unshifted(until, &own));
}

long syscall(long number, ...) {
    REAL(syscall);
    long word[6];
    struct timespec own;
    va_list given;
    va_start(given, number);
    for (int i = 0; i < 6; i++)
        word[i] = va_arg(given, long);
    va_end(given);
    if (number == SYS_futex && (word[1] & FUTEX_CLOCK_REALTIME))
        word[3] = (long)unshifted((const struct timespec *)word[3], &own);
    return real(number, word[0], word[1], word[2], word[3], word[4], word[5]);
}
