/* Preloaded into a program: while the file $STALE_WHILE exists, files below $STALE_BELOW are those of a shared file system
   that has lost its server: every call fails with ESTALE. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_stale(const char *path) {
    const char *below = getenv("STALE_BELOW"), *flag = getenv("STALE_WHILE");
    int before = errno, found = below && flag && path && !strncmp(path, below, strlen(below)) && !access(flag, F_OK);
    errno = found ? ESTALE : before;
    return found;
}
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int stat(const char *path, struct stat *s) { return is_stale(path) ? -1 : NEXT(stat)(path, s); }
int stat64(const char *path, struct stat64 *s) { return is_stale(path) ? -1 : NEXT(stat64)(path, s); }
int lstat64(const char *path, struct stat64 *s) { return is_stale(path) ? -1 : NEXT(lstat64)(path, s); }
int fstatat64(int d, const char *path, struct stat64 *s, int f) { return is_stale(path) ? -1 : NEXT(fstatat64)(d, path, s, f); }
int unlink(const char *path) { return is_stale(path) ? -1 : NEXT(unlink)(path); }
int rename(const char *from, const char *to) { return is_stale(to) ? -1 : NEXT(rename)(from, to); }
int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, int);
    va_end(rest);
    return is_stale(path) ? -1 : NEXT(open64)(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, int);
    va_end(rest);
    return is_stale(path) ? -1 : NEXT(open)(path, flags, mode);
}
