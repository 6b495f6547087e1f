/* SPDX-License-Identifier: Apache-2.0 */
/* failover.c -- may this machine take over, and from what?  The decision is epoch.c's, the answer is said here. */
#include "internal.h"

#include "commit.h"
#include "epoch.h"
#include "error.h"

int colocache_failover(struct colocache *cc, uint64_t *epoch_out)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    struct cc_record current;
    int rc = cc_commit_read(cc->region.control, &current);
    if (rc < 0)
        return rc;
    if (epoch_out)
        *epoch_out = current.epoch;
    enum cc_state from, to = cc_epoch_failover(cc, &from);
    if (to)
        return cc_epoch_failover_asked(to);
    if (from == CC_LOAD_FAILED)
        return cc_fail(COLOCACHE_E_LOAD_FAILED, "the device state of epoch %llu did not load: attach with a fresh VM to take over from it",
                       (unsigned long long)current.epoch);
    if (from == CC_CLAIMED_FIRST)
        return cc_fail(COLOCACHE_E_NO_STATE, "there is no state to take over from: the first epoch is only just being sealed");
    if (current.epoch == 0)
        return cc_fail(COLOCACHE_E_NO_STATE, "there is no secondary yet: no epoch has been sealed");
    return cc_fail(COLOCACHE_E_NO_STATE,
                   "there is no state to take over from: pages newer than epoch %llu are in the cache and the VM that ran is gone",
                   (unsigned long long)current.epoch);
}
