/* SPDX-License-Identifier: Apache-2.0 */
/* ioctl.h -- ioctl, again when a signal came in between. */
#ifndef CC_IOCTL_H
#define CC_IOCTL_H

#include <errno.h>
#include <sys/ioctl.h>

static inline int cc_ioctl(int fd, unsigned long request, void *arg)
{
    int rc;
    do {
        rc = ioctl(fd, request, arg);
    } while (rc < 0 && errno == EINTR);
    return rc;
}

#endif
