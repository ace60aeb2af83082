/* Writes down what a process does to the files of one folder, in order, so that a test can cut the power anywhere.
 *
 * Preloaded before libc. Each write, truncation, removal and completed sync of a file in $POWERCUT_FOLDER becomes one
 * entry of $POWERCUT_JOURNAL:
 *
 *     op (1 byte: W write, T truncate, U unlink, S sync) | path length u16 | offset u64 | data length u32 | path | data
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int journal = -2;
static const char *folder;

static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static int (*real_ftruncate)(int, off_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_unlink)(const char *);

__attribute__((constructor)) static void begin(void)
{
    real_write = dlsym(RTLD_NEXT, "write");
    real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_unlink = dlsym(RTLD_NEXT, "unlink");
    folder = getenv("POWERCUT_FOLDER");
    const char *path = getenv("POWERCUT_JOURNAL");
    journal = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
}

static void note(char op, const char *path, uint64_t offset, const void *data, uint32_t length)
{
    if (journal < 0 || !folder || strncmp(path, folder, strlen(folder)) != 0)
        return;
    uint16_t path_length = (uint16_t)strlen(path);
    char head[15];
    head[0] = op;
    memcpy(head + 1, &path_length, 2);
    memcpy(head + 3, &offset, 8);
    memcpy(head + 11, &length, 4);
    struct iovec parts[3] = {{head, sizeof head}, {(void *)path, path_length}, {(void *)data, length}};
    size_t whole = sizeof head + path_length + length;
    if (writev(journal, parts, 3) != (ssize_t)whole)
        abort();
}

static void note_fd(char op, int fd, uint64_t offset, const void *data, uint32_t length)
{
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0)
        return;
    path[size] = 0;
    note(op, path, offset, data, length);
}

ssize_t write(int fd, const void *data, size_t length)
{
    off_t at = lseek(fd, 0, SEEK_CUR);
    ssize_t done = real_write(fd, data, length);
    if (done > 0 && at >= 0)
        note_fd('W', fd, (uint64_t)at, data, (uint32_t)done);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset)
{
    ssize_t done = real_pwrite(fd, data, length, offset);
    if (done > 0)
        note_fd('W', fd, (uint64_t)offset, data, (uint32_t)done);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return pwrite64(fd, data, length, offset); }

int ftruncate64(int fd, off_t length)
{
    int done = real_ftruncate(fd, length);
    if (done == 0)
        note_fd('T', fd, (uint64_t)length, "", 0);
    return done;
}

int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }

int fsync(int fd)
{
    int done = real_fsync(fd);
    if (done == 0)
        note_fd('S', fd, 0, "", 0);
    return done;
}

int fdatasync(int fd)
{
    int done = real_fdatasync(fd);
    if (done == 0)
        note_fd('S', fd, 0, "", 0);
    return done;
}

int unlink(const char *path)
{
    int done = real_unlink(path);
    if (done == 0)
        note('U', path, 0, "", 0);
    return done;
}
