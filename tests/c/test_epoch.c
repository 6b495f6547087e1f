/* SPDX-License-Identifier: Apache-2.0 */
/* epoch.c: the table's state that no strategy here reaches yet (the VM runs, its flush is not committed), and what it allows. */
#include "internal.h"

#include "epoch.h"
#include "rig.h"

static const uint64_t blocks[] = {100};

static void sealed_and_running(struct rig *rig)
{
    rig_open(rig, 1, blocks, 4096, false);
    rig_receive(rig, 1, 0, 5, 1);
    rig_device_state(rig, 1, 0);
    rig_seal(rig, 1);
    CHECK_EQ(CC_SEALED, cc_epoch_state(rig->cc));
    CHECK_RC(0, cc_epoch_loaded(rig->cc, true, false));
    CHECK_EQ(CC_RUNNING, cc_epoch_state(rig->cc));
}

static void while_a_flush_is_not_committed_nothing_of_the_next_epoch_comes(void)
{
    struct rig rig;
    sealed_and_running(&rig);
    CHECK_EQ(COLOCACHE_PHASE_LIVE, rig_phase(&rig)); /* the VM runs */
    CHECK_RC(COLOCACHE_E_SEALED, colocache_receive_zero(rig.cc, 2, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_SEALED, rig_try_seal(&rig, 2));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_abort(rig.cc, 2, "x"));
    CHECK_RC(COLOCACHE_E_NOT_SEALED, cc_epoch_loaded(rig.cc, true, true));
    rig_guest_write(&rig, 0, 7, 7); /* its writes belong to the next epoch */
    cc_epoch_committed(rig.cc);
    CHECK_EQ(CC_LIVE, cc_epoch_state(rig.cc));
    rig_receive_zero(&rig, 2, 0, 0, 1);
    rig_close(&rig);
}

static void a_machine_that_runs_before_its_flush_is_committed_may_take_over(void)
{
    struct rig rig;
    sealed_and_running(&rig);
    CHECK_RC(0, colocache_failover(rig.cc, NULL));
    CHECK(rig.control->taken_over != 0);
    cc_epoch_committed(rig.cc); /* the flush goes on to its end, and changes nothing about it */
    CHECK_EQ(COLOCACHE_PHASE_FAILED_OVER, rig_phase(&rig));
    CHECK_RC(COLOCACHE_E_FAILED_OVER, colocache_receive_zero(rig.cc, 2, 0, 0, 1));
    rig_close(&rig);

    rig_open(&rig, 1, blocks, 4096, false); /* asked for before it runs: decided when it does */
    rig_receive(&rig, 1, 0, 5, 1);
    rig_device_state(&rig, 1, 0);
    rig_seal(&rig, 1);
    CHECK_RC(1, colocache_failover(rig.cc, NULL));
    CHECK_RC(1, cc_epoch_loaded(rig.cc, true, false));
    CHECK(rig.control->taken_over != 0);
    CHECK_EQ(CC_FAILED_OVER, cc_epoch_state(rig.cc));
    rig_close(&rig);
}

int main(void)
{
    RUN(while_a_flush_is_not_committed_nothing_of_the_next_epoch_comes);
    RUN(a_machine_that_runs_before_its_flush_is_committed_may_take_over);
    return DONE();
}
