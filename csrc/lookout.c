/* SPDX-License-Identifier: Apache-2.0 */
/* lookout.c -- when a reader looks out, and when it sleeps. */
#include "lookout.h"

#include "atomics.h"
#include "clock.h"

static void judge(struct cc_lookout *lookout, bool paid)
{
    lookout->in_vain = paid ? 0 : lookout->in_vain + (lookout->in_vain < CC_LOOKOUT_SLEEPS_MAX);
    lookout->sleeps = lookout->in_vain;
}

bool cc_look_out(struct cc_lookout *lookout)
{
    const uint64_t now = cc_now_ns();
    if (!lookout->until_ns) {
        const bool much = lookout->n_bytes >= CC_LOOKOUT_PAYS;
        if (lookout->looked)
            judge(lookout, much);
        lookout->looked = false;
        lookout->n_bytes = 0;
        if (!much)
            return false;
        if (lookout->sleeps) {
            lookout->sleeps--;
            return false;
        }
        lookout->until_ns = now + CC_LOOKOUT_NS;
    } else if (now >= lookout->until_ns) {
        lookout->until_ns = 0;
        judge(lookout, false);
        return false;
    }
    for (unsigned i = 0; i < 16; i++)
        cc_relax();
    return true;
}

void cc_lookout_came(struct cc_lookout *lookout, uint64_t n_bytes)
{
    lookout->looked |= lookout->until_ns != 0;
    lookout->until_ns = 0;
    lookout->n_bytes += n_bytes;
}
