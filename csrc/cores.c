/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* sched_getaffinity */
#endif
#include "cores.h"

#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* read_text -- the beginning of a small file, as a string; false if there is none */
static bool read_text(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);
    if (fd >= 0)
        close(fd);
    text[n < 0 ? 0 : n] = '\0';
    return n > 0;
}

static uint32_t in_cores(long long quota, long long period)
{
    if (quota <= 0 || period <= 0 || quota > LLONG_MAX - period)
        return 0;
    long long cores = (quota + period - 1) / period;
    return cores < INT_MAX ? (uint32_t)cores : 0;
}

/* quota_of -- of one cgroup: version 2 says "QUOTA PERIOD" or "max PERIOD", version 1 has a file for each and -1 for none */
static uint32_t quota_of(const char *folder)
{
    char path[PATH_MAX], text[64];
    long long quota, period;
    if (snprintf(path, sizeof path, "%s/cpu.max", folder) < (int)sizeof path && read_text(path, text, sizeof text))
        return sscanf(text, "%lld %lld", &quota, &period) == 2 ? in_cores(quota, period) : 0;
    if (snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder) >= (int)sizeof path || !read_text(path, text, sizeof text))
        return 0;
    quota = strtoll(text, NULL, 10);
    if (snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder) >= (int)sizeof path || !read_text(path, text, sizeof text))
        return 0;
    return in_cores(quota, strtoll(text, NULL, 10));
}

static uint32_t smaller(uint32_t a, uint32_t b) /* 0 = no limit */
{
    return !a || (b && b < a) ? b : a;
}

/* quota_up_to -- the smallest from `group` (which begins with /) up to the hierarchy's root.  A process in a cgroup namespace, or one
 * whose file system shows its own group as the root, finds its quota at the root itself. */
static uint32_t quota_up_to(const char *hierarchy, const char *group)
{
    char folder[PATH_MAX];
    int n = snprintf(folder, sizeof folder, "%s%s", hierarchy, group);
    if (n < 0 || n >= (int)sizeof folder)
        return 0;
    uint32_t least = 0;
    for (;;) {
        least = smaller(least, quota_of(folder));
        char *slash = strrchr(folder, '/');
        if (!slash || (size_t)(slash - folder) < strlen(hierarchy))
            return least;
        *slash = '\0';
    }
}

/* is_cpu -- is "cpu" one of the controllers, as in "cpu,cpuacct"? */
static bool is_cpu(const char *controllers)
{
    for (const char *at = controllers; *at; at += strcspn(at, ",") + (at[strcspn(at, ",")] == ',')) {
        if (strcspn(at, ",") == 3 && strncmp(at, "cpu", 3) == 0)
            return true;
    }
    return false;
}

uint32_t cc_cgroup_cores(const char *self, const char *root)
{
    char text[8192], hierarchy[PATH_MAX];
    uint32_t least = 0;
    if (!read_text(self, text, sizeof text))
        return 0;
    char *rest = text;
    for (char *line = strsep(&rest, "\n"); line; line = strsep(&rest, "\n")) {
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group || group[1] != '/') /* ID:CONTROLLERS:/GROUP; version 2 has no controllers there */
            continue;
        *group++ = '\0';
        controllers++;
        if (*controllers == '\0')
            least = smaller(least, quota_up_to(root, group));
        else if (is_cpu(controllers) && snprintf(hierarchy, sizeof hierarchy, "%s/%s", root, controllers) < (int)sizeof hierarchy)
            least = smaller(least, quota_up_to(hierarchy, group));
    }
    return least;
}

uint32_t cc_usable_cores(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                        : 1; /* fails above 1,024 CPUs: then one thread, and say so in n_threads */
    uint32_t cores = n < 1 ? 1 : (uint32_t)n, quota = cc_cgroup_cores("/proc/self/cgroup", "/sys/fs/cgroup");
    return quota && quota < cores ? quota : cores;
}
