/* SPDX-License-Identifier: Apache-2.0 */
/* handle.c -- a handle: its threads and its parts, made and given back; create and close. */
#include "internal.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "block.h"
#include "control.h"
#include "cores.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "page_copy.h"
#include "pool.h"
#include "spill.h"
#include "strategy.h"
#include "version.h"

#define RECEIVE_WAIT_DEFAULT_MS 10000u

void cc_log(const struct colocache *cc, int level, const char *format, ...)
{
    if (!cc->log)
        return;
    char sentence[512];
    va_list args;
    va_start(args, format);
    vsnprintf(sentence, sizeof sentence, format, args);
    va_end(args);
    cc->log(cc->log_context, level, sentence);
}

/* check_options -- fill in defaults */
static int check_options(const struct colocache_options *options, struct colocache_options *out)
{
    const struct colocache_options none = {.struct_size = sizeof none};
    int rc = cc_take_struct(out, sizeof *out, options ? options : &none, 16, "options");
    if (rc)
        return rc;
    if (out->device_state_max_bytes == 0)
        out->device_state_max_bytes = CC_DEVICE_STATE_DEFAULT;
    if (out->device_state_max_bytes > CC_DEVICE_STATE_LIMIT)
        return cc_fail(COLOCACHE_E_TOO_LARGE, "device_state_max_bytes is %llu, the most is %llu",
                       (unsigned long long)out->device_state_max_bytes, (unsigned long long)CC_DEVICE_STATE_LIMIT);
    if (out->n_threads == 0) {
        uint32_t cores = cc_usable_cores();
        out->n_threads = cores < CC_THREADS_MAX ? cores : CC_THREADS_MAX;
    }
    if (out->n_threads > CC_THREADS_MAX)
        return cc_fail(COLOCACHE_E_ARGUMENT, "n_threads is %u, the most is %u: 0 takes as many as there are cores", out->n_threads,
                       CC_THREADS_MAX);
    if (out->memory_mode > COLOCACHE_MEMORY_BOUNDED)
        return cc_fail(COLOCACHE_E_ARGUMENT, "memory_mode is %u: there are %d (mirror) and %d (bounded)", out->memory_mode,
                       COLOCACHE_MEMORY_MIRROR, COLOCACHE_MEMORY_BOUNDED);
    return cc_fault_refuse();
}

/* cc_handle_open -- a handle over a fresh or an existing region, without its blocks */
int cc_handle_open(int control_fd, bool create, const struct colocache_options *options, struct colocache **out)
{
    if (!out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "out is NULL");
    *out = NULL;
    struct colocache_options opts;
    int rc = check_options(options, &opts);
    if (rc)
        return rc;
    struct cc_copy copy;
    if (!cc_copy_pick((int)opts.copy_variant, &copy))
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "copy variant %u is not supported by this CPU or build: use COLOCACHE_COPY_AUTO",
                       opts.copy_variant);

    struct colocache *cc = NULL;
    if (posix_memalign((void **)&cc, _Alignof(struct colocache), sizeof *cc) != 0)
        return cc_fail(-ENOMEM, "no memory for a handle");
    memset(cc, 0, sizeof *cc);
    cc->region.fd = cc->spill.fd = -1;
    cc->copy = copy;
    cc->log = opts.log;
    cc->log_context = opts.log_context;
    cc->bounded = opts.memory_mode == COLOCACHE_MEMORY_BOUNDED;
    cc->strategy = cc_strategy_default(cc->bounded);
    cc_epoch_init(cc);
    pthread_mutex_init(&cc->walking, NULL);
    pthread_mutex_init(&cc->spill.lock, NULL);
    cc->epoch.receive_wait_ns = (opts.receive_wait_ms ? opts.receive_wait_ms : RECEIVE_WAIT_DEFAULT_MS) * 1000000ull;
    cc->blocks = calloc(COLOCACHE_BLOCKS_MAX, sizeof *cc->blocks);
    rc = cc->blocks ? cc_pool_create(opts.n_threads, opts.thread_start, opts.thread_context, &cc->pool) : -ENOMEM;
    if (rc)
        (void)cc_fail(rc, "no memory or threads for a handle with %u threads: %s", opts.n_threads, colocache_strerror(rc));
    else
        rc = cc_spill_open(cc, opts.spill_fd);
    if (rc == 0)
        rc = cc_control_open(&cc->region, control_fd, opts.lock_fd, create, opts.device_state_max_bytes, cc->bounded);
    if (rc) {
        cc_handle_free(cc);
        return rc;
    }
    *out = cc;
    return 0;
}

/* cc_handle_free -- give back everything a handle holds, however far its making came */
void cc_handle_free(struct colocache *cc)
{
    cc_pool_destroy(cc->pool);
    for (uint32_t i = 0; i < cc->n_blocks; i++)
        cc_block_release(&cc->blocks[i]);
    free(cc->blocks);
    cc_control_close(&cc->region);
    cc_spill_close(cc);
    cc_epoch_destroy(cc);
    pthread_mutex_destroy(&cc->walking);
    pthread_mutex_destroy(&cc->spill.lock);
    free(cc);
}

int colocache_create(int control_fd, const struct colocache_options *options, struct colocache **out)
{
    int rc = cc_handle_open(control_fd, true, options, out);
    if (rc == 0)
        cc_log(*out, COLOCACHE_LOG_INFO, "control region created, %u threads", cc_pool_size((*out)->pool));
    return rc;
}

int colocache_let_go(struct colocache *cc)
{
    if (!cc)
        return 0;
    cc_pool_destroy(cc->pool);
    cc->pool = NULL;
    cc_control_unlock(&cc->region);
    return 0;
}

int colocache_close(struct colocache *cc)
{
    if (!cc)
        return 0;
    cc_handle_free(cc);
    return 0;
}
