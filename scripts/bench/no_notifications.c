/* Preloaded over a program: its file notifications never arrive, or can't be had at all. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

int inotify_add_watch(int fd, const char *path, uint32_t mask)
{
    static int last;

    (void)fd;
    (void)path;
    (void)mask;
    if (getenv("NOTIFICATIONS_FAIL")) {
        errno = ENOSPC;
        return -1;
    }
    return __sync_add_and_fetch(&last, 1);
}
