/* SPDX-License-Identifier: Apache-2.0 */
/*
 * colocache.h -- the COLO cache of a secondary virtual machine, as a C library, and its manual.
 *
 * What it does.  A secondary VM (SVM) is kept in step with a primary (PVM).  While a checkpoint
 * (epoch) arrives, its pages go to a second image of guest memory, the cache, never to guest RAM.
 * When it is complete it is sealed: one aligned 64-bit store makes it the state the secondary will
 * take over from.
 * Then every page that either machine wrote is copied from the cache over guest RAM: the flush.
 * After a crash between the two the next process that attaches repeats the flush.
 *
 * Contents: the life of a secondary, the life of a primary, memory you bring, bounded memory,
 * memory that comes and goes, what you must hold still, KVM, threads, processes and signals,
 * errors, ownership, structs and versions, limits, after a death, the promise.
 * A whole VMM that uses all this in 400 lines is tests/c/vmm_secondary.c; csrc/README.md tells how
 * the inside works.
 *
 * ---- The life of a secondary, in calls ----
 *
 *     colocache_create            one control region (a file descriptor of yours, size 0)
 *     colocache_add_block         once per RAM block: two images, guest RAM and cache; more may
 *                                 come later
 *     colocache_source_*          the SVM's dirty log; colocache_source_discard before it runs
 *     colocache_receive_*         the initial copy, epoch 1; colocache_preflush at any time
 *  then for each epoch, the first included:
 *     colocache_receive_*         pages of the epoch, from any number of threads
 *     colocache_device_state_begin, then write the bytes: before the last pages, or after them
 *     [you stop the SVM's vCPUs and device threads; the receiving calls have come back]
 *     colocache_sync_dirty_log    get, OR into the SVM bitmap, clear (or colocache_sync_words, for
 *                                 a log of your own)
 *     colocache_seal              the commit point; only after it may the primary be told RECEIVED
 *     colocache_flush             guest RAM becomes the epoch; committed
 *     [you load the device state: colocache_device_state]
 *     colocache_loaded            tells how that went; 1 means: do not go on as a secondary, take
 *                                 over now
 *     [the SVM's vCPUs run, after the first epoch for the first time; the primary is told LOADED]
 *  and at the end
 *     colocache_failover          may this machine take over, and from what?
 *     colocache_source_close, colocache_close
 *
 *  An epoch that will not be completed: colocache_abort, and the SVM runs on as it was, if it ever
 *  ran.  Its pages and bits stay and are part of the next epoch that is sealed; the primary sends
 *  again what it has no RECEIVED for.
 *  The connection is lost: colocache_abort the open epoch, wait as long as you like for the primary
 *  to come back, then colocache_failover: 0, and this VM is the machine the world sees, from where
 *  it stands; if it was stopped, it runs.
 *  The connection is lost after a seal (RECEIVED can't be written): flush, load, loaded as always,
 *  then the same.
 *
 * ---- The life of a primary, in calls ----
 *
 *     colocache_sender_create, colocache_sender_add_block in the order of the secondary's blocks
 *     colocache_source_discard, colocache_sender_mark_all       everything must be sent
 *     colocache_sender_send                                     epoch 1, while the PVM runs
 *  then for each epoch:
 *     colocache_sender_sync_dirty_log, colocache_sender_send    at any time, while the PVM runs
 *     [the secondary says that its VM stands; you stop the PVM's vCPUs and device threads]
 *     [you save the device state, which may write guest RAM, and send it]
 *     colocache_sender_sync_dirty_log, colocache_sender_send    the rest; then how many pages were
 *                                                               sent for the epoch
 *     [RECEIVED comes] colocache_sender_received; the PVM runs; release the output withheld
 *     [LOADED comes] pages of the next epoch may go
 *  After an aborted epoch: colocache_sender_resend.  While the connection is lost the PVM may run
 *  on; its log keeps.
 *  At a reconnection the secondary tells its history_id and sealed_epoch (colocache_get_status) and
 *  the primary compares.  The same history and the epoch in flight sealed:
 *  colocache_sender_received.  The same history and the epoch acknowledged last:
 *  colocache_sender_resend.  Anything else (a new region, nothing sealed):
 *  colocache_sender_mark_all, as resend would leave out every page acknowledged before and nobody
 *  would notice.  While the fate of an epoch in flight is unknown take nothing from the log:
 *  "it is sealed" would clear what is not in it.
 *  A transport of your own: colocache_sender_next instead of colocache_sender_send.
 *  Nobody but you sends messages other than PAGES; colocache_message_header makes headers for them.
 *
 * ---- Memory you bring ----
 *
 *  The library names and creates no memory.  You give it descriptors:
 *   - the control region: an empty regular or shared-memory file (memfd_create, shm_open), which it
 *     sizes itself.  It is opened again through /proc/self/fd; where /proc is not mounted you open
 *     it twice and give lock_fd in the options;
 *   - per block two images: each a range of a file (memfd, POSIX shared memory, hugetlbfs),
 *     zero-filled, disjoint, beginning at a multiple of the file's granularity (4096, or its huge
 *     page size) and long enough for the block rounded up to it.
 *     That they are zero is not checked: a page that is not, and never comes, is a wrong page for
 *     ever.  So load no firmware into guest RAM beforehand; it comes from the primary like
 *     everything else.
 *  Reserve an image before you add it: posix_fallocate on the file (a hugetlb mapping reserves by
 *  itself).  A page that can't be allocated later is a SIGBUS in whoever touches it.  With `sparse`
 *  set the library allocates both pages itself before it writes or flushes them and says
 *  COLOCACHE_E_NO_MEMORY instead.  Do not shrink the files and do not punch holes in them:
 *  colocache_give_back gives pages back.
 *  To survive your process, descriptors must be held by somebody else too, or the files must have
 *  names.
 *  Guest RAM is mapped by the library, shared and writable (colocache_get_block tells where), or
 *  you give guest_addr, your own MAP_SHARED mapping of guest_fd at guest_offset (checked when the
 *  block is added, by the kernel's list of mappings; the library writes through one of its own).
 *  A block by address alone (both descriptors -1) can be private memory; it dies with the process,
 *  and with one such block nobody can attach to the region: that is said to `log` (WARN) when it is
 *  added.
 *
 * ---- Bounded memory ----
 *
 *  With options.memory_mode BOUNDED a secondary needs one image and a little, not two.
 *   - The guest image is the newest committed epoch, whole.  The VM maps it MAP_PRIVATE: its first
 *     write to a page makes a copy of its own, and the image stays what it is.  The library makes
 *     that mapping (colocache_get_block tells where) and another one for itself; or you give
 *     guest_addr, your own MAP_PRIVATE mapping of guest_fd (what kind it is, the kernel is asked,
 *     it is never tried with a store; at a multiple of 1 GiB the flush is quickest); or the VM is
 *     another process that maps the file by itself.
 *   - The cache holds only the pages of the open epoch.  Give an empty file of full size
 *     (ftruncate, no posix_fallocate) on 4 KiB pages, and no other block's guest RAM in it: memory
 *     comes with the pages and goes when their epoch is committed or given up; colocache_add_block
 *     gives back what was allocated.  status.staged_bytes is what it takes now.
 *   - There is no dirty log of the SVM.  What it wrote is its private pages, which colocache_flush
 *     forgets in the library's or your mapping; a VM in another process calls
 *     colocache_private_forget itself, or its process ends, after the flush and before the next
 *     device state is loaded.  colocache_mark_dirty and the sync calls check their arguments and
 *     do nothing, the SVM bitmap stays empty.  The vCPUs stand from before the seal until after
 *     colocache_loaded, as ever.
 *   - The initial copy goes straight to guest RAM: no private mapping of it may have been written
 *     before the first colocache_loaded.
 *   - After a death every attach finds guest RAM exactly the newest sealed epoch: RESTART (or
 *     REPLAYED), never NO_RESTART. What had come of a newer epoch is thrown away; the primary
 *     sends it again (colocache_sender_resend).  So is what had come of an epoch that is aborted,
 *     or that a failing seal gave up.
 *   - After a takeover colocache_fold brings the private copies into the image, a part at a time.
 *   - A machine without room for a further page, or a limit that it would pass: the receiving call
 *     says COLOCACHE_E_NO_MEMORY; abort the epoch.
 *   - With options.spill_fd, a file on a disk, pages that would pass the limit are written there
 *     instead, and come from there in the flush; 512 KiB of it are in memory at a time, and 32 KiB
 *     for each thread that receives.  What is received in place is not spilled.  A disk that is
 *     full or fails costs the epoch: E_NO_MEMORY or -errno from the receiving call or the seal,
 *     before the commit point.  The file belongs to the region as its images do: attach wants the
 *     same one (E_FOREIGN_IMAGE) if the epoch that it has to replay was spilled.  A disk that can't
 *     be read back between seal and committed is as a host that loses power: not covered.
 *   - How much memory the secondary takes beside the one image: status.staged_bytes,
 *     colocache_private_bytes of the VM's mappings, the control region.  Near a limit ask for a
 *     checkpoint: both go down to nothing with it.  colocache_limit_staged keeps the first below
 *     what you say; of the second only standing vCPUs take no more.
 *   - Refused: hugetlb (a private copy is a whole huge page), blocks by address, SHARED_ELSEWHERE.
 *     Nobody may punch holes into the guest image (a balloon, free page reporting): that changes
 *     the image under a private mapping too.
 *
 * ---- Memory that comes and goes ----
 *
 *  RAM that is plugged in while the machines run is a new block, added on both sides in the same
 *  order: colocache_add_block, then colocache_sender_add_block, whose pages the primary sends only
 *  when it was told that the secondary has the block.
 *   - The next epoch that is sealed has it; no epoch before it has.  Until then, whichever epoch
 *     is aborted, all of it counts as written by the SVM: its first flush makes it whole.
 *   - After a death before that seal the block is all zeros, in a VM that knows nothing of it
 *     yet, as its device state is older.
 *   - A process can die between making the files and the return of add_block, so whoever attaches
 *     asks colocache_inspect which blocks the region has; what it does not name was never used, or
 *     was removed.
 *   - A KVM slot of the new block has KVM_MEM_LOG_DIRTY_PAGES from the start, and is in the source
 *     before the next sync.
 *
 *  RAM that is unplugged is a block that goes: colocache_remove_block, and
 *  colocache_sender_remove_block when the primary's machine has it no more.
 *   - It goes with the seal of the next epoch.  Until then nothing changes: its pages may still
 *     come and count, it is marked and synced, and after a death the epoch before is there with
 *     it.  An abort keeps the intention; a death forgets it, so remove it again after the attach
 *     (unless inspect no longer names it).
 *   - Between that seal and colocache_loaded you take it out of the SVM: its KVM slots go, between
 *     colocache_source_change_begin and _end; a uffd source that logs it is made anew before the
 *     next sync, as a log with pages of no block is refused.  colocache_loaded then unmaps the
 *     library's mappings.  What is in the images is yours again; bounded memory leaves there what
 *     was staged of it.
 *   - Its index is not given to another block, its name may be: a region has 256 blocks in its
 *     life.
 *
 * ---- Memory that a guest gives back ----
 *
 *  A block added with `sparse`, its images in files of 4 KiB pages that can be punched, takes no
 *  memory for pages of zeros: those that were never there stay holes in both images, and those that
 *  become zeros are given back, in the cache when they come, in guest RAM with the flush.  (During
 *  the initial copy a page that has come already keeps its memory.  On huge pages, and where a file
 *  can't be punched, zeros are written.)  With bounded memory this is so for the initial copy.
 *   - What the SVM gives back: colocache_give_back, and nobody else punches.  The pages count as
 *     written and are zeros in guest RAM; the cache keeps its own, which a restart may need.  The
 *     next flush brings back what the primary has there, so the gain lasts where the primary's
 *     guest gave the same pages back.  Until loaded it is refused, and may be forgotten.
 *   - What the PVM gives back: your memory, so your call (madvise or fallocate); when the pages are
 *     zeros, colocache_sender_mark_dirty.  They travel as flags, and the secondary gives them back
 *     with the flush of their epoch.  The sender reads them to see that they are zeros: in memory
 *     that is a shared file that takes them again, so punch once more after RECEIVED, or use
 *     private memory, where it takes nothing.
 *
 * ---- What you must hold still, and when ----
 *
 *  From before colocache_sync_dirty_log until after colocache_loaded nobody but this library writes
 *  guest RAM: vCPUs are out of the guest and stay out, device threads and DMA stand.  The one
 *  exception is the load of the device state, which calls colocache_mark_dirty for what it writes.
 *  (What such a write hits was equal to the primary's a moment before, so the next flush must
 *  restore it.)
 *  User space that writes guest RAM at any other time (device emulation, vhost, a debugger) calls
 *  colocache_mark_dirty after the write and before it lets itself be stopped for a checkpoint; or,
 *  if it has a log of its own, you hand that to colocache_sync_words.  Too many dirty bits cost a
 *  copy, a missing one is a wrong page for ever.
 *  The cache images are the library's: read them if you like, write them never.
 *  On a CPU whose instruction cache does not see stores (ARM) the flush may have rewritten code of
 *  the guest through the host's mapping, and KVM cleans caches only when it maps a page, not when
 *  you write it later: invalidate the guest's instruction cache after colocache_flush (after
 *  colocache_attach and colocache_private_forget too), before its vCPUs run.
 *  Each log is got, ORed and cleared before the vCPUs run again.  A log that is cleared after they
 *  run loses what was written in between.  A log that can't be read (COLOCACHE_E_LOG_LOST):
 *  colocache_dirty_log_lost, and go on.
 *  Who pauses whom: the primary asks for the checkpoint, you pause the SVM and answer, then the
 *  primary pauses the PVM.  You let the SVM run after colocache_loaded, or after an abort; the
 *  primary lets the PVM run when it hears that you sealed (RECEIVED) or gave up, and sends nothing
 *  of the next epoch before it hears LOADED.
 *
 * ---- KVM ----
 *
 *  Memory slots map the guest images and have KVM_MEM_LOG_DIRTY_PAGES set from before the SVM first
 *  runs.  A slot lies within one block, may begin at any of its pages, and is tracked in units of
 *  4096 bytes whatever backs it; so the block's page_size is 4096.  Slots that hold no block (ROM,
 *  device memory) are not listed.
 *  Choose one source for a VM: colocache_source_kvm, or _kvm_ring if the VM was made with dirty
 *  rings.  Enable KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 if there is one (flag 1, not INITIALLY_SET):
 *  the get is then almost free.
 *  The order at a checkpoint: all vCPUs out of KVM_RUN (an exit that is half done, such as port
 *  I/O, is completed by one more KVM_RUN with immediate_exit set, before registers are read or
 *  replaced) -> colocache_sync_dirty_log -> seal -> flush -> KVM_SET_* of the device state ->
 *  colocache_loaded -> KVM_RUN.  The flush needs no KVM call: guest and library share the pages.
 *  Slots change only while vCPUs stand, between colocache_source_change_begin and
 *  colocache_source_change_end.  Changed without them, or with logging switched off and on, they
 *  have lost what was logged: colocache_dirty_log_lost then.
 *
 * ---- Threads ----
 *
 *  A handle may be used by many threads.  Safe at any time, from any thread: colocache_receive_*,
 *  colocache_mark_dirty, colocache_give_back, colocache_sync_words, colocache_failover,
 *  colocache_abort,
 *  colocache_get_status, colocache_get_stats.  All other functions on one handle are called by one
 *  thread at a time (the conductor's); colocache_close by the last one.  colocache_seal and
 *  colocache_abort wait for receiving calls that are in the middle of a packet, at most
 *  receive_wait_ms (E_RECEIVING then): shut down their sockets first if their peer may be dead.
 *  A source is used by one thread at a time (a ring source by any).  A sender:
 *  colocache_sender_send in several threads with a socket and a stripe each,
 *  colocache_sender_mark_dirty in any thread, the rest in one.
 *  Different handles are independent; there is no global state but each thread's own last error
 *  text.
 *  Callbacks: `log` and `check` are called in the thread of the call that caused them.  They return
 *  soon, let neither longjmp nor a C++ exception pass through the library, and call at most
 *  functions that are safe from any thread, but not receive and abort.
 *
 * ---- Processes and signals ----
 *
 *  A handle, source or sender belongs to the process that made it; after fork the child may only
 *  leave it alone or exec.
 *  (Worker threads don't exist in the child, and a child that lives on keeps the region's lock
 *  after its parent's death.)
 *  All descriptors the library makes are close-on-exec.
 *  The control region is locked by its owner (an OFD lock on an open file description of the
 *  library's own, dropped by the kernel at death); a second owner is told COLOCACHE_E_BUSY with the
 *  first one's pid.
 *  No function is async-signal-safe: in a handler set a flag, or write to an eventfd.  System calls
 *  interrupted by a signal are repeated; worker threads block all signals; writing to a closed
 *  socket raises no SIGPIPE.  The library installs no handlers.  SIGBUS comes only from memory you
 *  did not reserve, or took away.
 *  In a jail.  Create, attach and add_block open files under /proc and /sys, unless /proc is not
 *  there: lock_fd then, and no guest_addr.  From then until close, these system calls and no
 *  others are made: futex, recvmsg, sendmsg, poll or ppoll, ioctl (dirty logs), fallocate (a device
 *  state, sparse pages), lseek and pwrite64 (sparse images), fstat and pread64 (validate),
 *  clock_gettime (where the vDSO has none); nothing is allocated.  colocache_close adds munmap,
 *  close, fcntl and what the C library does to end a thread; the colocache_loaded of an epoch that
 *  a block went with adds munmap and close.  tests/c/test_jail.c runs under exactly this list.
 *  A colocache_add_block in the jail, without guest_addr, adds fstat, fstatfs, fcntl, ftruncate,
 *  fallocate and mmap, and after an error munmap and close.
 *  Bounded memory adds pwrite64, fallocate, madvise, ioctl, openat and close (/proc/self/pagemap);
 *  a spill file pread64, ftruncate, sync_file_range and fadvise64.
 *
 * ---- Errors ----
 *
 *  Functions return 0 (or a positive flag, where said) or a negative code: -errno of the system
 *  call that failed, or one of enum colocache_error, one code per cause.  colocache_strerror knows
 *  both; colocache_last_error gives the sentence with the numbers, of this thread.  After an error
 *  the object is as before the call, unless said otherwise; what a function lists are the codes
 *  that say something about your call, COLOCACHE_E_ARGUMENT (NULL, struct_size) and -errno can come
 *  from any.
 *  Every out-parameter that is a pointer to a result struct or a count may be NULL if you don't
 *  want it, unless looking is all the call does (get_*, inspect, device_state, message_parse).
 *  Options may be NULL for the defaults.
 *
 * ---- Ownership ----
 *
 *  Descriptors stay yours: the library duplicates what it keeps, close yours when you like (but see
 *  above on surviving).
 *  Strings and structs passed in are copied; log_context lives as long as the handle.  Pointers
 *  handed out (images) live until colocache_close, or the colocache_loaded of the epoch that a
 *  removed block went with; those to a device state until the next
 *  colocache_device_state_begin after the next seal.
 *  Mappings you gave stay mapped until colocache_close, and are not unmapped by it.  Close the VM
 *  first, then its sources, then the handle.
 *
 * ---- Structs and versions ----
 *
 *  Structs that may grow begin with struct_size, which the caller sets to sizeof: a newer library
 *  then knows which fields an older caller has.  Zero the rest (`= {.struct_size = sizeof s}`):
 *  fields of value 0 mean the default, but descriptors are -1 where there is none.  Structs without
 *  it never change.  The library's SONAME is libcolocache.so.0; as long as it is the same, programs
 *  need not be rebuilt.
 *  The control region has a layout of its own: a build that lays it out in another way refuses it
 *  (COLOCACHE_E_LAYOUT).
 *
 * ---- Limits ----
 *
 *  256 blocks, removed ones included, with names of 255 bytes, each up to 1 PiB in pages of 4 KiB
 *  to 2 MiB, as far as they can be mapped: guest RAM and cache are once each, and guest RAM once
 *  more if you give guest_addr or it is bounded, so that on 47-bit addresses all blocks together
 *  are at most about 63 or 42 TiB (COLOCACHE_E_NO_MEMORY above); epochs from 1 to 2^48-1, always
 *  growing; a device state up to the bound given at create (64 MiB by default, at most 1 TiB); 256
 *  threads.  The control region takes 1/32768 of guest RAM per bitmap and there are three, besides
 *  two device states (sparse: only what comes is allocated).
 *  colocache_receive_stream needs 40 KiB of stack, 72 with a spill file.  The wire carries no
 *  secrets' protection: for TLS give the library one end of a socketpair, or take packets apart
 *  yourself and call colocache_receive_pages.
 *  Bitmaps are little-endian 64-bit words, bit n of word w is page 64w+n of the block, bits past
 *  the last page are zero: the format of KVM_GET_DIRTY_LOG.  Linux only; 64-bit, little-endian
 *  only.
 *
 * ---- After a death: colocache_attach instead of create and add_block ----
 *
 *  An empty control region is for create, any other for attach.  The next process gives the same
 *  files (checked by device and inode) and is told what it has, in a struct colocache_recovery.
 *  There is no colocache_loaded to call; a handle whose VM does not come up is closed.
 *   - NOTHING      no epoch was sealed: as new, but epoch numbers that were used stay used;
 *   - REPLAYED, RESTART   guest RAM and device state are exactly `epoch`: load the device state
 *     into a fresh VM and run it;
 *   - NO_RESTART   pages of a newer epoch had come already and the VM that ran is gone: no VM runs,
 *     colocache_failover refuses, every page counts as written by the SVM, and the next epoch that
 *     is sealed makes the secondary whole.
 *  A machine that had taken over before it died is no longer a secondary: COLOCACHE_E_FAILED_OVER.
 *  Make new files and a new region.
 *  In each other case the conversation goes on as after a lost connection: tell history_id and
 *  sealed_epoch of the status (not the report's epoch).  A VM that restarts has a fresh dirty log,
 *  discarded before it runs; what the load of its state writes is marked.
 *
 * ---- The promise ----
 *
 *  No single failure -- the death of one process or host, or the loss of the connection -- leaves
 *  the secondary without a state to take over from, once the first epoch is committed.  A sealed
 *  epoch is always finished, by this process or by the next one that attaches; one that is not
 *  sealed never touches guest RAM.
 *  Not covered: the secondary host losing power (shared memory is no disk); two failures before the
 *  pair has committed an epoch again; the process of the SVM dying while pages of a newer epoch
 *  have come (see NO_RESTART: the primary carries on); blocks given by address alone, whose memory
 *  dies with the process; a caller that breaks the rules above.
 */
#ifndef COLOCACHE_H
#define COLOCACHE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* cffi: begin */

/* ---- limits and numbers ---------------------------------------------------------------------- */

#define COLOCACHE_BLOCKS_MAX 256        /* RAM blocks of one secondary */
#define COLOCACHE_NAME_BYTES 256        /* of a block's name, with its final zero byte (QEMU's
                                           idstr) */
#define COLOCACHE_PAGE_SIZE_MIN 4096    /* bytes of the tracking unit, a power of two */
#define COLOCACHE_PAGE_SIZE_MAX 2097152
#define COLOCACHE_BLOCK_BYTES_MAX 1125899906842624 /* 1 PiB; mapped 2 or 3 times: see Limits */
#define COLOCACHE_EPOCH_MAX 0xffffffffffff /* epochs go from 1 to this: 2^48-1 */
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
    COLOCACHE_E_CORRUPT = -20006,      /* a checksum or an invariant does not hold; nothing was
                                          changed */
    COLOCACHE_E_FOREIGN_IMAGE = -20007,/* attach: not the image (device, inode, size) the region
                                          names */
    COLOCACHE_E_BLOCK = -20008,        /* no such block, a name used twice, or too many blocks */
    COLOCACHE_E_RANGE = -20009,        /* pages past the end of the block */
    COLOCACHE_E_LENGTH = -20010,       /* a length is not what it must be */
    COLOCACHE_E_TAIL = -20011,         /* a bitmap has bits set past its last page */
    COLOCACHE_E_EPOCH = -20012,        /* this epoch number can't be used now */
    COLOCACHE_E_SEALED = -20013,       /* an epoch is sealed and its flush or load is not
                                          finished */
    COLOCACHE_E_NOT_SEALED = -20014,   /* flush or loaded without a seal before */
    COLOCACHE_E_INCOMPLETE = -20015,   /* seal: pages or device-state bytes are missing */
    COLOCACHE_E_VETO = -20016,         /* seal: the VM's check refused the device state */
    COLOCACHE_E_NO_STATE = -20017,     /* there is no state to take over from */
    COLOCACHE_E_LOAD_FAILED = -20018,  /* the device state did not load; only a fresh VM may
                                          attach */
    COLOCACHE_E_FAILED_OVER = -20019,  /* this secondary took over; it is no longer a secondary */
    COLOCACHE_E_TOO_LARGE = -20020,    /* device state or packet above its bound */
    COLOCACHE_E_NO_MEMORY = -20021,    /* the backing of an image or of the region has too little
                                          room */
    COLOCACHE_E_PACKET = -20022,       /* a message's header is damaged or breaks the rules */
    COLOCACHE_E_PEER_LOST = -20023,    /* the connection was closed */
    COLOCACHE_E_TIMEOUT = -20024,      /* nothing moved on the connection for the time allowed */
    COLOCACHE_E_UNSUPPORTED = -20025,  /* the kernel, the CPU or this build lacks what was asked
                                          for */
    COLOCACHE_E_LOG_LOST = -20026,     /* a dirty log is lost: call colocache_dirty_log_lost (on
                                          a primary colocache_sender_mark_all) */
    COLOCACHE_E_ORDER = -20027,        /* a call that the object's state does not allow now */
    COLOCACHE_E_STRATEGY = -20028,     /* attach: sealed for a flush strategy that this build
                                          does not have; nothing was changed */
    COLOCACHE_E_MEMORY_MODE = -20029,  /* attach: the region was made with the other memory mode */
    COLOCACHE_E_RECEIVING = -20030     /* seal, abort: pages are still being received, after the
                                          longest wait; the epoch is open as before */
};

enum colocache_copy {                  /* how pages are copied; AUTO picks the best the CPU has */
    COLOCACHE_COPY_AUTO = 0,
    COLOCACHE_COPY_LIBC = 1,           /* memcpy per run */
    COLOCACHE_COPY_AVX2 = 2,           /* non-temporal stores, 32 bytes */
    COLOCACHE_COPY_AVX512 = 3,         /* non-temporal stores, 64 bytes */
    COLOCACHE_COPY_NEON = 4            /* aarch64 non-temporal pairs */
};

enum colocache_ready {                 /* of colocache_receive_ready */
    COLOCACHE_READY_NOT = 1,           /* nothing more has come yet */
    COLOCACHE_READY_MORE = 2           /* as many pages as were asked for; look again */
};

enum colocache_phase {
    COLOCACHE_PHASE_EMPTY = 0,         /* nothing to take over from yet (or no more, after an
                                          attach) */
    COLOCACHE_PHASE_LIVE = 1,          /* the SVM runs or may run; an epoch may be arriving */
    COLOCACHE_PHASE_SEALING = 2,       /* from the start of seal until loaded */
    COLOCACHE_PHASE_LOAD_FAILED = 3,
    COLOCACHE_PHASE_FAILED_OVER = 4
};

enum colocache_log_level {
    COLOCACHE_LOG_DEBUG = 0,
    COLOCACHE_LOG_INFO = 1,
    COLOCACHE_LOG_WARN = 2
};

struct colocache;          /* a secondary: the cache, its bitmaps and its commit record */
struct colocache_sender;   /* a primary's half: what it must still send, and what is not
                              acknowledged */
struct colocache_source;   /* a dirty log: KVM's, the kernel's */

/* ---- library --------------------------------------------------------------------------------- */

/* Version as 0xMMmmpp (major, minor, patch).  Any thread. */
uint32_t colocache_version(void);

/* One sentence for a code: a COLOCACHE_E_*, a negative errno, or 0.  Never NULL; static text.
 * Any thread. */
const char *colocache_strerror(int code);

/* The sentence, with its numbers, of the last call on this thread that failed; "" if none did.
 * Valid until the next call on this thread. */
const char *colocache_last_error(void);

/* The 64-bit checksum used in commit records and message headers; defined in csrc/checksum.h. */
uint64_t colocache_checksum(const void *data, uint64_t len_bytes);

/* 0 if this build and this CPU can copy with `variant`, else COLOCACHE_E_UNSUPPORTED. */
int colocache_copy_supported(int variant);

/* ---- create, attach, close ------------------------------------------------------------------- */

struct colocache_options {
    uint64_t struct_size;              /* sizeof(struct colocache_options) */
    uint32_t n_threads;                /* threads of the flush, the caller's included, at most 256;
                                          0 = the cores this process may use, no more than its
                                          cgroup's CPU quota pays for */
    uint32_t copy_variant;             /* enum colocache_copy */
    uint64_t device_state_max_bytes;   /* bound on a device state, at create; 0 = 64 MiB */
    /* NULL = silent; called from the calling thread */
    void (*log)(void *log_context, int level, const char *sentence);
    void *log_context;
    /* Called in worker thread i (1 to n_threads-1) before its first work, for names, CPUs and
     * priorities; NULL = a name only.  It calls nothing of this library.  Create and attach return
     * when all of them have: a seccomp filter can be laid over them then. */
    void (*thread_start)(void *thread_context, uint32_t i);
    void *thread_context;              /* lives as long as the handle */
    int32_t lock_fd;                   /* 0 = the region is opened again through /proc; else a
                                          second open() of it, for reading and writing, that nobody
                                          else has: its lock is held until the handle is closed.
                                          Close yours after the call */
    uint32_t memory_mode;              /* enum colocache_memory_mode; at attach the region's */
    uint32_t receive_wait_ms;          /* longest that seal and abort wait for receives under way;
                                          0 = 10,000 */
    uint32_t reserved;                 /* 0 */
    int32_t spill_fd;                  /* bounded: 0 = none; else a regular file on a disk, opened
                                          for reading and writing, for pages that the limit of
                                          staged pages leaves no memory for.  Empty at create; at
                                          attach the same file.  Duplicated */
    uint32_t reserved2;                /* 0 */
};

enum colocache_memory_mode {           /* see "Bounded memory" above */
    COLOCACHE_MEMORY_MIRROR = 0,       /* the VM runs on guest RAM itself; two whole images */
    COLOCACHE_MEMORY_BOUNDED = 1       /* the VM runs on a private mapping of it; the cache holds
                                          the open epoch only */
};

struct colocache_images {
    uint64_t struct_size;              /* sizeof(struct colocache_images) */
    const char *name;                  /* of the RAM block, 1 to COLOCACHE_NAME_BYTES-1 bytes */
    uint64_t len_bytes;                /* of the block: a positive multiple of page_size */
    uint32_t page_size;                /* the tracking unit: a power of two, 4096 to 2 MiB */
    uint32_t sparse;                   /* not 0: images are not reserved; pages are allocated as
                                          they come */
    int32_t guest_fd;                  /* guest RAM image; -1: by address alone (both, then) */
    int32_t cache_fd;                  /* cache image; another file or another range than the
                                          guest's */
    uint64_t guest_offset;             /* of the block in guest_fd: a multiple of the mapping
                                          granularity */
    uint64_t cache_offset;
    void *guest_addr;                  /* where the VMM maps guest RAM already, or NULL: the
                                          library maps it */
    void *cache_addr;                  /* only for a block by address alone */
    uint32_t flags;                    /* enum colocache_images_flags, ORed */
    uint32_t reserved;                 /* 0 */
};

enum colocache_images_flags {
    /* Another process or a device maps this guest RAM too (vhost-user, VFIO, anything with DMA):
     * bounded memory refuses it, as such writes would not be private. */
    COLOCACHE_IMAGES_SHARED_ELSEWHERE = 1
};

struct colocache_recovery {            /* what attach found and did */
    uint32_t action;                   /* enum colocache_action */
    uint32_t reserved;
    uint64_t epoch;                    /* guest RAM and device state are exactly this epoch; 0 =
                                          none */
    uint64_t receiving_epoch;          /* newest epoch of which pages may be in the cache */
    uint64_t n_pages;                  /* pages copied to get there */
    char sentence[256];                /* the same for people */
};

enum colocache_action {
    COLOCACHE_RECOVERED_NOTHING = 0,   /* no epoch was sealed: the initial copy starts again */
    COLOCACHE_RECOVERED_REPLAYED = 1,  /* a sealed epoch was flushed to its end */
    COLOCACHE_RECOVERED_RESTART = 2,   /* the whole cache was copied; the VM restarts from the
                                          epoch */
    COLOCACHE_RECOVERED_NO_RESTART = 3 /* pages of a newer epoch had come; the next checkpoint
                                          makes it whole */
};

/* Make the control region in `control_fd` (a regular or shared-memory file of size 0, open for
 * reading and writing), take its lock and return a handle in *out.  E_EXISTS if the file is not
 * empty, E_BUSY if owned, E_NO_MEMORY. */
int colocache_create(int control_fd, const struct colocache_options *options,
                     struct colocache **out);

/* Add a RAM block; *block_out is its index, from 0 in the order of the calls.  Both images are
 * mapped (or taken at their addresses) and must be zero-filled and of full size.  At any time
 * but from the seal of an epoch to colocache_loaded (E_SEALED), also while pages arrive: see
 * "Memory that comes and goes".  E_BLOCK: name used twice or too many; E_LENGTH: length or page
 * size; E_NO_MEMORY, E_LOAD_FAILED, E_FAILED_OVER. */
int colocache_add_block(struct colocache *cc, const struct colocache_images *images,
                        uint32_t *block_out);

/* The next epoch that is sealed is without this block; see "Memory that comes and goes".  When it
 * may be called is as for colocache_add_block; twice does no harm.  From that seal on the block's
 * index is nobody's (E_BLOCK), and colocache_loaded unmaps it and closes its descriptors. */
int colocache_remove_block(struct colocache *cc, uint32_t block);

/* 1: the newest sealed epoch has this block; 0: it came later, so a VM that restarts from that
 * epoch knows nothing of it.  E_BLOCK. */
int colocache_block_sealed(struct colocache *cc, uint32_t block);

/* Take over the control region of a process that died.  `images` names every block of the
 * region and no other, in any order, each with the same struct_size; if its owner may have died
 * while a block came, colocache_inspect tells which there are.  Pages of sparse blocks that hold
 * nothing are left alone.  Verifies the region, repeats or finishes what was sealed, and tells
 * in *report what it found and did.  It may itself be killed at any point and called again.
 * E_BUSY, E_NOT_COLOCACHE, E_LAYOUT, E_CORRUPT, E_FOREIGN_IMAGE, E_BLOCK (missing or unknown
 * block), E_FAILED_OVER, E_STRATEGY. */
int colocache_attach(int control_fd, const struct colocache_options *options,
                     const struct colocache_images *images, uint32_t n_images,
                     struct colocache_recovery *report, struct colocache **out);

/* Unmap, unlock, free.  Removes nothing.  The VM must have stopped running on the library's
 * mappings. */
int colocache_close(struct colocache *cc);
/* The first half of a close, while pointers to memory are still in use (a language's views of it):
 * the lock is dropped, so that another process may attach, and the threads end; the memory stays
 * mapped until colocache_close, the only function that may be called after this one.  Write
 * nothing through those pointers any more. */
int colocache_let_go(struct colocache *cc);

/* ---- looking --------------------------------------------------------------------------------- */

struct colocache_status {
    uint64_t struct_size;
    uint8_t history_id[16];            /* random; new with each create and each attach that found
                                          nothing sealed */
    uint32_t phase;                    /* enum colocache_phase; inspect: SEALING = sealed, not
                                          committed */
    uint32_t n_blocks;                 /* removed ones included: indices go up to it */
    uint64_t sealed_epoch;             /* newest sealed epoch, 0 = none */
    uint64_t committed_epoch;          /* newest committed epoch, 0 = none */
    uint64_t receiving_epoch;          /* newest epoch whose pages may be in the cache, 0 = none */
    uint64_t received_pages;           /* pages of the open epoch so far, zero pages and repeats
                                          included */
    uint64_t pvm_pages, svm_pages, flush_pages; /* bits set now in the three bitmaps, from inspect;
                                                   of a handle 0: counting takes as long as they are
                                                   large, colocache_get_block does it per block */
    uint64_t device_state_bytes;       /* length of the sealed epoch's device state */
    uint64_t device_state_max_bytes;
    uint64_t control_bytes;            /* size of the control region */
    int64_t owner_pid;                 /* the process that locked it last */
    uint32_t failover_pending;         /* failover was asked for while sealing */
    uint32_t n_threads;                /* of the flush */
    uint32_t copy_variant;             /* enum colocache_copy in use */
    uint32_t reserved;
    uint64_t open_epoch;               /* the epoch that is arriving now, 0 = none (inspect: 0);
                                          what colocache_abort gives up */
    uint64_t staged_bytes;             /* bounded: memory that the caches take now, as their file
                                          system counts it (inspect: 0) */
    uint32_t memory_mode;              /* enum colocache_memory_mode */
    uint32_t attachment_slot;          /* the sealed epoch's, as colocache_seal_args had them */
    uint64_t attachment_bytes, attachment_checksum;
    uint64_t spilled_bytes;            /* bounded: of staged pages, in the spill file now; inspect:
                                          of the sealed epoch, until it is committed */
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

enum colocache_bitmap_kind {
    COLOCACHE_BITMAP_PVM = 0,
    COLOCACHE_BITMAP_SVM = 1,
    COLOCACHE_BITMAP_FLUSH_SET = 2
};

/* The state of a handle.  Any thread; a snapshot. */
int colocache_get_status(struct colocache *cc, struct colocache_status *out);

struct colocache_stats {               /* of a handle since it was made */
    uint64_t struct_size;
    uint64_t received_pages;           /* zero pages and repeats included */
    uint64_t sealed_epochs, aborted_epochs;
    uint64_t flushed_pages, flushed_bytes;
    uint64_t flush_total_ns;
    uint64_t epoch;                    /* newest epoch sealed by this handle, 0 = none; the times
                                          below are its own */
    uint64_t sync_ns;                  /* in colocache_sync_dirty_log since the seal before */
    uint64_t seal_ns, flush_ns;        /* in these two calls; 0 = not flushed yet */
    uint64_t load_ns;                  /* from the end of the flush to colocache_loaded: your
                                          load of the device state */
};

/* What a handle has done, and where the time of its newest checkpoint went.  Any thread; each
 * number by itself is exact. */
int colocache_get_stats(struct colocache *cc, struct colocache_stats *out);
/* One block, with its addresses and counts.  E_BLOCK. */
int colocache_get_block(struct colocache *cc, uint32_t block, struct colocache_block_info *out);
/* Copy of a bitmap: n_words 64-bit words, exactly (n_pages+63)/64 (E_LENGTH). */
int colocache_get_bitmap(struct colocache *cc, uint32_t block, int kind, uint64_t *words,
                         uint64_t n_words);
/* Look at a control region without lock and without writing.  *n_blocks: in, room in `blocks`;
 * out, blocks there are, removed ones included: those have no name (""), no length and no pages.
 * Its owner may be at work: it is never called corrupt for that; counts are of about the same
 * moment.  E_NOT_COLOCACHE (as is a region that create has not finished), E_LAYOUT, E_CORRUPT. */
int colocache_inspect(int control_fd, struct colocache_status *out,
                      struct colocache_block_info *blocks, uint32_t *n_blocks);

/* Check every invariant of the region; with `compare_pages` also that each page in neither
 * bitmap is the same in guest RAM and cache (only while the SVM is stopped, its log synced, and
 * no receive runs).  0 or E_CORRUPT / E_TAIL with the first broken invariant as last error.
 * Pages may be received and marked beside it, if they are not compared. */
int colocache_validate(struct colocache *cc, int compare_pages);

/* ---- receive: pages go to the cache, then their bits into the PVM bitmap --------------------- */

/* Page, zero pages, many pages.  `epoch` is the epoch the page belongs to: one that is open
 * already or a new one, greater than any used before; the first page opens it.  E_EPOCH: sealed,
 * aborted or smaller; E_SEALED: the epoch before is not finished; E_BLOCK, E_RANGE, E_LENGTH
 * (data is not n_pages*page_size); E_NO_MEMORY (sparse).  Any number of threads. */
int colocache_receive_page(struct colocache *cc, uint64_t epoch, uint32_t block, uint64_t pfn,
                           const void *data, uint64_t len_bytes);
int colocache_receive_zero(struct colocache *cc, uint64_t epoch, uint32_t block, uint64_t first_pfn,
                           uint64_t n_pages);
/* data holds n_pages pages one after the other, for pfns[0], pfns[1], ...; nothing is written if
 * any pfn is out of range. */
int colocache_receive_pages(struct colocache *cc, uint64_t epoch, uint32_t block,
                            const uint64_t *pfns, uint64_t n_pages, const void *data,
                            uint64_t len_bytes);

/* For a transport that writes memory itself (RDMA, TLS, a VMM's own streams): where the bytes of
 * these pages go, at *addr_out, one page after the other.  Write them, then call done: bits and
 * counts come with it, so nobody takes half a page for a whole one.  Between the two the epoch
 * can neither be sealed nor given up (E_RECEIVING after the longest wait, the epoch stays open);
 * any number of ranges at once, from any threads, and done may come from another than begin.
 * begin: same errors as colocache_receive_page, E_ARGUMENT (no pages), E_NO_MEMORY.
 * done, once per begin, with the same range: whole 0 if the bytes may not all be there; the pages
 * keep bits but do not count, so the epoch can't be sealed with its right number and is aborted.
 * E_ORDER (no begin), E_EPOCH. */
int colocache_receive_begin(struct colocache *cc, uint64_t epoch, uint32_t block,
                            uint64_t first_pfn, uint64_t n_pages, void **addr_out);
int colocache_receive_done(struct colocache *cc, uint64_t epoch, uint32_t block, uint64_t first_pfn,
                           uint64_t n_pages, int whole);

/* Read messages from the stream socket `fd` (TCP or Unix; its blocking mode does not matter) and
 * put the pages of PAGES packets of `epoch` into the cache, without a copy in between, until
 * another message comes.  Its 40 header bytes (checksum verified, see colocache_message_parse)
 * are then in `header` and 0 is returned; its body, if it has one, is still in the socket: check
 * its length against a bound of yours, then read it.  timeout_ms: longest wait without a byte,
 * -1 = for ever.  *n_pages_out counts pages taken, also on error.  A damaged or wrong packet
 * (E_PACKET, E_EPOCH, E_BLOCK, E_RANGE, E_TOO_LARGE) writes nothing.  E_PEER_LOST, E_TIMEOUT;
 * pages of a packet that broke off keep their bits, so nothing is wrong, but the epoch's count
 * is short and it must be aborted.  After any error, E_TIMEOUT included, the connection is out
 * of step: close it; a peer that is alive sends something (a PING of yours) more often than
 * timeout_ms.  epoch 0: take the epoch of the packets as it comes.  Where 16 KiB or more have come
 * since it last waited, the thread looks out for the next bytes, at most 50 us, before it sleeps;
 * never at the beginning, and more seldom where nothing comes of it. */
int colocache_receive_stream(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch,
                             void *header, uint64_t *n_pages_out);

/* The same for an event loop (epoll, asyncio): takes what is there and comes back.  0: another
 * message came, as above.  COLOCACHE_READY_NOT: not one byte of a next packet is there, and the
 * connection is in step; call again when it is readable.  COLOCACHE_READY_MORE: max_pages or more
 * were taken (0 = no limit), and more may be there already.  A packet that has begun is waited
 * for to its end: at most timeout_ms for each of its parts, E_TIMEOUT then. */
int colocache_receive_ready(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch,
                            uint64_t max_pages, void *header, uint64_t *n_pages_out);

/* The same from memory, for a transport whose bytes are no socket's (TLS): data holds len_bytes of
 * what came.  Whole PAGES packets are taken until another message, whose header is then in
 * `header` (0), or until what is left is no whole packet (COLOCACHE_READY_NOT): keep that, and call
 * again with what comes after it.  *n_used_out: bytes that were taken, that message's header
 * included, from the front.  A packet is 40 bytes and the length that its header says at most:
 * bound it before you take memory for it. */
int colocache_receive_packets(struct colocache *cc, const void *data, uint64_t len_bytes,
                              uint64_t epoch, void *header, uint64_t *n_used_out,
                              uint64_t *n_pages_out);

/* Room for the device state of `epoch`, which it opens if no page did: len_bytes at *addr_out,
 * zero-copy in the region.  The last call before seal counts.  len_bytes 0 is a state too.
 * E_TOO_LARGE, E_EPOCH, E_SEALED, E_NO_MEMORY. */
int colocache_device_state_begin(struct colocache *cc, uint64_t epoch, uint64_t len_bytes,
                                 void **addr_out);
/* The device state of the newest sealed epoch.  E_NO_STATE. */
int colocache_device_state(struct colocache *cc, const void **addr_out, uint64_t *len_bytes_out);

/* ---- the SVM's dirty log --------------------------------------------------------------------- */

/* Pages written by user space on the SVM's side.  Any thread, at any time.  E_BLOCK, E_RANGE. */
int colocache_mark_dirty(struct colocache *cc, uint32_t block, uint64_t first_pfn,
                         uint64_t n_pages);
/* Pages that the SVM gives back (balloon, free page reporting): they are zeros and take no memory
 * in guest RAM when this returns; see "Memory that a guest gives back".  Any thread.
 * E_UNSUPPORTED: the block is not sparse, on huge pages, or in bounded memory; E_SEALED: between a
 * seal and colocache_loaded; E_ORDER: no VM runs yet.  E_BLOCK, E_RANGE. */
int colocache_give_back(struct colocache *cc, uint32_t block, uint64_t first_pfn, uint64_t n_pages);
/* OR words of any log into the SVM bitmap: bit 0 of words[0] is page first_pfn (any page).  Bits
 * past n_pages must be zero (E_TAIL).  Clearing the log is then the caller's, before the VM
 * runs. */
int colocache_sync_words(struct colocache *cc, uint32_t block, uint64_t first_pfn, uint64_t n_pages,
                         const uint64_t *words);
/* Get, OR into the SVM bitmap, clear.  vCPUs stopped.  E_LOG_LOST if the log can't be read, or
 * was cleared and could not be taken.  E_BLOCK, E_RANGE, E_LENGTH: a slot or range of the source
 * fits no block, or a block whose pages are not the 4096 bytes that sources track; nothing was
 * taken, and all of it is still in the log. */
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
    int32_t vcpu_fd;                   /* the library maps the ring from it; not used if addr is
                                          given */
    uint32_t reserved;                 /* 0 */
    void *addr;                        /* where you map it already (KVM_DIRTY_LOG_PAGE_OFFSET
                                          pages into vcpu_fd), or NULL */
};

struct colocache_uffd_range {          /* memory of this process; in colocache_source_uffd_process
                                          of another one */
    uint32_t block;
    uint32_t reserved;
    uint64_t first_pfn;                /* page of the block at addr */
    uint64_t n_pages;
    void *addr;                        /* page aligned (2 MiB on hugetlb), in the process whose
                                          memory it is */
};

/* KVM's dirty log of a VM.  Slots must have KVM_MEM_LOG_DIRTY_PAGES set and 4096-byte pages; each
 * is probed here: E_ARGUMENT (no VM, no such slot, or one without the flag), E_LENGTH (another
 * number of pages), E_UNSUPPORTED (the VM has dirty rings).  manual_protect is not looked at: the
 * log is got and cleared, with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 or without. */
int colocache_source_kvm(int vm_fd, const struct colocache_kvm_slot *slots, uint32_t n_slots,
                         int manual_protect, struct colocache_source **out);
/* KVM's dirty rings, one per vCPU, of ring_bytes each: the size given to KVM_ENABLE_CAP for
 * KVM_CAP_DIRTY_LOG_RING (or _ACQ_REL), a power of two, before the vCPUs were made.  Slots as
 * above; with rings, KVM_GET_DIRTY_LOG and this VM's colocache_source_kvm do not work.  Taking
 * marks entries as read, hands each page on once, and clears by KVM_RESET_DIRTY_RINGS.  The
 * source is the only reader of the rings, from before the first vCPU runs until the VM's end;
 * mappings given by addr stay until it is closed.  A vCPU that comes out with
 * KVM_EXIT_DIRTY_RING_FULL calls colocache_sync_dirty_log (on a primary
 * colocache_sender_sync_dirty_log) in its own thread and runs on: for this source that is
 * allowed at any time, besides the one with all vCPUs stopped before each seal.  E_ARGUMENT
 * (sizes, a slot given twice), E_LENGTH, E_UNSUPPORTED, -errno. */
int colocache_source_kvm_ring(int vm_fd, const struct colocache_kvm_slot *slots, uint32_t n_slots,
                              const struct colocache_kvm_ring *rings, uint32_t n_rings,
                              uint32_t ring_bytes, struct colocache_source **out);
/* The kernel's own log of 4 KiB mappings in this process: userfaultfd write-protect-async and
 * PAGEMAP_SCAN; needs no privilege.  On hugetlb it sees 2 MiB at a time.  E_UNSUPPORTED on
 * kernels before 6.7. */
int colocache_source_uffd(const struct colocache_uffd_range *ranges, uint32_t n_ranges,
                          struct colocache_source **out);
/* The same for memory of another process, such as a VMM that is driven from outside.  That
 * process makes the userfaultfd (user-mode faults suffice) and hands the descriptor over, on
 * which nothing was done yet; `pagemap_fd` is its /proc/PID/pagemap; the addresses are its own.
 * Both descriptors stay yours.  Seen is whoever writes through that process's page tables: its
 * threads, the kernel on its behalf, vCPUs of its KVM; not other processes that map the same
 * file.  kvm_maps_it: not 0 if a KVM of it has slots on 4 KiB pages of this memory; then only
 * what was written is protected anew, and KVM keeps its mappings of the rest.  Mappings must
 * stay until the source is closed.  E_UNSUPPORTED, -errno (descriptors that are none).  Once
 * that process has ended a sync is E_LOG_LOST. */
int colocache_source_uffd_process(int uffd, int pagemap_fd, int kvm_maps_it,
                                  const struct colocache_uffd_range *ranges, uint32_t n_ranges,
                                  struct colocache_source **out);
/* Slots of a KVM source (a log or rings) come, go, or get another length: begin takes what was
 * logged so far into the source's own memory, then you change the slots, and end names and probes
 * those that there are now, as when the source was made.  vCPUs stand from before begin until
 * after end.  What was kept is handed on with the next sync; pages of a block that is gone by then
 * are nobody's.
 * If end fails the change is still under way: give it the right slots.  Between the two a sync is
 * E_ORDER.  begin: same errors as colocache_sync_dirty_log, E_UNSUPPORTED (a source without
 * slots), -ENOMEM; nothing changed then. */
int colocache_source_change_begin(struct colocache_source *source);
int colocache_source_change_end(struct colocache_source *source,
                                const struct colocache_kvm_slot *slots, uint32_t n_slots);
/* Get, clear and throw away: before the VM first runs. */
int colocache_source_discard(struct colocache_source *source);
int colocache_source_close(struct colocache_source *source);

/* ---- private memory of a mapping ------------------------------------------------------------- */

/* A MAP_PRIVATE mapping of guest RAM shows the file until it is written; a page's first write makes
 * a private copy.  How many bytes of [addr, addr+len_bytes) are such copies, in memory or swapped,
 * as the kernel counts them (PAGEMAP_SCAN, or /proc/PID/pagemap before Linux 6.7).  pid 0 is this
 * process; another one takes the permission to trace it.  Page aligned.  Any thread; a snapshot,
 * if somebody writes meanwhile. */
int colocache_private_bytes(int pid, const void *addr, uint64_t len_bytes, uint64_t *n_bytes_out);
/* Drop them, in this process: every page of the range shows the file again.  Whoever uses the
 * mapping stands still meanwhile.  Memory that is locked (mlock) can't be forgotten: -EINVAL,
 * and some of it may be forgotten. */
int colocache_private_forget(void *addr, uint64_t len_bytes);
/* Write them into the file: byte `addr` of the mapping is byte `offset` of fd.  For a VM in another
 * process, after a takeover (see colocache_fold): it stands from before this until it has mapped
 * the range MAP_SHARED.  *n_bytes_out: how many, also on error.  E_NO_MEMORY (a full file system:
 * the private copies are what they were, and the VM can go on), E_ARGUMENT, -errno. */
int colocache_private_write_back(int pid, const void *addr, uint64_t len_bytes, int fd,
                                 uint64_t offset, uint64_t *n_bytes_out);
/* Bounded memory, after a takeover: private copies would grow to a second image for ever.  Those of
 * this range are written into the guest image, and the VM's mapping of it, in this process, becomes
 * a shared one (PROT_READ | PROT_WRITE, nothing mapped yet: a device that pinned pages must be
 * told).  The VM stands meanwhile: some MiB at a time make many short pauses of a long one.
 * *n_bytes_out (may be NULL): how many were private.  E_ORDER: before a takeover, when the image is
 * the newest epoch; E_UNSUPPORTED: mirrored memory; E_NO_MEMORY, -errno from writing: nothing has
 * changed for the VM; E_BLOCK, E_RANGE. */
int colocache_fold(struct colocache *cc, uint32_t block, uint64_t first_pfn, uint64_t n_pages,
                   uint64_t *n_bytes_out);

/* ---- seal, flush, abort, failover ------------------------------------------------------------ */

struct colocache_seal_args {
    uint64_t struct_size;
    uint64_t epoch;
    uint64_t n_pages;                  /* pages the peer sent with this epoch's number, zero
                                          pages and repeats included, all its sends together;
                                          COLOCACHE_ANY_COUNT = unchecked */
    /* not 0 = veto; NULL = accept */
    int (*check)(void *check_context, const void *device_state, uint64_t len_bytes);
    void *check_context;
    /* What of this epoch lies elsewhere, as a log of disk writes that you apply between seal and
     * flush and again after each attach: words of yours, carried by the commit record, told by
     * colocache_status as long as the epoch is the newest. */
    uint64_t attachment_bytes, attachment_checksum;
    uint32_t attachment_slot;          /* 0 or 1: which of two; the other is the next epoch's */
    uint32_t reserved;
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
    uint64_t copy_ns, commit_ns;       /* copy_ns without forget_ns */
    uint32_t n_threads;
    uint32_t reserved;
    uint64_t forget_ns;                /* bounded: dropping the VM's private pages */
    uint64_t spilled_pages;            /* bounded: of n_pages, those from the spill file */
};

/* The commit point.  vCPUs stopped, log synced, all pages and the device state of args->epoch
 * there.  Order: check the counts, ask `check`, flush set := PVM | SVM, record, commit word;
 * then both bitmaps are cleared.  Until it returns 0 nothing is sealed and nothing is lost:
 * bits, cache and the epoch before stay.  `check` sees the device state before anything depends
 * on it: whatever your load would refuse, refuse here, where a veto costs one epoch; a load that
 * fails after the flush costs the secondary.  On E_INCOMPLETE, E_VETO and E_NO_MEMORY (sparse)
 * the epoch is aborted; E_EPOCH, E_SEALED and E_RECEIVING change nothing.  E_FAILED_OVER: take
 * over instead.
 * After any error look at the phase: FAILED_OVER means that failover was asked for meanwhile and
 * is granted. */
int colocache_seal(struct colocache *cc, const struct colocache_seal_args *args,
                   struct colocache_seal_result *out);

/* Make guest RAM the sealed epoch, and say so in the commit record.  Can be repeated after an
 * error.  E_NOT_SEALED. */
int colocache_flush(struct colocache *cc, struct colocache_flush_result *out);

/* After the flush: ok != 0, the device state is loaded; the SVM may run.  Returns 0, or 1 if
 * failover was asked for in the meantime: this machine takes over now.  ok == 0: the load
 * failed; the VM must never run, memory and device state stay for a fresh VM that attaches;
 * returns 0.  E_NOT_SEALED, E_SEALED (not flushed). */
int colocache_loaded(struct colocache *cc, int ok);

/* Before epoch 1 is sealed: copy what has come to guest RAM already (bits taken before each page
 * is copied).  *n_pages_out pages.  E_ORDER once anything is sealed. */
int colocache_preflush(struct colocache *cc, uint64_t *n_pages_out);

/* Bounded: give back the memory of the pages that were staged for an epoch which is committed or
 * given up, and of the private pages that its flush forgot (where they are many, the flush only
 * moves them out of the VM's sight).  Call it when the VM runs again; else it is done before the
 * first page of the next epoch is let in.  Any thread.  0, -errno. */
int colocache_free_staged(struct colocache *cc);

/* Bounded: the most memory that staged pages may take, in bytes; 0 = no limit, as at the beginning.
 * A receiving call whose pages would pass it says E_NO_MEMORY before a byte of them is stored, or
 * spills them (options.spill_fd); zero pages take none.  What is staged already stays.  Pages of an
 * epoch that is committed count until they are freed.  The initial copy stages nothing.  Of this
 * handle only; any thread.
 * E_UNSUPPORTED: a mirror stages nothing. */
int colocache_limit_staged(struct colocache *cc, uint64_t n_bytes);

/* Give up the open epoch.  Its number is not used again; bits and cache stay (in bounded memory
 * both are dropped).  Waits for receives under way, and changes nothing if that takes too long
 * (E_RECEIVING).  Returns 0, or 1 if failover was asked for at the same moment: this machine takes
 * over now.  E_EPOCH if it is not the open one, E_SEALED if too late.  Any thread; shut down the
 * sockets of receives that wait for a peer first. */
int colocache_abort(struct colocache *cc, uint64_t epoch, const char *reason);

/* May this machine take over?  0: now, from its live state; the handle takes no more epochs.  1:
 * an epoch is being sealed, flushed or loaded; when it is time colocache_loaded or
 * colocache_abort return 1, or a failing seal leaves the phase FAILED_OVER.  E_NO_STATE,
 * E_LOAD_FAILED.  *epoch_out: newest sealed epoch.  Any thread; decided by one
 * compare-and-exchange, so of a failover and a seal at the same moment one is first and the
 * other knows.  Whether the primary is dead or only out of sight is not for the library to know:
 * ask your arbiter before you call this. */
int colocache_failover(struct colocache *cc, uint64_t *epoch_out);

/* ---- the primary's half ---------------------------------------------------------------------- */

struct colocache_send_result {
    uint64_t struct_size;
    uint64_t n_pages;                  /* sent, zero pages included */
    uint64_t n_zero;                   /* of these, as flags */
    uint64_t n_bytes;                  /* on the wire, headers included */
    uint64_t n_packets;
};

struct colocache_run {                 /* pages taken to be sent */
    uint32_t block;                    /* index of the block */
    uint32_t zero;                     /* 1: all of them are zero pages, their bytes need not be
                                          sent */
    uint64_t first_pfn;
    uint64_t n_pages;
    const void *addr;                  /* of the first one, in the memory given to
                                          colocache_sender_add_block */
};

/* A sender knows the primary's RAM blocks, at their addresses (yours; it maps nothing), and per
 * block two bitmaps: pending (still to be sent) and unacked (taken from the log since the last
 * RECEIVED).  sender_send may run in several threads on several sockets; mark_dirty in any
 * thread; the rest in one thread at a time. */
int colocache_sender_create(struct colocache_sender **out);
int colocache_sender_close(struct colocache_sender *sender);
/* *block_out as on the secondary: the order of the calls is what pairs the blocks.  Once pages
 * were sent, all of a new block is pending and unacked: the peer has nothing of it. */
int colocache_sender_add_block(struct colocache_sender *sender, const char *name, const void *addr,
                               uint64_t len_bytes, uint32_t page_size, uint32_t *block_out);
/* From now on no page of this block is sent or counted, and its index names none (E_BLOCK).  Its
 * memory may go when the sending calls that other threads are in the middle of have come back. */
int colocache_sender_remove_block(struct colocache_sender *sender, uint32_t block);
/* Take the log into unacked and pending.  The log is write-protected or cleared before this
 * returns, so before any page of it is read.  Same errors as colocache_sync_dirty_log; after
 * E_LOG_LOST call colocache_sender_mark_all. */
int colocache_sender_sync_dirty_log(struct colocache_sender *sender,
                                    struct colocache_source *source);
/* Words of your own log, as in colocache_sync_words.  While the PVM runs take them from it
 * atomically: exchange each word with 0 into a copy and hand over the copy.  A log that is
 * cleared after this call loses what the PVM set in between. */
int colocache_sender_sync_words(struct colocache_sender *sender, uint32_t block, uint64_t first_pfn,
                                uint64_t n_pages, const uint64_t *words);
/* Pages written by user space on the primary's side; after the write. */
int colocache_sender_mark_dirty(struct colocache_sender *sender, uint32_t block, uint64_t first_pfn,
                                uint64_t n_pages);
/* All of RAM is pending and unacked: the initial copy, or a log that was lost. */
int colocache_sender_mark_all(struct colocache_sender *sender);
/* Send pending pages as PAGES packets of `epoch` on the stream socket `fd`, gathered from guest
 * RAM, zero pages as flags.  Stops after max_pages (0 = all).  With several streams, thread i of
 * n sends the pages of stripe i, so that a page always travels on the same connection and its
 * versions stay in order; stripes count from 0.  When an epoch's pages are out, send a message
 * of yours on each stream: it is what lets that stream's colocache_receive_stream return.
 * timeout_ms as above.  E_PEER_LOST, E_TIMEOUT, E_EPOCH (0).  After an error the pages of the
 * packet that broke off, and those not sent yet, are pending as before; *out counts the packets
 * that went out whole.  Whether these arrived is not known: colocache_sender_resend after the
 * reconnection makes them pending again. */
int colocache_sender_send(struct colocache_sender *sender, int fd, int timeout_ms, uint64_t epoch,
                          uint32_t stripe, uint32_t n_stripes, uint64_t max_pages,
                          struct colocache_send_result *out);
/* The same into memory, for a transport that is no socket (TLS): as many packets as room_bytes
 * hold, out->n_bytes in all; 0 of them: the stripe has nothing pending.  What was packed counts
 * as sent; if it can't be delivered, colocache_sender_resend.  E_LENGTH: not one page fits. */
int colocache_sender_pack(struct colocache_sender *sender, void *room, uint64_t room_bytes,
                          uint64_t epoch, uint32_t stripe, uint32_t n_stripes, uint64_t max_pages,
                          struct colocache_send_result *out);
/* For a transport of your own (RDMA, TLS, shared memory): take pending pages of a stripe, as
 * runs in ascending order, at most max_runs of them and max_pages pages (0 = no limit).
 * *n_runs_out 0: the stripe has nothing pending.  A page's pending bit is taken before this
 * returns, so read its bytes after it; what the guest writes later is in the next log.  Send the
 * pages of a stripe in the order in which they were taken.  A run that could not be delivered:
 * colocache_sender_mark_dirty, and its pages are pending again.  Stripes and threads as in
 * colocache_sender_send, with which it may be mixed. */
int colocache_sender_next(struct colocache_sender *sender, uint32_t stripe, uint32_t n_stripes,
                          uint64_t max_pages, struct colocache_run *runs, uint32_t max_runs,
                          uint32_t *n_runs_out);
/* RECEIVED came (or the peer said at reconnection that it sealed): everything is acknowledged
 * now. */
int colocache_sender_received(struct colocache_sender *sender);
/* After an abort or a reconnection: everything unacknowledged is pending again. */
int colocache_sender_resend(struct colocache_sender *sender);
int colocache_sender_count(struct colocache_sender *sender, uint64_t *pending_out,
                           uint64_t *unacked_out);

/* A message is 40 header bytes -- u32 magic "COLO", u16 wire version, u16 type, u64 epoch, u64
 * body length, u32 a, u32 b, u64 checksum of the 32 bytes before (colocache_checksum), all
 * little-endian -- and a body.  In PAGES (type 256) a is the block, b the number of runs; the
 * body is that many runs {u64 first_pfn, u32 n_pages, u32 flags: 1 = zero pages} and the bytes
 * of the runs that are not zero; its checksum is that of the header XOR that of the runs.  All
 * other types are yours; types 0 to 6 and 257 to 261 have a meaning between `colocache primary`
 * and `colocache secondary`.
 *
 * Fill the header of a message without pages: type (at most 65535, not that of PAGES), epoch,
 * body length, two words of its own. */
int colocache_message_header(void *header, uint32_t type, uint64_t epoch, uint64_t body_len_bytes,
                             uint32_t a, uint32_t b);
/* Check the checksum, magic and version of 40 header bytes and take them apart.  E_PACKET. */
int colocache_message_parse(const void *header, uint32_t *type_out, uint64_t *epoch_out,
                            uint64_t *body_len_bytes_out, uint32_t *a_out, uint32_t *b_out);

/* cffi: end */

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
