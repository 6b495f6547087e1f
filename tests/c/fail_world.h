/* SPDX-License-Identifier: Apache-2.0 */
/* fail_world.h -- a primary and a secondary in one process, whose every step is tried again, or given up, when it fails. */
#ifndef FAIL_WORLD_H
#define FAIL_WORLD_H

#include <stdbool.h>
#include <stdint.h>

#include "colocache.h"

enum { PAGE = 4096, DENSE = 5, SPARSE = 8, SOURCES = 3, STATE_MAX = 5000 };

struct world {
    bool give_up; /* after a failure stop, as if the process had died; else go on */
    bool bounded; /* memory mode */
    bool spills;  /* and it has a spill file */
    bool uffd;    /* this kernel has the log */
    int control, guest[2], cache[2], vm, spill;
    int late[2];            /* images of a block that comes and goes */
    uint8_t *ram[2];        /* the PVM's memory */
    uint8_t *svm[2];        /* guest RAM, where the handle has it */
    uint8_t *given;         /* where the dense block is mapped before the handle is told of it */
    uint8_t *sealed_ram[2]; /* the PVM's memory at the newest sealed epoch */
    struct colocache *cc;
    struct colocache_sender *sender;
    struct colocache_source *sources[SOURCES];
    uint64_t epoch, sealed, committed;
    uint32_t n_blocks, ring_next;
    unsigned n_failures; /* steps that returned an error */
    int last_error;
};

void world_open(struct world *world); /* memory only */
void world_close(struct world *world);
int world_history(struct world *world);  /* everything; -1: gave up */
void world_recover(struct world *world); /* after giving up: a fresh attach, the promise, and a further epoch */
void __attribute__((noreturn, format(printf, 1, 2))) breach(const char *format, ...);

#endif
