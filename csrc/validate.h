/* SPDX-License-Identifier: Apache-2.0 */
/* validate.h -- what attach checks of bitmaps, too. */
#ifndef CC_VALIDATE_H
#define CC_VALIDATE_H

#include "internal.h"

/* Tails; and summaries, unless they are about to be rebuilt.  0, E_TAIL, E_CORRUPT. */
int cc_validate_bitmaps(struct colocache *cc, bool with_summaries);

#endif
