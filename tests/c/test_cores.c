/* SPDX-License-Identifier: Apache-2.0 */
/* cores.c: quotas of both versions of cgroups, at any height, in a made-up tree. */
#include "cores.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

static char root[PATH_MAX];

static void put(const char *path, const char *text)
{
    char whole[2 * PATH_MAX], *slash;
    snprintf(whole, sizeof whole, "%s/%s", root, path);
    for (slash = whole + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        mkdir(whole, 0700);
        *slash = '/';
    }
    FILE *file = fopen(whole, "w");
    REQUIRE(file != NULL);
    fputs(text, file);
    fclose(file);
}

static uint32_t cores(const char *self)
{
    char path[2 * PATH_MAX];
    put("self", self);
    snprintf(path, sizeof path, "%s/self", root);
    return cc_cgroup_cores(path, root);
}

static void a_quota_of_version_2_is_found_at_any_height(void)
{
    put("two/inner/cpu.max", "max 100000\n");
    put("two/cpu.max", "150000 100000\n");
    put("three/cpu.max", "50000 100000\n");
    CHECK_EQ(2, cores("0::/two/inner\n")); /* 1.5 cores, rounded up */
    CHECK_EQ(2, cores("0::/two\n"));
    CHECK_EQ(1, cores("0::/three/nothing/here\n"));
    CHECK_EQ(0, cores("0::/other\n"));
    put("cpu.max", "300000 100000\n"); /* our own group is shown as the root */
    CHECK_EQ(3, cores("0::/other\n"));
    CHECK_EQ(2, cores("0::/two/inner\n")); /* the smallest one counts */
    put("cpu.max", "max 100000\n");
}

static void a_quota_of_version_1_is_found(void)
{
    put("cpu,cpuacct/pod/cpu.cfs_quota_us", "400000\n");
    put("cpu,cpuacct/pod/cpu.cfs_period_us", "100000\n");
    put("cpu,cpuacct/free/cpu.cfs_quota_us", "-1\n");
    put("cpu,cpuacct/free/cpu.cfs_period_us", "100000\n");
    CHECK_EQ(4, cores("5:memory:/pod\n4:cpu,cpuacct:/pod/inner\n0::/\n"));
    CHECK_EQ(0, cores("4:cpu,cpuacct:/free\n"));
    CHECK_EQ(0, cores("4:cpuset:/pod\n"));
}

static void what_makes_no_sense_is_no_limit(void)
{
    static const char *const texts[] = {"", "\n", "0", "0::", "0::relative\n", "::", "4:cpu,cpuacct:/pod", "0::/bad\n", "0::/zero\n"};
    put("bad/cpu.max", "lots of it\n");
    put("zero/cpu.max", "100000 0\n");
    for (unsigned i = 0; i < sizeof texts / sizeof texts[0]; i++)
        CHECK_EQ(i == 6 ? 4 : 0, cores(texts[i]));
    CHECK_EQ(0, cc_cgroup_cores("/nowhere/at/all", root));
    CHECK(cc_usable_cores() >= 1);
}

int main(void)
{
    char command[PATH_MAX + 16];
    snprintf(root, sizeof root, "/tmp/colocache-cores-XXXXXX");
    REQUIRE(mkdtemp(root) != NULL);
    RUN(a_quota_of_version_2_is_found_at_any_height);
    RUN(a_quota_of_version_1_is_found);
    RUN(what_makes_no_sense_is_no_limit);
    snprintf(command, sizeof command, "rm -r %s", root);
    CHECK_EQ(0, system(command));
    return DONE();
}
