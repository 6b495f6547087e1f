/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cores.h -- how many threads can run at once: the cores that this process may use, and no more than its cgroup's CPU quota pays for.
 *
 * A quota of 1.5 cores counts as 2: a third thread would only use up the period's share sooner and have all of them stand still.
 */
#ifndef CC_CORES_H
#define CC_CORES_H

#include <stdint.h>

uint32_t cc_usable_cores(void); /* at least 1 */

/* The smallest quota on the way from this process's cgroup to the root, in cores rounded up; 0: none, or it can't be read.
 * self: /proc/self/cgroup; root: where the cgroup file systems are mounted, /sys/fs/cgroup. */
uint32_t cc_cgroup_cores(const char *self, const char *root);

#endif
