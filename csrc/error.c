/* SPDX-License-Identifier: Apache-2.0 */
/* error.c -- a sentence per code, and the last one with its numbers, per thread. */
#define _GNU_SOURCE /* strerror_r that returns the text */
#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "colocache.h"

static _Thread_local char last_error[512];

static const struct {
    int code;
    const char *sentence;
} sentences[] = {
    {COLOCACHE_E_ARGUMENT, "an argument is out of its documented range"},
    {COLOCACHE_E_BUSY, "another live process owns this control region"},
    {COLOCACHE_E_EXISTS, "the control region is not empty: attach to it, or remove it"},
    {COLOCACHE_E_NOT_COLOCACHE, "this is no colocache control region"},
    {COLOCACHE_E_LAYOUT, "the control region was made by a build with another layout"},
    {COLOCACHE_E_CORRUPT, "the control region is corrupt; nothing was changed"},
    {COLOCACHE_E_FOREIGN_IMAGE, "this is not the image that the control region names"},
    {COLOCACHE_E_BLOCK, "there is no such RAM block, or its name is used twice, or there are too many"},
    {COLOCACHE_E_RANGE, "the pages lie past the end of the RAM block"},
    {COLOCACHE_E_LENGTH, "a length is not what it must be"},
    {COLOCACHE_E_TAIL, "a bitmap has bits set past its last page"},
    {COLOCACHE_E_EPOCH, "this epoch number can't be used now"},
    {COLOCACHE_E_SEALED, "a sealed epoch is not finished yet: flush it and call loaded first"},
    {COLOCACHE_E_NOT_SEALED, "no epoch is sealed"},
    {COLOCACHE_E_INCOMPLETE, "pages or device state of the epoch are missing"},
    {COLOCACHE_E_VETO, "the VM refused the device state"},
    {COLOCACHE_E_NO_STATE, "there is no state to take over from"},
    {COLOCACHE_E_LOAD_FAILED, "the device state did not load: attach with a fresh VM"},
    {COLOCACHE_E_FAILED_OVER, "this secondary took over; it is no longer a secondary"},
    {COLOCACHE_E_TOO_LARGE, "a length is above its bound"},
    {COLOCACHE_E_NO_MEMORY, "the memory behind an image or the control region is too small"},
    {COLOCACHE_E_PACKET, "a message's header is damaged or breaks the rules"},
    {COLOCACHE_E_PEER_LOST, "the connection was closed by the peer"},
    {COLOCACHE_E_TIMEOUT, "nothing moved on the connection for the time allowed"},
    {COLOCACHE_E_UNSUPPORTED, "the kernel, the CPU or this build lacks what was asked for"},
    {COLOCACHE_E_LOG_LOST, "a dirty log could not be read: every page must count as written"},
    {COLOCACHE_E_ORDER, "this call is not allowed in the present state"},
    {COLOCACHE_E_MEMORY_MODE, "the control region was made with the other memory mode (mirror, bounded): attach with that one"},
    {COLOCACHE_E_RECEIVING, "pages of this epoch are still being received"},
    {COLOCACHE_E_STRATEGY, "the sealed epoch needs a flush strategy that this build does not have: attach with the build that sealed it"},
};

/* system_sentence -- strerror without its shared buffer.  There are two strerror_r: GNU's returns the text, which may or may not
 * be in our buffer; that of POSIX (musl) always uses our buffer and returns whether it could. */
static const char *system_sentence(int number)
{
    static _Thread_local char buffer[128];
#ifdef __GLIBC__
    return strerror_r(number, buffer, sizeof buffer);
#else
    return strerror_r(number, buffer, sizeof buffer) == 0 ? buffer : "unknown error number";
#endif
}

const char *colocache_strerror(int code)
{
    if (code >= 0)
        return "no error";
    for (size_t i = 0; i < sizeof sentences / sizeof *sentences; i++) {
        if (sentences[i].code == code)
            return sentences[i].sentence;
    }
    return code > -4096 ? system_sentence(-code) : "unknown error code";
}

const char *colocache_last_error(void)
{
    return last_error;
}

/* cc_fail -- leave the sentence for this thread, return the code */
int cc_fail(int code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return code;
}

int cc_fail_errno(const char *what)
{
    int saved = errno;
    return cc_fail(-saved, "%s failed: %s", what, system_sentence(saved));
}
