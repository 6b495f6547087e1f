/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fault.h -- crash points for tests.
 *
 * CC_CRASH_POINT("name") stands before and after each store that matters.  In a test build (-DCOLOCACHE_FAULTS) the process
 * can be told to die (SIGKILL) when it comes by the n-th point, counted over all of them; n = 0 only counts.
 * CC_COPY_RUN, CC_COPY_PAGES and CC_HALF are how a run, scattered pages or a record are copied: whole, and in a test build page by
 * page and half by half, so that a death in the middle of each page can be had; CC_HALF_WRITTEN does it for a file (-1, errno).
 * CC_FLUSH_SOURCES tells which bitmaps the union takes, so that a demo can be seen to go wrong without one of them.
 * In a normal build both compile to nothing, and a process that asks for them by environment is refused
 * (cc_fault_refuse), so that no test can believe it injected something.
 *
 *     COLOCACHE_FAULT_CRASH_AT=n      die at the n-th crash point (from 1)
 *     COLOCACHE_FAULT_UNION=pvm|svm|none
 */
#ifndef CC_FAULT_H
#define CC_FAULT_H

enum cc_flush_sources { CC_FLUSH_BOTH = 0, CC_FLUSH_PVM_ONLY = 1, CC_FLUSH_SVM_ONLY = 2, CC_FLUSH_NONE = 3 };

/* 0, or COLOCACHE_E_UNSUPPORTED if faults are asked for by environment but not built in. */
int cc_fault_refuse(void);

#ifdef COLOCACHE_FAULTS
#include <stdint.h>
#pragma GCC visibility push(default)
extern uint64_t colocache_fault_crash_at;              /* 0 = never */
extern uint64_t colocache_fault_passed;                /* crash points passed so far */
extern void (*colocache_fault_seen)(const char *name); /* called at every point, before the death; NULL = nobody looks */
#pragma GCC visibility pop
void cc_fault_pass(const char *name);
struct cc_copy;
void cc_fault_copy_run(const struct cc_copy *copy, void *dst, const void *src, uint64_t n_bytes, uint64_t page_bytes, const char *name);
void cc_fault_copy_pages(const struct cc_copy *copy, void *dst, const void *src, const uint64_t *at, uint32_t n, const char *name);
void cc_fault_half(void *dst, const void *src, uint64_t n_bytes, const char *name);
int cc_fault_half_written(int fd, uint64_t at, const void *src, uint64_t n_bytes, const char *name);
int cc_fault_flush_sources(void);
#define CC_CRASH_POINT(name) cc_fault_pass(name)
#define CC_COPY_RUN(copy, dst, src, n_bytes, page_bytes, name) cc_fault_copy_run(copy, dst, src, n_bytes, page_bytes, name)
#define CC_COPY_PAGES(copy, dst, src, at, n, n_next, name) ((void)(n_next), cc_fault_copy_pages(copy, dst, src, at, n, name))
#define CC_HALF(dst, src, n_bytes, name) cc_fault_half(dst, src, n_bytes, name)
#define CC_HALF_WRITTEN(fd, at, src, n_bytes, name) cc_fault_half_written(fd, at, src, n_bytes, name)
#define CC_FLUSH_SOURCES() cc_fault_flush_sources()
#else
#define CC_CRASH_POINT(name) ((void)0)
#define CC_COPY_RUN(copy, dst, src, n_bytes, page_bytes, name) (copy)->run(dst, src, n_bytes)
#define CC_COPY_PAGES(copy, dst, src, at, n, n_next, name) (copy)->pages(dst, src, at, n, n_next)
#define CC_HALF(dst, src, n_bytes, name) ((void)0)
#define CC_HALF_WRITTEN(fd, at, src, n_bytes, name) 0
#define CC_FLUSH_SOURCES() CC_FLUSH_BOTH
#endif

#endif
