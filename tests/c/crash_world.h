/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crash_world.h -- two small machines, a history of epochs, and what must be found after a death at any point of it.
 *
 * A *case* is a pair of bitmaps: which pages the PVM and which the SVM writes.  From it a list of steps is made (create, receive,
 * seal, flush, ..., with an aborted and a vetoed epoch in between).  A child process runs the steps with the library and is killed at
 * its n-th crash point.  The *model* here runs the same steps on a few integers; it never looks at a bitmap, a record or a
 * cache of the library.  It learns two facts from the dead child: which step it was in, and whether one of the two words that
 * decide (commit word, receiving word) had been stored in that step.
 *
 * All memory modes run the same histories.  With bounded memory guest RAM is what the VM's private writes never reach, the SVM has no
 * bits, and pages of an epoch that is given up are gone.
 */
#ifndef CRASH_WORLD_H
#define CRASH_WORLD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "colocache.h"

enum {
    PAGE = 4096,
    PAGES_0 = 4,
    PAGES_1 = 1,
    PAGES = PAGES_0 + PAGES_1, /* of both blocks; page g is page g of block 0, or page g-4 of block 1 */
    ALL = (1 << PAGES) - 1,
    STEPS_MAX = 160,
    EPOCHS_MAX = 16,
    STATE_MAX = 8200, /* largest device state: not a multiple of a page */
    CASES = 256
};

enum kind {
    CREATE,
    ADD_BLOCK,
    RECEIVE,
    ZERO,
    STREAM,
    TORN,
    PREFLUSH,
    WRITE,
    SYNC,
    LATE_MARK,
    STATE,
    SEAL,
    VETO,
    FLUSH,
    LOADED,
    ABORT,
    GIVE_BACK,
    END
};

struct step {
    enum kind kind;
    unsigned epoch;
    unsigned page; /* RECEIVE, ZERO, WRITE, LATE_MARK, GIVE_BACK: page; ADD_BLOCK: block; STREAM, TORN, SYNC: set of pages */
    uint64_t tag;  /* RECEIVE, WRITE */
    uint64_t len;  /* STATE */
};

extern bool bounded; /* the memory mode of this run */
extern bool spill;   /* bounded, and all but so many staged pages go into a spill file: */
enum { STAGED_MAX = 1 };
extern bool sparse; /* mirror, and no image is reserved: holes, and pages given back */

struct history {
    unsigned pvm, svm; /* the case: sets of pages */
    int n_steps;
    struct step steps[STEPS_MAX];
    uint64_t pvm_at[EPOCHS_MAX][PAGES]; /* the PVM's memory at each epoch: tags */
    uint64_t state_len[EPOCHS_MAX];
};

/* What the child tells before it dies; in memory shared with the parent. */
struct progress {
    volatile int step;                       /* the step it is in */
    volatile int word_stored;                /* commit word stored in this step */
    volatile int receiving_stored;           /* receiving word stored in this step */
    volatile uint64_t passed[STEPS_MAX + 1]; /* crash points passed at the beginning of each step */
    volatile const char *where;              /* name of the crash point */
    char failed[400];                        /* an error it found itself */
};

struct model {
    unsigned sealed, committed, receiving;
    uint64_t guest[PAGES];                   /* guest RAM, as tags */
    uint64_t or_else[PAGES];                 /* or, half page by half page, this; the same tag where nothing was in progress */
    unsigned pvm_bits, svm_bits, flush_bits; /* that must be set at least */
    bool created, blocks;                    /* create and both add_blocks are done */
    bool partial;                            /* until the first epoch is committed: guest RAM means nothing */
};

/* crash_world.c */
uint64_t tag_of(unsigned epoch, unsigned writer, unsigned page); /* writer: 1 PVM, 2 SVM, 3 device load, 4 after a recovery */
void fill_page(void *page, uint64_t tag);                        /* tag 0: zeros */
bool page_is(const void *page, uint64_t tag);
bool page_is_either(const void *page, uint64_t tag, uint64_t other); /* each half is one of the two */
const char *name_page(const void *page);                             /* where its halves come from, for messages */
unsigned char state_byte(unsigned epoch, uint64_t i);
static inline uint64_t attachment_bytes(unsigned epoch) /* what its record says lies elsewhere: something that no other epoch's says */
{
    return epoch ? epoch * 0x1234567891ull : 0;
}
static inline uint32_t attachment_slot(unsigned epoch)
{
    return epoch / 2 % 2;
}
void make_history(struct history *history, unsigned pvm, unsigned svm);
void model_start(struct model *model);
void model_step(struct model *model, const struct history *history, const struct step *step); /* a step that was finished */
void model_death(struct model *model, const struct history *history, const struct progress *progress);
void model_attach_death(struct model *model, const struct history *history, const struct progress *progress);
const char *kind_name(enum kind kind);

/* crash_memory.c: memory that outlives children */
struct memory {
    int control, guest[2], cache[2], spill;
    uint8_t *guest_at[2]; /* the parent's mappings */
    uint8_t *cache_at[2];
    uint8_t *control_at;
    uint64_t control_bytes; /* room of the mapping; the file may be shorter */
    struct progress *progress;
};

struct picture { /* all of it, as it was at one moment */
    uint8_t guest[PAGES * PAGE], cache[PAGES * PAGE];
    bool staged[PAGES]; /* bounded, sparse: no hole in the cache, which must stay one */
    bool there[PAGES];  /* sparse: the same of guest RAM */
    uint8_t spill[(PAGES + 2) * PAGE];
    uint64_t spill_bytes;
    uint8_t *control;
    uint64_t control_bytes;
    struct progress progress;
};

void memory_make(struct memory *memory);
struct picture *memory_picture(const struct memory *memory);                        /* an empty one */
void picture_move(struct picture *picture, const struct memory *memory, bool back); /* memory into the picture, or back */
void picture_free(struct picture *picture);
void memory_reset(struct memory *memory); /* as new: zeros, control region empty */
void memory_images(const struct memory *memory, struct colocache_images images[2]);
struct colocache_options memory_options(const struct memory *memory);
int memory_attach(const struct memory *memory, struct colocache_recovery *report, struct colocache **out);
uint8_t *memory_page(const struct memory *memory, unsigned page); /* of guest RAM; sparse: a copy, as a look would fill a hole */
uint8_t *vm_page(struct colocache *cc, unsigned page);            /* the same where the VM has it */
bool cache_is_empty(const struct memory *memory);                 /* takes no memory */

/* crash_run.c: the child's part */
int in_child(void (*work)(void *context), void *context, uint64_t crash_at);
void run_step(const struct memory *memory, const struct history *history, const struct step *step, struct colocache **cc,
              const struct model *before);
void run_steps(const struct memory *memory, const struct history *history, bool check_bits);
void watch_points(struct progress *progress); /* from now on crash points are told to *progress */

/* crash_check.c: after the death; false and a message if the promise does not hold */
bool check_dead(const struct memory *memory, const struct model *model);
bool check_recovery(const struct memory *memory, const struct history *history, const struct model *model, bool take_over);
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
extern char complaint[1000];

#endif
