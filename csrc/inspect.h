/* SPDX-License-Identifier: Apache-2.0 */
/* inspect.h -- what a control region says by itself. */
#ifndef CC_INSPECT_H
#define CC_INSPECT_H

#include "internal.h"

/* History, epochs, sizes, owner; and the record that is named (zero: none).  0 or E_CORRUPT. */
int cc_inspect_head(const struct cc_control *control, struct colocache_status *out, struct cc_record *record);

#endif
