/* SPDX-License-Identifier: Apache-2.0 */
/* fail_calls.h -- every call into the system that the library makes, counted, and one of them made to fail. */
#ifndef FAIL_CALLS_H
#define FAIL_CALLS_H

#include <stdbool.h>
#include <stdint.h>

enum call {
    MMAP,
    MUNMAP,
    FTRUNCATE,
    POSIX_FALLOCATE,
    OPEN,
    FCNTL,
    FSTAT,
    FSTATFS,
    GETRANDOM,
    RECVMSG,
    SENDMSG,
    POLL,
    IOCTL,
    PTHREAD_CREATE,
    CALLOC,
    POSIX_MEMALIGN,
    FOPEN,
    PREAD,
    LSEEK,
    SYSCALL,
    SCHED_GETAFFINITY,
    MADVISE,
    FALLOCATE,
    PWRITE,
    MPROTECT,
    MREMAP,
    SYNC_FILE_RANGE,
    N_CALLS
};

/* Ways to fail that are no errno. */
enum { END_OF_FILE = -1, SHORT = -2, TIMES_OUT = -3 };

struct failure {
    enum call call;
    unsigned long index; /* from 1; 0 = none fails */
    int error;
};

extern const char *const call_names[N_CALLS];
extern unsigned long call_counts[N_CALLS];
extern unsigned call_moves;    /* of bytes over a socket: every fifth would block once, so that poll is called */
extern struct failure failure; /* the one to happen */
extern bool failure_happened;
extern bool attaching; /* inside an attach */
extern bool tidying;   /* inside a call that gives back what an epoch left */
extern bool bounded;   /* memory mode of the history */
extern bool counting;  /* only calls made inside the library count */

const int *errors_of(enum call call);        /* plausible ones, ended by 0 */
bool is_absorbed(enum call call, int error); /* the library goes on without an error */
const char *error_name(int error);

/* A VM without KVM: what its dirty log and its ring will report. */
extern uint64_t kvm_log_words;
struct kvm_ring_entry {
    uint32_t flags, slot;
    uint64_t page;
};
extern struct kvm_ring_entry kvm_ring[256];

#endif
