/* SPDX-License-Identifier: Apache-2.0 */
#include "fault.h"

#include <stdlib.h>
#include <string.h>

#include "colocache.h"
#include "error.h"
#include "page_copy.h"

#ifdef COLOCACHE_FAULTS

#include <errno.h>
#include <signal.h>
#include <unistd.h>

uint64_t colocache_fault_crash_at;
uint64_t colocache_fault_passed;
void (*colocache_fault_seen)(const char *name);

int cc_fault_refuse(void)
{
    const char *at = getenv("COLOCACHE_FAULT_CRASH_AT");
    if (at)
        colocache_fault_crash_at = strtoull(at, NULL, 10);
    return 0;
}

/* Nothing is flushed, closed or unlocked: SIGKILL is what the kernel's OOM killer and an operator send too. */
void cc_fault_pass(const char *name)
{
    if (colocache_fault_seen)
        colocache_fault_seen(name);
    if (__atomic_add_fetch(&colocache_fault_passed, 1, __ATOMIC_SEQ_CST) == colocache_fault_crash_at) {
        kill(getpid(), SIGKILL);
        for (;;)
            pause();
    }
}

/* cc_fault_half -- the first half of a copy that the caller makes whole after it: a death in the middle */
void cc_fault_half(void *dst, const void *src, uint64_t n_bytes, const char *name)
{
    memcpy(dst, src, n_bytes / 2);
    cc_fault_pass(name);
}

/* cc_fault_half_written -- the same into a file: 0, or -1 with errno */
int cc_fault_half_written(int fd, uint64_t at, const void *src, uint64_t n_bytes, const char *name)
{
    ssize_t n;
    do {
        n = pwrite(fd, src, n_bytes / 2, (off_t)at);
    } while (n < 0 && errno == EINTR);
    cc_fault_pass(name);
    return n < 0 ? -1 : 0;
}

/* cc_fault_copy_run -- a run page by page, each with a death in its middle and one after it */
void cc_fault_copy_run(const struct cc_copy *copy, void *dst, const void *src, uint64_t n_bytes, uint64_t page_bytes, const char *name)
{
    for (uint64_t at = 0; at < n_bytes; at += page_bytes) {
        char *to = (char *)dst + at;
        const char *from = (const char *)src + at;
        cc_fault_half(to, from, page_bytes, name);
        copy->run(to, from, page_bytes);
        cc_fault_pass(name);
    }
}

/* cc_fault_copy_pages -- the same for scattered pages */
void cc_fault_copy_pages(const struct cc_copy *copy, void *dst, const void *src, const uint64_t *at, uint32_t n, const char *name)
{
    for (uint32_t i = 0; i < n; i++) {
        cc_fault_half((char *)dst + at[i], (const char *)src + at[i], CC_COPY_PAGE, name);
        copy->pages(dst, src, &at[i], 1, 0);
        cc_fault_pass(name);
    }
}

int cc_fault_flush_sources(void)
{
    const char *sources = getenv("COLOCACHE_FAULT_UNION");
    if (!sources)
        return CC_FLUSH_BOTH;
    if (strcmp(sources, "pvm") == 0)
        return CC_FLUSH_PVM_ONLY;
    if (strcmp(sources, "svm") == 0)
        return CC_FLUSH_SVM_ONLY;
    return strcmp(sources, "none") == 0 ? CC_FLUSH_NONE : CC_FLUSH_BOTH;
}

#else

int cc_fault_refuse(void)
{
    if (getenv("COLOCACHE_FAULT_CRASH_AT") || getenv("COLOCACHE_FAULT_UNION"))
        return cc_fail(COLOCACHE_E_UNSUPPORTED,
                       "COLOCACHE_FAULT_* is set but this build has no faults: build with COLOCACHE_FAULTS or unset it");
    return 0;
}

#endif
