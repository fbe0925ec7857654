/* Makes one system call on files below a folder fail. Loaded by LD_PRELOAD, steered by calls.py.

   Every function of libc below that Python, tensorstore and orbax use on files is replaced by one that counts its calls on
   paths below the folder. At call `target` it fails with an error number, does half of its work, or kills the process.
   Calls that do not go through libc are not seen; calls.py compares the count with strace's where that is installed. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FAIL = 0, SHORT = 1, KILL = 2 };
static char prefix[PATH_MAX];
static size_t prefix_length;
static atomic_long count, target = -1;
static atomic_int mode, number, is_armed, is_done;
static char what[64];

/* From now on, calls below `folder` count, and call `index` meets its fault. */
void faults_arm(const char *folder, long index, int fault_mode, int error_number) {
  snprintf(prefix, sizeof prefix, "%s", folder);
  prefix_length = strlen(prefix);
  count = 0;
  is_done = 0;
  what[0] = 0;
  target = index;
  mode = fault_mode;
  number = error_number;
  is_armed = 1;
}
long faults_disarm(void) { is_armed = 0; return count; }
int faults_happened(void) { return is_done; }
const char *faults_call(void) { return what; }

static int is_below(const char *path) {
  return path && !strncmp(path, prefix, prefix_length) && (path[prefix_length] == '/' || !path[prefix_length]);
}
static int fd_is_below(int fd) {
  char link[32], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_below(path);
}
static int at_is_below(int fd, const char *path) {
  return path && (path[0] == '/' ? is_below(path) : fd == AT_FDCWD ? 0 : fd_is_below(fd));
}

/* Whether this call meets the fault. Only a call that can do half of its work counts in mode SHORT. */
static int strikes(const char *name, int can_be_short) {
  if (mode == SHORT && !can_be_short) return 0;
  if (atomic_fetch_add(&count, 1) != target) return 0;
  snprintf(what, sizeof what, "%s", name);
  is_done = 1;
  if (mode == KILL) kill(getpid(), SIGKILL);
  if (mode == FAIL) errno = number;
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PLAIN(type, name, parameters, arguments, is_ours, failure) \
  type name parameters {                                           \
    static __typeof__(&name) real;                                 \
    if (!real) real = REAL(name);                                  \
    if (is_armed && (is_ours) && strikes(#name, 0)) return failure; \
    return real arguments;                                         \
  }
#define TRANSFER(name, parameters, whole, half)                    \
  ssize_t name parameters {                                        \
    static __typeof__(&name) real;                                 \
    if (!real) real = REAL(name);                                  \
    if (is_armed && n > 0 && fd_is_below(fd) && strikes(#name, n > 1)) { \
      if (mode == SHORT) return real half;                         \
      return -1;                                                   \
    }                                                              \
    return real whole;                                             \
  }
#define OPEN(name)                                                 \
  int name(const char *path, int flags, ...) {                     \
    static __typeof__(&name) real;                                 \
    va_list list; va_start(list, flags);                           \
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                                  \
    if (!real) real = REAL(name);                                  \
    if (is_armed && is_below(path) && strikes(#name, 0)) return -1; \
    return real(path, flags, bits);                                \
  }
#define OPENAT(name)                                               \
  int name(int at, const char *path, int flags, ...) {             \
    static __typeof__(&name) real;                                 \
    va_list list; va_start(list, flags);                           \
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; \
    va_end(list);                                                  \
    if (!real) real = REAL(name);                                  \
    if (is_armed && at_is_below(at, path) && strikes(#name, 0)) return -1; \
    return real(at, path, flags, bits);                            \
  }
#define FCNTL(name)                                                \
  int name(int fd, int command, ...) {                             \
    static __typeof__(&name) real;                                 \
    va_list list; va_start(list, command);                         \
    void *argument = va_arg(list, void *);                         \
    va_end(list);                                                  \
    if (!real) real = REAL(name);                                  \
    int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW; \
    if (is_armed && locks && fd_is_below(fd) && strikes(#name, 0)) return -1; \
    return real(fd, command, argument);                            \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FCNTL(fcntl)
FCNTL(fcntl64)
TRANSFER(read, (int fd, void *to, size_t n), (fd, to, n), (fd, to, n / 2))
TRANSFER(pread, (int fd, void *to, size_t n, off_t at), (fd, to, n, at), (fd, to, n / 2, at))
TRANSFER(pread64, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at), (fd, to, n / 2, at))
TRANSFER(write, (int fd, const void *from, size_t n), (fd, from, n), (fd, from, n / 2))
TRANSFER(pwrite, (int fd, const void *from, size_t n, off_t at), (fd, from, n, at), (fd, from, n / 2, at))
TRANSFER(pwrite64, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at), (fd, from, n / 2, at))

/* Of vectors, half of the first part is transferred. */
#define VECTOR(name)                                               \
  ssize_t name(int fd, const struct iovec *parts, int n) {         \
    static __typeof__(&name) real;                                 \
    if (!real) real = REAL(name);                                  \
    if (is_armed && n > 0 && fd_is_below(fd) && strikes(#name, parts[0].iov_len > 1)) { \
      struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2}; \
      return mode == SHORT ? real(fd, &half, 1) : -1;              \
    }                                                              \
    return real(fd, parts, n);                                     \
  }
VECTOR(readv)
VECTOR(writev)

PLAIN(int, fsync, (int fd), (fd), fd_is_below(fd), -1)
PLAIN(int, fdatasync, (int fd), (fd), fd_is_below(fd), -1)
PLAIN(int, ftruncate, (int fd, off_t size), (fd, size), fd_is_below(fd), -1)
PLAIN(int, ftruncate64, (int fd, off64_t size), (fd, size), fd_is_below(fd), -1)
PLAIN(int, rename, (const char *from, const char *to), (from, to), is_below(from) || is_below(to), -1)
PLAIN(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to),
      at_is_below(a, from) || at_is_below(b, to), -1)
PLAIN(int, link, (const char *from, const char *to), (from, to), is_below(from) || is_below(to), -1)
PLAIN(int, unlink, (const char *path), (path), is_below(path), -1)
PLAIN(int, unlinkat, (int at, const char *path, int flags), (at, path, flags), at_is_below(at, path), -1)
PLAIN(int, rmdir, (const char *path), (path), is_below(path), -1)
PLAIN(int, mkdir, (const char *path, mode_t bits), (path, bits), is_below(path), -1)
PLAIN(int, mkdirat, (int at, const char *path, mode_t bits), (at, path, bits), at_is_below(at, path), -1)
PLAIN(int, stat, (const char *path, struct stat *to), (path, to), is_below(path), -1)
PLAIN(int, stat64, (const char *path, struct stat64 *to), (path, to), is_below(path), -1)
PLAIN(int, lstat, (const char *path, struct stat *to), (path, to), is_below(path), -1)
PLAIN(int, lstat64, (const char *path, struct stat64 *to), (path, to), is_below(path), -1)
PLAIN(int, fstat, (int fd, struct stat *to), (fd, to), fd_is_below(fd), -1)
PLAIN(int, fstat64, (int fd, struct stat64 *to), (fd, to), fd_is_below(fd), -1)
PLAIN(int, fstatat, (int at, const char *path, struct stat *to, int flags), (at, path, to, flags), at_is_below(at, path), -1)
PLAIN(int, fstatat64, (int at, const char *path, struct stat64 *to, int flags), (at, path, to, flags),
      at_is_below(at, path), -1)
PLAIN(DIR *, opendir, (const char *path), (path), is_below(path), NULL)
PLAIN(DIR *, fdopendir, (int fd), (fd), fd_is_below(fd), NULL)
PLAIN(struct dirent *, readdir, (DIR *folder), (folder), fd_is_below(dirfd(folder)), NULL)
PLAIN(struct dirent64 *, readdir64, (DIR *folder), (folder), fd_is_below(dirfd(folder)), NULL)

/* Other names of stat and openat, in programs that were built for an older glibc or with fortified calls. */
#define OLD(name, parameters, arguments, is_ours)            \
  int name parameters {                                            \
    static int(*real) parameters;                                  \
    if (!real) real = (int(*) parameters)dlsym(RTLD_NEXT, #name);  \
    if (is_armed && (is_ours) && strikes(#name, 0)) return -1;     \
    return real arguments;                                         \
  }
OLD(__xstat, (int v, const char *path, struct stat *to), (v, path, to), is_below(path))
OLD(__xstat64, (int v, const char *path, struct stat64 *to), (v, path, to), is_below(path))
OLD(__lxstat, (int v, const char *path, struct stat *to), (v, path, to), is_below(path))
OLD(__lxstat64, (int v, const char *path, struct stat64 *to), (v, path, to), is_below(path))
OLD(__openat_2, (int at, const char *path, int flags), (at, path, flags), at_is_below(at, path))
OLD(__fxstatat, (int v, int at, const char *path, struct stat *to, int flags), (v, at, path, to, flags),
    at_is_below(at, path))
OLD(__fxstat, (int v, int fd, struct stat *to), (v, fd, to), fd_is_below(fd))
OLD(__fxstat64, (int v, int fd, struct stat64 *to), (v, fd, to), fd_is_below(fd))
