/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crash_failover.c -- what another thread does in the middle of a failover or an abort, at a crash point, by turns instead of by chance.
 *
 * The hook of the crash points stands for the other thread: it is called between two lines, and calls the library.
 */
#include "rig.h"

#include "fault.h"

static const uint64_t blocks[] = {100};
static struct rig rig;
static unsigned seen;

static void live_with_epoch_2(void)
{
    seen = 0;
    rig_open(&rig, 1, blocks, 4096, false);
    rig_receive(&rig, 1, 0, 0, 1);
    rig_checkpoint(&rig, 1, 0);
    rig_receive(&rig, 2, 0, 1, 2);
}

static void end(void)
{
    colocache_fault_seen = NULL;
    rig_close(&rig);
}

/* Decided by one thread, and not in shared memory yet: nobody may have been told, or their machine runs and an attach restarts another. */
static void at_the_decision(const char *point)
{
    if (strcmp(point, "failover: decided, not told") != 0 || seen++)
        return;
    CHECK_EQ(0, rig.control->taken_over);
    CHECK(rig_phase(&rig) != COLOCACHE_PHASE_FAILED_OVER);
    CHECK_RC(COLOCACHE_E_FAILED_OVER, colocache_receive_zero(rig.cc, 2, 0, 0, 1));
    CHECK_RC(0, colocache_failover(rig.cc, NULL));
    CHECK(rig.control->taken_over != 0);
    CHECK_EQ(COLOCACHE_PHASE_FAILED_OVER, rig_phase(&rig));
}

static void a_second_thread_is_told_only_what_shared_memory_says(void)
{
    live_with_epoch_2();
    colocache_fault_seen = at_the_decision;
    CHECK_RC(0, colocache_failover(rig.cc, NULL));
    CHECK(seen > 0);
    end();
}

static void in_an_abort(const char *point)
{
    static bool inside; /* the points of the calls below are not meant */
    if (inside)
        return;
    inside = true;
    if (strcmp(point, "abort: before the claim") == 0) { /* epoch 2 is given up by another thread, and 3 opens */
        CHECK_RC(0, colocache_abort(rig.cc, 2, "faster"));
        rig_receive(&rig, 3, 0, 2, 3);
    } else if (strcmp(point, "abort: claimed") == 0) {
        CHECK_RC(1, colocache_failover(rig.cc, NULL)); /* to be decided by the abort */
    }
    inside = false;
}

static void an_abort_that_came_too_late_still_tells_of_the_takeover_it_granted(void)
{
    live_with_epoch_2();
    colocache_fault_seen = in_an_abort;
    CHECK_RC(1, colocache_abort(rig.cc, 2, "slower"));
    CHECK_EQ(COLOCACHE_PHASE_FAILED_OVER, rig_phase(&rig));
    end();
}

static void ask_in_an_abort(const char *point)
{
    if (strcmp(point, "abort: claimed") == 0 && !seen++)
        CHECK_RC(1, colocache_failover(rig.cc, NULL));
}

static void an_abort_tells_of_the_takeover_it_granted(void)
{
    live_with_epoch_2();
    colocache_fault_seen = ask_in_an_abort;
    CHECK_RC(1, colocache_abort(rig.cc, 2, "the link is gone"));
    CHECK_EQ(COLOCACHE_PHASE_FAILED_OVER, rig_phase(&rig));
    end();
}

int main(void)
{
    RUN(a_second_thread_is_told_only_what_shared_memory_says);
    RUN(an_abort_that_came_too_late_still_tells_of_the_takeover_it_granted);
    RUN(an_abort_tells_of_the_takeover_it_granted);
    return DONE();
}
