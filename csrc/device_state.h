/* SPDX-License-Identifier: Apache-2.0 */
/* device_state.h -- the two device-state areas of the region: the sealed epoch's, and room for the next. */
#ifndef CC_DEVICE_STATE_H
#define CC_DEVICE_STATE_H

#include "internal.h"

uint8_t *cc_device_area(struct colocache *cc, uint32_t area);
/* Are the bytes those that `record` was sealed with?  0 or E_CORRUPT. */
int cc_device_state_check(struct colocache *cc, const struct cc_record *record);

#endif
