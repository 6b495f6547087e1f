/* SPDX-License-Identifier: Apache-2.0 */
/* error.h -- the sentence that a failing call leaves for its thread. */
#ifndef CC_ERROR_H
#define CC_ERROR_H

/* Leaves the sentence, returns the code: `return cc_fail(...)` at the place that knows the numbers. */
int cc_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* "<what> failed: <why>"; returns -errno. */
int cc_fail_errno(const char *what);

#endif
