/* SPDX-License-Identifier: Apache-2.0 */
/*
 * colocache.h -- the COLO cache of a secondary virtual machine, as a C library.
 *
 * What it does.  A secondary VM (SVM) is kept in step with a primary (PVM).  While a checkpoint (epoch)
 * arrives, its pages go to a second image of guest memory, the cache, never to guest RAM.  When it is
 * complete it is sealed: one aligned 64-bit store makes it the state the secondary will take over from.
 * Then every page that either machine wrote is copied from the cache over guest RAM: the flush.  After a
 * crash between the two the next process that attaches repeats the flush.
 *
 * The life of a secondary, in calls.
 *
 *     colocache_create            one control region (a file descriptor of yours, size 0)
 *     colocache_add_block         once per RAM block: two images, guest RAM and cache
 *     colocache_receive_*         the initial copy, epoch 1; colocache_preflush as often as you like
 *  then for each epoch, the first included:
 *     colocache_receive_*         pages of the epoch, from any number of threads
 *     colocache_device_state_begin, then write the bytes
 *     [the SVM's vCPUs and device threads are stopped by you]
 *     colocache_sync_dirty_log    get, OR into the SVM bitmap, clear
 *     colocache_seal              the commit point; only after it may the primary be told RECEIVED
 *     colocache_flush             guest RAM becomes the epoch; committed
 *     [you load the device state]
 *     colocache_loaded            tells how that went; 1 means: do not go on as a secondary, take over now
 *     [the SVM's vCPUs run]
 *  and at the end
 *     colocache_failover          may this machine take over, and from what?
 *     colocache_close
 *
 *  After a death of the process: colocache_attach instead of create and add_block.
 *
 * What the caller must hold still.  From before colocache_sync_dirty_log until after colocache_loaded nobody
 * but this library writes guest RAM, except the load of the device state, which calls
 * colocache_mark_dirty for what it writes.  User space that writes guest RAM at any other time calls
 * colocache_mark_dirty after the write.  A dirty log must never be cleared after the vCPUs run again: the
 * writes between get and clear would be lost.
 *
 * The promise.  No single failure -- the death of one process or host, or the loss of the connection --
 * leaves the secondary without a state to take over from, once the first epoch is committed.  Not covered:
 * the secondary host losing power (shared memory is no disk), two failures before the pair has committed an
 * epoch again, and blocks given by address alone, whose memory dies with the process.
 *
 * Threads.  A handle may be used by many threads.  Safe at any time, from any thread: colocache_receive_*,
 * colocache_mark_dirty, colocache_failover, colocache_get_status, colocache_abort.  All other functions on one
 * handle are called by one thread at a time (the conductor's); colocache_close by the last one.  Different
 * handles are independent; there is no global state but each thread's own last error text.
 *
 * Processes.  A handle belongs to the process that made it; after fork the child may only leave it alone.
 * The control region is locked by its owner (an OFD lock, dropped by the kernel at death); a second owner is
 * told COLOCACHE_E_BUSY.  Signals: no function is async-signal-safe; system calls interrupted by a signal are
 * repeated.
 *
 * Errors.  Functions return 0 (or a positive count or flag, where said) or a negative code: -errno of the
 * system call that failed, or one of enum colocache_error, one code per cause.  colocache_strerror knows both.
 * colocache_last_error gives the sentence with the numbers.  After an error the object is as before the call,
 * unless said otherwise.  Every out-parameter that is a pointer to a result may be NULL if you don't want it.
 *
 * Ownership.  File descriptors stay yours; the library duplicates what it keeps.  Strings and structs passed in
 * are copied.  Pointers handed out (images, device state) live until colocache_close; device state until the
 * next seal.
 *
 * Structs that may grow begin with struct_size, which the caller sets to sizeof: a newer library then
 * knows which fields an older caller has.
 *
 * Bitmaps are little-endian 64-bit words, bit n of word w is page 64w+n of the block, bits past the last page
 * are zero: the format of KVM_GET_DIRTY_LOG.  Linux only; 64-bit only.
 */
#ifndef COLOCACHE_H
#define COLOCACHE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* cffi: begin */

/* ---- limits and numbers ------------------------------------------------------------------------------- */

#define COLOCACHE_BLOCKS_MAX 256        /* RAM blocks of one secondary */
#define COLOCACHE_NAME_BYTES 256        /* of a block's name, with its final zero byte (QEMU's idstr) */
#define COLOCACHE_HEADER_BYTES 40       /* of a message on the wire, see stream below */
#define COLOCACHE_PACKET_RUNS_MAX 1024  /* runs in one PAGES packet */
#define COLOCACHE_PACKET_PAGES_MAX 4096 /* pages in one PAGES packet, zero pages included */
#define COLOCACHE_MSG_PAGES 256         /* message type of a PAGES packet on the wire */
#define COLOCACHE_WIRE_VERSION 1
#define COLOCACHE_ANY_COUNT 0xffffffffffffffff /* seal: do not check how many pages came */

enum colocache_error {
    COLOCACHE_E_ARGUMENT = -20001,     /* an argument is out of its documented range */
    COLOCACHE_E_BUSY = -20002,         /* another live process owns this control region */
    COLOCACHE_E_EXISTS = -20003,       /* create: the control region is not empty */
    COLOCACHE_E_NOT_COLOCACHE = -20004,/* no control region: wrong magic or size */
    COLOCACHE_E_LAYOUT = -20005,       /* made by a build with another layout */
    COLOCACHE_E_CORRUPT = -20006,      /* a checksum or an invariant does not hold; nothing was changed */
    COLOCACHE_E_FOREIGN_IMAGE = -20007,/* attach: not the image (device, inode, size) the region names */
    COLOCACHE_E_BLOCK = -20008,        /* no such block, a name used twice, or too many blocks */
    COLOCACHE_E_RANGE = -20009,        /* pages past the end of the block */
    COLOCACHE_E_LENGTH = -20010,       /* a length is not what it must be */
    COLOCACHE_E_TAIL = -20011,         /* a bitmap has bits set past its last page */
    COLOCACHE_E_EPOCH = -20012,        /* this epoch number can't be used now */
    COLOCACHE_E_SEALED = -20013,       /* an epoch is sealed and its flush or load is not finished */
    COLOCACHE_E_NOT_SEALED = -20014,   /* flush or loaded without a seal before */
    COLOCACHE_E_INCOMPLETE = -20015,   /* seal: pages or device-state bytes are missing */
    COLOCACHE_E_VETO = -20016,         /* seal: the VM's check refused the device state */
    COLOCACHE_E_NO_STATE = -20017,     /* there is no state to take over from */
    COLOCACHE_E_LOAD_FAILED = -20018,  /* the device state did not load; only a fresh VM may attach */
    COLOCACHE_E_FAILED_OVER = -20019,  /* this secondary took over; it is no secondary any more */
    COLOCACHE_E_TOO_LARGE = -20020,    /* device state or packet above its bound */
    COLOCACHE_E_NO_MEMORY = -20021,    /* the backing of an image or of the region has too little room */
    COLOCACHE_E_PACKET = -20022,       /* a message's header is damaged or breaks the rules */
    COLOCACHE_E_PEER_LOST = -20023,    /* the connection was closed */
    COLOCACHE_E_TIMEOUT = -20024,      /* nothing moved on the connection for the time allowed */
    COLOCACHE_E_UNSUPPORTED = -20025,  /* the kernel, the CPU or this build lacks what was asked for */
    COLOCACHE_E_LOG_LOST = -20026,     /* a dirty log could not be read: call colocache_dirty_log_lost */
    COLOCACHE_E_ORDER = -20027         /* a call that the object's state does not allow now */
};

enum colocache_copy {                  /* how pages are copied; AUTO picks the best the CPU has */
    COLOCACHE_COPY_AUTO = 0,
    COLOCACHE_COPY_LIBC = 1,           /* memcpy per run */
    COLOCACHE_COPY_AVX2 = 2,           /* non-temporal stores, 32 bytes */
    COLOCACHE_COPY_AVX512 = 3,         /* non-temporal stores, 64 bytes */
    COLOCACHE_COPY_NEON = 4            /* aarch64 non-temporal pairs */
};

enum colocache_phase {
    COLOCACHE_PHASE_EMPTY = 0,         /* nothing to take over from yet (or no more, after an attach) */
    COLOCACHE_PHASE_LIVE = 1,          /* the SVM runs or may run; an epoch may be arriving */
    COLOCACHE_PHASE_SEALING = 2,       /* from the start of seal until loaded */
    COLOCACHE_PHASE_LOAD_FAILED = 3,
    COLOCACHE_PHASE_FAILED_OVER = 4
};

enum colocache_log_level { COLOCACHE_LOG_DEBUG = 0, COLOCACHE_LOG_INFO = 1, COLOCACHE_LOG_WARN = 2 };

struct colocache;          /* a secondary: the cache, its bitmaps and its commit record */
struct colocache_sender;   /* a primary's half: what it must still send, and what is not acknowledged */
struct colocache_source;   /* a dirty log: KVM's, the kernel's */

/* ---- library ------------------------------------------------------------------------------------------ */

/* Version as 0xMMmmpp (major, minor, patch).  Any thread. */
uint32_t colocache_version(void);

/* One sentence for a code: a COLOCACHE_E_*, a negative errno, or 0.  Never NULL; static text.  Any thread. */
const char *colocache_strerror(int code);

/* The sentence, with its numbers, of the last call on this thread that failed; "" if none did.  Valid until
 * the next call on this thread. */
const char *colocache_last_error(void);

/* The 64-bit checksum used in commit records and message headers; defined in csrc/checksum.h. */
uint64_t colocache_checksum(const void *data, uint64_t len_bytes);

/* 0 if this build and this CPU can copy with `variant`, else COLOCACHE_E_UNSUPPORTED. */
int colocache_copy_supported(int variant);

/* ---- create, attach, close ---------------------------------------------------------------------------- */

struct colocache_options {
    uint64_t struct_size;              /* sizeof(struct colocache_options) */
    uint32_t n_threads;                /* threads of the flush, the caller's included; 0 = the cores this process may use */
    uint32_t copy_variant;             /* enum colocache_copy */
    uint64_t device_state_max_bytes;   /* bound on a device state, at create; 0 = 64 MiB */
    void (*log)(void *log_context, int level, const char *sentence); /* NULL = silent; called from the calling thread */
    void *log_context;
};

struct colocache_images {
    uint64_t struct_size;              /* sizeof(struct colocache_images) */
    const char *name;                  /* of the RAM block, 1 to COLOCACHE_NAME_BYTES-1 bytes */
    uint64_t len_bytes;                /* of the block: a positive multiple of page_size */
    uint32_t page_size;                /* the tracking unit: a power of two, 4096 to 2 MiB */
    uint32_t sparse;                   /* not 0: images are not reserved; pages are allocated as they come */
    int32_t guest_fd;                  /* guest RAM image; -1: by address alone (both, then) */
    int32_t cache_fd;                  /* cache image; another file or another range than the guest's */
    uint64_t guest_offset;             /* of the block in guest_fd: a multiple of the mapping granularity */
    uint64_t cache_offset;
    void *guest_addr;                  /* where the VMM maps guest RAM already, or NULL: the library maps it */
    void *cache_addr;                  /* only for a block by address alone */
};

struct colocache_recovery {            /* what attach found and did */
    uint32_t action;                   /* enum colocache_action */
    uint32_t reserved;
    uint64_t epoch;                    /* guest RAM and device state are exactly this epoch; 0 = none */
    uint64_t receiving_epoch;          /* newest epoch of which pages may be in the cache */
    uint64_t n_pages;                  /* pages copied to get there */
    char sentence[256];                /* the same for people */
};

enum colocache_action {
    COLOCACHE_RECOVERED_NOTHING = 0,   /* no epoch was sealed: the initial copy starts again */
    COLOCACHE_RECOVERED_REPLAYED = 1,  /* a sealed epoch was flushed to its end */
    COLOCACHE_RECOVERED_RESTART = 2,   /* the whole cache was copied; the VM restarts from the epoch */
    COLOCACHE_RECOVERED_NO_RESTART = 3 /* pages of a newer epoch had come; the next checkpoint makes it whole */
};

/* Make the control region in `control_fd` (a regular or shared-memory file of size 0, open for reading and writing),
 * take its lock and return a handle in *out.  E_EXISTS if the file is not empty, E_BUSY if owned, E_NO_MEMORY. */
int colocache_create(int control_fd, const struct colocache_options *options, struct colocache **out);

/* Add a RAM block; *block_out is its index, from 0 in the order of the calls.  Both images are mapped (or taken at
 * their addresses) and must be zero-filled and of full size.  Only before the first page is received (E_ORDER).
 * E_BLOCK: name used twice or too many; E_LENGTH: length or page size; E_NO_MEMORY. */
int colocache_add_block(struct colocache *cc, const struct colocache_images *images, uint32_t *block_out);

/* Take over the control region of a process that died.  `images` names every block of the region, in any order.
 * Verifies the region, repeats or finishes what was sealed, and tells in *report what it found and did.
 * It may itself be killed at any point and called again.  E_BUSY, E_NOT_COLOCACHE, E_LAYOUT, E_CORRUPT,
 * E_FOREIGN_IMAGE, E_BLOCK (missing or unknown block), E_FAILED_OVER. */
int colocache_attach(int control_fd, const struct colocache_options *options, const struct colocache_images *images,
                     uint32_t n_images, struct colocache_recovery *report, struct colocache **out);

/* Unmap, unlock, free.  Removes nothing.  The VM must not run on the library's mappings any more. */
int colocache_close(struct colocache *cc);

/* ---- looking ------------------------------------------------------------------------------------------- */

struct colocache_status {
    uint64_t struct_size;
    uint8_t history_id[16];            /* random, made with the initial copy */
    uint32_t phase;                    /* enum colocache_phase; inspect: SEALING = sealed, not committed */
    uint32_t n_blocks;
    uint64_t sealed_epoch;             /* newest sealed epoch, 0 = none */
    uint64_t committed_epoch;          /* newest committed epoch, 0 = none */
    uint64_t receiving_epoch;          /* newest epoch whose pages may be in the cache, 0 = none */
    uint64_t received_pages;           /* pages of the open epoch so far, zero pages and repeats included */
    uint64_t pvm_pages, svm_pages, flush_pages; /* bits set now in the three bitmaps (inspect), else 0 */
    uint64_t device_state_bytes;       /* length of the sealed epoch's device state */
    uint64_t device_state_max_bytes;
    uint64_t control_bytes;            /* size of the control region */
    int64_t owner_pid;                 /* the process that locked it last */
    uint32_t failover_pending;         /* failover was asked for while sealing */
    uint32_t n_threads;                /* of the flush */
    uint32_t copy_variant;             /* enum colocache_copy in use */
    uint32_t reserved;
};

struct colocache_block_info {
    char name[COLOCACHE_NAME_BYTES];
    uint64_t len_bytes;
    uint32_t page_size;
    uint32_t sparse;
    uint64_t n_pages;
    uint64_t pvm_pages, svm_pages, flush_pages; /* bits set now */
    void *guest_addr;                  /* NULL from inspect */
    void *cache_addr;
};

enum colocache_bitmap_kind { COLOCACHE_BITMAP_PVM = 0, COLOCACHE_BITMAP_SVM = 1, COLOCACHE_BITMAP_FLUSH_SET = 2 };

/* The state of a handle.  Any thread; a snapshot. */
int colocache_get_status(struct colocache *cc, struct colocache_status *out);

struct colocache_stats {               /* of a handle since it was made */
    uint64_t struct_size;
    uint64_t received_pages;           /* zero pages and repeats included */
    uint64_t sealed_epochs, aborted_epochs;
    uint64_t flushed_pages, flushed_bytes;
    uint64_t flush_total_ns;
    uint64_t epoch;                    /* newest epoch sealed by this handle, 0 = none; the times below are its own */
    uint64_t sync_ns;                  /* in colocache_sync_dirty_log since the seal before */
    uint64_t seal_ns, flush_ns;        /* in these two calls; 0 = not flushed yet */
    uint64_t load_ns;                  /* from the end of the flush to colocache_loaded: your load of the device state */
};

/* What a handle has done, and where the time of its newest checkpoint went.  Any thread; each number by itself is exact. */
int colocache_get_stats(struct colocache *cc, struct colocache_stats *out);
/* One block, with its addresses and counts.  E_BLOCK. */
int colocache_get_block(struct colocache *cc, uint32_t block, struct colocache_block_info *out);
/* Copy of a bitmap: n_words 64-bit words, exactly (n_pages+63)/64 (E_LENGTH). */
int colocache_get_bitmap(struct colocache *cc, uint32_t block, int kind, uint64_t *words, uint64_t n_words);
/* Look at a control region without lock and without writing.  *n_blocks: in, room in `blocks`; out, blocks there are.
 * E_NOT_COLOCACHE, E_LAYOUT, E_CORRUPT. */
int colocache_inspect(int control_fd, struct colocache_status *out, struct colocache_block_info *blocks, uint32_t *n_blocks);

/* Check every invariant of the region; with `compare_pages` also that each page in neither bitmap is the same in
 * guest RAM and cache (only while the SVM is stopped, its log synced, and no receive runs).  0 or E_CORRUPT / E_TAIL
 * with the first broken invariant as last error. */
int colocache_validate(struct colocache *cc, int compare_pages);

/* ---- receive: pages go to the cache, then their bits into the PVM bitmap ------------------------------- */

/* `epoch` is the epoch the page belongs to: one that is open already or a new one, greater than any used before; the
 * first page opens it.  E_EPOCH: sealed, aborted or smaller; E_SEALED: the epoch before is not finished;
 * E_BLOCK, E_RANGE, E_LENGTH (data is not n_pages*page_size); E_NO_MEMORY (sparse).  Any number of threads. */
int colocache_receive_page(struct colocache *cc, uint64_t epoch, uint32_t block, uint64_t pfn, const void *data, uint64_t len_bytes);
int colocache_receive_zero(struct colocache *cc, uint64_t epoch, uint32_t block, uint64_t first_pfn, uint64_t n_pages);
/* data holds n_pages pages one after the other, for pfns[0], pfns[1], ...; nothing is written if any pfn is out of range. */
int colocache_receive_pages(struct colocache *cc, uint64_t epoch, uint32_t block, const uint64_t *pfns, uint64_t n_pages,
                            const void *data, uint64_t len_bytes);

/* Read messages from the stream socket `fd` and put the pages of PAGES packets of `epoch` into the cache, without a
 * copy in between, until another message comes.  Its 40 header bytes (checksum verified) are then in `header` and 0 is
 * returned; its body, if it has one, is still in the socket.  timeout_ms: longest wait without a byte, -1 = for ever.
 * *n_pages_out counts pages taken, also on error.  A damaged or wrong packet (E_PACKET, E_EPOCH, E_BLOCK, E_RANGE,
 * E_TOO_LARGE) writes nothing.  E_PEER_LOST, E_TIMEOUT.  epoch 0: take the epoch of the packets as it comes. */
int colocache_receive_stream(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch, void *header, uint64_t *n_pages_out);

/* Room for the device state of `epoch`: len_bytes at *addr_out, zero-copy in the region.  The last call before seal
 * counts.  len_bytes 0 is a state too.  E_TOO_LARGE, E_EPOCH, E_SEALED, E_NO_MEMORY. */
int colocache_device_state_begin(struct colocache *cc, uint64_t epoch, uint64_t len_bytes, void **addr_out);
/* The device state of the newest sealed epoch.  E_NO_STATE. */
int colocache_device_state(struct colocache *cc, const void **addr_out, uint64_t *len_bytes_out);

/* ---- the SVM's dirty log --------------------------------------------------------------------------------- */

/* Pages written by user space on the SVM's side.  Any thread, at any time.  E_BLOCK, E_RANGE. */
int colocache_mark_dirty(struct colocache *cc, uint32_t block, uint64_t first_pfn, uint64_t n_pages);
/* OR words of any log into the SVM bitmap: bit 0 of words[0] is page first_pfn (any page).  Bits past n_pages must be
 * zero (E_TAIL).  Clearing the log is then the caller's, before the VM runs. */
int colocache_sync_words(struct colocache *cc, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words);
/* Get, OR into the SVM bitmap, clear.  vCPUs stopped.  E_LOG_LOST if the log can't be read. */
int colocache_sync_dirty_log(struct colocache *cc, struct colocache_source *source);
/* The log is unknown (its owner died): every page counts as written by the SVM. */
int colocache_dirty_log_lost(struct colocache *cc);

struct colocache_kvm_slot {            /* a KVM memory slot that holds a part of a block */
    uint32_t slot;                     /* number given to KVM_SET_USER_MEMORY_REGION */
    uint32_t block;                    /* index of the block */
    uint64_t first_pfn;                /* page of the block where the slot begins; any page */
    uint64_t n_pages;
};

struct colocache_kvm_ring {            /* the dirty ring of one vCPU */
    int32_t vcpu_fd;                   /* the library maps the ring from it; not used if addr is given */
    uint32_t reserved;                 /* 0 */
    void *addr;                        /* where you map it already (KVM_DIRTY_LOG_PAGE_OFFSET pages into vcpu_fd), or NULL */
};

struct colocache_uffd_range {          /* memory written by threads of this process */
    uint32_t block;
    uint32_t reserved;
    uint64_t first_pfn;                /* page of the block at addr */
    uint64_t n_pages;
    void *addr;                        /* page aligned (2 MiB on hugetlb) */
};

/* KVM's dirty log of a VM.  Slots must have KVM_MEM_LOG_DIRTY_PAGES set and 4096-byte pages.  manual_protect: not 0 if
 * KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 was enabled; then get and clear are two calls, made one after the other here. */
int colocache_source_kvm(int vm_fd, const struct colocache_kvm_slot *slots, uint32_t n_slots, int manual_protect,
                         struct colocache_source **out);
/* KVM's dirty rings, one per vCPU, of ring_bytes each: the size given to KVM_ENABLE_CAP for KVM_CAP_DIRTY_LOG_RING (or _ACQ_REL), a power of
 * two, before the vCPUs were made.  Slots as above; with rings, KVM_GET_DIRTY_LOG and this VM's colocache_source_kvm do not work.
 * Taking marks entries as read, hands each page on once, and clears by KVM_RESET_DIRTY_RINGS.  The source is the only
 * reader of the rings, from before the first vCPU runs until the VM's end; mappings given by addr stay until it is closed.
 * A vCPU that comes out with KVM_EXIT_DIRTY_RING_FULL calls colocache_sync_dirty_log (on a primary colocache_sender_sync_dirty_log)
 * in its own thread and runs on: for this source that is allowed at any time, besides the one with all vCPUs stopped before each seal.
 * E_ARGUMENT (sizes, a slot given twice), E_LENGTH, E_UNSUPPORTED, -errno. */
int colocache_source_kvm_ring(int vm_fd, const struct colocache_kvm_slot *slots, uint32_t n_slots,
                              const struct colocache_kvm_ring *rings, uint32_t n_rings, uint32_t ring_bytes,
                              struct colocache_source **out);
/* The kernel's own log of 4 KiB mappings in this process: userfaultfd write-protect-async and PAGEMAP_SCAN; needs no privilege.
 * On hugetlb it sees 2 MiB at a time.  E_UNSUPPORTED on kernels before 6.7. */
int colocache_source_uffd(const struct colocache_uffd_range *ranges, uint32_t n_ranges, struct colocache_source **out);
/* Get, clear and throw away: before the VM first runs. */
int colocache_source_discard(struct colocache_source *source);
int colocache_source_close(struct colocache_source *source);

/* ---- seal, flush, abort, failover -------------------------------------------------------------------------- */

struct colocache_seal_args {
    uint64_t struct_size;
    uint64_t epoch;
    uint64_t n_pages;                  /* pages the peer says it sent for this epoch; COLOCACHE_ANY_COUNT = unchecked */
    int (*check)(void *check_context, const void *device_state, uint64_t len_bytes); /* not 0 = veto; NULL = accept */
    void *check_context;
};

struct colocache_seal_result {
    uint64_t struct_size;
    uint64_t epoch;
    uint64_t pvm_pages;                /* set in the PVM bitmap only */
    uint64_t svm_pages;                /* set in the SVM bitmap only */
    uint64_t both_pages;
    uint64_t flush_pages;              /* the union: the sum of the three */
    uint64_t check_ns, union_ns, commit_ns, clear_ns;
};

struct colocache_flush_result {
    uint64_t struct_size;
    uint64_t epoch;
    uint64_t n_pages, n_runs, n_bytes;
    uint64_t copy_ns, commit_ns;
    uint32_t n_threads;
    uint32_t reserved;
};

/* The commit point.  vCPUs stopped, log synced, all pages and the device state of args->epoch there.  Order: check the
 * counts, ask `check`, flush set := PVM | SVM, record, commit word; then both bitmaps are cleared.  Until it returns 0
 * nothing is sealed and nothing is lost: bits, cache and the epoch before stay.  An error other than E_EPOCH aborts the epoch.
 * E_EPOCH, E_INCOMPLETE, E_VETO, E_FAILED_OVER (take over instead), E_SEALED, E_NO_MEMORY (sparse). */
int colocache_seal(struct colocache *cc, const struct colocache_seal_args *args, struct colocache_seal_result *out);

/* Make guest RAM the sealed epoch, and say so in the commit record.  Can be repeated after an error.  E_NOT_SEALED. */
int colocache_flush(struct colocache *cc, struct colocache_flush_result *out);

/* After the flush: ok != 0, the device state is loaded; the SVM may run.  Returns 0, or 1 if failover was asked for
 * in the meantime: this machine takes over now.  ok == 0: the load failed; the VM must never run, memory and
 * device state stay for a fresh VM that attaches; returns 0.  E_NOT_SEALED, E_SEALED (not flushed). */
int colocache_loaded(struct colocache *cc, int ok);

/* Before epoch 1 is sealed: copy what has come to guest RAM already (bits taken before each page is copied).
 * *n_pages_out pages.  E_ORDER once anything is sealed. */
int colocache_preflush(struct colocache *cc, uint64_t *n_pages_out);

/* Give up the open epoch.  Its number is not used again; bits and cache stay.  Waits for receives under way.
 * Returns 0, or 1 if failover was asked for at the same moment: this machine takes over now.  E_EPOCH if it is not the
 * open one, E_SEALED if too late.  Any thread; shut down the sockets of receives that wait for a peer first. */
int colocache_abort(struct colocache *cc, uint64_t epoch, const char *reason);

/* May this machine take over?  0: now, from its live state; the handle takes no more epochs.  1: an epoch is being
 * sealed, flushed or loaded; when it is time colocache_loaded or colocache_abort return 1, or a failing seal leaves the
 * phase FAILED_OVER.  E_NO_STATE,
 * E_LOAD_FAILED.  *epoch_out: newest sealed epoch.  Any thread; decided by one compare-and-exchange. */
int colocache_failover(struct colocache *cc, uint64_t *epoch_out);

/* ---- the primary's half ------------------------------------------------------------------------------------ */

struct colocache_send_result {
    uint64_t struct_size;
    uint64_t n_pages;                  /* sent, zero pages included */
    uint64_t n_zero;                   /* of these, as flags */
    uint64_t n_bytes;                  /* on the wire, headers included */
    uint64_t n_packets;
};

/* A sender knows the primary's RAM blocks, at their addresses (yours; it maps nothing), and per block two bitmaps:
 * pending (still to be sent) and unacked (taken from the log since the last RECEIVED).  sender_send may run in several
 * threads on several sockets; mark_dirty in any thread; the rest in one thread at a time. */
int colocache_sender_create(struct colocache_sender **out);
int colocache_sender_close(struct colocache_sender *sender);
int colocache_sender_add_block(struct colocache_sender *sender, const char *name, const void *addr, uint64_t len_bytes,
                               uint32_t page_size, uint32_t *block_out);
/* Take the log into unacked and pending.  The log is write-protected or cleared before this returns, so before any page
 * of it is read. */
int colocache_sender_sync_dirty_log(struct colocache_sender *sender, struct colocache_source *source);
int colocache_sender_sync_words(struct colocache_sender *sender, uint32_t block, uint64_t first_pfn, uint64_t n_pages,
                                const uint64_t *words);
int colocache_sender_mark_dirty(struct colocache_sender *sender, uint32_t block, uint64_t first_pfn, uint64_t n_pages);
/* All of RAM is pending and unacked: the initial copy, or a log that was lost. */
int colocache_sender_mark_all(struct colocache_sender *sender);
/* Send pending pages as PAGES packets of `epoch` on the stream socket `fd`, gathered from guest RAM, zero pages as flags.
 * Stops after max_pages (0 = all).  With several streams, thread i of n sends the pages of stripe i, so that a page
 * always travels on the same connection and its versions stay in order.  timeout_ms as above.  E_PEER_LOST, E_TIMEOUT. */
int colocache_sender_send(struct colocache_sender *sender, int fd, int timeout_ms, uint64_t epoch, uint32_t stripe,
                          uint32_t n_stripes, uint64_t max_pages, struct colocache_send_result *out);
/* RECEIVED came (or the peer said at reconnection that it sealed): nothing is unacknowledged any more. */
int colocache_sender_received(struct colocache_sender *sender);
/* After an abort or a reconnection: everything unacknowledged is pending again. */
int colocache_sender_resend(struct colocache_sender *sender);
int colocache_sender_count(struct colocache_sender *sender, uint64_t *pending_out, uint64_t *unacked_out);

/* Fill the 40 header bytes of a message without pages: type, epoch, body length, two words of its own. */
int colocache_message_header(void *header, uint32_t type, uint64_t epoch, uint64_t body_len_bytes, uint32_t a, uint32_t b);
/* Check the checksum, magic and version of 40 header bytes and take them apart.  E_PACKET. */
int colocache_message_parse(const void *header, uint32_t *type_out, uint64_t *epoch_out, uint64_t *body_len_bytes_out,
                            uint32_t *a_out, uint32_t *b_out);

/* cffi: end */

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
