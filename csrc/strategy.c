/* SPDX-License-Identifier: Apache-2.0 */
/* strategy.c -- the strategies there are, each in a file of its own.  The first of a memory mode is the one that its new epochs are sealed with. */
#include "strategy.h"

#define STRATEGIES(each) each(cc_flush_copy) each(cc_flush_staged)

#define DECLARE(name) extern const struct cc_strategy name;
STRATEGIES(DECLARE)

#define ADDRESS(name) &name,
static const struct cc_strategy *const strategies[] = {STRATEGIES(ADDRESS)};

const struct cc_strategy *cc_strategy_find(uint32_t number)
{
    for (unsigned i = 0; i < sizeof strategies / sizeof *strategies; i++) {
        if (strategies[i]->number == number)
            return strategies[i];
    }
    return NULL;
}

const struct cc_strategy *cc_strategy_default(bool bounded)
{
    for (unsigned i = 0; i < sizeof strategies / sizeof *strategies; i++) {
        if (strategies[i]->bounded == bounded)
            return strategies[i];
    }
    return NULL;
}
