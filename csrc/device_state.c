/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device_state.c -- the two device-state areas.  The current record names one of them; room for the next epoch's is in the other, so
 * that the state before stays whole until the seal.
 */
#include "internal.h"

#include "checksum.h"
#include "commit.h"
#include "device_state.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "map.h"

static uint64_t area_bytes(const struct colocache *cc)
{
    return cc_round_to_page(cc->region.device_state_max_bytes);
}

/* reserve -- the first bytes of an area: read through the mapping a hole would be allocated, or be a SIGBUS */
static int reserve(struct colocache *cc, uint32_t area, uint64_t n_bytes)
{
    if (n_bytes <= cc->region.device_reserved[area])
        return 0; /* nothing of these areas is ever given back */
    int rc = cc_map_reserve(cc->region.fd, CC_DEVICES_OFFSET + area * area_bytes(cc), n_bytes, "the device-state area");
    if (rc == 0)
        cc->region.device_reserved[area] = n_bytes;
    return rc;
}

uint8_t *cc_device_area(struct colocache *cc, uint32_t area)
{
    return cc->region.devices + area * area_bytes(cc);
}

int cc_device_state_check(struct colocache *cc, const struct cc_record *record)
{
    int rc = reserve(cc, record->device_area, record->device_bytes);
    if (rc)
        return rc;
    uint64_t found = cc_checksum(cc_device_area(cc, record->device_area), record->device_bytes);
    if (found != record->device_checksum)
        return cc_fail(COLOCACHE_E_CORRUPT, "device state of epoch %llu (%llu bytes) has checksum %016llx, its record says %016llx",
                       (unsigned long long)record->epoch, (unsigned long long)record->device_bytes, (unsigned long long)found,
                       (unsigned long long)record->device_checksum);
    return 0;
}

int colocache_device_state_begin(struct colocache *cc, uint64_t epoch, uint64_t len_bytes, void **addr_out)
{
    if (!cc || !addr_out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle or addr_out is NULL");
    if (len_bytes > cc->region.device_state_max_bytes)
        return cc_fail(COLOCACHE_E_TOO_LARGE, "device state is %llu bytes, this region takes %llu: create it with a larger bound",
                       (unsigned long long)len_bytes, (unsigned long long)cc->region.device_state_max_bytes);
    struct cc_record current;
    int rc = cc_commit_read(cc->region.control, &current);
    if (rc < 0)
        return rc;
    uint32_t area = rc == 0 ? 0 : 1 - current.device_area;
    rc = reserve(cc, area, len_bytes);
    CC_CRASH_POINT("device state: room is there");
    if (rc == 0)
        rc = cc_epoch_enter(cc, epoch);
    if (rc)
        return rc;
    cc_epoch_stage(cc, &(struct cc_staged){.epoch = epoch, .len_bytes = len_bytes, .area = area});
    *addr_out = cc_device_area(cc, area);
    cc_epoch_leave(cc);
    return 0;
}

int colocache_device_state(struct colocache *cc, const void **addr_out, uint64_t *len_bytes_out)
{
    struct cc_record current;
    if (!cc || !addr_out || !len_bytes_out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle or an out-parameter is NULL");
    int rc = cc_commit_read(cc->region.control, &current);
    if (rc < 0)
        return rc;
    if (rc == 0)
        return cc_fail(COLOCACHE_E_NO_STATE, "no epoch has been sealed yet, so there is no device state");
    *addr_out = cc_device_area(cc, current.device_area);
    *len_bytes_out = current.device_bytes;
    return 0;
}
