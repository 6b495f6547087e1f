/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "gate.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "atomics.h"
#include "clock.h"

static void futex_wait(uint32_t *word, uint32_t while_it_is, const struct timespec *longest)
{
    /* EAGAIN (it changed), EINTR and ETIMEDOUT all mean: look again, which every caller does */
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, while_it_is, longest, NULL, 0);
}

static void futex_wake_all(uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void cc_gate_enter(struct cc_gate *gate)
{
    for (;;) {
        uint32_t now = cc_observe32(&gate->word);
        if (now & CC_GATE_CLOSED) { /* looked at before it is touched: else waiters would wake each other for ever */
            futex_wait(&gate->word, now, NULL);
            continue;
        }
        if (!(cc_add32(&gate->word, 1) & CC_GATE_CLOSED))
            return;
        cc_gate_leave(gate); /* came too late: out again, so that the closer isn't kept waiting */
    }
}

void cc_gate_leave(struct cc_gate *gate)
{
    if (cc_add32(&gate->word, (uint32_t)-1) == CC_GATE_CLOSED)
        futex_wake_all(&gate->word); /* the last one out wakes the closer */
}

void cc_gate_close(struct cc_gate *gate)
{
    uint32_t now = cc_or32(&gate->word, CC_GATE_CLOSED) | CC_GATE_CLOSED;
    while (now != CC_GATE_CLOSED) {
        futex_wait(&gate->word, now, NULL);
        now = cc_observe32(&gate->word);
    }
}

uint32_t cc_gate_close_within(struct cc_gate *gate, uint64_t longest_ns)
{
    const uint64_t begin = cc_now_ns();
    uint32_t now = cc_or32(&gate->word, CC_GATE_CLOSED) | CC_GATE_CLOSED;
    while (now != CC_GATE_CLOSED) {
        const uint64_t waited = cc_now_ns() - begin;
        if (waited >= longest_ns) {
            cc_gate_open(gate);
            return now & ~CC_GATE_CLOSED;
        }
        const uint64_t left = longest_ns - waited;
        futex_wait(&gate->word, now, &(struct timespec){.tv_sec = (time_t)(left / 1000000000u), .tv_nsec = (long)(left % 1000000000u)});
        now = cc_observe32(&gate->word);
    }
    return 0;
}

void cc_gate_open(struct cc_gate *gate)
{
    cc_and32(&gate->word, ~CC_GATE_CLOSED);
    futex_wake_all(&gate->word);
}
