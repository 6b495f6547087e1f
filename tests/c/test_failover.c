/* SPDX-License-Identifier: Apache-2.0 */
/* checkpoint.c: who may take over, asked in every phase; and what is left when a device state does not load. */
#include "rig.h"

static const uint64_t blocks[] = {100, 4097};

static int ask_failover(void *context, const void *state, uint64_t len_bytes)
{
    struct rig *rig = context;
    (void)state, (void)len_bytes;
    uint64_t epoch = 99;
    CHECK_RC(1, colocache_failover(rig->cc, &epoch)); /* in the middle of a seal: decided when it is over */
    CHECK_EQ(1, epoch);
    CHECK_RC(1, colocache_failover(rig->cc, NULL)); /* again: the same answer */
    return rig->n_blocks == 1;                      /* veto or not, as the test wants it */
}

static void failover_in_every_phase(void)
{
    struct rig rig;
    uint64_t epoch = 99;
    struct colocache_status status = {.struct_size = sizeof status};

    rig_open(&rig, 2, blocks, 4096, false); /* before anything is sealed */
    CHECK_RC(COLOCACHE_E_NO_STATE, colocache_failover(rig.cc, &epoch));
    rig_receive(&rig, 1, 0, 0, 1);
    CHECK_RC(COLOCACHE_E_NO_STATE, colocache_failover(rig.cc, &epoch));
    rig_device_state(&rig, 1, 0);
    rig_seal(&rig, 1);
    CHECK_RC(1, colocache_failover(rig.cc, &epoch)); /* sealed: there is a state, when it is flushed and loaded */
    CHECK_EQ(1, epoch);
    CHECK_RC(0, colocache_get_status(rig.cc, &status));
    CHECK_EQ(1, status.failover_pending);
    rig_flush(&rig);
    CHECK_EQ(0, rig.control->taken_over);
    CHECK_RC(1, colocache_failover(rig.cc, &epoch));
    CHECK_RC(1, colocache_loaded(rig.cc, 1)); /* now */
    CHECK_EQ(COLOCACHE_PHASE_FAILED_OVER, rig_phase(&rig));
    CHECK_EQ(cc_word_make(1), rig.control->taken_over);
    CHECK_RC(0, colocache_failover(rig.cc, &epoch));
    CHECK_RC(COLOCACHE_E_FAILED_OVER, colocache_receive_zero(rig.cc, 2, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_FAILED_OVER, rig_try_seal(&rig, 2));
    CHECK_RC(COLOCACHE_E_FAILED_OVER, colocache_abort(rig.cc, 2, "x"));
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_flush(rig.cc, NULL));
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_loaded(rig.cc, 1));
    rig_check(&rig, true);
    rig_die(&rig);
    CHECK_RC(COLOCACHE_E_FAILED_OVER, rig_attach(&rig)); /* the world has moved on */
    CHECK_RC(0, colocache_inspect(rig.control_fd, &status, NULL, NULL));
    CHECK_EQ(COLOCACHE_PHASE_FAILED_OVER, status.phase);
    rig_check(&rig, false);
    rig_close(&rig);

    rig_open(&rig, 2, blocks, 4096, false); /* live, with an epoch arriving */
    rig_receive(&rig, 1, 0, 0, 1);
    rig_checkpoint(&rig, 1, 0);
    rig_receive(&rig, 2, 0, 1, 2);
    rig_guest_write(&rig, 0, 2, 3);
    CHECK_RC(0, colocache_failover(rig.cc, &epoch));
    CHECK_EQ(1, epoch);
    rig_check(&rig, false); /* from the live state: guest RAM is the SVM's own */
    CHECK_RC(COLOCACHE_E_FAILED_OVER, colocache_receive_zero(rig.cc, 2, 0, 0, 1));
    rig_close(&rig);

    rig_open(&rig, 2, blocks, 4096, false); /* while the check runs, accepted: taken over when loaded */
    rig_receive(&rig, 1, 0, 0, 1);
    rig_checkpoint(&rig, 1, 0);
    rig_receive(&rig, 2, 0, 1, 2);
    rig_device_state(&rig, 2, 0);
    struct colocache_seal_args args = rig_seal_args(2);
    args.check = ask_failover;
    args.check_context = &rig;
    CHECK_RC(0, colocache_seal(rig.cc, &args, NULL));
    CHECK_RC(0, colocache_flush(rig.cc, NULL));
    CHECK_RC(1, colocache_loaded(rig.cc, 1));
    CHECK(memcmp(rig.blocks[0].guest, rig.blocks[0].cache, 100 * 4096) == 0);
    rig_close(&rig);

    rig_open(&rig, 1, blocks, 4096, false); /* while the check runs, vetoed: taken over at once, from the live state */
    rig_receive(&rig, 1, 0, 0, 1);
    rig_checkpoint(&rig, 1, 0);
    rig_receive(&rig, 2, 0, 1, 2);
    rig_device_state(&rig, 2, 0);
    args.check_context = &rig;
    CHECK_RC(COLOCACHE_E_VETO, colocache_seal(rig.cc, &args, NULL));
    CHECK_EQ(COLOCACHE_PHASE_FAILED_OVER, rig_phase(&rig));
    CHECK_EQ(cc_word_make(1), rig.control->taken_over);
    rig_check(&rig, false);
    rig_close(&rig);
}

static int ask_in_vain(void *context, const void *state, uint64_t len_bytes)
{
    (void)state, (void)len_bytes;
    CHECK_RC(COLOCACHE_E_NO_STATE, colocache_failover(context, NULL));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_abort(context, 1, "seal has it"));
    CHECK_RC(0, colocache_mark_dirty(context, 0, 33, 1)); /* a check may write guest RAM and say so */
    return 0;
}

static void the_first_seal_has_nothing_before_it(void)
{
    struct rig rig;
    rig_open(&rig, 1, blocks, 4096, false);
    rig_receive(&rig, 1, 0, 0, 1);
    rig_device_state(&rig, 1, 0);
    struct colocache_seal_args args = rig_seal_args(1);
    args.check = ask_in_vain;
    args.check_context = rig.cc;
    struct colocache_seal_result result = {.struct_size = sizeof result};
    CHECK_RC(0, colocache_seal(rig.cc, &args, &result));
    CHECK_EQ(2, result.flush_pages); /* page 33 is in it */
    rig_close(&rig);
}

static void a_failed_load_leaves_the_epoch_for_a_fresh_vm(void)
{
    struct rig rig;
    rig_open(&rig, 2, blocks, 4096, false);
    rig_receive(&rig, 1, 0, 0, 1);
    rig_checkpoint(&rig, 1, 0);
    rig_receive(&rig, 2, 0, 1, 2);
    rig_device_state(&rig, 2, 123);
    rig_seal(&rig, 2);
    rig_flush(&rig);
    CHECK_RC(1, colocache_failover(rig.cc, NULL));
    CHECK_RC(0, colocache_loaded(rig.cc, 0));
    CHECK_EQ(COLOCACHE_PHASE_LOAD_FAILED, rig_phase(&rig));
    CHECK_RC(COLOCACHE_E_LOAD_FAILED, colocache_failover(rig.cc, NULL));
    CHECK_RC(COLOCACHE_E_LOAD_FAILED, colocache_receive_zero(rig.cc, 3, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_LOAD_FAILED, rig_try_seal(&rig, 3));
    CHECK_RC(COLOCACHE_E_LOAD_FAILED, colocache_abort(rig.cc, 3, "x"));
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_loaded(rig.cc, 1));
    rig_check_device_state(&rig, 2, 123);
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    CHECK_EQ(2, rig.report.epoch);
    rig_check_device_state(&rig, 2, 123);
    rig_check(&rig, true);
    CHECK_RC(0, colocache_failover(rig.cc, NULL));
    rig_close(&rig);
}

int main(void)
{
    RUN(failover_in_every_phase);
    RUN(the_first_seal_has_nothing_before_it);
    RUN(a_failed_load_leaves_the_epoch_for_a_fresh_vm);
    return DONE();
}
