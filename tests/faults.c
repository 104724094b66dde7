// A file system that fails once: preloaded into a process, it spoils the n-th call that changes files below a folder.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAILS, FULL, SHORT, HALF_FAILS, DONE_BUT_FAILS };

static char folder[PATH_MAX];
static int at, kind;
static volatile int count, hit;
static char what[64];

void faults_arm(const char *below, int n, int how) {
  snprintf(folder, sizeof folder, "%s/", below);
  at = n, kind = how, count = hit = 0;
}
int faults_count(void) { return count; }
const char *faults_hit(void) { return hit ? what : ""; }

static int is_below(const char *path) { return *folder && path && !strncmp(path, folder, strlen(folder)); }
static int is_of(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = *folder ? readlink(link, path, sizeof path - 2) : -1;
  if (size < 0) return 0;
  path[size] = '/', path[size + 1] = 0;  // the folder itself counts: it is flushed
  return is_below(path);
}
// Whether this call is the one. What can be cut short is a write; what can fail after it was done is anything else.
static int is_due(const char *name, int is_write) {
  if (++count != at || hit) return 0;
  if (is_write ? kind == DONE_BUT_FAILS : kind == SHORT || kind == HALF_FAILS) return 0;
  hit = 1;
  snprintf(what, sizeof what, "%s", name);
  return 1;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define SPOIL(name, ours, call)                                    \
  do {                                                             \
    if ((ours) && is_due(#name, 0)) {                              \
      if (kind == DONE_BUT_FAILS) call;                            \
      return errno = kind == FULL ? ENOSPC : EIO, -1;              \
    }                                                              \
    return call;                                                   \
  } while (0)

ssize_t write(int fd, const void *data, size_t size) {
  if (is_of(fd) && is_due("write", 1)) {
    ssize_t written = kind == SHORT || kind == HALF_FAILS ? REAL(write)(fd, data, (size + 1) / 2) : 0;
    if (kind == SHORT) return written;
    return errno = kind == FULL ? ENOSPC : EIO, -1;
  }
  return REAL(write)(fd, data, size);
}
int fsync(int fd) { SPOIL(fsync, is_of(fd), REAL(fsync)(fd)); }
int fdatasync(int fd) { SPOIL(fdatasync, is_of(fd), REAL(fdatasync)(fd)); }
int rename(const char *a, const char *b) { SPOIL(rename, is_below(b), REAL(rename)(a, b)); }
int link(const char *a, const char *b) { SPOIL(link, is_below(b), REAL(link)(a, b)); }
int linkat(int i, const char *a, int j, const char *b, int f) { SPOIL(linkat, is_below(b), REAL(linkat)(i, a, j, b, f)); }
int symlink(const char *a, const char *b) { SPOIL(symlink, is_below(b), REAL(symlink)(a, b)); }
int unlink(const char *a) { SPOIL(unlink, is_below(a), REAL(unlink)(a)); }
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
  SPOIL(sendfile, is_of(out), ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(out, in, offset, size));
}
#define OPEN(name)                                                                      \
  int name(const char *path, int flags, ...) {                                          \
    va_list rest;                                                                       \
    va_start(rest, flags);                                                              \
    int mode = va_arg(rest, int);                                                       \
    va_end(rest);                                                                       \
    SPOIL(name, (flags & O_CREAT) && is_below(path), REAL(name)(path, flags, mode));    \
  }
OPEN(open)
OPEN(open64)
